"""Maximum mean discrepancy to a Gaussian."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cyclevae import _checks
from cyclevae._precision import no_autocast
from cyclevae._types import Estimator, Latents, Number, Scalar
from cyclevae.kernels import gaussian_gram, gaussian_mean, gaussian_self
from cyclevae.priors._samples import Moment, standard_form


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
    x, v = standard_form(z, mean, variance, estimator)
    if not scales:
        raise ValueError("`scales` must name at least one scale, got none")
    for scale in scales:
        _checks.check_positive("scales", scale)
    with no_autocast(x):
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
