"""Latents of variable length: which vectors a mask keeps, and nothing in place of others."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.types import LatentMask, LatentMaskLike, Latents


def as_latent_mask(
    name: str, mask: LatentMaskLike, shape: Sequence[int], *, rows: Tensor | None = None
) -> LatentMask:
    """The mask of latents `[b, n, d]`, of which `shape` is the shape, as bool `[b, n]`.

    Every row must keep a vector, or of some `rows`, if given.
    """
    checks.check_tensor(name, mask)
    if len(shape) != 3:
        raise ValueError(
            f"`{name}` says which of the n vectors of latents [b, n, d] are kept, and these are of "
            f"shape {list(shape)}; leave it out"
        )
    if tuple(mask.shape) != tuple(shape[:2]):
        raise ValueError(
            f"`{name}` must have the shape [b, n] = {list(shape[:2])} of its latents "
            f"{list(shape)}, got {list(mask.shape)}"
        )
    mask = checks.as_mask(name, mask)
    checks.check_kept(name, mask, rows)
    return mask


def only_kept(values: Tensor, mask: LatentMask | None) -> Tensor:
    """Values `[b, n, ...]` at kept positions; 0, without a gradient to the values, elsewhere."""
    if mask is None:
        return values
    return torch.where(mask.view(*mask.shape, *[1] * (values.ndim - 2)), values, 0.0)


def kept_latents(
    name: str,
    latents: Latents,
    mask: LatentMaskLike | None,
    shape: Sequence[int] | None = None,
    *,
    cure: str = "drop or repair these rows",
) -> tuple[Latents, LatentMask | None]:
    """Checked latents with 0 at padding, whatever stands there, and their mask."""
    checks.check_tensor(name, latents)
    if mask is not None:
        mask = as_latent_mask("latent_mask", mask, latents.shape)
        latents = only_kept(latents, mask)
    checks.check_latents(name, latents, shape, cure=cure)
    return latents, mask


def kept_vectors(z: Latents, mask: LatentMask) -> tuple[Tensor, Tensor]:
    """All vectors `[b n, d]`, 0 where one is padding, and which are kept `[b n]`."""
    return only_kept(z, mask).flatten(0, 1), mask.flatten()


def kept_numbers(z: Latents, mask: LatentMask | None) -> int | Tensor:
    """How many numbers of each latent are kept: of all rows alike, or `[b]`."""
    if mask is None:
        return math.prod(z.shape[1:])
    return mask.sum(dim=1) * math.prod(z.shape[2:])


def mean_vector(z: Latents, mask: LatentMask) -> Tensor:
    """The mean `[b, d]` of the kept vectors of each row."""
    return only_kept(z, mask).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
