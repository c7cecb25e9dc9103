"""What crosses the bridge of the text cycle: meaning, or digits that nobody else would read."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.precision import fp32
from cyclevae._base.types import (
    LatentMask,
    LatentMaskLike,
    Latents,
    Mask,
    MaskLike,
    Number,
    Tokens,
)
from cyclevae.bridges.latent import ONE_SHOT, LatentBridge, encode_text
from cyclevae.diagnostics._measuring import (
    another,
    as_pairs,
    measuring,
    seeded,
    statistics,
    without_latent,
)
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.passes import l2t
from cyclevae.model.unread import AnyLogits, read_logits
from cyclevae.priors.samples import Moment
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.noise import draw_noise
from cyclevae.processes.text import TextProcess


class Treatment(NamedTuple):
    """What was done to the latents, and how much of the text was still decoded.

    Attributes:
        name: such as `noise 0.1` or `grid 1/4`.
        size: root mean square change, in standard deviations of the latents.
        cycle: accuracy from the encoder's `z_hat`, so treated.
        pairs: accuracy from the true latents, so treated.

    Examples:
        >>> Treatment("noise 0.1", size=0.1, cycle=0.2, pairs=0.9).cycle
        0.2
    """

    name: str
    size: float
    cycle: float
    pairs: float


class CheatTest(NamedTuple):
    """Accuracies of the decoder, per kept token; what `cheat_test` measures.

    Attributes:
        cycle: from the bridge as it is.
        pairs: from the true latents.
        shuffled: from another row's bridge.
        chance: from no latent.
        treatments: from latents that were changed a little.

    Examples:
        >>> CheatTest(0.9, 0.8, shuffled=0.1, chance=0.15, treatments=()).floor
        0.15
    """

    cycle: float
    pairs: float
    shuffled: float
    chance: float
    treatments: tuple[Treatment, ...]

    @property
    def floor(self) -> float:
        """What is decoded without the row's own latent: the larger of `shuffled` and `chance`."""
        return max(self.shuffled, self.chance)


@at_the_door
def cheat_test(
    denoiser: Denoiser,
    tokens: Tokens,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    z_hat: Latents | None = None,
    bridge: LatentBridge = ONE_SHOT,
    time: Number = 1.0,
    variance: Moment | None = None,
    noises: Sequence[Number] = (0.03, 0.1, 0.3),
    grids: Sequence[Number] = (16, 4, 1),
    generator: torch.Generator | None = None,
    latent_mask: LatentMaskLike | None = None,
) -> CheatTest:
    """Does the text cycle survive where only meaning can: noise and rounding on its bridge.

    Accuracy of the text decoded in one pass from `z_hat`, from `z_hat + s std xi`, from `z_hat`
    rounded to multiples of `std / k`, and from another row's `z_hat`, beside the same of the true
    latents. An honest encoder loses little where the change is small; one that hides the text in
    late digits falls to chance. Another row's bridge must leave no more than chance.

    Args:
        denoiser: the model; run in evaluation mode, if it exposes its `.module`.
        tokens: clean ids `[b, s]`.
        latents: theirs.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process.
        z_hat: of the encoder, where it is already computed; of `bridge` only its noise is used.
        bridge: of the text cycle.
        time: at which the encoder starts from noise.
        variance: `std^2` of the latents, a number or in the shape of one; the batch's if not given.
        noises: `s`, standard deviations of the noise, in those of the latents.
        grids: `k`, how many steps of the grid make a standard deviation.
        generator: random state of the draws; one of its own, seeded with 0, if not given.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`, whose deviation is then that of
            their kept vectors.

    Raises:
        ValueError: fewer than 2 rows, equal latents, wrong shapes or values, or an epsilon process
            whose gain at `time` is above `max_gain`.

    Reference: hidden signals in cycles, https://arxiv.org/abs/1712.02950.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, latents = toy_batch(seed=0)[:3]
        >>> found = cheat_test(
        ...     denoiser, tokens, latents, mask,
        ...     text_process=text_process, latent_process=latent_process,
        ... )
        >>> [treatment.name for treatment in found.treatments]
        ['noise 0.03', 'noise 0.1', 'noise 0.3', 'grid 1/16', 'grid 1/4', 'grid 1/1']
    """
    tokens, mask, latents, kept = as_pairs(
        tokens, latents, attention_mask, text_process, latent_mask
    )
    for name, sizes in (("noises", noises), ("grids", grids)):
        for size in sizes:
            checks.check_positive(name, size)
    if variance is None:
        _, variance = statistics(latents, kept)
    checks.check_variance("variance", variance, latents.shape[1:])
    std = torch.as_tensor(variance).sqrt().to(fp32(latents)).expand(latents.shape[1:])
    generator = seeded(generator, latents)
    noise = draw_noise(len(latents), latent_process, at=latents, like=latents, generator=generator)
    with measuring(denoiser):
        if z_hat is None:
            z_hat = encode_text(
                denoiser,
                tokens,
                mask,
                text_process=text_process,
                latent_process=latent_process,
                bridge=bridge,
                time=time,
                noise=noise,
                latent_mask=kept,
            )
        checks.check_same_shape("z_hat", z_hat, "latents", latents)
        crossing = bridge.noised(z_hat, generator=generator, latent_mask=kept)

        hidden = text_process.at_full_noise(mask, generator=generator)
        read: dict[str, Any] = {"text_process": text_process, "tokens": hidden}

        def decoded(z: Tensor, kept: LatentMask | None = kept) -> float:
            logits = l2t(denoiser, z.to(latents.dtype), mask, latent_mask=kept, **read)
            return accuracy(logits, tokens, mask)

        def treated() -> Iterator[Treatment]:
            for s in noises:
                change = s * std * fp32(noise)
                yield Treatment(
                    f"noise {s:g}", float(s), decoded(crossing + change), decoded(latents + change)
                )
            for k in grids:
                step = std / k
                cycle, pairs = (
                    decoded((fp32(z) / step).round() * step) for z in (crossing, latents)
                )
                yield Treatment(f"grid 1/{k:g}", 1 / (k * math.sqrt(12)), cycle, pairs)

        return CheatTest(
            cycle=decoded(crossing),
            pairs=decoded(latents),
            shuffled=decoded(crossing.roll(1, 0), another(kept)),
            chance=accuracy(
                without_latent(
                    denoiser, noise, mask, latent_process=latent_process, latent_mask=kept, **read
                ),
                tokens,
                mask,
            ),
            treatments=tuple(treated()),
        )


def accuracy(logits: AnyLogits, tokens: Tokens, mask: Mask) -> float:
    """The share of kept tokens that are the most probable ones."""
    best: Tensor = read_logits(logits).argmax(dim=-1)
    hits = (best == tokens) & mask
    return (hits.sum() / mask.sum().clamp(min=1)).item()
