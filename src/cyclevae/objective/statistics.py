"""Statistics of latents that a step reports: are they alive?"""

from torch import Tensor

from cyclevae._base.masked import kept_vectors
from cyclevae._base.precision import fp64
from cyclevae._base.reduce import only_present
from cyclevae._base.types import Count, LatentMask, Latents, Rows


def mean_norm(latents: Latents, rows: Rows | None = None) -> Tensor:
    """The mean length, of the rows that are there."""
    norms: Tensor = latents.flatten(1).float().norm(dim=1)
    if rows is not None:  # the others are zeros
        return norms.sum() / rows.sum().clamp(min=1)
    return norms.sum() / max(len(norms), 1)


def moments(z_hat: Latents, latent_mask: LatentMask | None = None) -> dict[str, Tensor]:
    """Norm, and mean and variance pooled over dimensions: with a mask, of the kept vectors."""
    if latent_mask is None:
        flat, kept = fp64(z_hat.flatten(1)), None
        number: Count = max(len(flat), 1)  # of none, they are 0
    else:
        flat, kept = kept_vectors(fp64(z_hat), latent_mask)
        number = kept.sum().clamp(min=1)
    mean = flat.sum(dim=0) / number
    off = (flat - mean).square()
    if kept is not None:
        off = only_present(off, kept)
    return {
        "latent_pred_norm": mean_norm(z_hat),
        "latent_pred_mean": mean.square().mean().sqrt().float(),
        "latent_pred_variance": off.sum(dim=0).mean().float() / number,
    }
