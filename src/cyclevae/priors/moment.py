"""Moment priors."""

from cyclevae._types import Estimator, Latents, Scalar
from cyclevae.priors._samples import Moment, standard_form


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
    x, v = standard_form(z, mean, variance, estimator)
    n = len(x)
    m, s2 = x.mean(dim=0), x.var(dim=0)
    if estimator == "biased":
        return m.square().sum() + (s2 - v).square().sum()
    mean_term = m.square() - s2 / n
    variance_term = (n - 1) / (n + 1) * s2.square() - 2 * s2 * v + v.square()
    return (mean_term + variance_term).sum()
