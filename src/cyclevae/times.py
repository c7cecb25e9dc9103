"""At which diffusion times a step trains."""

import torch

from cyclevae._types import Time


def stratified_times(
    rows: int,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Time:
    """Uniform times `[rows]` in (0, 1], one in each of `rows` strata, in random order.

    Reference: variational diffusion models, https://arxiv.org/abs/2107.00630, appendix I.
    """
    jitter = torch.rand(1, dtype=torch.float32, device=device, generator=generator)
    order = torch.randperm(rows, device=device, generator=generator)
    return (1 - (order + jitter) / max(rows, 1)).clamp(min=1e-7)
