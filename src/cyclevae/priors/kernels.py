"""Kernels that mix Gaussian kernels, and their expectations under a Gaussian in closed form."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base.derivatives import transformed
from cyclevae._base.types import Number, Scalar

Samples = Float[Tensor, "b D"]
PerDimension = Float[Tensor, " D"]
PerComponent = Float[Tensor, " k"]


@dataclass(frozen=True)
class Kernel:
    """`k(x, y) = sum_k weights_k exp(-||x - y||^2 / (2 bandwidths2_k))`.

    Expectations are over independent `z, z' ~ N(0, diag(variance))`. Gaussians convolve to a
    Gaussian, and variances add.

    Attributes:
        of: the kernel as a function of squared distances, where there is a shorter way than the
            sum over components.
        bandwidths2: of the components, squared.
        weights: of the components; they add up to 1.
        far: bandwidths and weights of the same mixture in more components, which holds also for
            points far from the target.
    """

    of: Callable[[Tensor], Tensor]
    bandwidths2: PerComponent
    weights: PerComponent
    far: tuple[Float[Tensor, " far"], Float[Tensor, " far"]] | None = None

    def mean(self, x: Samples, variance: PerDimension) -> Float[Tensor, " b"]:
        """`E k(x_i, z)`.

        Per component, with `s = bandwidths2_k` and `v = variance`:
        `prod_d (s/(s + v_d))^(1/2) exp(-x_d^2 / (2 (s + v_d)))`.
        """
        bandwidths2, weights = self.far or (self.bandwidths2, self.weights)
        s, typical = bandwidths2[:, None], variance.mean()
        # 1/(s + v) = (1 + tilt)/(s + typical): the product of matrices, which a GPU may be told to
        # round (TF32), carries only what differs between dimensions.
        tilt = (typical - variance) / (s + variance)
        square = x.square()
        distance2 = (square.sum(dim=1, keepdim=True) + square @ tilt.T) / (s.T + typical)
        log_scale = -(variance / s).log1p().sum(dim=1) / 2
        return ((log_scale - distance2 / 2).exp() * weights).sum(dim=1)

    def self_mean(self, variance: PerDimension) -> Scalar:
        """`E k(z, z')`: variances add once more."""
        return (self._log_self_means(variance).exp() * self.weights).sum()

    def null_variance(self, variance: PerDimension, copies: int = 1) -> Scalar:
        """`E h(z, z')^2` of the centred kernel `h = k - E k(., z') - E k(z, .) + E k(z, z')`.

        `copies`: how often the dimensions are there; equal ones are cheaper told by their number.

        It is `E k^2 - 2 E (E k(z, z' | z))^2 + (E k)^2`. For two components, with `p = v/s` and
        `q = v/s'`, the three expectations are `prod_d (1 + 2p + 2q + c p q)^(-1/2)` with
        `c = 0, 3, 4`. Written by their ratios to the last, nothing cancels in wide latents.
        """
        p = variance / self.bandwidths2[:, None]
        log_self = self._log_self_means(variance) * copies
        base = log_self[:, None] + log_self
        log_square, log_mean = torch.zeros_like(base), torch.zeros_like(base)
        for share in torch.split(p / (1 + 2 * p), 256, dim=1):  # bounds the memory
            product = share[:, None] * share
            log_square = log_square - (-4 * product).log1p().sum(dim=2) * (copies / 2)
            log_mean = log_mean - (-product).log1p().sum(dim=2) * (copies / 2)
        excess = _excess(base, log_square) - 2 * _excess(base, log_mean)
        return (excess * self.weights[:, None] * self.weights).sum()

    def _log_self_means(self, variance: PerDimension) -> PerComponent:
        return -(2 * variance / self.bandwidths2[:, None]).log1p().sum(dim=1) / 2


def gaussian_kernel(scales: Sequence[Number], total: Scalar) -> Kernel:
    """The mean over scales of `exp(-d^2 / (2 b))` with `b = scale * total`."""
    bandwidths2 = torch.stack([scale * total for scale in scales])

    def of(distance2: Tensor) -> Tensor:
        return torch.stack([(-distance2 / (2 * b)).exp() for b in bandwidths2]).mean(dim=0)

    return Kernel(of, bandwidths2, torch.full_like(bandwidths2, 1 / len(scales)))


def imq_kernel(scales: Sequence[Number], total: Scalar) -> Kernel:
    """The mean over scales of the inverse multiquadric `C/(C + d^2)` with `C = scale * 2 total`.

    As `C/(C + d^2) = int_0^inf e^-s exp(-s d^2/C) ds`, it is a mixture of Gaussian kernels. The
    expectations over both points take the integral by 48 nodes, to 1e-9 of their value; that of a
    point `x` by 112, to 1e-9 up to `||x||^2 = 1e6 C` and 1e-7 up to `1e8 C`. The kernel itself is
    exact.
    """
    constants = torch.stack([2 * scale * total for scale in scales])

    def of(distance2: Tensor) -> Tensor:
        return torch.stack([c / (c + distance2) for c in constants]).mean(dim=0)

    def mixture(nodes: list[float], weights: list[float]) -> tuple[PerComponent, PerComponent]:
        s, w = (
            torch.tensor(values, dtype=total.dtype, device="cpu").to(
                total.device, non_blocking=True
            )
            for values in (nodes, weights)
        )
        return (constants[:, None] / (2 * s)).flatten(), w.repeat(len(scales)) / len(scales)

    return Kernel(of, *mixture(*_NEAR), far=mixture(*_FAR))


def squared_distances(x: Float[Tensor, "b D"], y: Float[Tensor, "m D"]) -> Float[Tensor, "b m"]:
    """`||x_i - y_j||^2`, all pairs."""
    # ||a||^2 + ||b||^2 - 2ab cancels far from 0, also to slightly below it
    shift = y.mean(dim=0).detach()
    x, y = x - shift, y - shift
    square = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return (square - 2 * x @ y.T).clamp(min=0)


def own_distances(x: Float[Tensor, "b D"]) -> Float[Tensor, "b b"]:
    """`||x_i - x_j||^2`, all pairs of one sample, by one product of matrices in each direction."""
    if torch.compiler.is_compiling() or transformed(x):
        return squared_distances(x, x)
    distances: Tensor = _OwnDistances.apply(x)  # type: ignore[no-untyped-call]
    return distances


class _OwnDistances(torch.autograd.Function):
    """Autograd takes two products for the gradient of `x @ x.T`; their sum needs one.

    With the gradient `g` and `s = g + g^T` it is `2 (s 1 x - s x)`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return squared_distances(x, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x, both = x - x.mean(dim=0).detach(), gradient + gradient.T
        result: Tensor = 2 * (both.sum(dim=1, keepdim=True) * x - both @ x)
        return result


def _excess(base: Tensor, log_ratio: Tensor) -> Tensor:
    """`e^base (e^log_ratio - 1)`, where `e^log_ratio` may overflow though the product does not."""
    return -(base + log_ratio).exp() * (-log_ratio).expm1()


Rule = tuple[list[float], list[float]]  # nodes and weights of int_0^inf e^-s f(s) ds


def _double_exponential() -> Rule:
    """Trapezoidal in `t` with `s = exp(t - e^-t)`.

    Double exponential quadrature (Takahasi and Mori, 1974), which does not mind that `f` may vary
    fastest next to 0, where the nodes of Gauss and Laguerre are sparse.
    """
    first, last, count = -3.0, 3.2, 48
    step = (last - first) / (count - 1)
    t = [first + i * step for i in range(count)]
    s = [math.exp(t_i - math.exp(-t_i)) for t_i in t]
    weights = [
        step * math.exp(-s_i) * s_i * (1 + math.exp(-t_i)) for t_i, s_i in zip(t, s, strict=True)
    ]
    return s, weights


def _exponential() -> Rule:
    """Trapezoidal in `log s`: as exact for an `f` that varies at 1e-8 as for one that does at 1."""
    first, last, count = -36.0, 3.65, 112
    step = (last - first) / (count - 1)
    s = [math.exp(first + i * step) for i in range(count)]
    return s, [step * math.exp(-s_i) * s_i for s_i in s]


_NEAR, _FAR = _double_exponential(), _exponential()
