"""Latents as samples of a distribution: checked, flat, centred, in float64."""

from typing import NamedTuple, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.masked import as_latent_mask, kept_vectors
from cyclevae._base.precision import fp64
from cyclevae._base.types import Estimator, LatentMaskLike, Latents, Number

Moment = Number | Float[Tensor, "..."]


class Samples(NamedTuple):
    """Samples of a distribution, and what they are compared with.

    Attributes:
        x: one in a row, less the mean of the target.
        variance: of the target.
        kept: which are no padding; all if None.
        number: how many are kept, which a mask tells on its device alone.
    """

    x: Float[Tensor, "b D"]
    variance: Float[Tensor, " D"]
    kept: Bool[Tensor, " b"] | None
    number: int | Float[Tensor, ""]

    def mean(self, values: Float[Tensor, "b ..."]) -> Float[Tensor, "..."]:
        """Of a value for each sample."""
        if self.kept is None:
            return values.mean(dim=0)
        return self.only(values).sum(dim=0) / self.number

    def only(self, values: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """0 where a sample is padding."""
        if self.kept is None:
            return values
        return torch.where(self.kept.view(-1, *[1] * (values.ndim - 1)), values, 0.0)

    def most(self) -> int:
        """How many there are, or may be where that is not read."""
        known = self.kept is not None and checks.reads_values(self.kept)
        return int(self.number) if known else len(self.x)


def standard_form(
    z: Latents,
    mean: Moment | None,
    variance: Moment,
    estimator: Estimator,
    latent_mask: LatentMaskLike | None = None,
) -> Samples:
    """Centred latents, flat, and the target's variances, in float64: see `fp64`.

    With a mask, a sample is a kept vector.
    """
    kept: Tensor | None = None
    number: int | Tensor = len(z)
    if latent_mask is not None:
        z, kept = kept_vectors(z, as_latent_mask("latent_mask", latent_mask, z.shape))
        number = fp64(kept.sum())
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
    return Samples(x, _per_dimension("variance", variance, z, x), kept, number)


def _per_dimension(name: str, moment: Moment, z: Tensor, x: Tensor) -> Tensor:
    if not isinstance(moment, Tensor):
        return x.new_full((x.shape[1],), moment)
    if moment.ndim and moment.shape != z.shape[1:]:
        raise ValueError(
            f"`{name}` must be a number or have the shape of one latent {list(z.shape[1:])}, "
            f"got {list(moment.shape)}"
        )
    return moment.to(x).expand(z.shape[1:]).reshape(-1)
