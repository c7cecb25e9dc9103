"""Sliced priors: compare one-dimensional projections of latents, for very wide ones."""

import torch

from cyclevae._base import checks
from cyclevae._base.draws import seeded
from cyclevae._base.precision import fp32, no_autocast, rounded
from cyclevae._base.types import Estimator, LatentMaskLike, Latents, Number, Scalar
from cyclevae.model.door import at_the_door
from cyclevae.priors.samples import Moment, standard_form


@at_the_door
def sigreg_prior(
    z: Latents,
    *,
    directions: int = 256,
    knots: int = 17,
    bound: Number = 3.0,
    mean: Moment | None = None,
    variance: Moment = 1.0,
    estimator: Estimator = "unbiased",
    generator: torch.Generator | None = None,
    latent_mask: LatentMaskLike | None = None,
) -> Scalar:
    """SIGReg: characteristic functions of random projections against that of a Gaussian.

    The mean over fresh random unit vectors `u` of the statistic of Epps and Pulley,
    `T(u) = b int |f(t) - e^(-t^2/2)|^2 e^(-t^2/2) dt` with `f(t) = mean_j e^(i t u.x_j)`, of the
    latents `x` standardised by the target, by the trapezoidal rule on [-bound, bound]. Its cost is
    linear in rows: `b directions (d + knots)`.

    `biased` is this statistic, LeJEPA's. Under the target its mean is the same for any batch size:
    `int (1 - e^(-t^2)) e^(-t^2/2) dt`, which is `sqrt(2 pi) (1 - 1/sqrt 3) = 1.0594` where nothing
    is cut off and 1.0525 with the default bound. `unbiased` leaves the pairs of a row with itself
    out of `|f|^2`, so that its mean is `b` times the discrepancy itself, for any latents: 0 under
    the target. It may be negative. Untruncated it is `b sqrt(2 pi)` times the mean over `u` of
    `mmd_prior` of the projections with bandwidth 1.

    Args:
        z: latents `[b, ...]`; a sample is one vector, whatever its shape.
        directions: how many projections; the more, the less noise.
        knots: of the trapezoidal rule on [0, bound].
        bound: where the integral is cut off.
        mean: of the target, a number or in the shape of one latent; 0 if not given.
        variance: of the target, likewise.
        estimator: `unbiased` or `biased`.
        generator: random state of the directions, on the device of `z`. On several ranks the
            directions must be the same: seed it alike on all of them, for example with the step.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`: samples are then the kept
            vectors of `D = d` numbers, of any row and position, and moments of the target `[d]`.

    Raises:
        ValueError: fewer than 2 samples, latents that are not finite, a variance or bound that is
            not above 0, moments whose shape does not fit, no direction or fewer than 2 knots.

    Reference: LeJEPA, https://arxiv.org/abs/2511.08544; Epps and Pulley, Biometrika 1983.

    Examples:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> z = torch.randn(64, 8, **seeded(generator))
        >>> good = sigreg_prior(z, generator=generator)
        >>> collapsed = sigreg_prior(0.1 * z, generator=generator)
        >>> bool(good.abs() < 0.5), bool(collapsed > 20)
        (True, True)
    """
    samples = standard_form(z, mean, variance, estimator, latent_mask)
    x, v, _, n = samples
    checks.check_positive("bound", bound)
    for name, value, least in (("directions", directions, 1), ("knots", knots, 2)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}")
    d = x.shape[1]
    # drawn alike for latents of any precision
    u = torch.randn(d, directions, dtype=fp32(z).dtype, device=x.device, **seeded(generator)).to(x)
    u = u / torch.linalg.vector_norm(u, dim=0)
    t = torch.linspace(0, bound, knots, dtype=x.dtype, device=x.device)
    target = (-t.square() / 2).exp()
    with no_autocast(x):
        projections = (x / v.sqrt()) @ u
        angle = projections[..., None] * t
        real, imaginary = samples.mean(angle.cos()), samples.mean(angle.sin())
        gap = (real - target).square() + imaginary.square()
        if estimator == "unbiased":
            gap = gap - (1 - real.square() - imaginary.square()) / (n - 1)
        # the integrand is even: twice the half that is computed
        return rounded(2 * n * torch.trapezoid(gap * target, t, dim=1).mean(), z)
