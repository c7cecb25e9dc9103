"""The noise that latents are given, or started from."""

import torch
from torch import Tensor

from cyclevae._base.draws import seeded
from cyclevae._base.types import Latents
from cyclevae.processes.latent import LatentProcess


def draw_noise(
    rows: int,
    latent_process: LatentProcess,
    *,
    at: Tensor,
    like: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Latents:
    """Standard normal noise in the shape of `like`, or of the process, on the device of `at`."""
    shape = latent_process.shape if like is None else like.shape[1:]
    if shape is None:
        raise ValueError(
            "noise must be drawn and no latent shows its shape: set `shape` on the LatentProcess, "
            "as in LatentProcess(shape=(64,)), or give `noise`"
        )
    dtype = torch.get_default_dtype() if like is None else like.dtype
    return torch.randn(rows, *shape, dtype=dtype, device=at.device, **seeded(generator))
