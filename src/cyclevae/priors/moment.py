"""Moment priors: mean and spread of a batch against those of a Gaussian."""

from math import sqrt
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.precision import fp64, no_autocast, rounded
from cyclevae._base.types import Count, Estimator, LatentMaskLike, Latents, Number, Scalar
from cyclevae.model.door import at_the_door
from cyclevae.priors.samples import Moment, Samples, standard_form

MomentForm = Literal[
    "diagonal", "bures", "kl", "norm", "hinge", "covariance", "full_kl", "full_bures"
]
Rows = Float[Tensor, "b D"]
Mean = Float[Tensor, " D"]
PerDimension = Float[Tensor, " D"]
Factor = Float[Tensor, " D"] | Float[Tensor, "D D"]  # standard deviations, or a Cholesky factor

_WHITENED = ("kl", "norm", "full_kl")
_TAKE_COVARIANCE = ("norm", "covariance", "full_kl", "full_bures")
_SMALL = 1e-6  # of a variance, relative to the target's: the logarithm goes on straight below it


@at_the_door
def moment_prior(
    z: Latents,
    *,
    form: MomentForm = "diagonal",
    mean: Moment | None = None,
    variance: Moment = 1.0,
    covariance: Float[Tensor, "D D"] | None = None,
    estimator: Estimator = "unbiased",
    threshold: Number = 1.0,
    latent_mask: LatentMaskLike | None = None,
) -> Scalar:
    """Distance of a batch's mean and spread from those of a Gaussian.

    With the batch's mean `m`, variances `s^2` and covariance `S` (divided by n - 1), `d = m - mean`
    and the target's variances `v` and covariance `C` (`diag(v)` if not given):

    - `diagonal`: `||d||^2 + ||s^2 - v||^2`.
    - `bures`: `||d||^2 + ||s - sqrt v||^2`, the squared 2-Wasserstein distance per dimension.
    - `kl`: `1/2 sum [(s^2 + d^2)/v - 1 - log s^2/v]`.
    - `norm`: `mean_i (||x_i||^2/D - 1)^2` of the latents `x` whitened by the target.
    - `hinge`: `sum max(0, threshold sqrt v - s)`; one-sided, and it does not compare means.
    - `covariance`: `||d||^2 + ||S - C||_F^2`.
    - `full_kl`: `1/2 [tr C^-1 S + d^T C^-1 d - D + log det C - log det S]`.
    - `full_bures`: `||d||^2 + tr S + tr C - 2 tr (C^1/2 S C^1/2)^1/2`.

    `biased` is this plug-in value, positive even for latents that follow the target. `unbiased` has
    the form's value at the true moments as its mean, for independent Gaussian latents whatever
    their moments, and may be negative; `hinge` has it only for latents of the target's variances,
    `norm` for any latents, less the 2/D of the target itself. `kl` and `full_kl` have it as far as
    all batches have variances above `1e-6 v`: below `s^2 = 1e-6 v` (in `full_kl`: along the axes of
    `C^-1/2 S C^-1/2`) the logarithm is continued by its tangent, so that latents that nearly
    collapse have a finite gradient, which spreads them. Rows that are equal get equal gradients, as
    from any statistic of a batch: nothing here parts latents that have collapsed exactly.
    `full_kl` and `full_bures` take a singular value decomposition, for which torch waits for the
    device. Computed in float64.

    Args:
        z: latents `[b, ...]`; a sample is one vector of `D` numbers, whatever its shape.
        form: what is compared, and how.
        mean: of the target, a number or in the shape of one latent; 0 if not given.
        variance: of the target, likewise.
        covariance: of the target, `[D, D]`, in place of `variance`; for `norm`, `covariance`,
            `full_kl` and `full_bures`.
        estimator: `unbiased` or `biased`; `full_bures` has the second only.
        threshold: of `hinge`, in standard deviations of the target.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`: samples are then the kept
            vectors of `D = d` numbers, of any row and position, and moments of the target `[d]`.

    Raises:
        ValueError: fewer than 2 samples (3 for an unbiased `covariance`, D + 1 for `full_kl`),
            latents that are not finite, a variance or threshold that is not above 0, moments whose
            shape does not fit, a covariance that is not symmetric positive definite, or an option
            that the form has no use for.

    Reference: the finite-batch corrections are moments of Wishart matrices (Muirhead, Aspects of
    Multivariate Statistical Theory, 1982). Hinge: VICReg, https://arxiv.org/abs/2105.04906.

    Examples:
        >>> import torch
        >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # variances 2 and 0
        >>> moment_prior(z, estimator="biased")
        tensor(2.)
        >>> moment_prior(z, form="hinge", threshold=0.5, estimator="biased")
        tensor(0.5000)
        >>> moment_prior(z, form="full_bures", covariance=torch.eye(2) * 2, estimator="biased")
        tensor(2.)
    """
    checks.check_choice("form", form, get_args(MomentForm))
    samples = standard_form(z, mean, variance, estimator, latent_mask)
    x, v, _, n = samples
    _check_use(samples, form, variance, covariance, estimator, threshold)
    unbiased = estimator == "unbiased"
    with no_autocast(x):
        scale = v.sqrt() if covariance is None else _factor(covariance, x)
        if form in _WHITENED:
            x = _whiten(x, scale)
        m = samples.mean(x)
        c = samples.only(x - m)
        c = samples.only(c - samples.mean(c))  # the first mean of latents far from 0 was rounded
        match form:
            case "diagonal":
                distance = _diagonal(m, c, n, v, unbiased)
            case "bures":
                distance = _bures(m, c, n, scale, unbiased)
            case "kl":
                distance = _kl(m, c, n, unbiased)
            case "norm":
                distance = samples.mean((x.square().mean(dim=1) - 1).square())
                if unbiased:
                    distance = distance - 2 / x.shape[1]
            case "hinge":
                distance = _hinge(c, n, scale, threshold, unbiased)
            case "covariance":
                distance = _covariance(m, c, n, scale, unbiased)
            case "full_kl":
                distance = _full_kl(m, c, n, unbiased)
            case "full_bures":
                distance = _full_bures(m, c, n, scale)
        return rounded(distance, z)


