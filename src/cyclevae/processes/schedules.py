"""Weights and times as functions of the step."""

from dataclasses import dataclass

from cyclevae._base.checks import check_count, check_nonnegative, check_positive, check_share
from cyclevae._base.types import Number


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


_WHOLE = 1 << 16


@dataclass(frozen=True)
class Turn:
    """A weight on some steps, in turn with others: see `take_turns`.

    Args:
        weight: where it is this one's turn, a number or a ramp.
        turn: which of them this one is, from 0.
        of: how many take turns.
        together: the share of steps on which all have theirs.
        every: of how many steps the terms run at one: see `Term.every`.
        seed: which steps those are.
    """

    weight: Number | Ramp
    turn: int
    of: int
    together: Number = 0.0
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.weight):
            check_nonnegative("weight", self.weight)
        for name in ("of", "every"):
            check_count(name, getattr(self, name))
        if not 0 <= self.turn < self.of:
            raise ValueError(f"`turn` must be one of the {self.of}, from 0, got {self.turn!r}")
        check_share("together", self.together)

    def __call__(self, step: int) -> Number:
        """The weight at a step."""
        weight = self.weight(step) if callable(self.weight) else self.weight
        return weight if self.runs(step // self.every) else 0.0

    def runs(self, step: int) -> bool:
        """Whether it is this one's turn."""
        if self.together == 1:
            return True
        # Spread as evenly as integers can be, so that any window of steps has its share.
        share, phase = round(self.together * _WHOLE), self.seed * 40503 % _WHOLE
        before, now = (((step + k) * share + phase) // _WHOLE for k in (0, 1))
        return now > before or (step - before + self.seed) % self.of == self.turn


def take_turns(
    *weights: Number | Ramp, together: Number = 0.0, every: int = 1, seed: int = 0
) -> tuple[Turn, ...]:
    """Weights for terms that take turns, such as the two cycles.

    Args:
        weights: one for each turn, a number or a ramp. Terms that go together share a turn.
        together: the share of steps on which all run; on the others one does, in turn.
        every: that of the terms, where they run at every so many steps only.
        seed: which steps are shared.

    Raises:
        ValueError: fewer than 2 weights, or a share outside [0, 1].

    Examples:
        >>> text, latent = take_turns(4.0, 1.0)
        >>> [(text(step), latent(step)) for step in range(3)]
        [(4.0, 0.0), (0.0, 1.0), (4.0, 0.0)]
    """
    if len(weights) < 2:
        raise ValueError(f"turns are taken by 2 or more, got {len(weights)} `weights`")
    of = len(weights)
    return tuple([Turn(w, i, of, together, every, seed) for i, w in enumerate(weights)])


@dataclass(frozen=True)
class Anneal:
    """A value that waits, then moves to another: see `anneal`."""

    start: Number
    end: Number
    warmup_steps: int = 0
    steps: int = 1

    def __post_init__(self) -> None:
        for name in ("start", "end", "warmup_steps"):
            check_nonnegative(name, getattr(self, name))
        check_positive("steps", self.steps)

    def __call__(self, step: int) -> Number:
        """The value at a step."""
        # min and max, not branches: see Ramp
        moved = min(1.0, max(0.0, (step - self.warmup_steps) / self.steps))
        return (1 - moved) * self.start + moved * self.end


def anneal(start: Number, end: Number, warmup_steps: int = 0, steps: int = 1) -> Anneal:
    """A value as a function of the step: constant in the warm-up, then linear, then constant.

    Such as the cap of a `TimePolicy`, which lets the encoder learn at easy times first. The value
    is `start` up to step `warmup_steps`, and `end` from step `warmup_steps + steps` on.

    Args:
        start: the first value, at least 0.
        end: the last value, at least 0.
        warmup_steps: steps at `start`.
        steps: steps from `start` to `end`, at least 1.

    Raises:
        ValueError: a negative, NaN or infinite argument, or `steps` of 0.

    Examples:
        >>> cap = anneal(0.5, 0.9, warmup_steps=100, steps=200)
        >>> [cap(step) for step in (0, 100, 200, 300, 10_000)]
        [0.5, 0.5, 0.7, 0.9, 0.9]
    """
    return Anneal(start, end, warmup_steps, steps)
