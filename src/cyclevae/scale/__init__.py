"""Ranks, accumulation, memory, and steps that are not finite."""