def _diagonal(m: Mean, c: Rows, n: Count, variance: PerDimension, unbiased: bool) -> Scalar:
    s2 = _variance(c, n)
    distance = _squared_mean(m, c, n, unbiased) + (s2 - variance).square().sum()
    # E s^4 = (1 + 2/(n - 1)) sigma^4
    return distance - 2 / (n + 1) * s2.square().sum() if unbiased else distance


def _bures(m: Mean, c: Rows, n: Count, std: PerDimension, unbiased: bool) -> Scalar:
    s = _std(c, n)
    distance = _squared_mean(m, c, n, unbiased) + (s - std).square().sum()
    if not unbiased:
        return distance
    excess = 1 / _mean_chi(n - 1) - 1  # E s is below sigma
    return distance - 2 * excess.to(c.dtype) * (std * s).sum()


def _kl(m: Mean, c: Rows, n: Count, unbiased: bool) -> Scalar:
    mean_log = c.shape[1] * _mean_log_det(n - 1, 1)
    return _kl_of_spreads(m, c, n, _variance(c, n), mean_log, unbiased)


def _full_kl(m: Mean, c: Rows, n: Count, unbiased: bool) -> Scalar:
    mean_log = _mean_log_det(n - 1, c.shape[1])
    return _kl_of_spreads(m, c, n, _spreads(c, n).square(), mean_log, unbiased)


def _kl_of_spreads(
    m: Mean, c: Rows, n: Count, s2: PerDimension, mean_log: Tensor, unbiased: bool
) -> Scalar:
    """From N(0, I), of a Gaussian with the variances `s2` along axes of its own."""
    logs = s2.clamp(min=_SMALL).log() + (s2 / _SMALL).clamp(max=1) - 1
    divergence = (_squared_mean(m, c, n, unbiased) + (s2 - 1 - logs).sum()) / 2
    return divergence + mean_log.to(c.dtype) / 2 if unbiased else divergence


def _hinge(c: Rows, n: Count, std: PerDimension, threshold: Number, unbiased: bool) -> Scalar:
    hinge = (threshold * std - _std(c, n)).relu().sum()
    if not unbiased:
        return hinge
    # s = std chi_k / sqrt k, and E [chi_k; chi_k < a] = E chi_k P(chi_(k+1) < a)
    half = _half(n - 1)
    cut = half * threshold**2
    below: Tensor = torch.special.gammainc(half, cut)
    weighted: Tensor = torch.special.gammainc(half + 0.5, cut)
    floor = threshold * below - _mean_chi(n - 1) * weighted
    bias = floor - max(0.0, threshold - 1)  # less the form's own value at the target
    return hinge - bias.to(c.dtype) * std.sum()


def _covariance(m: Mean, c: Rows, n: Count, scale: Factor, unbiased: bool) -> Scalar:
    rows, d = c.shape
    k = n - 1
    gram = (c @ c.T if rows < d else c.T @ c) / k
    square = gram.square().sum()  # tr S^2, either way
    cross = _colour(c, scale).square().sum() / k  # tr S C
    own = (scale.square() if scale.ndim == 1 else scale.T @ scale).square().sum()  # tr C^2
    distance = _squared_mean(m, c, n, unbiased) + square - 2 * cross + own
    if not unbiased:
        return distance
    # tr S^2 less the unbiased estimate of tr Sigma^2, for the batch's true covariance Sigma, from
    # E tr S^2 = ((k + 1) tr Sigma^2 + tr^2 Sigma) / k and E tr^2 S = tr^2 Sigma + 2 tr Sigma^2 / k
    trace = gram.diagonal().sum()
    return distance - (k * trace.square() + (k - 2) * square) / ((k + 2) * (k - 1))


