"""The two cycles: T2L2T, text to latent to text, and L2T2L, latent to text to latent."""

from contextlib import AbstractContextManager, nullcontext
from typing import get_args

import torch

from cyclevae import _checks
from cyclevae._types import Count, Latents, Loss, MaskLike, Number, Reduction, Time, Tokens
from cyclevae.base import latent_loss, text_loss
from cyclevae.bridges import Bridge, pseudo_text
from cyclevae.denoiser import Denoiser
from cyclevae.gradient_policy import GradientPolicy, detach, freeze
from cyclevae.latent_process import LatentProcess
from cyclevae.passes import draw_noise, l2t, t2l
from cyclevae.text_process import TextProcess

STOP_GRADIENT = GradientPolicy()


def cycle_text_loss(
    denoiser: Denoiser,
    tokens: Tokens,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    z_hat: Latents | None = None,
    time: Number | Time = 1.0,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    policy: GradientPolicy = STOP_GRADIENT,
    reduction: Reduction = "mean",
    count: Count | None = None,
) -> Loss:
    """Text cycle: encode a text, decode the latent, compare with the text.

    `L_T2L2T = 1/N sum_l -log p(y_l | z_hat(y), text fully masked)`. The text is fully masked
    because visible tokens would let the decoder ignore the latent. `z_hat` is read off one pass
    from pure noise, so it has not seen the true latent.

    Args:
        denoiser: the model.
        tokens: clean ids `[b, s]`, paired or unpaired.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process; its `shape` says what to draw if `noise` is not given.
        z_hat: the first half, where it is already computed; the encoder pass is then skipped.
        time: at which the encoder starts from noise.
        noise: standard normal noise; drawn with `generator` if not given.
        generator: random state of the draw.
        policy: who learns. By default the bridge is detached: the decoder learns to read what the
            encoder writes. With `bridge="full"` the gradient goes on into the encoder pass.
        reduction: as `text_loss`.
        count: as `text_loss`.

    Raises:
        ValueError: wrong shapes or values, or an epsilon process whose gain at `time` is above
            `max_gain`; the message lists the cures.

    Reference: ITIT, https://arxiv.org/abs/2310.03734; back-translation,
    https://arxiv.org/abs/1511.06709.

    Examples:
        >>> from cyclevae.testing import toy_denoiser
        >>> denoiser, text, latent = toy_denoiser(seed=0)
        >>> tokens = torch.tensor([[3, 4, 5], [4, 6, 0]])
        >>> loss = cycle_text_loss(
        ...     denoiser, tokens, tokens > 0, text_process=text, latent_process=latent,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> loss.shape, bool(loss > 0)
        (torch.Size([]), True)
    """
    _checks.check_choice("reduction", reduction, get_args(Reduction))
    _checks.check_tokens("tokens", tokens, text_process.vocab_size)
    mask = _checks.as_mask("attention_mask", attention_mask, tokens.shape)
    if z_hat is None:
        latent_process.refuse_ill_conditioned(time)
        with bridge_pass(denoiser, policy):
            z_hat = t2l(
                denoiser,
                tokens,
                mask,
                text_process=text_process,
                latent_process=latent_process,
                start="noise",
                time=time,
                noise=noise,
                generator=generator,
            ).z_hat(latent_process)
    elif policy.bridge == "detach":
        z_hat = z_hat.detach()
    _checks.check_latents("z_hat", z_hat, latent_process.shape, cure="has training diverged?")
    with _freeze(denoiser, policy.freeze):
        logits = l2t(denoiser, z_hat, mask, text_process=text_process)
    return text_loss(logits, tokens, mask, reduction=reduction, count=count)


