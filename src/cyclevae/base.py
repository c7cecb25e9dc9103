"""The losses both directions are trained with anyway, and the two formulas all others share."""

from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cyclevae import _checks
from cyclevae._precision import fp32
from cyclevae._reduce import reduce_latents, reduce_text
from cyclevae._types import (
    Count,
    Latents,
    Logits,
    Loss,
    MaskLike,
    Number,
    Reduction,
    Rows,
    Scalar,
    Time,
    Tokens,
)
from cyclevae.denoiser import Denoiser
from cyclevae.latent_process import LatentProcess
from cyclevae.passes import joint, l2t, only_present, t2l
from cyclevae.text_process import TextProcess
from cyclevae.times import stratified_times


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
    _checks.check_tokens("tokens", tokens, logits.shape[-1])
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"`logits` must have shape [b, s, v] with [b, s] = {list(tokens.shape)}, "
            f"got {list(logits.shape)}"
        )
    mask = _checks.as_mask("attention_mask", attention_mask, tokens.shape)
    return reduce_text(_token_nll(logits, tokens, mask), mask, reduction=reduction, count=count)


def latent_loss(
    prediction: Latents,
    target: Latents,
    *,
    variance: Number | Tensor = 1.0,
    reduction: Reduction = "mean",
    count: Count | None = None,
) -> Loss:
    """Squared error of latents, in fp32 or better.

    `mean`: `1/(b d) sum ||prediction - target||^2`.

    Args:
        prediction: `[b, d]` or `[b, n, d]`.
        target: of equal shape; nothing is broadcast.
        variance: of the Gaussian whose negative log-density `nats` is, a number or `[d]`.
        reduction: `mean` over elements, `sum`, `none` (the shape of the latents) or `nats` (half
            the squared error over `variance`, summed over dimensions, mean over rows).
        count: the denominator in place of this batch's own: see `text_loss`.

    Raises:
        ValueError: unequal shapes, an unknown reduction, a variance that is not above 0.

    Examples:
        >>> import torch
        >>> latent_loss(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
        tensor(5.)
        >>> latent_loss(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), reduction="nats")
        tensor(5.)
    """
    _checks.check_same_shape("prediction", prediction, "target", target)
    _checks.check_variance("variance", variance, prediction.shape[1:])
    error = fp32(prediction) - fp32(target)
    return reduce_latents(error.square(), reduction=reduction, variance=variance, count=count)


