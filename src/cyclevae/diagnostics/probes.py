"""Does each direction listen: the right condition against another row's, and against none."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.precision import fp32
from cyclevae._base.types import LatentMask, LatentMaskLike, Latents, MaskLike, Number, Time, Tokens
from cyclevae.diagnostics._measuring import another, as_pairs, measuring, seeded, without_latent
from cyclevae.losses.text import text_loss
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.passes import l2t, t2l
from cyclevae.priors.learned import noise_error, without_text
from cyclevae.priors.weighting import weighted_times
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.noise import draw_noise
from cyclevae.processes.text import TextProcess


class Probe(NamedTuple):
    """What a direction loses, in nats per row, under three conditions.

    Attributes:
        right: given the row's own partner.
        shuffled: given the partner of the row before, a derangement.
        empty: given nothing.
        gap_error: standard error of `gap` over the rows.
        difference: of `latent_probe`, what the predictions themselves differ by with and without
            the text; None for `text_probe`.

    Examples:
        >>> probe = Probe(right=1.0, shuffled=4.0, empty=2.5, gap_error=0.1)
        >>> probe.gap, probe.information
        (3.0, 1.5)
    """

    right: float
    shuffled: float
    empty: float
    gap_error: float
    difference: float | None = None

    @property
    def gap(self) -> float:
        """`shuffled - right`: at or below 0, the condition is ignored.

        Of a calibrated model it is the Jeffreys divergence between pairs and shuffled pairs, which
        is at least the mutual information.
        """
        return self.shuffled - self.right

    @property
    def information(self) -> float:
        """`empty - right`: of a calibrated model the mutual information of text and latent."""
        return self.empty - self.right


@at_the_door
def text_probe(
    denoiser: Denoiser,
    tokens: Tokens,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    latent_mask: LatentMaskLike | None = None,
) -> Probe:
    """Does the decoder read the latent: L2T given the right, another row's and no latent.

    `-sum_l log p(y_l | z, text fully masked)`, in nats per text. No latent is pure noise at latent
    time 1, a state that the unconditional mode trains. Rows should hold different texts: where a
    row's neighbour has the same text, shuffling changes nothing.

    Args:
        denoiser: the model; run in evaluation mode, if it exposes its `.module`.
        tokens: clean ids `[b, s]`.
        latents: theirs.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process.
        noise: in place of the latents where there are none; drawn with `generator` if not given.
        generator: random state of the draw; one of its own, seeded with 0, if not given.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`; it goes with the latent.

    Raises:
        ValueError: fewer than 2 rows, wrong shapes or values.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, latents = toy_batch(seed=0, rows=16)[:3]
        >>> probe = text_probe(
        ...     denoiser, tokens, latents, mask,
        ...     text_process=text_process, latent_process=latent_process,
        ... )
        >>> abs(probe.gap) < 4 * probe.gap_error  # the toy has learned nothing
        True
    """
    tokens, mask, latents, kept = as_pairs(
        tokens, latents, attention_mask, text_process, latent_mask
    )
    generator = seeded(generator, latents)
    if noise is None:
        noise = draw_noise(
            len(latents), latent_process, at=latents, like=latents, generator=generator
        )
    else:
        checks.check_same_shape("noise", noise, "latents", latents)
    hidden = text_process.at_full_noise(mask, generator=generator)
    read: dict[str, Any] = {"text_process": text_process, "tokens": hidden}
    with measuring(denoiser):
        logits = {
            "right": l2t(denoiser, latents, mask, latent_mask=kept, **read),
            "shuffled": l2t(denoiser, latents.roll(1, 0), mask, latent_mask=another(kept), **read),
            "empty": without_latent(
                denoiser, noise, mask, latent_process=latent_process, latent_mask=kept, **read
            ),
        }
    nats = {
        name: text_loss(values, tokens, mask, reduction="none").sum(dim=1)
        for name, values in logits.items()
    }
    return _probe(nats)


@at_the_door
def latent_probe(
    denoiser: Denoiser,
    tokens: Tokens,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    low: Number = 0.02,
    high: Number = 0.98,
    samples: int = 8,
    time: Number | Float[Tensor, " r"] | None = None,
    noise: Float[Tensor, "r *n d"] | None = None,
    generator: torch.Generator | None = None,
    latent_mask: LatentMaskLike | None = None,
) -> Probe:
    """Does the encoder read the text: T2L given the right, another row's and no text.

    `1/2 int gamma' ||eps - eps(z_t, t, y)||^2 dt` with `gamma = -log SNR`, between two times, in
    nats per latent. The times are spread evenly in gamma and are the same for the three conditions,
    as is the noise. No text is a fully masked one of the same length at text time 1. By the I-MMSE
    relation `information` is the mutual information that noise takes away between the two times.

    Of optimal denoisers it equals `difference = 1/2 int gamma' E ||eps_empty - eps_right||^2 dt`,
    which varies less and is never negative. Where the two disagree, the model is miscalibrated: its
    predictions move with the text by more, or by less, than they gain.

    This reads the model at all times in between. One whose T2L was trained at full noise alone has
    learned nothing there; see then what its bridge carries, as `cycle_report` does.

    Args:
        denoiser: the model; run in evaluation mode, if it exposes its `.module`.
        tokens: clean ids `[b, s]`.
        latents: theirs.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process.
        low: the lowest time.
        high: the highest time.
        samples: how often each row is probed; each costs three passes.
        time: a number or `[samples * b]`, as they would be drawn; drawn if not given.
        noise: standard normal, for `samples * b` latents; drawn if not given.
        generator: random state of the draws; one of its own, seeded with 0, if not given.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`; nats are of what is kept.

    Raises:
        ValueError: fewer than 2 rows, wrong shapes or values, a range of times at whose ends the
            signal-to-noise ratio is 0 or infinite.

    Reference: Guo, Shamai and Verdu, https://arxiv.org/abs/cs/0412108; in diffusion models,
    https://arxiv.org/abs/2302.03792.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, latents = toy_batch(seed=0, rows=16)[:3]
        >>> probe = latent_probe(
        ...     denoiser, tokens, latents, mask,
        ...     text_process=text_process, latent_process=latent_process,
        ... )
        >>> probe.difference > 0 and abs(probe.gap) < 4 * probe.gap_error
        True
    """
    tokens, mask, latents, kept = as_pairs(
        tokens, latents, attention_mask, text_process, latent_mask
    )
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples!r}")
    generator = seeded(generator, latents)
    repeated = fp32(latents).repeat(samples, *[1] * (latents.ndim - 1))
    times, weights = weighted_times(
        "likelihood", repeated, latent_process, low=low, high=high, time=time, generator=generator
    )
    if noise is None:
        noise = draw_noise(
            len(repeated), latent_process, at=latents, like=repeated, generator=generator
        )
    else:
        checks.check_same_shape("noise", noise, "latents, repeated `samples` times,", repeated)
    hidden, parts = text_process.at_full_noise(mask, generator=generator), []
    with measuring(denoiser):
        for drawn in zip(*(x.chunk(samples) for x in (times, weights, noise)), strict=True):
            parts.append(
                _latent_nats(
                    denoiser,
                    tokens,
                    latents,
                    mask,
                    kept,
                    hidden,
                    text_process,
                    latent_process,
                    *drawn,
                )
            )
    return _probe({name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]})


def _latent_nats(
    denoiser: Denoiser,
    tokens: Tokens,
    latents: Latents,
    mask: Tensor,
    kept: LatentMask | None,
    hidden: Tokens,
    text_process: TextProcess,
    latent_process: LatentProcess,
    time: Time,
    weight: Time,
    noise: Latents,
) -> dict[str, Float[Tensor, " b"]]:
    """The weighed squared errors of each row under the three conditions, and their difference."""
    right, shuffled = (
        t2l(
            denoiser,
            tokens.roll(shift, 0),
            mask.roll(shift, 0),
            text_process=text_process,
            latent_process=latent_process,
            latents=latents,
            time=time,
            noise=noise,
            latent_mask=kept,
        )
        for shift in (0, 1)
    )
    empty = without_text(denoiser, right.z_t, mask, time, hidden, kept)
    target = latent_process.target(latents, right.noise, time)

    def nats(prediction: Latents, other: Latents) -> Float[Tensor, " b"]:
        error = noise_error(fp32(other) - fp32(prediction), time, latent_process)
        return weight * error.square().flatten(1).sum(dim=1)

    return {
        "right": nats(right.prediction, target),
        "shuffled": nats(shuffled.prediction, target),
        "empty": nats(empty, target),
        "difference": nats(right.prediction, empty),
    }


def _probe(nats: dict[str, Float[Tensor, " b"]]) -> Probe:
    gap = nats["shuffled"] - nats["right"]
    means = {name: values.mean().item() for name, values in nats.items()}
    return Probe(**means, gap_error=gap.std().item() / math.sqrt(len(gap)))
