"""A pseudo-text in several passes: the decoder reads the words it is surest of, and goes on."""

import math

import torch

from cyclevae._base.checks import as_mask, check_positive
from cyclevae._base.types import Latents, Logits, MaskLike, Number, Tokens
from cyclevae.bridges.words import argmax_text, categorical_text, word_logits
from cyclevae.gradient_policy.contexts import detach
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.passes import l2t
from cyclevae.processes.text import TextProcess


@at_the_door
def unmask_text(
    denoiser: Denoiser,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    steps: int,
    logits: Logits | None = None,
    temperature: Number | None = None,
    generator: torch.Generator | None = None,
) -> Tokens:
    """A pseudo-text `[b, s]` written in `steps` passes, the most confident words first.

    The first pass reads a fully masked text. After pass `k`, `ceil(n k / steps)` of the `n` words
    of a row stand, and never change; the next pass reads them, at the time that is the share of its
    kept tokens still masked. A word's confidence is its probability. Placed tokens stand from the
    second pass on. With one step this is `argmax_text` of a plain pass. There is no gradient.

    Args:
        denoiser: the model.
        latents: clean latents, `[b, d]` or `[b, n, d]`.
        attention_mask: `[b, s]`, True = keep: the lengths of the texts to write.
        text_process: the text process.
        steps: number of passes.
        logits: of a fully masked pass that is already computed; it is then not run again.
        temperature: sample the words from `softmax(logits / temperature)` instead of taking the
            most probable ones.
        generator: random state of the draws.

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
    mask = as_mask("attention_mask", attention_mask)
    with detach():
        masked = text_process.chosen(mask)
        words, kept = masked.sum(dim=1), mask.sum(dim=1).clamp(min=1)
        tokens = text_process.fully_masked(mask)
        for step in range(1, steps + 1):
            if logits is None:
                logits = l2t(
                    denoiser,
                    latents,
                    mask,
                    text_process=text_process,
                    tokens=tokens,
                    text_time=1.0 if step == 1 else masked.sum(dim=1) / kept,
                )
            if temperature is None:
                drawn = argmax_text(logits, mask, text_process=text_process)
            else:
                drawn = categorical_text(
                    logits,
                    mask,
                    text_process=text_process,
                    temperature=temperature,
                    generator=generator,
                )
            chances = word_logits(logits, mask, text_process, temperature or 1.0).log_softmax(-1)
            confidence = chances.gather(-1, drawn[..., None]).squeeze(-1)
            surest = confidence.masked_fill(~masked, -math.inf)
            rank = surest.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            due = (words * step + steps - 1) // steps - (words - masked.sum(dim=1))
            chosen = masked & (rank < due[:, None])
            tokens = text_process.frame(torch.where(chosen, drawn, tokens), mask)
            masked, logits = masked & ~chosen, None
    return tokens
