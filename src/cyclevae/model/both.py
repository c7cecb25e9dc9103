"""One forward of the denoiser in the unconditional mode, where both parts are noised."""

from typing import NamedTuple

import torch
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.masked import kept_latents, only_kept
from cyclevae._base.reduce import only_present
from cyclevae._base.types import (
    LatentMaskLike,
    Latents,
    MaskLike,
    Number,
    Rows,
    Time,
    Tokens,
)
from cyclevae.model.denoiser import Denoiser, need_latents, need_logits
from cyclevae.model.door import at_the_door
from cyclevae.model.dtypes import in_its_dtype
from cyclevae.model.padding import tell_latent_mask
from cyclevae.model.unread import AnyLogits
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.noise import draw_noise
from cyclevae.processes.text import TextProcess
from cyclevae.processes.times import stratified_times


class Joint(NamedTuple):
    """A pass of the unconditional mode, where both parts are noised.

    Attributes:
        logits: `[b, s, v]`.
        latent_prediction: in the process's prediction type.
        masked: which tokens were masked `[b, s]`; where noise is random words, all taught ones.
        noise: the noise in the latents.
        text_time: `[b]`, the rate at which tokens were masked.
        latent_time: `[b]`.
        noisy_tokens: the noised text `[b, s]`.
    """

    logits: AnyLogits
    latent_prediction: Latents
    masked: Tensor
    noise: Latents
    text_time: Time
    latent_time: Time
    noisy_tokens: Tokens


@at_the_door
def joint(
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
    latent_mask: LatentMaskLike | None = None,
) -> Joint:
    """The unconditional mode: text noised at a random time, latents at another.

    A row without a text has it at full noise, a row without a latent has what the encoder starts
    from at time 1, nothing but noise: the model then learns from the part that is there, knowing
    nothing of the other.

    Args:
        denoiser: the model.
        tokens: clean ids `[b, s]`; ignored where `has_text` is False.
        latents: clean latents; ignored where `has_latent` is False.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process.
        has_text: `[b]`, which rows have a text; all of them if not given.
        has_latent: `[b]`, which rows have a latent; all of them if not given.
        text_time: a number or `[b]`; stratified uniform if not given.
        latent_time: a number or `[b]`; stratified uniform if not given.
        noise: standard normal noise; drawn with `generator` if not given.
        generator: random state of the draws.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`; where `has_latent` is False, how
            long the noise is.

    Raises:
        ValueError: wrong shapes or values.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, latents = toy_batch(seed=0)[:3]
        >>> out = joint(
        ...     denoiser, tokens, latents, mask,
        ...     text_process=text_process, latent_process=latent_process, text_time=1.0,
        ... )
        >>> bool((out.masked == mask).all())
        True
    """
    checks.check_row_mask("has_text", has_text, tokens)
    checks.check_row_mask("has_latent", has_latent, tokens)
    if has_latent is not None:  # whatever stands there, be it NaN
        latents = only_present(latents, has_latent)
    tokens, mask = text_process.as_text(tokens, attention_mask, rows=has_text)
    checks.check_kept("attention_mask", mask)  # a text that is not there has a length all the same
    latents, latent_mask = kept_latents("latents", latents, latent_mask, latent_process.shape)
    checks.check_rows("latents", latents, "tokens", tokens)
    if noise is not None:
        checks.check_same_shape("noise", noise, "latents", latents)
    latents = in_its_dtype(latents, denoiser)
    rows, device = len(tokens), tokens.device

    def time(name: str, given: Number | Time | None, present: Rows | None) -> Time:
        if given is None:
            given = stratified_times(rows, device=device, generator=generator)
        given = checks.as_time(name, given, latents)
        return given if present is None else torch.where(present, given, torch.ones_like(given))

    text_time = time("text_time", text_time, has_text)
    latent_time = time("latent_time", latent_time, has_latent)
    if noise is None:
        noise = draw_noise(rows, latent_process, like=latents, generator=generator, at=tokens)
    noise = only_kept(noise, latent_mask)
    noised = text_process.noised(tokens, mask, text_time, generator=generator)
    z_t = latent_process.noised(latents, noise, latent_time)
    if has_latent is not None:
        z_t = only_present(z_t, has_latent, latent_process.started(noise, latent_time))
    output = denoiser.denoise(
        noised.tokens,
        z_t,
        text_time=text_time,
        latent_time=latent_time,
        attention_mask=mask,
        need="both",
        **tell_latent_mask(denoiser, latent_mask),
    )
    return Joint(
        need_logits(output, tokens, text_process.vocab_size),
        only_kept(need_latents(output, z_t), latent_mask),
        noised.counted,
        noise,
        text_time,
        latent_time,
        noised.tokens,
    )
