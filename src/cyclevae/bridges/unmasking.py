"""A pseudo-text in several passes: the decoder reads the words it is surest of, and goes on."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from cyclevae._base.checks import as_mask, check_positive
from cyclevae._base.types import LatentMaskLike, Latents, Mask, MaskLike, Number, Tokens
from cyclevae.bridges.words import argmax_text, categorical_text, word_log_probs
from cyclevae.gradient_policy.contexts import detach
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.passes import l2t
from cyclevae.model.unread import AnyLogits
from cyclevae.processes.text import TextProcess


@at_the_door
def unmask_text(
    denoiser: Denoiser,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    steps: int,
    logits: AnyLogits | None = None,
    temperature: Number | None = None,
    generator: torch.Generator | None = None,
    latent_mask: LatentMaskLike | None = None,
) -> Tokens:
    """A pseudo-text `[b, s]` written in `steps` passes, the most confident words first.

    The first pass reads a text at full noise. After pass `k`, `ceil(n k / steps)` of the `n` words
    of a row stand, and never change; the next pass reads them, at the time at which that share of
    its kept tokens is noise, for masks the share itself. A word's confidence is its probability.
    Placed tokens stand from the second pass on. With one step this is `argmax_text` of a plain
    pass. There is no gradient.

    Where noise is random words, no pass can tell which words stand: each writes all of them anew,
    the surest are read by the next, and noise is drawn again for the others. A word may so be
    mended.

    Args:
        denoiser: the model.
        latents: clean latents, `[b, ...]`.
        attention_mask: `[b, s]`, True = keep: the lengths of the texts to write.
        text_process: the text process.
        steps: number of passes.
        logits: of a pass from full noise that is already computed; it is then not run again.
        temperature: sample the words from `softmax(logits / temperature)` instead of taking the
            most probable ones.
        generator: random state of the draws, of words and of noise.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`.

    Raises:
        ValueError: wrong shapes or values, fewer than 1 step.

    Reference: MaskGIT, https://arxiv.org/abs/2202.04200, with a linear schedule and without the
    noise on the confidence.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, _ = toy_denoiser(seed=0)
        >>> _, mask, latents = toy_batch(seed=0)[:3]
        >>> y_hat = unmask_text(denoiser, latents, mask, text_process=text_process, steps=3)
        >>> bool((y_hat[mask] != text_process.mask_id).all())
        True
    """
    if not (isinstance(steps, int) and steps >= 1):
        raise ValueError(f"`steps` must be an integer of at least 1, got {steps!r}")
    if temperature is not None:
        check_positive("temperature", temperature)
    return write_words(
        denoiser,
        latents,
        as_mask("attention_mask", attention_mask),
        text_process=text_process,
        steps=steps,
        logits=logits,
        temperature=temperature,
        generators=(generator,),
        latent_mask=latent_mask,
    )


def write_words(
    denoiser: Denoiser,
    latents: Latents,
    mask: Mask,
    *,
    text_process: TextProcess,
    steps: int,
    logits: AnyLogits | None,
    temperature: Number | None,
    generators: Sequence[torch.Generator | None],
    latent_mask: LatentMaskLike | None,
) -> Tokens:
    """`unmask_text` of as many equal parts of the rows as there are generators, in common passes.

    Each part is what it would be alone.
    """
    size = len(mask) // len(generators)

    def by_part(draw: Callable[..., Tokens], *rows: Any) -> Tokens:
        parts = [slice(i * size, (i + 1) * size) for i in range(len(generators))]
        drawn = zip(parts, generators, strict=True)
        return torch.cat([draw(*(r[part] for r in rows), generator=g) for part, g in drawn])

    with detach():
        places = text_process.chosen(mask)
        words, kept = places.sum(dim=1), mask.sum(dim=1).clamp(min=1)
        everywhere, time = torch.ones_like(mask), torch.ones_like(kept, dtype=torch.float32)
        hidden, written = everywhere, torch.zeros_like(mask, dtype=torch.long)
        for step in range(1, steps + 1):
            if logits is None:
                noise = by_part(text_process.noise, mask, time)
                logits = l2t(
                    denoiser,
                    latents,
                    mask,
                    text_process=text_process,
                    tokens=torch.where(hidden, noise, written),
                    text_time=1.0 if step == 1 else time,
                    latent_mask=latent_mask,
                )
            if temperature is None:
                drawn = argmax_text(logits, mask, text_process=text_process)
            else:
                draw = partial(categorical_text, text_process=text_process, temperature=temperature)
                drawn = by_part(draw, logits, mask)
            confidence = word_log_probs(
                logits, drawn[..., None], mask, text_process, temperature or 1.0
            ).squeeze(-1)
            if text_process.replaces:  # any word may be wrong
                hidden = everywhere
            written = torch.where(hidden, drawn, written)
            hidden = hidden & places
            surest = confidence.masked_fill(~hidden, -math.inf)
            rank = surest.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            due = (words * step + steps - 1) // steps - (words - hidden.sum(dim=1))
            hidden, logits = hidden & (rank >= due[:, None]), None
            time = text_process.time_of(hidden.sum(dim=1) / kept)
    return written
