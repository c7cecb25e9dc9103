"""Weights as functions of the step."""

from dataclasses import dataclass

from cyclevae._checks import check_nonnegative
from cyclevae._types import Number


@dataclass(frozen=True)
class Ramp:
    """A weight that waits, then rises: see `ramp`."""

    weight: Number
    warmup_steps: int = 0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("weight", "warmup_steps", "ramp_steps"):
            check_nonnegative(name, getattr(self, name))

    def __call__(self, step: int) -> Number:
        """The weight at a step."""
        if step < self.warmup_steps:
            return 0.0
        # min, not a branch: the end of a ramp is no reason to compile again
        return self.weight * min(1.0, (step - self.warmup_steps + 1) / (self.ramp_steps + 1))


def ramp(weight: Number, warmup_steps: int = 0, ramp_steps: int = 0) -> Ramp:
    """A weight as a function of the step: 0 in the warm-up, then a linear ramp, then constant.

    The first step after the warm-up already has a positive weight, so that no forward pass is
    spent on a term that weighs nothing.

    Args:
        weight: the final weight, at least 0.
        warmup_steps: steps at weight 0.
        ramp_steps: steps from 0 to `weight`.

    Raises:
        ValueError: a negative, NaN or infinite argument.

    Examples:
        >>> weight = ramp(1.0, warmup_steps=100, ramp_steps=99)
        >>> [weight(step) for step in (0, 99, 100, 149, 199, 10_000)]
        [0.0, 0.0, 0.01, 0.5, 1.0, 1.0]
    """
    return Ramp(weight, warmup_steps, ramp_steps)
