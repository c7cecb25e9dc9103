"""Schedules of latent noise: amplitudes of signal and noise at a time, and how fast they move."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.types import Number, Time
from cyclevae.processes.amplitudes import discrete_alpha_bar

LatentSchedule = Literal["cosine", "linear", "sigmoid", "continuous_cosine", "flow", "edm"]
AlphaSigma = Callable[[Time], tuple[Time, Time]]


@dataclass(frozen=True)
class Flow:
    """The straight path of flow matching: `alpha = 1 - s`, `sigma = s`.

    `s = shift t / (1 + (shift - 1) t)` is the time itself without a shift. One above 1 spends more
    of the times near full noise, as latents of more numbers need: SD3 takes 3. The velocity is that
    by `s`, `epsilon - z` whatever the shift. A network trained with a shift reads `s` as its time:
    the module around it gives it `Flow(3.0)(latent_time)[1]`.

    Attributes:
        shift: of the times, above 0.

    Raises:
        ValueError: a shift that is not above 0.

    Reference: Lipman et al., https://arxiv.org/abs/2210.02747; the shift, Esser et al.,
    https://arxiv.org/abs/2403.03206, eq. 23.

    Examples:
        >>> Flow(shift=3.0)(torch.tensor([0.0, 0.5, 1.0]))
        (tensor([1.0000, 0.2500, 0.0000]), tensor([0.0000, 0.7500, 1.0000]))
    """

    shift: Number = 1.0

    def __post_init__(self) -> None:
        checks.check_positive("shift", self.shift)

    def __call__(self, time: Time) -> tuple[Time, Time]:
        """Signal and noise amplitudes at a time, `[b]` each."""
        bend = 1 + (self.shift - 1) * time
        return (1 - time) / bend, self.shift * time / bend

    def rates(self, time: Time) -> tuple[Time, Time]:
        """Their derivatives by `s`."""
        one = torch.ones_like(time)
        return -one, one


@dataclass(frozen=True)
class EDM:
    """Noise that grows on a latent that stays: `alpha = 1`.

    `sigma(t) = (low + t (high - low))^rho` with the `rho`-th roots of `sigma_min` and `sigma_max`.
    The velocity is that by `sigma`, which is epsilon. A start from noise has a standard deviation
    of `sqrt(1 + sigma^2)`. A network reads `sigma`, not the time, and predicts `x0`: the module
    around it gives it `EDM()(latent_time)[1]` and has the preconditioning.

    Attributes:
        sigma_min: at time 0, at least 0.
        sigma_max: at time 1.
        rho: how much of the times goes to little noise.

    Raises:
        ValueError: amplitudes that do not grow, or a `rho` that is not above 0.

    Reference: Karras et al., https://arxiv.org/abs/2206.00364, eq. 5 and table 1.

    Examples:
        >>> EDM()(torch.tensor([0.0, 0.5, 1.0]))[1]
        tensor([2.0000e-03, 2.5152e+00, 8.0000e+01])
    """

    sigma_min: Number = 0.002
    sigma_max: Number = 80.0
    rho: Number = 7.0

    def __post_init__(self) -> None:
        checks.check_nonnegative("sigma_min", self.sigma_min)
        checks.check_positive("sigma_max", self.sigma_max)
        checks.check_positive("rho", self.rho)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"`sigma_min` must be below `sigma_max`, got {self.sigma_min!r} and "
                f"{self.sigma_max!r}"
            )

    def __call__(self, time: Time) -> tuple[Time, Time]:
        """Signal and noise amplitudes at a time, `[b]` each."""
        low, high = (sigma ** (1 / self.rho) for sigma in (self.sigma_min, self.sigma_max))
        return torch.ones_like(time), (low + time * (high - low)) ** self.rho

    def rates(self, time: Time) -> tuple[Time, Time]:
        """Their derivatives by `sigma`."""
        return torch.zeros_like(time), torch.ones_like(time)


class ContinuousCosine:
    """`alpha = cos(pi t / 2)`, exactly 0 at full noise."""

    def __call__(self, time: Time) -> tuple[Time, Time]:
        """Signal and noise amplitudes at a time, `[b]` each."""
        quarter = math.pi / 2
        return torch.sin(quarter * (1 - time)), torch.sin(quarter * time)

    def rates(self, time: Time) -> tuple[Time, Time]:
        """Their derivatives."""
        alpha, sigma = self(time)
        return -math.pi / 2 * sigma, math.pi / 2 * alpha


class Discretised:
    """One of the tables of 1000 steps: a time `t` means step `floor(999 t)`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, time: Time) -> tuple[Time, Time]:
        """Signal and noise amplitudes at a time, `[b]` each."""
        key = time.device, time.dtype
        if key not in self._tables:  # float64 ends on the CPU: some devices have none
            alpha_bar = discrete_alpha_bar(self._name)
            table = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()])
            self._tables[key] = table.to(time.dtype).to(time.device)
        alpha, sigma = self._tables[key][:, (time * 999).long()]
        return alpha, sigma


def named(schedule: LatentSchedule) -> AlphaSigma:
    """The schedule of a name."""
    match schedule:
        case "flow":
            return Flow()
        case "edm":
            return EDM()
        case "continuous_cosine":
            return ContinuousCosine()
        case _:
            return Discretised(schedule)
