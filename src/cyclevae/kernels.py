"""Gaussian kernels, and their means against a Gaussian in closed form."""

from jaxtyping import Float
from torch import Tensor

Samples = Float[Tensor, "b d"]
PerDimension = Float[Tensor, " d"]


def gaussian_gram(x: Samples, bandwidth2: Tensor) -> Float[Tensor, "b b"]:
    """`k(x_i, x_j) = exp(-||x_i - x_j||^2 / (2 bandwidth2))`, all pairs."""
    square = x.square().sum(dim=1)
    # ||a||^2 + ||b||^2 - 2ab cancels to slightly below 0 for equal points
    distance2 = (square[:, None] + square[None, :] - 2 * x @ x.T).clamp(min=0)
    return (-distance2 / (2 * bandwidth2)).exp()


def gaussian_mean(x: Samples, bandwidth2: Tensor, variance: PerDimension) -> Float[Tensor, " b"]:
    """`E k(x_i, z)` for `z ~ N(0, diag(variance))`.

    `prod_d (s/(s + v_d))^(1/2) exp(-x_d^2 / (2 (s + v_d)))` with `s = bandwidth2`: Gaussians
    convolve to a Gaussian, and variances add.
    """
    log_scale = -(variance / bandwidth2).log1p().sum() / 2
    return (log_scale - (x.square() / (bandwidth2 + variance)).sum(dim=1) / 2).exp()


def gaussian_self(bandwidth2: Tensor, variance: PerDimension) -> Float[Tensor, ""]:
    """`E k(z, z')` for independent `z, z' ~ N(0, diag(variance))`: variances add once more."""
    return (-(2 * variance / bandwidth2).log1p().sum() / 2).exp()