def cycle_latent_loss(
    denoiser: Denoiser,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    y_hat: Tokens | None = None,
    bridge: Bridge = "argmax",
    temperature: Number = 1.0,
    show_latent: bool = False,
    time: Number | Time = 1.0,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    policy: GradientPolicy = STOP_GRADIENT,
    reduction: Reduction = "mean",
    count: Count | None = None,
) -> Loss:
    """Latent cycle: decode a latent, encode the pseudo-text, compare with the latent.

    `L_L2T2L = 1/(b d) ||z - z_hat(x, t, y_hat(z))||^2`, where `x` is pure noise. The pseudo-text is
    data to the encoder: its ids carry no gradient back into the decoder.

    Args:
        denoiser: the model.
        latents: clean latents, paired or unpaired.
        attention_mask: `[b, s]`, True = keep: the lengths of the pseudo-texts. Those of unpaired
            latents must not come from a hidden partner: see `draw_lengths`.
        text_process: the text process.
        latent_process: the latent process.
        y_hat: the first half, where it is already computed; the decoder pass is then skipped.
        bridge: `argmax` or `categorical`.
        temperature: of the categorical bridge.
        show_latent: noise the true latent to `time` for the encoder, which thereby sees it, instead
            of starting from pure noise.
        time: at which the encoder starts.
        noise: standard normal noise; drawn with `generator` if not given.
        generator: random state of the draws.
        policy: who learns. Its bridge must be `"detach"`; `freeze` acts on the encoder pass.
        reduction: as `latent_loss`.
        count: as `latent_loss`.

    Raises:
        ValueError: wrong shapes or values, `policy.bridge="full"`, or an epsilon process whose
            gain at `time` is above `max_gain`.

    Reference: ITIT, https://arxiv.org/abs/2310.03734.

    Examples:
        >>> from cyclevae.testing import toy_denoiser
        >>> denoiser, text, latent = toy_denoiser(seed=0)
        >>> loss = cycle_latent_loss(
        ...     denoiser, torch.randn(2, 4), torch.ones(2, 3, dtype=torch.bool),
        ...     text_process=text, latent_process=latent,
        ... )
        >>> loss.shape, bool(loss > 0)
        (torch.Size([]), True)
    """
    if policy.bridge != "detach":
        raise ValueError(
            f"the {bridge!r} bridge is a choice of ids and has no gradient, so the latent cycle "
            f"cannot use policy.bridge={policy.bridge!r}; use 'detach'"
        )
    _checks.check_choice("reduction", reduction, get_args(Reduction))
    _checks.check_choice("bridge", bridge, get_args(Bridge))
    _checks.check_positive("temperature", temperature)
    _checks.check_latents("latents", latents, latent_process.shape)
    _checks.check_rows("attention_mask", attention_mask, "latents", latents)
    mask = _checks.as_mask("attention_mask", attention_mask, attention_mask.shape)
    if noise is not None:
        _checks.check_latents("noise", noise, latents.shape[1:])
        _checks.check_rows("noise", noise, "latents", latents)
    if y_hat is not None:
        _checks.check_tokens("y_hat", y_hat, text_process.vocab_size)
        _checks.as_mask("attention_mask", mask, y_hat.shape)
    latent_process.refuse_ill_conditioned(time)
    time = _checks.as_time("time", time, latents)
    if y_hat is None:
        with bridge_pass(denoiser, policy):
            y_hat = pseudo_text(
                l2t(denoiser, latents, mask, text_process=text_process),
                mask,
                text_process=text_process,
                bridge=bridge,
                temperature=temperature,
                generator=generator,
            )
    y_hat, mask = text_process.cut(y_hat, mask)
    if noise is None:
        noise = draw_noise(
            len(latents), latent_process, at=latents, like=latents, generator=generator
        )
    with _freeze(denoiser, policy.freeze):
        encoded = t2l(
            denoiser,
            y_hat,
            mask,
            text_process=text_process,
            latent_process=latent_process,
            latents=latents if show_latent else None,
            start=None if show_latent else "noise",
            time=time,
            noise=noise,
        )
    z_hat = encoded.z_hat(latent_process)
    return latent_loss(z_hat, latents, reduction=reduction, count=count)


def bridge_pass(denoiser: Denoiser, policy: GradientPolicy) -> AbstractContextManager[object]:
    """The context in which a bridge is made: without a graph, or with some parameters frozen."""
    if policy.bridge == "detach":
        return detach()
    return _freeze(denoiser, policy.freeze_bridge)


def _freeze(denoiser: Denoiser, patterns: tuple[str, ...]) -> AbstractContextManager[object]:
    return freeze(denoiser, *patterns) if patterns else nullcontext()
