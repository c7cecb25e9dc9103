"""The base loss of the decoder direction, and the cross-entropy that others share."""

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.reduce import divided
from cyclevae._base.types import (
    Count,
    LatentMaskLike,
    Latents,
    Loss,
    Mask,
    MaskLike,
    Number,
    Reduction,
    TextWeighting,
    Time,
    Tokens,
)
from cyclevae.losses.text_bound import bound_weights, reduced_bound
from cyclevae.losses.token_loss import reduced_nll
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.linear_cross_entropy import swept
from cyclevae.model.passes import l2t
from cyclevae.model.unread import AnyLogits, UnreadLogits, read_logits, readable
from cyclevae.processes.text import Noised, TextProcess
from cyclevae.processes.times import TimePolicy


@at_the_door
def text_loss(
    logits: AnyLogits,
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
        logits: `[b, s, v]`, or unread ones.
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
    return reduced_nll(logits, tokens, mask, reduction=reduction, count=count)


@at_the_door
def l2t_loss(
    denoiser: Denoiser,
    tokens: Tokens,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    text_time: Number | Time | TimePolicy = 1.0,
    weighting: TextWeighting = "mean",
    step: int = 0,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    latent_mask: LatentMaskLike | None = None,
    count: Count | None = None,
) -> Loss:
    """Train the decoder on pairs: cross-entropy of the noised words, given the latent and the rest.

    At full noise by default: the other words are a help that no cycle gives.

    Args:
        denoiser: the model.
        tokens: clean ids `[b, s]`.
        latents: clean latents.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        text_time: the time of the text, for masks their rate; a number, `[b]`, or a policy that
            draws it.
        weighting: `mean` over the counted words, which are the masked ones, or all where noise is
            random words; or `bound`, whose mean over uniform times, per taught word, bounds
            `-log p(y | z)`.
        step: the training step, for a policy whose cap moves.
        generator: random state of the draws.
        reduction: as `text_loss`; `mean` is over the counted words, or all taught ones of a bound.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`.
        count: as `text_loss`.

    Raises:
        ValueError: wrong shapes or values, or a bound at a constant time, or of a text process
            whose weights are not its own.

    Reference: the bound for masks, https://arxiv.org/abs/2406.07524; with random words,
    https://arxiv.org/abs/2503.04482.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, latents = toy_batch(seed=0)[:3]
        >>> loss = l2t_loss(denoiser, tokens, latents, mask, text_process=text_process)
        >>> loss.shape
        torch.Size([])
    """
    checks.check_choice("reduction", reduction, get_args(Reduction))
    checks.check_choice("weighting", weighting, get_args(TextWeighting))
    tokens, mask = text_process.as_text(tokens, attention_mask)
    checks.check_rows("latents", latents, "tokens", tokens)
    if weighting == "bound":
        text_process.check_bound()
        check_bound_time("text_time", text_time)
    decoded = decode_noised(
        denoiser,
        tokens,
        latents,
        mask,
        text_process=text_process,
        time=text_time,
        step=step,
        generator=generator,
        latent_mask=latent_mask,
    )
    if weighting == "mean":
        return text_loss(*decoded[:3], reduction=reduction, count=count)
    return decoded.bound(text_process, text_process.taught(mask), reduction=reduction, count=count)


_ALL_TIMES = ("uniform", 0, 1)


def check_bound_time(name: str, time: object) -> None:
    """Refuse times of which no mean is that of a bound."""
    if isinstance(time, Tensor):  # drawn by the caller
        return
    if isinstance(time, TimePolicy) and (time.distribution, time.low, time.high) == _ALL_TIMES:
        return
    raise ValueError(
        f"weighting='bound' is a mean over uniform times from 0 to 1, and `{name}` is {time!r}: "
        "give TimePolicy('uniform'), or leave the weighting at 'mean'"
    )


class Decoding(NamedTuple):
    """An L2T pass of the base loss.

    Attributes:
        logits: `[b, s, v]`, or unread ones.
        targets: what they should be `[b, s]`.
        counted: where `[b, s]`.
        noisy: what was read `[b, s]`; None at full noise.
        time: the time of the noise.
    """

    logits: AnyLogits
    targets: Tokens
    counted: Mask
    noisy: Tokens | None = None
    time: Number | Time = 1.0

    def bound(
        self,
        text_process: TextProcess,
        taught: Mask,
        *,
        reduction: Reduction = "mean",
        count: Count | None = None,
    ) -> Loss:
        """The bound, per taught word."""
        return reduced_bound(
            self.logits,
            self.targets,
            self._noised,
            self._times,
            taught,
            text_process=text_process,
            reduction=reduction,
            count=count,
        )

    def judged(
        self,
        text_process: TextProcess,
        taught: Mask,
        *,
        weighting: TextWeighting,
        count: Count | None,
    ) -> tuple[Loss, Tokens]:
        """The base loss, and the most probable words, by one reading of the logits."""
        logits, targets, counted = readable(self.logits), self.targets, self.counted
        bound = weighting == "bound"
        if isinstance(logits, UnreadLogits) and not (bound and text_process.replaces):
            weight = bound_weights(logits, self._times, text_process) if bound else None
            total, best = swept(logits, targets, counted, weight)
            return divided(total, taught if bound else counted, reduction="mean", count=count), best
        plain = self._replace(logits=read_logits(logits))
        best = plain.logits.detach().max(dim=-1).indices  # several times faster than argmax on CPUs
        if bound:
            return plain.bound(text_process, taught, count=count), best
        return text_loss(plain.logits, targets, counted, count=count), best

    @property
    def _noised(self) -> Noised:
        if self.noisy is None:
            raise ValueError("a text at full noise alone has no bound")
        return Noised(self.noisy, self.counted)

    @property
    def _times(self) -> Time:
        if not isinstance(self.time, Tensor):
            raise ValueError("a text at full noise alone has no bound")
        return self.time


def decode_noised(
    denoiser: Denoiser,
    tokens: Tokens,
    latents: Latents,
    mask: Mask,
    *,
    text_process: TextProcess,
    time: Number | Time | TimePolicy,
    step: int,
    generator: torch.Generator | None,
    latent_mask: LatentMaskLike | None = None,
) -> Decoding:
    """The L2T pass of `l2t_loss`."""
    targets, counted = text_process.targets(tokens, mask)
    noisy = None
    if isinstance(time, TimePolicy):
        time = time(len(tokens), step=step, device=tokens.device, generator=generator)
    if isinstance(time, Tensor) or time != 1:
        time = checks.as_time("text_time", time, latents)
        noisy, counted = text_process.noised(tokens, mask, time, generator=generator)
    logits = l2t(
        denoiser,
        latents,
        mask,
        text_process=text_process,
        tokens=noisy,
        text_time=time,
        generator=generator,
        latent_mask=latent_mask,
    )
    return Decoding(logits, targets, counted, noisy, time)
