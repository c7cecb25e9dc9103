"""What a model predicts of a noised latent: pairs of coefficients, and one solve between them."""

from collections.abc import Iterable
from typing import get_args

import torch
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.precision import fp32
from cyclevae._base.types import Latents, Prediction, Time

Amplitudes = tuple[Time, Time]


def noise_latents(latents: Latents, noise: Latents, alpha: Time, sigma: Time) -> Latents:
    """Noise latents: `z_t = alpha z + sigma epsilon`."""
    alpha, sigma = rowwise(latents, alpha, sigma)
    return alpha * latents + sigma * noise


def coefficients(
    prediction: Prediction, alpha: Time, sigma: Time, rates: Amplitudes | None = None
) -> Amplitudes:
    """What a model predicts as `a x0 + b epsilon`: the pair `(a, b)`, `[b]` each.

    Beside `z_t = alpha x0 + sigma epsilon` this is all that a conversion needs, in any schedule.
    That of `velocity` are the `rates` of the schedule.

    Raises:
        ValueError: `velocity` without rates.

    Examples:
        >>> coefficients("v", torch.tensor([0.6]), torch.tensor([0.8]))
        (tensor([-0.8000]), tensor([0.6000]))
    """
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    match prediction:
        case "epsilon":
            return zero, one
        case "x0":
            return one, zero
        case "v":
            return -sigma, alpha
        case "velocity":
            if rates is None:
                raise ValueError(
                    "`velocity` is (alpha', sigma'), which amplitudes alone do not tell: give "
                    "rates=latent_process.rates(time)"
                )
            return rates


def convert(
    value: Latents,
    z_t: Latents,
    alpha: Time,
    sigma: Time,
    *,
    source: Prediction,
    target: Prediction,
    rates: Amplitudes | None = None,
) -> Latents:
    """Convert between `epsilon`, `x0`, `v = alpha epsilon - sigma x0` and `velocity`.

    A prediction `p = a x0 + b epsilon` and `z_t = alpha x0 + sigma epsilon` are two equations in x0
    and epsilon, whose solution gives every other one, in any schedule: with `D = alpha b - sigma a`
    and the coefficients `a'`, `b'` of the target,
    `p' = ((a' b - b' a) z_t + (alpha b' - sigma a') p) / D`.

    Computed in fp32 or better: in bf16 at full noise a perfect epsilon decodes to an error of 15.
    At `alpha = 0`, epsilon says nothing of x0, and at `sigma = 0`, x0 nothing of epsilon: these
    conversions divide by zero. A `velocity` is `alpha' x0 + sigma' epsilon`, with `rates` of
    `(alpha', sigma')`: see `LatentProcess.rates`.

    Reference: Salimans and Ho, https://arxiv.org/abs/2202.00512, appendix D, where
    `alpha^2 + sigma^2 = 1`.

    Examples:
        >>> z_t, v = torch.tensor([[1.0]]), torch.tensor([[0.5]])
        >>> alpha, sigma = torch.tensor([0.6]), torch.tensor([0.8])
        >>> convert(v, z_t, alpha, sigma, source="v", target="x0")
        tensor([[0.2000]])
    """
    checks.check_choice("source", source, get_args(Prediction))
    checks.check_choice("target", target, get_args(Prediction))
    checks.check_same_shape("value", value, "z_t", z_t)
    checks.check_tensor("alpha", alpha)
    checks.check_tensor("sigma", sigma)
    value, z_t = fp32(value), fp32(z_t)
    if source == target:
        return value
    if rates is not None:
        rates = fp32(rates[0]), fp32(rates[1])
    known, wanted, pivot = solve(source, target, fp32(alpha), fp32(sigma), rates)
    known, wanted, pivot = rowwise(value, known, wanted, pivot)
    return (known * z_t + wanted * value) / pivot


def solve(
    source: Prediction, target: Prediction, alpha: Time, sigma: Time, rates: Amplitudes | None
) -> tuple[Time, Time, Time]:
    """What multiplies `z_t` and a prediction in another prediction, and what divides both."""
    (a, b), (to_a, to_b) = (coefficients(name, alpha, sigma, rates) for name in (source, target))
    return to_a * b - to_b * a, alpha * to_b - sigma * to_a, alpha * b - sigma * a


def rowwise(like: Tensor, *scales: Tensor) -> Iterable[Tensor]:
    """Scales `[b]` in a shape that multiplies the rows of a tensor."""
    shape = (-1,) + (1,) * (like.ndim - 1)
    return (scale.reshape(shape) for scale in scales)
