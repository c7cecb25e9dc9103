"""Maximum mean discrepancy to a Gaussian, or to latents of reference."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.precision import fp64, no_autocast, rounded
from cyclevae._base.types import Count, LatentMaskLike, Latents, Number, Scalar
from cyclevae.model.door import at_the_door
from cyclevae.priors.kernels import (
    gaussian_kernel,
    imq_kernel,
    own_distances,
    squared_distances,
)
from cyclevae.priors.samples import Moment, standard_form

KernelName = Literal["gaussian", "imq"]
MMDEstimator = Literal["unbiased", "biased", "linear"]
Bandwidth = Literal["target", "median"]
Samples = Float[Tensor, "b D"]

_KERNELS = {"gaussian": gaussian_kernel, "imq": imq_kernel}
_COLLAPSED = 1e-6  # a median below this share of the target's says nothing about a bandwidth


@at_the_door
def mmd_prior(
    z: Latents,
    *,
    kernel: KernelName = "gaussian",
    scales: Sequence[Number] = (0.5, 1.0, 2.0),
    estimator: MMDEstimator = "unbiased",
    mean: Moment | None = None,
    variance: Moment = 1.0,
    covariance: Float[Tensor, "D D"] | None = None,
    reference: Float[Tensor, "m *k d"] | None = None,
    bandwidth: Bandwidth = "target",
    standardize: bool = False,
    latent_mask: LatentMaskLike | None = None,
) -> Scalar:
    """Squared maximum mean discrepancy to a Gaussian, with the Gaussian's side in closed form.

    `MMD^2 = mean_ij k(z_i, z_j) - 2 mean_i E k(z_i, p) + E k(p, p')`. No samples of the prior are
    drawn, so they add no variance. With `T` the sum of the target's variances, and averaged over
    scales (WAE sums over seven), the kernel is

    - `gaussian`: `exp(-||x - y||^2 / (2 b))` with `b = scale T`;
    - `imq`: `C/(C + ||x - y||^2)` with `C = 2 scale T`, whose tails reach further; its expectation
      under the Gaussian is right to 1e-7 of its value up to `||x||^2 = 1e8 C`.

    Distances are taken in float64 and right to 1e-15 of the largest squared distance of a row from
    the mean: what is relevant at a bandwidth is right to 1e-3 in batches up to 1e6 bandwidths wide.

    `unbiased` leaves the pairs `i = j` out and may be negative; `biased` keeps them; `linear`
    averages over the disjoint pairs `(z_1, z_2), (z_3, z_4), ...` alone: noisier, at a cost linear
    in rows, which should be in random order; an odd last one is dropped.

    Args:
        z: latents `[b, ...]`; a sample is one vector of `D` numbers, whatever its shape.
        kernel: `gaussian` or `imq`.
        scales: of the squared bandwidth, relative to the expected squared norm of the target.
        estimator: `unbiased` (a U-statistic), `biased` (a V-statistic) or `linear`.
        mean: of the target, a number or in the shape of one latent; 0 if not given.
        variance: of the target, likewise.
        covariance: of the target, `[D, D]`, in place of `variance`; a constant. It is decomposed in
            every call, for which torch waits for the device: for a fixed one it is cheaper to give
            `z @ Q` and the eigenvalues as `variance`.
        reference: latents `[m, ...]` of the same shape to compare with in place of a Gaussian, no
            gradient; at least 2. `T` is then their total variance. `linear` uses as many rows of
            the longer side as the shorter has.
        bandwidth: `target`, or `median`: half the median squared distance between rows of `z` (and
            `reference`, pooled; for `linear` between those it pairs) in place of `T`, no gradient.
            Where that is next to 0, as for collapsed latents, `T` is kept. A kernel that depends on
            the batch makes no estimator quite unbiased, and its deviation no constant.
        standardize: divide by the standard deviation under the target, in closed form for the
            bandwidth used, as of a fixed one: the value then counts standard deviations of batches
            on the target, whatever the batch size, width and kernel. Not for `biased` or
            `reference`, where there is no such form.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`: samples are then the kept
            vectors of `D = d` numbers, of any row and position, and moments of the target `[d]`.
            A `reference` is then of vectors `[m, d]`. The cost is quadratic in `b n`.

    Raises:
        ValueError: fewer than 2 samples, latents that are not finite, a scale or variance that is
            not above 0, a target whose shape does not fit, a covariance that is not symmetric
            positive definite, a reference that does not vary, two targets at once, or `linear` with
            a mask, under which neighbours are vectors of one row.

    Reference: Gretton et al., A kernel two-sample test, JMLR 2012; the closed form is the BHEP
    statistic of Henze and Zirkler, 1990; `imq` is the kernel of WAE,
    https://arxiv.org/abs/1711.01558.

    Examples:
        >>> import torch
        >>> z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> mmd_prior(z, scales=(0.5,), estimator="biased")
        tensor(0.1342)
        >>> mmd_prior(torch.zeros(64, 64), standardize=True) > 100  # collapsed
        tensor(True)
    """
    checks.check_choice("kernel", kernel, get_args(KernelName))
    checks.check_choice("estimator", estimator, get_args(MMDEstimator))
    checks.check_choice("bandwidth", bandwidth, get_args(Bandwidth))
    if not scales:
        raise ValueError("`scales` must name at least one scale, got none")
    for scale in scales:
        checks.check_positive("scales", scale)
    _check_one_target(mean, variance, covariance, reference)
    if standardize and (reference is not None or estimator == "biased"):
        raise ValueError(
            "`standardize` has no closed form for `reference` or the 'biased' estimator; "
            "leave it out, or compare with a Gaussian by 'unbiased' or 'linear'"
        )
    if latent_mask is not None and estimator == "linear":
        raise ValueError(
            "estimator='linear' compares neighbours, which under a `latent_mask` are vectors of "
            "one row; use 'unbiased', or `sigreg_prior`, whose cost is linear too"
        )
    samples = standard_form(z, mean, variance, "unbiased", latent_mask)
    x, v, kept, n = samples
    with no_autocast(x):
        if covariance is not None:
            x, v = _along_axes(x, covariance)
        of_one = z.shape[1:] if kept is None else z.shape[2:]
        y = None if reference is None else _reference(reference, of_one).to(x)
        total = v.sum() if y is None else y.var(dim=0).sum()
        if estimator == "linear":
            rows = min(len(x), len(x if y is None else y)) // 2 * 2
            x, y = x[:rows], None if y is None else y[:rows]
        pairs, of_kept = _pairs(x, estimator), _kept_pairs(kept)
        if bandwidth == "median":
            pooled, of_pooled = pairs, of_kept
            if y is not None:
                pooled = _pairs(torch.cat([x, y]), estimator)
                of_pooled = (
                    None if kept is None else _kept_pairs(F.pad(kept, (0, len(y)), value=True))
                )
            total = _half_median(pooled.detach(), total, of_pooled)
        k = _KERNELS[kernel](scales, total)
        if y is None:
            cross, own = samples.mean(k.mean(x, v)), k.self_mean(v)
        else:
            cross = k.of(_cross(x, y, estimator))
            cross = cross.mean() if kept is None else samples.mean(cross).mean()
            own = _within(k.of(_pairs(y, estimator)), len(y), estimator)
        mmd2 = _within(k.of(pairs), n, estimator, of_kept) - 2 * cross + own
        if standardize:
            count = len(x) / 2 if estimator == "linear" else n * (n - 1) / 2
            alike = covariance is None and not (isinstance(variance, Tensor) and variance.ndim)
            null = k.null_variance(v[:1], copies=len(v)) if alike else k.null_variance(v)
            mmd2 = mmd2 / (null / count).sqrt()
        return rounded(mmd2, z)


def _pairs(x: Samples, estimator: MMDEstimator) -> Float[Tensor, "..."]:
    """Squared distances of the pairs of distinct rows that an estimator averages over."""
    if estimator == "linear":
        return (x[0::2] - x[1::2]).square().sum(dim=1)
    n = len(x)  # row by row, a diagonal element comes every n + 1
    return own_distances(x).flatten()[1:].view(n - 1, n + 1)[:, :-1]


def _cross(x: Samples, y: Float[Tensor, "m D"], estimator: MMDEstimator) -> Float[Tensor, "..."]:
    if estimator == "linear":  # x_1 with y_2, x_2 with y_1, ...
        partners = y.view(-1, 2, y.shape[1]).flip(1).flatten(0, 1)
        return (x - partners).square().sum(dim=1)
    return squared_distances(x, y)


def _kept_pairs(kept: Bool[Tensor, " b"] | None) -> Bool[Tensor, "..."] | None:
    """Which of `_pairs` are of two kept rows."""
    if kept is None:
        return None
    n = len(kept)
    return (kept[:, None] & kept).flatten()[1:].view(n - 1, n + 1)[:, :-1]


def _within(
    values: Float[Tensor, "..."],
    n: Count,
    estimator: MMDEstimator,
    kept: Bool[Tensor, "..."] | None = None,
) -> Scalar:
    mean = values.mean()
    if kept is not None:
        mean = torch.where(kept, values, 0.0).sum() / (n * (n - 1))
    return mean + (1 - mean) / n if estimator == "biased" else mean  # k(x, x) = 1


def _half_median(
    distance2: Float[Tensor, "..."], total: Scalar, kept: Bool[Tensor, "..."] | None = None
) -> Scalar:
    # of two independent points of an isotropic Gaussian, ||x - y||^2 is about 2T
    if kept is None:
        half = distance2.flatten().median() / 2
    else:
        ordered = torch.where(kept, distance2, torch.inf).flatten().sort().values
        half = ordered.gather(0, (kept.sum().view(1) - 1).clamp(min=0) // 2)[0] / 2
    return torch.where(half > _COLLAPSED * total, half, total)


def _along_axes(
    x: Samples, covariance: Float[Tensor, "D D"]
) -> tuple[Samples, Float[Tensor, " D"]]:
    """Latents in the eigenbasis of the covariance, whose Gaussian has independent dimensions."""
    d = x.shape[1]
    if covariance.shape != (d, d):
        raise ValueError(f"`covariance` must have shape [{d}, {d}], got {list(covariance.shape)}")
    covariance = fp64(covariance.detach())
    if checks.reads_values(covariance):
        skew = (covariance - covariance.T).abs().max()
        failed = torch.linalg.cholesky_ex(covariance).info
        if bool(failed) or not bool(skew <= 1e-5 * covariance.abs().max()):
            raise ValueError(
                "`covariance` must be symmetric positive definite; "
                "estimate it from more latents than dimensions, or add to its diagonal"
            )
    variances, axes = torch.linalg.eigh(covariance)
    return x @ axes.to(x), variances.to(x)


def _reference(reference: Float[Tensor, "m *n d"], shape: Sequence[int]) -> Float[Tensor, "m D"]:
    checks.check_latents("reference", reference, shape)
    if len(reference) < 2:
        raise ValueError(f"`reference` needs at least 2 samples, got shape {list(reference.shape)}")
    if checks.reads_values(reference) and bool((reference == reference[:1]).all()):
        raise ValueError("`reference` must vary; all of its rows are equal")
    return fp64(reference.detach()).flatten(1)


def _check_one_target(
    mean: Moment | None, variance: Moment, covariance: Tensor | None, reference: Tensor | None
) -> None:
    with_variance = isinstance(variance, Tensor) or variance != 1
    if covariance is not None and with_variance:
        raise ValueError("give `variance` or `covariance`, not both")
    if reference is not None and (mean is not None or covariance is not None or with_variance):
        raise ValueError(
            "`reference` is the target itself; give no `mean`, `variance` or `covariance` with it"
        )
