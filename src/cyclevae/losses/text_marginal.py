"""How improbable a text is by itself: keeps pseudo-texts from becoming private codes."""

from contextlib import nullcontext
from typing import get_args

import torch

from cyclevae._base import checks
from cyclevae._base.masked import kept_latents
from cyclevae._base.types import (
    AnyTokens,
    Count,
    LatentMaskLike,
    Latents,
    Loss,
    MaskLike,
    Number,
    Reduction,
    Time,
)
from cyclevae.gradient_policy.contexts import detach
from cyclevae.losses.text_bound import reduced_bound
from cyclevae.model.denoiser import Denoiser, need_logits
from cyclevae.model.door import at_the_door
from cyclevae.model.padding import tell_latent_mask
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.noise import draw_noise
from cyclevae.processes.text import TextProcess
from cyclevae.processes.times import stratified_times


@at_the_door
def text_marginal_loss(
    denoiser: Denoiser,
    tokens: AnyTokens,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    text_time: Number | Time | None = None,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    latent_mask: LatentMaskLike | None = None,
    count: Count | None = None,
) -> Loss:
    """The diffusion bound on `-log p(y)`, of texts alone: the latent is pure noise.

    `E_r [1/r sum_masked -log p(y_l | y_r, noise)]`, one draw of the rate `r` and of the mask per
    row; under another text process the bound of that. It bounds in the mean over uniform rates; one
    draw, or a rate of one's own, bounds nothing. The weight is capped at 1000, which takes off
    0.05 % of what words lose at rates near 0. Where `taught_padding` teaches padding, it is part of
    the text. It is the text part of `unconditional_loss` on rows without a latent.

    A relaxed text is noised as its most probable words, and its gradient is that of the targets,
    `sum_v y_v (-log p_v)`, as for the straight-through bridge: the text learns to be probable, and
    the model learns nothing. From ids the model learns, as in `unconditional_loss`.

    As the reward of a sampled text take the nats of each row, drawn with the same `text_time`,
    `noise` and generator state for all texts that are compared:
    `-text_marginal_loss(..., reduction="none").sum(dim=1)`, under `detach()`.

    Args:
        denoiser: the model.
        tokens: ids `[b, s]`, or a relaxed text `[b, s, v]`.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process; its `shape` says what to draw if `noise` is not given.
        text_time: the times of the text, for masks their rates; a number or `[b]`; stratified
            uniform if not given.
        noise: standard normal, of which the latents are made that the model sees, those of a start
            from noise at time 1; drawn with `generator` if not given.
        generator: random state of the draws.
        reduction: `mean` over taught tokens, `sum`, `none` (`[b, s]`, 0 where nothing was masked)
            or `nats` (sum over tokens, mean over rows).
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`: how long the noise is.
        count: as `text_loss`.

    Raises:
        ValueError: wrong shapes or values, or a text process whose weights are not its own.

    Reference: Sahoo et al., masked diffusion language models, https://arxiv.org/abs/2406.07524; a
    language model's reward in dual learning, https://arxiv.org/abs/1611.00179.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask = toy_batch(seed=0)[:2]
        >>> bound = text_marginal_loss(
        ...     denoiser, tokens, mask, text_process=text_process, latent_process=latent_process,
        ...     reduction="none",
        ... )
        >>> bound.sum(dim=1).shape  # nats of each text
        torch.Size([3])
    """
    checks.check_choice("reduction", reduction, get_args(Reduction))
    tokens, kept = text_process.as_text(tokens, attention_mask, relaxed=True)
    text_process.check_bound()
    relaxed = tokens.is_floating_point()
    if relaxed:  # the model learns from ids alone
        cure = "make the relaxed text outside of detach(), or give its ids to teach the model"
        checks.warn_without_graph("tokens", tokens, cure=cure)
    words, taught = text_process.targets(tokens, kept)
    ids = words.argmax(dim=-1) if relaxed else words
    if noise is None:
        noise = draw_noise(len(ids), latent_process, at=ids, generator=generator)
        if latent_mask is not None:
            noise, latent_mask = kept_latents("noise", noise, latent_mask)
    else:
        noise, latent_mask = kept_latents("noise", noise, latent_mask, latent_process.shape)
        checks.check_rows("noise", noise, "tokens", ids)
    if text_time is None:
        text_time = stratified_times(len(ids), device=ids.device, generator=generator)
    rate = checks.as_time("text_time", text_time, noise)
    noised = text_process.noised(ids, kept, rate, generator=generator)
    with detach() if relaxed else nullcontext():
        full = torch.ones_like(rate)
        output = denoiser.denoise(
            noised.tokens,
            latent_process.started(noise, full),
            text_time=rate,
            latent_time=full,
            attention_mask=kept,
            need="logits",
            **tell_latent_mask(denoiser, latent_mask),
        )
        logits = need_logits(output, ids, text_process.vocab_size)
    return reduced_bound(
        logits,
        words,
        noised,
        rate,
        taught,
        text_process=text_process,
        reduction=reduction,
        count=count,
    )