def l2t_loss(
    denoiser: Denoiser,
    tokens: Tokens,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    reduction: Reduction = "mean",
    count: Count | None = None,
) -> Loss:
    """Train the decoder on pairs: cross-entropy of the text given its latent, text fully masked.

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
    _checks.check_choice("reduction", reduction, get_args(Reduction))
    _checks.check_tokens("tokens", tokens, text_process.vocab_size)
    logits = l2t(denoiser, latents, attention_mask, text_process=text_process)
    return text_loss(logits, tokens, attention_mask, reduction=reduction, count=count)


def t2l_loss(
    denoiser: Denoiser,
    tokens: Tokens,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    time: Number | Time | None = 1.0,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    count: Count | None = None,
) -> Loss:
    """Train the encoder on pairs: squared error of its prediction, in its own prediction space.

    Args:
        denoiser: the model.
        tokens: clean ids `[b, s]`.
        latents: clean latents.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process.
        time: of the latents; a number, `[b]`, or None for stratified uniform times.
        noise: standard normal noise; drawn with `generator` if not given.
        generator: random state of the draws.
        reduction: as `latent_loss`.
        count: as `latent_loss`.

    Raises:
        ValueError: wrong shapes or values.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, latents = toy_batch(seed=0)[:3]
        >>> loss = t2l_loss(
        ...     denoiser, tokens, latents, mask,
        ...     text_process=text_process, latent_process=latent_process, time=None,
        ... )
        >>> loss.shape
        torch.Size([])
    """
    _checks.check_tokens("tokens", tokens, text_process.vocab_size)
    if time is None:
        time = stratified_times(len(tokens), device=tokens.device, generator=generator)
    encoded = t2l(
        denoiser,
        tokens,
        attention_mask,
        text_process=text_process,
        latent_process=latent_process,
        latents=latents,
        time=time,
        noise=noise,
        generator=generator,
    )
    target = latent_process.target(latents, encoded.noise, encoded.time)
    return latent_loss(encoded.prediction, target, reduction=reduction, count=count)


class UnconditionalLoss(NamedTuple):
    """The two terms of the unconditional mode.

    Attributes:
        text: a bound on the negative log-likelihood of a token, in nats.
        latent: squared error in the prediction space.

    Examples:
        >>> UnconditionalLoss(text=torch.tensor(2.0), latent=torch.tensor(1.0)).text
        tensor(2.)
    """

    text: Scalar
    latent: Scalar


def unconditional_loss(
    denoiser: Denoiser,
    tokens: Tokens,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    has_text: Rows | None = None,
    has_latent: Rows | None = None,
    text_time: Number | Time | None = None,
    latent_time: Number | Time | None = None,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    text_count: Count | None = None,
    latent_count: Count | None = None,
) -> UnconditionalLoss:
    """Denoise both parts at once; rows may lack one of them.

    Text: the masked-diffusion bound `E_r [1/r sum_masked -log p(y_l | y_r, z_t)]` at a random rate
    `r`, per kept token. Latent: squared error at a random time. A row without a text has it fully
    masked, a row without a latent sees pure noise; neither counts towards the missing part.

    Args:
        denoiser: the model.
        tokens: clean ids `[b, s]`.
        latents: clean latents.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process.
        has_text: `[b]`, which rows have a text; all of them if not given.
        has_latent: `[b]`, which rows have a latent; all of them if not given.
        text_time: the rates, a number or `[b]`; stratified uniform if not given.
        latent_time: a number or `[b]`; stratified uniform if not given.
        noise: standard normal noise; drawn with `generator` if not given.
        generator: random state of the draws.
        text_count: denominator in place of the kept tokens of rows with a text.
        latent_count: denominator in place of the elements of rows with a latent.

    Raises:
        ValueError: wrong shapes or values.

    Reference: Sahoo et al., masked diffusion language models, https://arxiv.org/abs/2406.07524.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, latents = toy_batch(seed=0)[:3]
        >>> text, latent = unconditional_loss(
        ...     denoiser, tokens, latents, mask, text_process=text_process,
        ...     latent_process=latent_process, has_latent=torch.tensor([True, True, False]),
        ... )
        >>> text.shape, latent.shape
        (torch.Size([]), torch.Size([]))
    """
    _checks.check_row_mask("has_latent", has_latent, tokens)
    if has_latent is not None:
        latents = only_present(latents, has_latent)
    out = joint(
        denoiser,
        tokens,
        latents,
        attention_mask,
        text_process=text_process,
        latent_process=latent_process,
        has_text=has_text,
        has_latent=has_latent,
        text_time=text_time,
        latent_time=latent_time,
        noise=noise,
        generator=generator,
    )
    kept = _checks.as_mask("attention_mask", attention_mask, tokens.shape)
    present = torch.ones_like(kept[:, 0])
    kept = kept & (present if has_text is None else has_text)[:, None]
    masked = out.masked & kept
    # 1 / r has no finite variance at r = 0; a rate this small masks next to nothing anyway
    nll = _token_nll(out.logits, tokens, masked) / out.text_time.clamp(min=1e-3)[:, None]
    text = reduce_text(
        nll, masked, reduction="mean", count=kept.sum() if text_count is None else text_count
    )
    rows = present if has_latent is None else has_latent
    target = latent_process.target(latents, out.noise, out.latent_time)
    squared = (fp32(out.latent_prediction) - fp32(target)).square()
    squared = only_present(squared, rows)
    if latent_count is None:
        latent_count = rows.sum() * squared[:1].numel()
    return UnconditionalLoss(text, reduce_latents(squared, reduction="mean", count=latent_count))


def _token_nll(logits: Logits, tokens: Tokens, mask: Tensor) -> Float[Tensor, "b s"]:
    ignored = -100
    labels = tokens.long().masked_fill(~mask, ignored)
    # An ignored row still has the gradient 0 * softmax, which is NaN where its logits are.
    logits = fp32(logits).masked_fill(~mask[..., None], 0.0)
    nll = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=ignored, reduction="none"
    )
    return nll.view_as(labels)