def _full_bures(m: Mean, c: Rows, n: Count, scale: Factor) -> Scalar:
    spreads = _spreads(_colour(c, scale), n)
    # Along an axis without spread the subgradient is any direction; take the smallest, which is 0.
    rounding = max(c.shape) * torch.finfo(c.dtype).eps * spreads.max()
    fidelity = torch.where(spreads > rounding, spreads, spreads.detach()).sum()
    return (
        _squared_mean(m, c, n, False) + _variance(c, n).sum() + scale.square().sum() - 2 * fidelity
    )


# --- moments of the batch ---------------------------------------------------------------------


def _squared_mean(m: Mean, c: Rows, n: Count, unbiased: bool) -> Scalar:
    return m.square().sum() - _variance(c, n).sum() / n if unbiased else m.square().sum()


def _variance(c: Rows, n: Count) -> PerDimension:
    return c.square().sum(dim=0) / (n - 1)


def _std(c: Rows, n: Count) -> PerDimension:
    # A norm has the gradient 0 at 0, where the root of a variance has none.
    norm: Tensor = torch.linalg.vector_norm(c, dim=0)
    return norm / _root(n - 1)


def _root(k: Count) -> float | Tensor:
    return k.sqrt() if isinstance(k, Tensor) else sqrt(k)


def _spreads(c: Rows, n: Count) -> Float[Tensor, " axes"]:
    """Standard deviations along the axes of the batch's own ellipsoid."""
    # torch raises at values that are not finite; the mean then is not either, nor will the loss be
    values: Tensor = torch.linalg.svdvals(c.nan_to_num(0.0, 0.0, 0.0))
    return values / _root(n - 1)


# --- moments of what a batch of the target would have, in float64, which some devices lack ------


def _half(k: Count) -> Scalar:
    if isinstance(k, Tensor):
        return k / 2
    return torch.full((), k / 2, dtype=torch.float64, device="cpu")


def _mean_chi(k: Count) -> Scalar:
    """`E s = E chi_k / sqrt k` of k + 1 standard normals."""
    half = _half(k)
    return ((half + 0.5).lgamma() - half.lgamma()).exp() / half.sqrt()


def _mean_log_det(k: Count, d: int) -> Scalar:
    """`E log det S` of k + 1 standard normals in d dimensions."""
    half = _half(k)
    halves = half + torch.arange(1 - d, 1, dtype=half.dtype, device=half.device) / 2
    return (halves.digamma() - half.log()).sum()


# --- the target -------------------------------------------------------------------------------


def _factor(covariance: Tensor, x: Rows) -> Float[Tensor, "D D"]:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(fp64(covariance))
    if checks.reads_values(covariance):
        skew = (covariance - covariance.T).abs().max()
        if bool(failed) or not bool(skew <= 1e-5 * covariance.abs().max()):
            raise ValueError(
                "`covariance` must be symmetric positive definite; "
                "estimate it from more latents than dimensions, or add to its diagonal"
            )
    return factor.to(x)


def _whiten(x: Rows, scale: Factor) -> Rows:
    if scale.ndim == 1:
        return x / scale
    white: Tensor = torch.linalg.solve_triangular(scale, x.T, upper=False)
    return white.T


def _colour(x: Rows, scale: Factor) -> Rows:
    return x * scale if scale.ndim == 1 else x @ scale


def _check_use(
    samples: Samples,
    form: MomentForm,
    variance: Moment,
    covariance: Tensor | None,
    estimator: Estimator,
    threshold: Number,
) -> None:
    n, d = samples.most(), samples.x.shape[1]
    checks.check_positive("threshold", threshold)
    if threshold != 1 and form != "hinge":
        raise ValueError(f"`threshold` is of the form 'hinge' only, got form {form!r}")
    if covariance is not None:
        if form not in _TAKE_COVARIANCE:
            raise ValueError(
                f"`covariance` is for the forms {', '.join(map(repr, _TAKE_COVARIANCE))}, "
                f"got form {form!r}; give `variance` instead"
            )
        if isinstance(variance, Tensor) or variance != 1:
            raise ValueError("give `variance` or `covariance`, not both")
        if covariance.shape != (d, d):
            raise ValueError(
                f"`covariance` must have shape [{d}, {d}], got {list(covariance.shape)}"
            )
    if form == "full_bures" and estimator == "unbiased":
        raise ValueError("form 'full_bures' has no unbiased estimator; say estimator='biased'")
    needed = {"covariance": 3 if estimator == "unbiased" else 2, "full_kl": d + 1}.get(form, 2)
    if n < needed:
        raise ValueError(
            f"`z` needs at least {needed} samples of {d} dimensions for form {form!r}, got {n}; "
            "raise the batch size, pool the rows of all ranks or take another form"
        )
