"""The unconditional mode: both parts noised at once, and rows that may lack one of them."""

from typing import Any, Literal, NamedTuple, get_args

import torch

from cyclevae._base import checks
from cyclevae._base.masked import kept_latents
from cyclevae._base.reduce import only_present, reduce_latents
from cyclevae._base.types import (
    Count,
    LatentMaskLike,
    Latents,
    MaskLike,
    Number,
    Rows,
    Scalar,
    TextWeighting,
    Time,
    Tokens,
)
from cyclevae.losses.latent import check_weighting, latent_loss
from cyclevae.losses.text_bound import reduced_bound
from cyclevae.losses.token_loss import reduced_nll
from cyclevae.model.both import joint
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import Noised, TextProcess
from cyclevae.processes.times import LatentWeighting


class UnconditionalLoss(NamedTuple):
    """The two terms of the unconditional mode.

    Attributes:
        text: in the mean over rates a bound on the negative log-likelihood of a token, in nats,
            unless `text_weighting="mean"`.
        latent: squared error in the prediction space.

    Examples:
        >>> UnconditionalLoss(text=torch.tensor(2.0), latent=torch.tensor(1.0)).text
        tensor(2.)
    """

    text: Scalar
    latent: Scalar


@at_the_door
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
    text_weighting: TextWeighting = "bound",
    latent_weighting: LatentWeighting | None = None,
    reduction: Literal["mean", "sum", "nats"] = "mean",
    latent_mask: LatentMaskLike | None = None,
    text_count: Count | None = None,
    latent_count: Count | None = None,
) -> UnconditionalLoss:
    """Denoise both parts at once; rows may lack one of them.

    Text: the masked-diffusion bound `E_r [1/r sum_masked -log p(y_l | y_r, z_t)]` at a random rate
    `r`, per taught token; a bound in the mean over uniform rates, but for the weight's cap at 1000,
    which takes off 0.05 % of what words lose at rates near 0. Where the text process has another
    schedule, or random words, the bound is that of its noise. Latent: squared error at a random
    time. A row without a text has it at full noise, a row without a latent sees pure noise; neither
    counts towards the missing part.

    `has_text` may also leave out texts that are there. Their latents are then denoised knowing
    nothing but the length of the text, which is what a learned prior asks of the model and what
    partial masking hardly ever shows it.

    Args:
        denoiser: the model.
        tokens: clean ids `[b, s]`.
        latents: clean latents.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process.
        has_text: `[b]`, which rows have a text; all of them if not given.
        has_latent: `[b]`, which rows have a latent; all of them if not given.
        text_time: the times of the text, for masks their rates; a number or `[b]`; stratified
            uniform if not given.
        latent_time: a number or `[b]`; stratified uniform if not given.
        noise: standard normal noise; drawn with `generator` if not given.
        generator: random state of the draws.
        text_weighting: `bound`, or the `mean` of the cross-entropy over the tokens that the noise
            leaves to be counted: see `Noised`.
        latent_weighting: of the rows of the latent term, a function of their times: `weighting` of
            `t2l_loss`.
        reduction: as `text_loss` and `latent_loss`, over the rows that have the part.
        latent_mask: as `joint`; what is not kept counts nowhere.
        text_count: denominator in place of the kept tokens (of a `mean`: the counted ones,
            `nats`: the number) of rows with a text.
        latent_count: denominator in place of the elements (`nats`: the number) of rows with a
            latent.

    Raises:
        ValueError: wrong shapes or values, an unknown reduction or weighting, or a text process
            whose weights are not its own.

    Reference: Sahoo et al., masked diffusion language models, https://arxiv.org/abs/2406.07524;
    random words: von Rütte et al., https://arxiv.org/abs/2503.04482.

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
    checks.check_choice("reduction", reduction, ("mean", "sum", "nats"))
    check_weighting("latent_weighting", latent_weighting)
    checks.check_choice("text_weighting", text_weighting, get_args(TextWeighting))
    if text_weighting == "bound":
        text_process.check_bound()
    checks.check_row_mask("has_latent", has_latent, tokens)
    if has_latent is not None:
        latents = only_present(latents, has_latent)
    if latent_mask is not None:
        latents, latent_mask = kept_latents("latents", latents, latent_mask)
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
        latent_mask=latent_mask,
    )
    kept = checks.as_mask("attention_mask", attention_mask, tokens.shape)
    tokens, kept = text_process.targets(tokens.long(), kept)
    everyone = torch.ones_like(kept[:, 0])
    has_text = everyone if has_text is None else has_text
    has_latent = everyone if has_latent is None else has_latent
    kept = kept & has_text[:, None]
    counted = out.masked & kept
    target = latent_process.target(latents, out.noise, out.latent_time)
    squared = latent_loss(
        out.latent_prediction,
        target,
        weight=None if latent_weighting is None else latent_weighting(out.latent_time),
        reduction="none",
    )
    if text_count is None:
        words = counted if text_weighting == "mean" else kept
        text_count = has_text.sum() if reduction == "nats" else words.sum()
    reduced: dict[str, Any] = {"reduction": reduction, "count": text_count}
    if text_weighting == "mean":
        text = reduced_nll(out.logits, tokens, counted, **reduced)
    else:
        noised = Noised(out.noisy_tokens, counted)
        reduced["text_process"] = text_process
        text = reduced_bound(out.logits, tokens, noised, out.text_time, counted, **reduced)
    return UnconditionalLoss(
        text,
        reduce_latents(
            squared,
            reduction=reduction,
            rows=has_latent,
            latent_mask=latent_mask,
            count=latent_count,
        ),
    )
