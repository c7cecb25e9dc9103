"""Statistics of latents that a step reports: are they alive?"""

from torch import Tensor

from cyclevae._base.precision import fp64
from cyclevae._base.types import Latents, Rows


def mean_norm(latents: Latents, rows: Rows | None = None) -> Tensor:
    """The mean length, of the rows that are there."""
    norms: Tensor = latents.flatten(1).float().norm(dim=1)
    if rows is not None:  # the others are zeros
        return norms.sum() / rows.sum().clamp(min=1)
    return norms.sum() / max(len(norms), 1)


def moments(z_hat: Latents) -> dict[str, Tensor]:
    """Norm, and mean and variance pooled over dimensions."""
    flat = fp64(z_hat.flatten(1))
    rows = max(len(flat), 1)  # of none, they are 0
    mean = flat.sum(dim=0) / rows
    return {
        "latent_pred_norm": mean_norm(z_hat),
        "latent_pred_mean": mean.square().mean().sqrt().float(),
        "latent_pred_variance": (flat - mean).square().sum(dim=0).mean().float() / rows,
    }
