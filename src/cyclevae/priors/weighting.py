"""At which times a bound is taken, and with what weight: VDM, likelihood and uniform weightings."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.types import Latents, Number, Time
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.times import stratified_times

Weighting = Literal["vdm", "likelihood", "uniform"]
STEPS = 1000  # of the discretised schedules: time t means step floor(999 t)


def weighted_times(
    weighting: Weighting,
    z: Latents,
    latent_process: LatentProcess,
    *,
    low: Number,
    high: Number,
    time: Number | Time | None,
    generator: torch.Generator | None,
) -> tuple[Time, Time]:
    """The times of a weighting, and the weights of the squared errors of the noise, `[b]` each."""
    first, last = _steps(latent_process, low, high)
    if time is None:
        u = stratified_times(len(z), device=z.device, generator=generator).to(z.dtype)
    else:
        time = checks.as_time("time", time, z)
        if checks.reads_values(time):
            index = time * (STEPS - 1)
            if not bool(((index >= first) & (index < last + 1)).all()):
                raise ValueError(
                    f"`time` must lie in [low, high] = [{low:g}, {high:g}], got other values"
                )
    match weighting:
        case "uniform":
            time = low + (high - low) * u if time is None else time
            return time, torch.ones_like(time)
        case "likelihood":
            grid = _time_of(torch.arange(first, last + 1, dtype=z.dtype, device=z.device))
            gamma = -latent_process.snr(grid).log()
            if time is None:
                # the nearest step: half an interval for each end, as the trapezoidal rule has it
                between = (gamma[1:] + gamma[:-1]) / 2
                target = torch.lerp(gamma[0], gamma[-1], u)
                time = grid[torch.searchsorted(between, target)]
            return time, ((gamma[-1] - gamma[0]) / 2).expand(len(z))
        case "vdm":
            steps = last - first
            if time is None:
                step = (u * steps).ceil()
            else:
                step = ((time * (STEPS - 1)).floor() - first).clamp(min=1)
            time, before = _time_of(first + step), _time_of(first + step - 1)
            ratio = latent_process.snr(before) / latent_process.snr(time)
            return time, steps / 2 * (ratio - 1)


def boundary_terms(
    mean: Latents,
    latent_process: LatentProcess,
    low: Number,
    high: Number,
    posterior_std: Number,
    *,
    kl: bool,
    dimensions: int | Tensor,
) -> Float[Tensor, " b"]:
    """The two ends of the bound per row of so many dimensions, in nats; no constant if `kl`."""
    first, last = _steps(latent_process, low, high)
    ends = torch.arange(first, last + 1, last - first, dtype=mean.dtype, device=mean.device)
    alpha, sigma = latent_process.alpha_sigma(_time_of(ends))
    variance = (alpha * posterior_std).square() + sigma.square()
    start = latent_process.start_variance(_time_of(ends))[1]
    left = ((variance if kl else sigma.square())[1] / start).log()
    square = (alpha[1] * mean).square().flatten(1).sum(dim=1) / start
    at_high = (square + dimensions * (variance[1] / start - 1 - left)) / 2
    if kl:
        return at_high
    return at_high + dimensions * (sigma[0].log() + math.log(2 * math.pi * math.e) / 2)


def _steps(latent_process: LatentProcess, low: Number, high: Number) -> tuple[int, int]:
    """The first and the last step of a range of times, at which the SNR must fall and be finite."""
    first, last = int(low * (STEPS - 1)), int(high * (STEPS - 1))
    if not (low >= 0 and high <= 1 and first < last):
        raise ValueError(
            f"`low` and `high` must be times in [0, 1], `low` at least {1 / (STEPS - 1):.3f} below "
            f"`high`, got {low!r} and {high!r}"
        )
    ends = torch.tensor([first, last], device="cpu")
    if checks.reads_values(ends):
        snr = latent_process.snr(_time_of(ends)).tolist()
        if not math.inf > snr[0] > snr[1] > 0:
            raise ValueError(
                f"the signal-to-noise ratio must fall from `low` = {low:g} to `high` = {high:g}, "
                f"finite and above 0, got {snr[0]:.4g} and {snr[1]:.4g}; narrow the range"
            )
    return first, last


def _time_of(step: Tensor) -> Tensor:
    """The middle of the times that mean a step, safe from rounding on either side."""
    return ((step + 0.5) / (STEPS - 1)).clamp(max=1)
