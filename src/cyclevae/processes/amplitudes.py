"""The amplitudes of signal and noise: what a schedule must give, and the discretised ones."""

import math
from typing import Any

import torch
from torch import Tensor

from cyclevae._base.precision import fp32
from cyclevae._base.types import Time


def check_schedule(time: Time, alpha: Any, sigma: Any) -> None:
    """Amplitudes at some times: tensors like these, of a signal-to-noise ratio that falls."""
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        if not isinstance(value, Tensor) or value.shape != time.shape:
            shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
            raise ValueError(
                "`schedule` must return the tensors (alpha, sigma) in the shape of the times it is "
                f"given, {list(time.shape)}; got as {name} a {type(value).__name__}{shape}: write "
                "torch.ones_like(t) where an amplitude is constant"
            )
        if not bool((value.isfinite() & (value >= 0)).all()):
            raise ValueError(
                f"`schedule` must return finite amplitudes of at least 0, got as {name} "
                f"{value.min().item():.4g} to {value.max().item():.4g} at times in [0, 1]"
            )
    # alpha / sigma falls, multiplied out, for either may be 0; a table may have equal neighbours
    alpha, sigma = fp32(alpha), fp32(sigma)
    before, after = alpha[:-1] * sigma[1:], alpha[1:] * sigma[:-1]
    rises = after > before * (1 + 1e-5)
    ends = bool(alpha[-1] * sigma[0] >= alpha[0] * sigma[-1])
    if ends or bool(rises.any()):
        at = int(rises.long().argmax())
        raise ValueError(
            "`schedule` must have a signal-to-noise ratio alpha / sigma that falls with time, from "
            f"0 (clean) to 1 (full noise); got alpha = {alpha[at].item():.4g}, sigma = "
            f"{sigma[at].item():.4g} at time {time[at].item():g} and {alpha[at + 1].item():.4g}, "
            f"{sigma[at + 1].item():.4g} at {time[at + 1].item():g}. Where time runs the other way "
            "write lambda t: schedule(1 - t), and as_denoiser(network, clean_at=1) if the network "
            "counts so too; the amplitudes come in this order, (alpha, sigma)"
        )


def check_rates(time: Time, schedule: Any) -> None:
    """Derivatives of the amplitudes: tensors like the times, along the path that these describe."""
    rates = schedule.rates((time[1:] + time[:-1]) / 2)
    if (
        not isinstance(rates, tuple)
        or [getattr(r, "shape", None) for r in rates] != [(len(time) - 1,)] * 2
    ):
        raise ValueError(
            "`schedule.rates` must return two tensors (alpha', sigma') in the shape of the times "
            f"it is given; got {rates!r:.100}"
        )
    path = torch.stack([fp32(amplitude).diff() for amplitude in schedule(time)])
    told = torch.stack([fp32(rate) for rate in rates])
    along = torch.cosine_similarity(path, told, dim=0, eps=0)
    middle = along.nanmedian().item()  # a table stands still in between
    if not middle > 0.99:
        raise ValueError(
            "`schedule.rates` must be the derivatives (alpha', sigma') of the amplitudes, by time "
            "or by what rises with it, and these point elsewhere (cosine with their differences: "
            f"{middle:.2g}); of a network whose velocity points to the data, say "
            "as_denoiser(network, clean_at=1)"
        )


def discrete_alpha_bar(schedule: str, steps: int = 1000) -> Tensor:
    """The squared signal amplitude after each step, in float64 on the CPU."""
    low, high = 1e-4, 0.02
    match schedule:
        case "cosine":
            grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu")
            alpha_bar = torch.cos((grid + 0.008) / 1.008 * math.pi / 2).square()
            betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(1e-4, 0.9999)
        case "linear":
            betas = torch.linspace(low, high, steps, dtype=torch.float64, device="cpu")
        case _:
            logistic = torch.linspace(-6, 6, steps, dtype=torch.float64, device="cpu").sigmoid()
            betas = logistic * (high - low) + low
    return torch.cumprod(1 - betas, dim=0)
