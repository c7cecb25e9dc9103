"""Latents as samples of a distribution: checked, flat, centred, in float64."""

from typing import get_args

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.precision import fp64
from cyclevae._base.types import Estimator, Latents, Number

Moment = Number | Float[Tensor, "..."]


def standard_form(
    z: Latents, mean: Moment | None, variance: Moment, estimator: Estimator
) -> tuple[Float[Tensor, "b D"], Float[Tensor, " D"]]:
    """Centred latents, flat, and the target's variances, in float64: see `fp64`."""
    checks.check_latents("z", z)
    checks.warn_without_graph("z", z, cure=checks.ENCODE_WITH_GRAPH)
    checks.check_choice("estimator", estimator, get_args(Estimator))
    if len(z) < 2:
        raise ValueError(
            f"`z` needs at least 2 samples for batch statistics, got shape {list(z.shape)}; "
            "raise the batch size or give the term weight 0"
        )
    x = rearrange(fp64(z), "b ... -> b (...)")
    if mean is not None:
        x = x - _per_dimension("mean", mean, z, x)
    checks.check_variance("variance", variance, z.shape[1:])
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
