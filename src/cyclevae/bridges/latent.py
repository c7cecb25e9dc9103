"""Latent bridges: from a text to the `z_hat` that crosses a text cycle."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.draws import seeded
from cyclevae._base.masked import only_kept
from cyclevae._base.precision import fp32, fp64
from cyclevae._base.types import LatentMask, LatentMaskLike, Latents, MaskLike, Number, Time, Tokens
from cyclevae.gradient_policy.gate import refuse_reentrant
from cyclevae.gradient_policy.policy import STOP_GRADIENT, GradientPolicy
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.passes import T2L, t2l
from cyclevae.processes.latent import LatentProcess, direction
from cyclevae.processes.text import TextProcess


@dataclass(frozen=True)
class LatentBridge:
    """How a text becomes the latent that the decoder reads.

    `K` DDIM steps from pure noise; then the guards, in this order. *Dynamic thresholding* clips
    every predicted clean latent, on the way too: `clip(z, -s, s) c / s` with
    `s = max(c, quantile |z|)` per row, a constant to the gradient; clipped entries get none. The
    *norm* scales each vector to a length: `z -> norm z / ||z||` passes no radial gradient, and
    hides that the length drifts. *Noise* is added to what crosses to the decoder only.

    A deterministic bridge can hide the text in digits that no reader of latents would see; noise of
    standard deviation `s` bounds what `D` dimensions of variance `v` carry by
    `D/2 log(1 + v / s^2)` nats. An encoder can still outgrow the noise: hold the variance with a
    prior or with `norm`.

    Attributes:
        steps: `K`, the passes of the encoder, at times `t (1 - k/K)`.
        noise: standard deviation of the noise on what crosses.
        threshold: `c` of dynamic thresholding; 2.81 is the quantile 0.995 of `|N(0, 1)|`.
        quantile: of dynamic thresholding.
        norm: the length to which each vector is scaled, the last axis of `[b, d]` or `[b, n, d]`.

    Raises:
        ValueError: fewer than 1 step, negative noise, a threshold or norm that is not above 0, a
            quantile outside (0, 1], or a quantile without a threshold.

    Reference: DDIM, https://arxiv.org/abs/2010.02502; dynamic thresholding, Imagen,
    https://arxiv.org/abs/2205.11487, section 2.3; hidden signals,
    https://arxiv.org/abs/1712.02950.

    Examples:
        >>> LatentBridge(threshold=1.0, quantile=0.5).thresholded(torch.tensor([[1.0, -2.0, 4.0]]))
        tensor([[ 0.5000, -1.0000,  1.0000]])
    """

    steps: int = 1
    noise: Number = 0.0
    threshold: Number | None = None
    quantile: Number = 0.995
    norm: Number | None = None

    def __post_init__(self) -> None:
        checks.check_count("steps", self.steps)
        checks.check_nonnegative("noise", self.noise)
        for name in ("threshold", "norm"):
            if getattr(self, name) is not None:
                checks.check_positive(name, getattr(self, name))
        if not 0 < self.quantile <= 1:
            raise ValueError(f"`quantile` must lie in (0, 1], got {self.quantile!r}")
        if self.threshold is None and self.quantile != LatentBridge.quantile:
            raise ValueError(
                f"`quantile` = {self.quantile!r} has no effect without a `threshold`: give both, "
                "as in LatentBridge(threshold=2.81), or neither"
            )

    def thresholded(self, z: Latents, latent_mask: LatentMask | None = None) -> Latents:
        """Dynamic thresholding of what is kept; unchanged without a `threshold`."""
        z = only_kept(z, latent_mask)
        if self.threshold is None:
            return z
        sizes = fp32(z.detach()).abs()
        if latent_mask is None:
            sizes = sizes.flatten(1).sort(dim=1).values
            place = self.quantile * (sizes.shape[1] - 1)  # torch.quantile takes 2^24 numbers
            below, above = sizes[:, math.floor(place)], sizes[:, math.ceil(place)]
            size = torch.lerp(below, above, place % 1)
        else:
            size = _quantile_of_kept(sizes, latent_mask, self.quantile)
        limit = size.clamp(min=self.threshold)
        limit = limit.view(-1, *[1] * (z.ndim - 1))
        return (fp32(z).clamp(-limit, limit) * (self.threshold / limit)).to(z.dtype)

    def normed(self, z: Latents, latent_mask: LatentMask | None = None) -> Latents:
        """Each kept vector at length `norm`; unchanged without one."""
        z = only_kept(z, latent_mask)
        self.check_shape(z.shape[1:])
        return z if self.norm is None else (self.norm * direction(z)).to(z.dtype)

    def read(self, encoded: T2L, latent_process: LatentProcess) -> Latents:
        """The guarded latent of the last pass of the encoder."""
        z_hat = self.thresholded(encoded.z_hat(latent_process), encoded.latent_mask)
        return self.normed(z_hat, encoded.latent_mask)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse a `norm` where latents, of which this is the shape of one, hold no vectors."""
        if self.norm is not None:
            cure = "hold their size by `threshold`, or by a prior"
            checks.check_vectors("norm", self.norm, shape, cure=cure)

    def noised(
        self,
        z_hat: Latents,
        *,
        generator: torch.Generator | None = None,
        latent_mask: LatentMask | None = None,
    ) -> Latents:
        """What crosses to the decoder: `z_hat` with `noise`, drawn with `generator`."""
        if self.noise == 0:
            return only_kept(z_hat, latent_mask)
        noise = torch.randn(
            z_hat.shape, dtype=z_hat.dtype, device=z_hat.device, **seeded(generator)
        )
        return only_kept(z_hat + self.noise * noise, latent_mask)

    @property
    def on_the_way(self) -> "LatentBridge":
        """The same without what acts on the last latent alone.

        Examples:
            >>> LatentBridge(steps=2, noise=0.5, norm=1.0).on_the_way
            LatentBridge(steps=2, noise=0.0, threshold=None, quantile=0.995, norm=None)
        """
        return ONE_SHOT if self.steps == 1 else replace(self, noise=0.0, norm=None)

    def same_passes(self, other: "LatentBridge") -> bool:
        """Whether both run the same passes, whatever acts on the last latent alone.

        Examples:
            >>> LatentBridge(noise=0.5).same_passes(LatentBridge(threshold=1.0))
            True
        """
        on_the_way = ("steps",) if self.steps == 1 else ("steps", "threshold", "quantile")
        return all([getattr(self, name) == getattr(other, name) for name in on_the_way])

    def capacity(self, variance: Number, dim: int) -> float:
        """The nats that cross at most: `dim/2 log(1 + variance / noise^2)`.

        The capacity of a Gaussian channel, for latents of `dim` dimensions and a mean square of
        `variance` per dimension; infinite without noise.

        Examples:
            >>> round(LatentBridge(noise=0.5).capacity(variance=1.0, dim=64), 1)  # 32 log 5
            51.5
        """
        if self.noise == 0:
            return math.inf
        return dim / 2 * math.log1p(variance / self.noise**2)


