"""Denoising diffusion variational inference: its wake KL and its sleep term, for a text encoder."""

import torch
from jaxtyping import Shaped
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.masked import kept_latents
from cyclevae._base.precision import fp32
from cyclevae._base.reduce import reduce_latents
from cyclevae._base.types import (
    Count,
    LatentMaskLike,
    Latents,
    Loss,
    MaskLike,
    Number,
    Reduction,
    Scalar,
    Time,
    Tokens,
)
from cyclevae.bridges.text import pseudo_text
from cyclevae.gradient_policy.contexts import detach
from cyclevae.losses.latent import t2l_loss
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.maker import check_bridge_maker
from cyclevae.model.passes import l2t, t2l
from cyclevae.model.teacher import check_frozen
from cyclevae.priors.learned import noise_error, without_text
from cyclevae.priors.weighting import weighted_times
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess


@at_the_door
def ddvi_wake_kl(
    denoiser: Denoiser,
    teacher: Denoiser,
    tokens: Tokens,
    attention_mask: MaskLike,
    z_hat: Latents,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    null_mask: Shaped[Tensor, "b u"] | None = None,
    low: Number = 0.02,
    high: Number = 0.98,
    time: Number | Time | None = None,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    latent_mask: LatentMaskLike | None = None,
    count: Count | None = None,
) -> Scalar:
    """How much more the encoder's reverse process says of a latent than the prior's: a KL in nats.

    `1/2 (gamma_high - gamma_low) E_t ||eps_phi(z_t, t, y) - eps_psi(z_t, t, no text)||^2`, summed
    over dimensions, averaged over rows, with `z_t = alpha sg(z_hat) + sigma eps` and t uniform in
    `gamma = -log SNR`. Per step it is the KL of two reverse kernels of equal variance; that `z_t`
    is noised forward, and not taken from the encoder's own trajectory, is an approximation. Only
    the denoiser learns. The prior is its own average: keep the weight at .01 or below, and ramp it.

    Args:
        denoiser: the model, read as an encoder; it learns.
        teacher: the unconditional denoiser, frozen and in eval mode: `Teacher(network).denoiser`.
        tokens: clean ids `[b, s]`.
        attention_mask: `[b, s]`, True = keep.
        z_hat: the latents that the encoder makes of the texts; no gradient reaches them.
        text_process: the text process.
        latent_process: the latent process, that of both.
        null_mask: `[b, u]`, the length of the fully masked text that the teacher sees; by default
            that of the text, and then the KL counts nothing that a length tells.
        low: the lowest time.
        high: the highest time.
        time: a number or `[b]`, as if drawn uniformly in gamma; drawn so if not given.
        noise: standard normal noise; drawn with `generator` if not given.
        generator: random state of the draws.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`; both models are told.
        count: rows in the denominator, in place of those of `z_hat`: see `text_loss`.

    Raises:
        TypeError: a teacher that is no `Denoiser`, such as a `Teacher` in place of its `.denoiser`.
        ValueError: a teacher that is not frozen or not in eval mode, or wrong shapes or values.

    Reference: Piriyakulkij et al., denoising diffusion variational inference,
    https://arxiv.org/abs/2401.02739; this form is an adaptation.

    Examples:
        >>> from cyclevae import Teacher
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, z_hat = toy_batch(seed=0)[:3]
        >>> kl = ddvi_wake_kl(
        ...     denoiser, Teacher(denoiser.module).denoiser, tokens, mask, z_hat,
        ...     text_process=text_process, latent_process=latent_process,
        ... )
        >>> kl.shape, bool(kl > 0)
        (torch.Size([]), True)
    """
    check_frozen(teacher)
    z_hat, latent_mask = kept_latents(
        "z_hat", z_hat, latent_mask, latent_process.shape, cure="has training diverged?"
    )
    checks.check_rows("z_hat", z_hat, "tokens", tokens)
    tokens, mask = text_process.as_text(tokens, attention_mask)
    if null_mask is not None:
        checks.check_rows("null_mask", null_mask, "tokens", tokens)
        null_mask = checks.as_mask("null_mask", null_mask)
        checks.check_kept("null_mask", null_mask)
    z_hat = z_hat.detach()
    time, weight = weighted_times(
        "likelihood",
        fp32(z_hat),
        latent_process,
        low=low,
        high=high,
        time=time,
        generator=generator,
    )
    encoded = t2l(
        denoiser,
        tokens,
        mask,
        text_process=text_process,
        latent_process=latent_process,
        latents=z_hat,
        time=time,
        noise=noise,
        generator=generator,
        latent_mask=latent_mask,
    )
    with detach():
        null_mask = mask if null_mask is None else null_mask
        hidden = text_process.at_full_noise(null_mask, generator=generator)
        prior = without_text(teacher, encoded.z_t, null_mask, time, hidden, latent_mask)
    error = noise_error(fp32(encoded.prediction) - fp32(prior), time, latent_process)
    per_row = weight * error.square().flatten(1).sum(dim=1)
    return reduce_latents(per_row, reduction="mean", count=count)


