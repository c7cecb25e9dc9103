"""Is the latent alive: its moments, its dimensions, and what it retrieves."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.masked import as_latent_mask, kept_latents, mean_vector
from cyclevae._base.types import LatentMaskLike, Latents
from cyclevae.diagnostics._measuring import check_rows, of_kept
from cyclevae.model.door import at_the_door
from cyclevae.priors.samples import Moment, standard_form
from cyclevae.processes.latent import direction

ACTIVE = 0.01  # a dimension with less than this share of the target's variance carries nothing


class LatentHealth(NamedTuple):
    """What `latent_health` measures of a batch of latents, flat, `D` numbers each.

    Attributes:
        norm: mean length.
        target_norm: root mean square length of the target, `sqrt(sum(variance + mean^2))`.
        mean: per dimension.
        variance: per dimension, divided by `n - 1`.
        scale: `sqrt(mean s^2/v)`: 1 on the target, 0 where the latents do not vary.
        drift: root mean square distance of the means, in standard deviations of the target, less
            what a finite batch on the target shows on average: `sqrt(max(0, mean ((m - mu)^2 -
            s^2/n)/v))`.
        effective_rank: `exp` of the entropy of the shares of the covariance's eigenvalues; at most
            `D` and `n - 1`, and 0 where nothing varies.
        active: dimensions with more than 1 % of the target's variance.

    Examples:
        >>> latent_health(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).active
        1
    """

    norm: float
    target_norm: float
    mean: tuple[float, ...]
    variance: tuple[float, ...]
    scale: float
    drift: float
    effective_rank: float
    active: int


class Retrieval(NamedTuple):
    """What `retrieval` measures.

    Attributes:
        recall: share of texts whose own latent is the nearest of `n` different ones; `1/n` by
            chance.
        hubness: skewness of how often each latent is among the `k` nearest; 0 where all come
            equally often, large where a few hubs take every text.
        never: share of latents that are never among them.

    Examples:
        >>> retrieval(torch.eye(3), torch.eye(3))
        Retrieval(recall=1.0, hubness=0.0, never=0.0)
    """

    recall: float
    hubness: float
    never: float


@torch.no_grad()
@at_the_door
def latent_health(
    z: Latents,
    *,
    mean: Moment = 0.0,
    variance: Moment = 1.0,
    latent_mask: LatentMaskLike | None = None,
) -> LatentHealth:
    """Moments, effective rank, active dimensions and drift of latents.

    In float64 on the CPU, so that a collapse is not hidden by rounding.

    Args:
        z: `[b, ...]`, each row one vector of `D` numbers.
        mean: of the target, a number or in the shape of one latent: the stored statistics.
        variance: of the target, above 0.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`: it is then the kept vectors
            that are measured, and moments of the target are of shape `[d]`.

    Raises:
        ValueError: fewer than 2 rows, latents that are not finite, moments of another shape.

    Reference: effective rank, Roy and Vetterli, https://ieeexplore.ieee.org/document/7098875.

    Examples:
        >>> z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> health = latent_health(3 * z)
        >>> round(health.scale, 1), health.active, 7 < health.effective_rank < 8
        (3.0, 8, True)
    """
    if latent_mask is not None:
        z = of_kept(z, as_latent_mask("latent_mask", latent_mask, z.shape))
    z = z.detach().cpu()
    checks.check_latents("z", z, cure="has training diverged?")
    rows = z.double().flatten(1)
    centered, v, *_ = standard_form(z.double(), mean, variance, "biased")
    mu = rows[0] - centered[0]
    m, s2 = rows.mean(dim=0), rows.var(dim=0)
    drift = (((m - mu).square() - s2 / len(rows)) / v).mean().clamp(min=0).sqrt()
    return LatentHealth(
        norm=rows.norm(dim=1).mean().item(),
        target_norm=(v + mu.square()).sum().sqrt().item(),
        mean=tuple(m.tolist()),
        variance=tuple(s2.tolist()),
        scale=(s2 / v).mean().sqrt().item(),
        drift=drift.item(),
        effective_rank=_effective_rank(rows),
        active=int((s2 > ACTIVE * v).sum()),
    )


@torch.no_grad()
@at_the_door
def retrieval(
    z_hat: Latents,
    latents: Latents,
    *,
    k: int = 1,
    latent_mask: LatentMaskLike | None = None,
) -> Retrieval:
    """Whether encoded texts find their own latents among those of the batch, by the cosine.

    Equal latents, as of equal texts, are one: a text finds its own where it finds its equal.

    Args:
        z_hat: latents of the encoder, `[b, ...]`, each row one vector.
        latents: the true latents of the same rows.
        k: neighbours that are counted for the hubs.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`: as `infonce_loss`.

    Raises:
        ValueError: fewer than 2 rows or different latents, unequal shapes, latents that are not
            finite, a `k` below 1 or above the number of different latents.

    Reference: hubs, Radovanovic et al., https://www.jmlr.org/papers/v11/radovanovic10a.html.

    Examples:
        >>> z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> hub = 0.1 * z + z[:1]  # every text lands near the first latent
        >>> found = retrieval(hub, z)
        >>> found.recall < 0.2, found.hubness > 3, found.never > 0.8
        (True, True, True)
    """
    checks.check_same_shape("z_hat", z_hat, "latents", latents)
    z_hat, mask = kept_latents("z_hat", z_hat, latent_mask, cure="has training diverged?")
    latents, _ = kept_latents("latents", latents, mask)
    check_rows("z_hat", z_hat)
    x, y = (part.detach().cpu().double() for part in (z_hat, latents))
    if mask is not None:
        x, y = mean_vector(x, mask.cpu()), mean_vector(y, mask.cpu())
    x, y = x.flatten(1), y.flatten(1)
    pool, own = torch.unique(y, dim=0, return_inverse=True)
    if len(pool) < 2:
        raise ValueError(
            "`latents` are equal in all rows, so every text would find its own; give rows that "
            "differ"
        )
    if not 1 <= k <= len(pool):
        raise ValueError(
            f"`k` must lie in [1, {len(pool)}], the number of different latents, got {k!r}"
        )
    nearest = (direction(x) @ direction(pool).T).topk(k, dim=1).indices
    counts = nearest.flatten().bincount(minlength=len(pool)).double()
    counts /= own.bincount()  # equal latents are found by as many texts
    return Retrieval(
        recall=(nearest[:, 0] == own).double().mean().item(),
        hubness=_skewness(counts),
        never=(counts == 0).double().mean().item(),
    )


def _effective_rank(rows: Float[Tensor, "n D"]) -> float:
    eigenvalues = torch.linalg.svdvals(rows - rows.mean(dim=0)).square()
    total = eigenvalues.sum()
    if total <= 1e-28 * rows.square().sum():  # what is left is rounding
        return 0.0
    shares = eigenvalues / total
    return math.exp(-torch.special.xlogy(shares, shares).sum().item())


def _skewness(counts: Float[Tensor, " n"]) -> float:
    off = counts - counts.mean()
    spread = off.square().mean()
    return (off.pow(3).mean() / spread.pow(1.5)).item() if spread > 0 else 0.0