def _quantile_of_kept(
    sizes: Float[Tensor, "b n d"], mask: LatentMask, quantile: Number
) -> Float[Tensor, " b"]:
    """Of the numbers that a mask keeps in each row."""
    sizes = torch.where(mask[..., None], sizes, -1.0).flatten(1).sort(dim=1).values
    kept = mask.sum(dim=1) * (sizes.shape[1] // max(mask.shape[1], 1))
    place = quantile * fp64(kept - 1).clamp(min=0) + (sizes.shape[1] - kept)
    last = sizes.shape[1] - 1
    below, above = (
        sizes.gather(1, at.long().clamp(max=last)[:, None])[:, 0]
        for at in (place.floor(), place.ceil())
    )
    return torch.lerp(below, above, (place % 1).to(sizes.dtype))


ONE_SHOT = LatentBridge()
NOISED = LatentBridge(noise=0.75)


@at_the_door
def encode_text(
    denoiser: Denoiser,
    tokens: Tokens,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    bridge: LatentBridge = ONE_SHOT,
    time: Number | Time = 1.0,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    policy: GradientPolicy = STOP_GRADIENT,
    latent_mask: LatentMaskLike | None = None,
) -> Latents:
    """The latent that the encoder writes of a text: `z_hat`, from pure noise.

    The first pass starts from `sqrt(alpha^2 + sigma^2) noise`, the law of `z_t` for latents of
    variance 1. With `K` steps, pass `k = 0, ..., K - 1` runs at `t_k = time (1 - k/K)` and predicts
    `z_k`; the next starts from `alpha z_k + sigma epsilon` at its time, with the noise that `z_k`
    leaves (DDIM), and the last prediction is `z_hat`. One step is a single pass of `t2l`. The
    bridge's noise is not added: see `LatentBridge.noised`.

    Args:
        denoiser: the model.
        tokens: clean ids `[b, s]`.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process; its `shape` says what to draw if `noise` is not given.
        bridge: the number of steps, and the guards.
        time: at which the first pass starts, a number or `[b]`.
        noise: standard normal noise to start from; drawn with `generator` if not given.
        generator: random state of the draw.
        policy: who learns from `z_hat`: `detach` nobody, `last` through the last pass alone, `full`
            through all; `freeze_bridge` says which parameters do not.
        latent_mask: `[b, n]`, True = keep, of the latents `[b, n, d]` to write.

    Raises:
        ValueError: wrong shapes or values, a norm of latents that hold no vectors, or a prediction
            whose gain at `time` is above `max_gain`; the message lists the cures.
        RuntimeError: a `freeze_bridge` over reentrant activation checkpointing.

    Reference: DDIM, https://arxiv.org/abs/2010.02502; gradient through the last step alone, ITIT,
    https://arxiv.org/abs/2310.03734.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, _ = toy_batch(seed=0)[:3]
        >>> z_hat = encode_text(
        ...     denoiser, tokens, mask, text_process=text_process, latent_process=latent_process,
        ...     bridge=LatentBridge(steps=4), policy=GradientPolicy("last"),
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> z_hat.shape, z_hat.requires_grad
        (torch.Size([3, 4]), True)
    """
    checks.check_type("bridge", bridge, LatentBridge)
    bridge.check_shape(latent_process.shape or () if noise is None else noise.shape[1:])
    latent_process.refuse_ill_conditioned(time)
    times = [time * (1 - k / bridge.steps) if k else time for k in range(bridge.steps)]
    z_t = None
    for k, now in enumerate(times):
        last = k == len(times) - 1
        with policy.bridge_pass(denoiser, last=last):
            encoded = t2l(
                denoiser,
                tokens,
                attention_mask,
                text_process=text_process,
                latent_process=latent_process,
                start="noise" if z_t is None else z_t,
                time=now,
                noise=noise if z_t is None else None,
                generator=generator,
                latent_mask=latent_mask,
            )
            z_hat = bridge.thresholded(encoded.z_hat(latent_process), encoded.latent_mask)
            if policy.freeze_bridge:
                refuse_reentrant([z_hat], bridge=noise if z_t is None else z_t)
            if last:
                z_hat = bridge.normed(z_hat, encoded.latent_mask)
            else:
                to = checks.as_time("time", times[k + 1], encoded.time)
                z_t = latent_process.ddim(z_hat, encoded.z_t, encoded.time, to)
    return z_hat
