"""The formulas: base losses, the unconditional mode, cycles, contrast and marginal."""
