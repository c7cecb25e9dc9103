"""What a term of the objective is: a weight, the passes it asks for, and a loss."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.types import Count, Number, Rows, Scalar, Schedule
from cyclevae.objective.requests import Decode, Encode, Own, Request
from cyclevae.objective.rows import Arranged, Share
from cyclevae.objective.step import Setting, Step
from cyclevae.processes.schedules import Ramp, Turn

Weight = Number | Ramp | Turn | Schedule


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """A term of a `CycleObjective`, ours or one's own: a frozen dataclass in a file of its own.

    A subclass adds its options as fields, checks them in `__post_init__`, says in `passes` what it
    reads or runs, and returns its loss from `loss`. It overrides the other methods where the
    defaults, written for a loss that is no mean over rows, do not fit.

    Attributes:
        weight: a number or a function of the step, such as `ramp(...)`; at 0 the term costs no
            pass.
        cap: a loss above it counts as that much and has no gradient.
        every: run at every so many steps only.
        fraction: the share of the rows it reads: the first ones of a batch, so batches must be in
            random order.
        name: of its metrics, in `counts` and in the configuration; that of the class in small
            letters if not given. Two terms of one kind need two.
        parts: the losses it returns, as infixes of their metrics; one without if not given.
        expected_counts: those of `parts` whose count is an expectation, because the loss draws
            what it counts.
        renamed: what its options were called in configurations of version 1.

    Raises:
        ValueError: an option out of range, by its name.

    Examples:
        >>> @dataclass(frozen=True, kw_only=True, eq=False)
        ... class Small(Term):
        ...     def passes(self, step):
        ...         return (cv.Encode(rows=cv.Share(pairs=self.fraction)),)
        ...
        ...     def loss(self, step):
        ...         return step.z_hat(*self.passes(step.number)).square().mean()
        >>> import cyclevae as cv
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> objective = cv.CycleObjective(text_process, latent_process, [cv.Latent(), Small()])
        >>> objective.passes(step=0)  # it reads the pass of the base encoder loss
        1
        >>> sorted(objective(denoiser, toy_batch(seed=0), step=0).metrics)[-2:]
        ['small_loss', 'small_weight']
    """

    weight: Weight = 1.0
    cap: Number | None = None
    every: int = 1
    fraction: Number = 1.0
    name: str = ""

    parts: ClassVar[tuple[str, ...]] = ("",)
    expected_counts: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        if not callable(self.weight):
            checks.check_nonnegative("weight", self.weight)
        if self.cap is not None:
            checks.check_positive("cap", self.cap)
        checks.check_count("every", self.every)
        checks.check_share("fraction", self.fraction, above_zero=True)
        known = {field.name for field in fields(self)}
        written = inspect.get_annotations(type(self)).items()
        lost = [name for name, kind in written if name not in known and "ClassVar" not in str(kind)]
        if lost:
            raise TypeError(
                f"{type(self).__name__} has no field {lost[0]!r}, which it annotates: write "
                "@dataclass(frozen=True, kw_only=True, eq=False) above the class, or no file would "
                "hold this option"
            )
        if not self.name:
            object.__setattr__(self, "name", self.kind())
        if not self.name.isidentifier():
            raise ValueError(
                f"`name` is part of the names of metrics and must be like 'prior_2', got "
                f"{self.name!r}"
            )

    @classmethod
    def kind(cls) -> str:
        """What a configuration calls it.

        Examples:
            >>> from cyclevae import CycleText
            >>> CycleText.kind()
            'cycle_text'
        """
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    # What a subclass says

    def passes(self, step: int) -> tuple[Request, ...]:
        """The passes it reads, `Decode` and `Encode`, or runs by itself, `Own`, at a step."""
        raise NotImplementedError(f"{type(self).__name__} must say in `passes` what it asks for")

    def loss(self, step: Step) -> Scalar | dict[str, Scalar]:
        """The loss of a step, unweighted and with its graph; by part where it has `parts`."""
        raise NotImplementedError(f"{type(self).__name__} must return its `loss`")

    def counts(self, rows: Arranged, setting: Setting) -> dict[str, Count]:
        """The denominator of each part that is a mean over rows, on a batch."""
        return {}

    def counted(self) -> tuple[str, ...]:
        """The parts for which a count may be given: all of a term that says its `counts`."""
        return () if type(self).counts is Term.counts else self.parts

    def check(self, setting: Setting) -> None:
        """Refuse, when an objective is made, what cannot be right with its processes."""

    def check_step(self, step: Step) -> None:
        """Refuse, before any pass, a step that could not run to its end."""

    def reads_teacher(self) -> bool:
        """Whether it needs a frozen copy of the network, such as makes its bridge."""
        return any(request.maker.by == "teacher" for request in self._shared())

    def reads_null_text(self) -> bool:
        """Whether it reads a network without a text, which some term had better train."""
        return any(
            isinstance(request, Encode) and request.maker.guidance != 1
            for request in self._shared()
        )

    def trains_null(self, setting: Setting) -> tuple[str, ...]:
        """Without which conditions it trains some rows, of `text` and `latent`."""
        return ()

    def depends_on_split(self, *, accumulates: bool) -> str | None:
        """Why its gradient depends on how rows are split over ranks or accumulation steps.

        None where it does not, given `counts`. `cyclevae.testing.check_ranks` asks.
        """
        if not self.counted():
            return "it is a statistic of one call; set its weight to 0 here, and see two_pass"
        if self.fraction < 1:
            return (
                f"fraction={self.fraction!r} takes the first rows of each batch, which depend on "
                "the split; set it to 1 here"
            )
        return None

    # What follows

    def weight_at(self, step: int) -> Number:
        """The weight at a step; 0 where the term rests."""
        if self.every > 1 and step % self.every:  # what is not read compiles once
            return 0.0
        if not callable(self.weight):
            return self.weight
        weight = self.weight(step)
        if not torch.compiler.is_compiling():  # there it is symbolic, as the step is
            checks.check_nonnegative(f"{self.name}.weight({step})", weight)
        return weight

    def _shared(self) -> list[Decode | Encode]:
        return [request for request in self.passes(0) if not isinstance(request, Own)]

    def metric(self, part: str = "") -> str:
        """The name of a loss among the metrics."""
        return f"{self.name}_{part}_loss" if part else f"{self.name}_loss"

    def __eq__(self, other: object) -> bool:
        return same(self, other)

    def __hash__(self) -> int:
        return hash((type(self), self.name))


@dataclass(frozen=True, kw_only=True, eq=False)
class UnpairedTerm(Term):
    """A term that reads rows without a partner, and those of pairs if asked for.

    Attributes:
        pairs: whether pairs are read too.
    """

    pairs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_type("pairs", self.pairs, bool)

    @property
    def rows(self) -> Share:
        """Which rows of its direction it reads."""
        pairs = self.fraction if self.pairs else 0.0
        return Share(pairs, others=self.fraction, marked=self.fraction)

    def there(self, rows: Arranged, direction: Literal["text", "latent"]) -> Rows | None:
        """Which of these rows are there to be read; all if None."""
        cycled = rows.to_cycle(self.pairs)
        there = cycled.has_text if direction == "text" else cycled.has_latent
        return None if there is None else rows.pick(there, self.rows)

    def read(self, rows: Arranged, direction: Literal["text", "latent"]) -> Rows:
        """The same, all of them if all are there: what a count counts."""
        texts, latents = rows.to_cycle(self.pairs).present()
        return rows.pick(texts if direction == "text" else latents, self.rows)


def check_null_rate(term: Any) -> None:
    """Refuse a share of rows without their condition that leaves none, or that nothing trains."""
    rate = term.null_rate
    checks.check_share("null_rate", rate)
    if rate == 1:
        raise ValueError(
            "`null_rate` = 1 shows no row its condition, so that the term trains no direction: "
            "0.1 is usual"
        )
    if rate and term.weight == 0:
        raise ValueError(
            f"`null_rate` = {rate!r} has nothing to act on in a term that weighs 0: give it a "
            "weight, or leave it out"
        )


def with_nulls(does: str, rate: Number) -> str:
    """What a base pass does, some rows of which go without their condition."""
    return f"{does}, {rate:.0%} without" if rate else does


def same(a: Any, b: Any) -> bool:
    """Equality of options, in which tensors compare by value."""
    if type(a) is not type(b):
        return isinstance(a, int | float) and isinstance(b, int | float) and a == b
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if is_dataclass(a) and not isinstance(a, type):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.compare)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