@at_the_door
def ddvi_sleep_loss(
    denoiser: Denoiser,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    y_hat: Tokens | None = None,
    maker: Denoiser | None = None,
    time: Number | Time | None = None,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    latent_mask: LatentMaskLike | None = None,
    count: Count | None = None,
) -> Loss:
    """Teach the encoder the real latents of dreamt texts, those that the decoder writes.

    `1/(b d) ||target - prediction(z_t, t, y_hat)||^2` in the encoder's own prediction space, with
    `y_hat ~ p(y | z)` drawn without a graph and t random. Only the encoder's pass learns. Unlike
    the latent cycle, the encoder sees the latent at time t, and so learns to denoise it.

    Args:
        denoiser: the model.
        latents: clean latents, samples of the prior: paired or unpaired.
        attention_mask: `[b, s]`, True = keep: the lengths of the pseudo-texts. Those of unpaired
            latents must not come from a hidden partner: see `draw_lengths`.
        text_process: the text process.
        latent_process: the latent process.
        y_hat: the dreamt texts, where they are already drawn; the decoder pass is then skipped.
        maker: the model that dreams, if it is not the one that learns: an averaged copy, `guided`
            or `evaluated`.
        time: a number or `[b]`; stratified uniform if not given.
        noise: standard normal noise; drawn with `generator` if not given.
        generator: random state of the draws.
        reduction: as `latent_loss`.
        latent_mask: as `latent_loss`; the model is told.
        count: as `latent_loss`.

    Raises:
        ValueError: wrong shapes or values.

    Reference: the sleep phase of https://arxiv.org/abs/2401.02739, here with real latents.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> _, mask, latents = toy_batch(seed=0)[:3]
        >>> loss = ddvi_sleep_loss(
        ...     denoiser, latents, mask, text_process=text_process, latent_process=latent_process
        ... )
        >>> loss.shape, bool(loss > 0)
        (torch.Size([]), True)
    """
    check_bridge_maker(maker, made="y_hat" if y_hat is not None else None)
    latents, latent_mask = kept_latents("latents", latents, latent_mask, latent_process.shape)
    checks.check_rows("attention_mask", attention_mask, "latents", latents)
    mask = checks.as_mask("attention_mask", attention_mask)
    if y_hat is None:
        with detach():
            y_hat = pseudo_text(
                l2t(
                    denoiser if maker is None else maker,
                    latents,
                    mask,
                    text_process=text_process,
                    generator=generator,
                    latent_mask=latent_mask,
                ),
                mask,
                text_process=text_process,
                bridge="categorical",
                generator=generator,
            )
    else:
        y_hat = checks.as_tokens("y_hat", y_hat, text_process.vocab_size)
        checks.as_mask("attention_mask", mask, y_hat.shape)
    y_hat, mask = text_process.cut(y_hat, mask)
    return t2l_loss(
        denoiser,
        y_hat,
        latents,
        mask,
        text_process=text_process,
        latent_process=latent_process,
        time=time,
        noise=noise,
        generator=generator,
        reduction=reduction,
        latent_mask=latent_mask,
        count=count,
    )
