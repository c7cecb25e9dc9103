"""Priors: keep the aggregate of encoded latents where the decoder expects it.

These are statistics of a batch. They return one scalar and take no reduction, and they are not
linear in the batch: averages over accumulation steps or ranks are not the value of the whole batch.
The unbiased forms are unbiased on any split and may be negative; the biased forms never are, and
reward contraction in small batches.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from cyclevae import _checks
from cyclevae._types import Estimator, Latents, Number, Scalar
from cyclevae.kernels import gaussian_gram, gaussian_mean, gaussian_self
from cyclevae.process import fp32

Moment = Number | Float[Tensor, "..."]


def moment_prior(
    z: Latents,
    *,
    mean: Moment | None = None,
    variance: Moment = 1.0,
    estimator: Estimator = "unbiased",
) -> Scalar:
    """Distance of per-dimension mean and variance from those of a Gaussian.

    `||m - mean||^2 + ||s^2 - variance||^2`, summed over dimensions. `biased` plugs in the batch's
    mean and unbiased variance, whose value under the target itself is positive (1/n and 2/(n-1) per
    unit-variance dimension). `unbiased` subtracts that floor, assuming Gaussian latents:
    `||m - mean||^2 - sum s^2/n + sum [(n-1)/(n+1) s^4 - 2 s^2 variance + variance^2]`.

    Args:
        z: latents, `[b, d]` or `[b, n, d]` (a sample is then one vector of `n d` numbers).
        mean: of the target, a number or in the shape of one latent; 0 if not given.
        variance: of the target, likewise.
        estimator: `unbiased` or `biased`.

    Raises:
        ValueError: fewer than 2 samples, latents that are not finite, a variance that is not above
            0, or moments whose shape does not fit.

    Reference: the floors are moments of chi-squared variables (Cochran's theorem).

    Examples:
        >>> import torch
        >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # variances 2 and 0
        >>> moment_prior(z, estimator="biased")
        tensor(2.)
    """
    x, v = _standard_form(z, mean, variance, estimator)
    n = len(x)
    m, s2 = x.mean(dim=0), x.var(dim=0)
    if estimator == "biased":
        return m.square().sum() + (s2 - v).square().sum()
    mean_term = m.square() - s2 / n
    variance_term = (n - 1) / (n + 1) * s2.square() - 2 * s2 * v + v.square()
    return (mean_term + variance_term).sum()


def mmd_prior(
    z: Latents,
    *,
    scales: Sequence[Number] = (0.5, 1.0, 2.0),
    mean: Moment | None = None,
    variance: Moment = 1.0,
    estimator: Estimator = "unbiased",
) -> Scalar:
    """Squared maximum mean discrepancy to a Gaussian, with the Gaussian's side in closed form.

    `MMD^2 = mean_ij k(z_i, z_j) - 2 mean_i E k(z_i, p) + E k(p, p')` for Gaussian kernels
    `k = exp(-||x - y||^2 / (2 bandwidth^2))`, with `bandwidth^2 = scale * sum of variances`,
    averaged over scales. No samples of the prior are drawn, so they add no variance. `unbiased`
    leaves the pairs `i = j` out and may be negative; `biased` keeps them.

    Args:
        z: latents, `[b, d]` or `[b, n, d]` (a sample is then one vector of `n d` numbers).
        scales: of the squared bandwidth, relative to the expected squared norm of the target.
        mean: of the target, a number or in the shape of one latent; 0 if not given.
        variance: of the target, likewise.
        estimator: `unbiased` (a U-statistic) or `biased` (a V-statistic).

    Raises:
        ValueError: fewer than 2 samples, latents that are not finite, a scale or variance that is
            not above 0, or moments whose shape does not fit.

    Reference: Gretton et al., A kernel two-sample test, JMLR 2012; the closed form is the BHEP
    statistic of Henze and Zirkler, 1990.

    Examples:
        >>> import torch
        >>> z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> mmd_prior(z, scales=(0.5,), estimator="biased")
        tensor(0.1342)
    """
    x, v = _standard_form(z, mean, variance, estimator)
    if not scales:
        raise ValueError("`scales` must name at least one scale, got none")
    for scale in scales:
        _checks.check_positive("scales", scale)
    # matrix products under autocast would round the distances to half precision
    exact = nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
    with exact:
        return torch.stack([_mmd2(x, v, scale * v.sum(), estimator) for scale in scales]).mean()


def _mmd2(x: Tensor, variance: Tensor, bandwidth2: Tensor, estimator: Estimator) -> Tensor:
    n = len(x)
    gram = gaussian_gram(x, bandwidth2)
    if estimator == "biased":
        pairs = gram.mean()
    else:
        pairs = (gram.sum() - gram.diagonal().sum()) / (n * (n - 1))
    cross = gaussian_mean(x, bandwidth2, variance).mean()
    return pairs - 2 * cross + gaussian_self(bandwidth2, variance)


def _standard_form(
    z: Latents, mean: Moment | None, variance: Moment, estimator: Estimator
) -> tuple[Float[Tensor, "b D"], Float[Tensor, " D"]]:
    """Centred latents, flat, and the target's variances, in fp32 or better."""
    _checks.check_latents("z", z)
    _checks.check_choice("estimator", estimator, get_args(Estimator))
    if len(z) < 2:
        raise ValueError(
            f"`z` needs at least 2 samples for batch statistics, got shape {list(z.shape)}; "
            "raise the batch size or give the term weight 0"
        )
    x = rearrange(fp32(z), "b ... -> b (...)")
    if mean is not None:
        x = x - _per_dimension("mean", mean, z, x)
    _checks.check_variance("variance", variance, z.shape[1:])
    return x, _per_dimension("variance", variance, z, x)


def _per_dimension(name: str, moment: Moment, z: Tensor, x: Tensor) -> Tensor:
    if not isinstance(moment, Tensor):
        return x.new_full((x.shape[1],), moment)
    if moment.ndim and moment.shape != z.shape[1:]:
        raise ValueError(
            f"`{name}` must be a number or have the shape of one latent {list(z.shape[1:])}, "
            f"got {list(moment.shape)}"
        )
    return moment.to(x).expand(z.shape[1:]).reshape(-1)
