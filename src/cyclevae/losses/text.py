"""The base loss of the decoder direction, and the cross-entropy that others share."""

from typing import get_args

import torch
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.reduce import reduce_text
from cyclevae._base.types import (
    Count,
    Latents,
    Logits,
    Loss,
    Mask,
    MaskLike,
    Number,
    Reduction,
    Time,
    Tokens,
)
from cyclevae.losses.cross_entropy import token_nll
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.passes import l2t
from cyclevae.processes.text import TextProcess
from cyclevae.processes.times import TimePolicy


@at_the_door
def text_loss(
    logits: Logits,
    tokens: Tokens,
    attention_mask: MaskLike,
    *,
    reduction: Reduction = "mean",
    count: Count | None = None,
) -> Loss:
    """Cross-entropy of the true tokens; padding never counts.

    `mean`: `-1/N sum_l log softmax(logits_l)[y_l]` over the `N` kept tokens of the batch, in fp32
    or better.

    Args:
        logits: `[b, s, v]`.
        tokens: the true ids `[b, s]`.
        attention_mask: `[b, s]`, True = keep.
        reduction: `mean` over kept tokens, `sum`, `none` (`[b, s]`, 0 at padding) or `nats` (sum
            over kept tokens, mean over rows).
        count: the denominator in place of this batch's own. For gradients that do not depend on the
            number of ranks and accumulation steps, give that of the whole step, divided by the
            number of ranks where DDP averages gradients.

    Raises:
        ValueError: shapes that do not fit, ids out of range, an unknown reduction.
        TypeError: tokens that are not integers.

    Examples:
        >>> import torch
        >>> logits, tokens = torch.zeros(1, 2, 4), torch.tensor([[1, 0]])
        >>> text_loss(logits, tokens, tokens > 0)  # log 4
        tensor(1.3863)
    """
    tokens = checks.as_tokens("tokens", tokens, logits.shape[-1])
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"`logits` must have shape [b, s, v] with [b, s] = {list(tokens.shape)}, "
            f"got {list(logits.shape)}"
        )
    mask = checks.as_mask("attention_mask", attention_mask, tokens.shape)
    return reduce_text(token_nll(logits, tokens, mask), mask, reduction=reduction, count=count)


@at_the_door
def l2t_loss(
    denoiser: Denoiser,
    tokens: Tokens,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    text_time: Number | Time | TimePolicy = 1.0,
    step: int = 0,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    count: Count | None = None,
) -> Loss:
    """Train the decoder on pairs: cross-entropy of the masked words, given the latent and the rest.

    Fully masked by default: the other words are a help that no cycle gives.

    Args:
        denoiser: the model.
        tokens: clean ids `[b, s]`.
        latents: clean latents.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        text_time: the rate at which words are masked; a number, `[b]`, or a policy that draws it.
        step: the training step, for a policy whose cap moves.
        generator: random state of the draws.
        reduction: as `text_loss`; `mean` is over the masked words.
        count: as `text_loss`.

    Raises:
        ValueError: wrong shapes or values.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, latents = toy_batch(seed=0)[:3]
        >>> loss = l2t_loss(denoiser, tokens, latents, mask, text_process=text_process)
        >>> loss.shape
        torch.Size([])
    """
    checks.check_choice("reduction", reduction, get_args(Reduction))
    tokens, mask = text_process.as_text(tokens, attention_mask)
    checks.check_rows("latents", latents, "tokens", tokens)
    decoded = decode_masked(
        denoiser,
        tokens,
        latents,
        mask,
        text_process=text_process,
        time=text_time,
        step=step,
        generator=generator,
    )
    return text_loss(*decoded, reduction=reduction, count=count)


def decode_masked(
    denoiser: Denoiser,
    tokens: Tokens,
    latents: Latents,
    mask: Mask,
    *,
    text_process: TextProcess,
    time: Number | Time | TimePolicy,
    step: int,
    generator: torch.Generator | None,
) -> tuple[Logits, Tokens, Mask]:
    """The L2T pass of `l2t_loss`: logits, what they should be, and where."""
    targets, taught = text_process.targets(tokens, mask)
    noisy = None
    if isinstance(time, TimePolicy):
        time = time(len(tokens), step=step, device=tokens.device, generator=generator)
    if isinstance(time, Tensor) or time != 1:
        time = checks.as_time("text_time", time, latents)
        noisy, taught = text_process.mask(tokens, mask, time, generator=generator)
    logits = l2t(denoiser, latents, mask, text_process=text_process, tokens=noisy, text_time=time)
    return logits, targets, taught
