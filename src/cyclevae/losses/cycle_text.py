"""The text cycle, T2L2T: from a text to a latent and back."""

from typing import get_args

import torch

from cyclevae._base import checks
from cyclevae._base.masked import kept_latents
from cyclevae._base.types import (
    Count,
    LatentMaskLike,
    Latents,
    Loss,
    Mask,
    MaskLike,
    Number,
    Reduction,
    Time,
    Tokens,
)
from cyclevae.bridges.latent import ONE_SHOT, LatentBridge, encode_text
from cyclevae.gradient_policy.gate import refuse_reentrant
from cyclevae.gradient_policy.policy import STOP_GRADIENT, GradientPolicy
from cyclevae.losses.text import text_loss
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.maker import check_bridge_maker
from cyclevae.model.passes import l2t
from cyclevae.model.unread import AnyLogits, in_the_graph
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess


@at_the_door
def cycle_text_loss(
    denoiser: Denoiser,
    tokens: Tokens,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    z_hat: Latents | None = None,
    maker: Denoiser | None = None,
    bridge: LatentBridge = ONE_SHOT,
    time: Number | Time = 1.0,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    policy: GradientPolicy = STOP_GRADIENT,
    reduction: Reduction = "mean",
    latent_mask: LatentMaskLike | None = None,
    count: Count | None = None,
) -> Loss:
    """Text cycle: encode a text, decode the latent, compare with the text.

    `L_T2L2T = 1/N sum_l -log p(y_l | z_hat(y), text fully masked)`. The text is fully masked
    because visible tokens would let the decoder ignore the latent. `z_hat` comes from pure noise,
    by `encode_text`, so it has not seen the true latent.

    Args:
        denoiser: the model.
        tokens: clean ids `[b, s]`, paired or unpaired.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process; its `shape` says what to draw if `noise` is not given.
        z_hat: the first half, where it is already computed; the encoder passes are then skipped,
            and of `bridge` only its noise is used.
        maker: the model that makes `z_hat`, if it is not the one that learns: an averaged copy,
            `guided` or `evaluated`. Nobody learns through what it makes.
        bridge: how many passes make `z_hat`, and what guards it.
        time: at which the encoder starts from noise.
        noise: standard normal noise; drawn with `generator` if not given.
        generator: random state of the draw.
        policy: who learns. By default the bridge is detached: the decoder learns to read what the
            encoder writes. With `bridge="full"` the gradient goes on into the encoder passes, and
            with `bridge="last"` into the last of them.
        reduction: as `text_loss`.
        latent_mask: `[b, n]`, True = keep, of the latents `[b, n, d]` to be written and read.
        count: as `text_loss`.

    Raises:
        ValueError: wrong shapes or values, a `maker` beside `z_hat` or under a policy that would
            teach it, or a prediction whose gain at `time` is above
            `max_gain`; the message lists the cures.
        RuntimeError: a policy that freezes, over reentrant activation checkpointing.

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
    checks.check_choice("reduction", reduction, get_args(Reduction))
    logits, tokens, taught = decode_cycled(
        denoiser,
        tokens,
        attention_mask,
        text_process=text_process,
        latent_process=latent_process,
        z_hat=z_hat,
        maker=maker,
        bridge=bridge,
        time=time,
        noise=noise,
        generator=generator,
        policy=policy,
        latent_mask=latent_mask,
    )
    return text_loss(logits, tokens, taught, reduction=reduction, count=count)


def decode_cycled(
    denoiser: Denoiser,
    tokens: Tokens,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    z_hat: Latents | None = None,
    maker: Denoiser | None = None,
    bridge: LatentBridge = ONE_SHOT,
    time: Number | Time = 1.0,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    policy: GradientPolicy = STOP_GRADIENT,
    latent_mask: LatentMaskLike | None = None,
) -> tuple[AnyLogits, Tokens, Mask]:
    """The passes of `cycle_text_loss`: logits, what they should be, and where that counts."""
    checks.check_type("bridge", bridge, LatentBridge)
    check_bridge_maker(maker, policy, made="z_hat" if z_hat is not None else None)
    tokens, mask = text_process.as_text(tokens, attention_mask)
    if z_hat is None:
        z_hat = encode_text(
            denoiser if maker is None else maker,
            tokens,
            mask,
            text_process=text_process,
            latent_process=latent_process,
            bridge=bridge,
            time=time,
            noise=noise,
            generator=generator,
            policy=policy,
            latent_mask=latent_mask,
        )
    elif policy.bridge == "detach":
        z_hat = z_hat.detach()
    else:
        cure = f"policy.bridge={policy.bridge!r} teaches what made it; {checks.ENCODE_WITH_GRAPH}"
        checks.warn_without_graph("z_hat", z_hat, cure=cure)
    z_hat, latent_mask = kept_latents(
        "z_hat", z_hat, latent_mask, latent_process.shape, cure="has training diverged?"
    )
    crossing = bridge.noised(z_hat, generator=generator, latent_mask=latent_mask)
    with policy.reading_pass(denoiser):
        logits = l2t(
            denoiser,
            crossing,
            mask,
            text_process=text_process,
            generator=generator,
            latent_mask=latent_mask,
        )
    if policy.freeze:
        refuse_reentrant([in_the_graph(logits)], bridge=crossing)
    return logits, *text_process.targets(tokens, mask)
