"""At which diffusion times a step trains."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cyclevae._base.checks import check_choice, check_positive
from cyclevae._base.draws import seeded
from cyclevae._base.types import Number, Schedule, Time
from cyclevae.processes.schedules import Anneal

TimeDistribution = Literal["full", "uniform", "logit_normal"]
_IGNORED = {
    "full": ("low", "stratified", "mean", "std"),
    "uniform": ("mean", "std"),
    "logit_normal": (),
}


@dataclass(frozen=True)
class TimePolicy:
    """The times `[rows]` of a pass, in `[low, high]`.

    `full` is constant at the cap `high`; `uniform` is `low + (high - low) u`; `logit_normal` is
    `low + (high - low) sigmoid(mean + std n)` with a standard normal `n`, which prefers middle
    times. `stratified` draws one `u` from each of `rows` equal parts of (0, 1), in random order
    (`n` is its normal quantile), which lowers the variance of the loss.

    Attributes:
        distribution: `full`, `uniform` or `logit_normal`.
        low: the lowest time.
        high: the highest time, the cap; it may be a function of the step, such as `anneal(...)`.
        stratified: whether the times of a batch are spread evenly.
        mean: of the normal variable in `logit_normal`; above 0 for more noise.
        std: its standard deviation.

    Raises:
        ValueError: an unknown distribution, a time outside [0, 1], `low` above `high`, a `std` that
            is not above 0, or an option that the distribution ignores.

    Reference: stratified times, https://arxiv.org/abs/2107.00630, appendix I; logit-normal times,
    https://arxiv.org/abs/2403.03206.

    Examples:
        >>> TimePolicy()(3)
        tensor([1., 1., 1.])
        >>> times = TimePolicy("uniform", high=0.8)(4, generator=torch.Generator().manual_seed(0))
        >>> times.sort().values  # one in each quarter of [0, 0.8]
        tensor([0.1007, 0.3007, 0.5007, 0.7007])
    """

    distribution: TimeDistribution = "full"
    low: Number = 0.0
    high: Number | Anneal | Schedule = 1.0
    stratified: bool = True
    mean: Number = 0.0
    std: Number = 1.0

    def __post_init__(self) -> None:
        check_choice("distribution", self.distribution, get_args(TimeDistribution))
        for name in _IGNORED[self.distribution]:
            if getattr(self, name) != getattr(TimePolicy, name):
                raise ValueError(
                    f"`{name}` = {getattr(self, name)!r} has no effect on the distribution "
                    f"{self.distribution!r}: drop it, or choose another distribution"
                )
        if not 0 <= self.low <= 1:
            raise ValueError(f"`low` must lie in [0 (clean), 1 (full noise)], got {self.low!r}")
        if not callable(self.high):
            self._check_cap("high", self.high)
        if not math.isfinite(self.mean):
            raise ValueError(f"`mean` must be finite, got {self.mean!r}")
        check_positive("std", self.std)

    def lowest(self, step: int = 0) -> Number:
        """The lowest time that can come at a step."""
        return self.highest(step) if self.distribution == "full" else self.low

    def highest(self, step: int = 0) -> Number:
        """The highest time that can come at a step: the cap.

        Raises:
            ValueError: a cap, as a function of the step, that is below `low` or above 1.
        """
        if not callable(self.high):
            return self.high
        cap = self.high(step)
        if not torch.compiler.is_compiling():  # there it is symbolic, as the step is
            self._check_cap(f"high({step})", cap)
        return cap

    def average(self, of: Callable[[Tensor], Tensor] | None = None) -> float | None:
        """The expected time, or that `of` a function; None where the cap moves with the step.

        Examples:
            >>> TimePolicy("uniform", low=0.5).average()
            0.75
        """
        if callable(self.high):
            return None
        share = {"full": 1.0, "uniform": 0.5}.get(self.distribution)
        if share is not None and of is None:
            return self.low + (self.high - self.low) * share
        u = (torch.arange(4096, dtype=torch.float64, device="cpu") + 0.5) / 4096
        if self.distribution == "logit_normal":
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        if of is None:
            return self.low + (self.high - self.low) * u.mean().item()
        times = self.high + 0 * u if share == 1 else self.low + (self.high - self.low) * u
        return of(times).mean().item()

    def __call__(
        self,
        rows: int,
        *,
        step: int = 0,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> Time:
        """Draw the times `[rows]`, in fp32; `full` draws nothing."""
        high = torch.full((rows,), self.highest(step), dtype=torch.float32, device=device)
        if self.distribution == "full":
            return high
        if self.stratified:
            u = stratified_times(rows, device=device, generator=generator)
        else:
            u = 1 - torch.rand(rows, dtype=torch.float32, device=device, **seeded(generator))
        if self.distribution == "logit_normal":
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
            u = u.clamp(1e-7, 1 - 1e-7)  # a logit-normal variable is never 0 or 1
        return torch.lerp(torch.full_like(high, self.low), high, u)

    def _check_cap(self, name: str, cap: Number) -> None:
        if not self.low <= cap <= 1:
            raise ValueError(
                f"`{name}` must lie in [low, 1] = [{self.low:g}, 1 (full noise)], got {cap!r}"
            )


UNIFORM = TimePolicy("uniform")


@dataclass(frozen=True)
class LogitNormal:
    """The density of a logit-normal time, as a weight of uniform ones: most at middle times.

    `exp(-(logit t - mean)^2 / (2 std^2)) / (std sqrt(2 pi) t (1 - t))`, 0 at both ends. At uniform
    times the loss is in the mean that of `TimePolicy("logit_normal", mean=, std=)` without a
    weight, which has less variance; beside times that are drawn for something else, this is left.

    Attributes:
        mean: of the logit; above 0 for more noise.
        std: its standard deviation.

    Raises:
        ValueError: a mean that is not finite, or a `std` that is not above 0.

    Reference: Esser et al., https://arxiv.org/abs/2403.03206, section 3.1.

    Examples:
        >>> LogitNormal()(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 1.5958, 0.0000])
    """

    mean: Number = 0.0
    std: Number = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"`mean` must be finite, got {self.mean!r}")
        check_positive("std", self.std)

    def __call__(self, time: Time) -> Time:
        """The density at times `[b]`."""
        inside = time.clamp(1e-6, 1 - 1e-6)
        bell = torch.exp(-((torch.logit(inside) - self.mean) / self.std).square() / 2)
        density = bell / (self.std * math.sqrt(2 * math.pi) * inside * (1 - inside))
        return torch.where(time == inside, density, 0.0)


LatentWeighting = LogitNormal | Callable[[Time], Time]


def stratified_times(
    rows: int,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Time:
    """Uniform times `[rows]` in (0, 1], one in each of `rows` strata, in random order.

    Reference: variational diffusion models, https://arxiv.org/abs/2107.00630, appendix I.
    """
    jitter = torch.rand(1, dtype=torch.float32, device=device, **seeded(generator))
    order = torch.randperm(rows, device=device, **seeded(generator))
    return (1 - (order + jitter) / max(rows, 1)).clamp(min=1e-7)


def check_time(name: str, value: object) -> None:
    """Refuse what is neither a time, from 0 (clean) to 1 (full noise), nor draws times."""
    if isinstance(value, TimePolicy):
        return refuse_clean(name, value.high)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 <= value <= 1):  # type: ignore[operator] # a number, then
        raise ValueError(
            f"`{name}` must lie in [0 (clean), 1 (full noise)] or be a TimePolicy, got {value!r}"
        )
    refuse_clean(name, value)


def refuse_clean(name: str, highest: object) -> None:
    """Refuse time 0 as the highest: a loss there is one of copying, or 0 for ever."""
    if isinstance(highest, int | float) and highest == 0:
        raise ValueError(
            f"`{name}` is 0, where nothing is hidden and nothing can be learnt: give a time above 0"
        )
