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
            "write lambda t: schedule(1 - t); and the amplitudes come in this order, (alpha, sigma)"
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
