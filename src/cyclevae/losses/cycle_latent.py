"""The latent cycle, L2T2L: from a latent to a text and back."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, get_args

import torch

from cyclevae._base import checks
from cyclevae._base.masked import kept_latents
from cyclevae._base.reduce import reduce_latents
from cyclevae._base.types import (
    AnyTokens,
    Count,
    LatentMask,
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
from cyclevae.bridges.latent import ONE_SHOT
from cyclevae.bridges.rloo import rloo_surrogate, text_log_prob
from cyclevae.bridges.text import AnyTextBridge, TextBridge, pseudo_text
from cyclevae.bridges.unmasking import write_words
from cyclevae.bridges.words import check_logits
from cyclevae.gradient_policy.contexts import detach
from cyclevae.gradient_policy.gate import refuse_reentrant
from cyclevae.gradient_policy.policy import STOP_GRADIENT, GradientPolicy
from cyclevae.losses.critic import ScoredText, best_of, errors_per_row, score_text
from cyclevae.losses.latent import AnyDistance, check_distance, latent_loss
from cyclevae.losses.text_marginal import text_marginal_loss
from cyclevae.model.denoiser import Denoiser, reading_relaxed
from cyclevae.model.door import at_the_door
from cyclevae.model.maker import check_bridge_maker
from cyclevae.model.padding import tell_latent_mask
from cyclevae.model.passes import l2t, t2l
from cyclevae.model.unread import AnyLogits, in_the_graph
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.noise import draw_noise
from cyclevae.processes.text import TextProcess
from cyclevae.processes.times import stratified_times


@at_the_door
def cycle_latent_loss(
    denoiser: Denoiser,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    y_hat: AnyTokens | None = None,
    logits: AnyLogits | None = None,
    maker: Denoiser | None = None,
    bridge: AnyTextBridge = "argmax",
    show_latent: bool = False,
    time: Number | Time = 1.0,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    policy: GradientPolicy = STOP_GRADIENT,
    distance: AnyDistance = "mse",
    reduction: Reduction = "mean",
    latent_mask: LatentMaskLike | None = None,
    count: Count | None = None,
) -> Loss:
    """Latent cycle: decode a latent, encode the pseudo-text, compare with the latent.

    `L_L2T2L = 1/(b d) ||z - z_hat(x, t, y_hat(z))||^2`, where `x` is pure noise. Where the bridge
    is a choice of ids, the pseudo-text is data to the encoder. Where it has a gradient, the decoder
    learns to write what the encoder reads: under `policy.bridge="full"`. `rloo` draws several texts
    per latent, encodes each from the same noise, and returns the mean of their losses, whose
    gradient for the decoder is that of `rloo_surrogate`. `best` draws several too, and keeps the
    one whose latent, from that noise and without a gradient, comes nearest by `distance`.

    The modes of the network are left as they are: in training, dropout acts in the pass that makes
    the pseudo-text as in any other. `maker=evaluated(denoiser)` does without.

    Args:
        denoiser: the model.
        latents: clean latents, paired or unpaired.
        attention_mask: `[b, s]`, True = keep: the lengths of the pseudo-texts. Those of unpaired
            latents must not come from a hidden partner: see `draw_lengths`.
        text_process: the text process.
        latent_process: the latent process.
        y_hat: the first half, where it is already computed, as ids or relaxed; `bridge` then only
            says in errors where it comes from.
        logits: of the fully masked decoder pass on these latents, where it is already computed;
            under a policy with `freeze_bridge`, inside of `freeze`.
        maker: the model that writes the pseudo-text, if it is not the one that learns: an averaged
            copy, `guided` or `evaluated`. Nobody learns through what it writes. Of given `logits`,
            the one that made them.
        bridge: a `TextBridge`, its name, or a function.
        show_latent: noise the true latent to `time` for the encoder, which thereby sees it, instead
            of starting from pure noise.
        time: at which the encoder starts.
        noise: standard normal noise; drawn with `generator` if not given.
        generator: random state of the draws.
        policy: who learns. `bridge="full"` takes a text bridge that has a gradient, and only such a
            bridge takes it; `freeze` acts on the encoder pass, `freeze_bridge` on the decoder's.
        distance: as `latent_loss`.
        reduction: as `latent_loss`. It also scales the reward of `rloo`, whose `marginal_weight`
            is the price of a nat in summed errors, or in nats with `nats`.
        latent_mask: as `latent_loss`; both halves of the cycle are told.
        count: as `latent_loss`.

    Raises:
        ValueError: wrong shapes or values, a policy that the bridge cannot follow, a `maker`
            beside `y_hat` or under a policy that would teach it, or an epsilon
            process whose gain at `time` is above `max_gain`.
        TypeError: a network that cannot read the relaxed text of the bridge.
        RuntimeError: a policy that freezes, over reentrant activation checkpointing.

    Reference: ITIT, https://arxiv.org/abs/2310.03734.

    Examples:
        >>> from cyclevae.testing import toy_denoiser
        >>> denoiser, text, latent = toy_denoiser(seed=0)
        >>> z, mask = torch.randn(2, 4), torch.ones(2, 3, dtype=torch.bool)
        >>> loss = cycle_latent_loss(denoiser, z, mask, text_process=text, latent_process=latent)
        >>> loss.shape, bool(loss > 0)
        (torch.Size([]), True)
        >>> loss = cycle_latent_loss(
        ...     denoiser, z, mask, text_process=text, latent_process=latent,
        ...     bridge="gumbel", policy=GradientPolicy("full"),
        ... )
    """
    bridge = TextBridge.of(bridge)
    check_bridge_maker(maker, policy, made="y_hat" if y_hat is not None else None)
    writer = denoiser if maker is None else maker
    if y_hat is None:
        bridge.check_policy(policy)
    elif logits is not None or bridge.name == "rloo":
        raise ValueError(
            "`y_hat` is a pseudo-text already made: give no `logits` beside it, and let the 'rloo' "
            "bridge, which weighs texts by their probability, draw its own"
        )
    checks.check_choice("reduction", reduction, get_args(Reduction))
    check_distance("distance", distance, latents.shape[1:])
    latents, latent_mask = kept_latents("latents", latents, latent_mask, latent_process.shape)
    tell_latent_mask(denoiser, latent_mask)
    checks.check_rows("attention_mask", attention_mask, "latents", latents)
    mask = checks.as_mask("attention_mask", attention_mask)
    checks.check_kept("attention_mask", mask)
    if noise is not None:
        noise, _ = kept_latents("noise", noise, latent_mask, latents.shape[1:])
        checks.check_rows("noise", noise, "latents", latents)
    if y_hat is not None:
        y_hat = checks.as_any_tokens("y_hat", y_hat, text_process.vocab_size)
        checks.as_mask("attention_mask", mask, y_hat.shape[:2])
    if logits is not None:
        check_logits(logits, mask, text_process)
    latent_process.refuse_ill_conditioned(time)
    time = checks.as_time("time", time, latents)
    given = y_hat
    if y_hat is None and logits is not None:
        given = in_the_graph(logits)
    if policy.bridge != "detach" and given is not None and given.is_floating_point():
        cure = f"policy.bridge={policy.bridge!r} teaches what made it; make it outside of detach()"
        checks.warn_without_graph("logits" if y_hat is None else "y_hat", given, cure=cure)
    if y_hat is not None:
        texts = [y_hat.detach() if policy.bridge == "detach" else y_hat]
    else:
        with policy.bridge_pass(denoiser):
            if logits is None:
                logits = l2t(
                    writer,
                    latents,
                    mask,
                    text_process=text_process,
                    generator=generator,
                    latent_mask=latent_mask,
                )
            if noise is None and bridge.candidates:
                noise = draw_noise(
                    len(latents), latent_process, at=latents, like=latents, generator=generator
                )
            start: dict[str, Any] = {"bridge": ONE_SHOT, "time": time, "noise": noise}
            score = partial(
                score_text,
                writer,
                mask=mask,
                latents=latents,
                text_process=text_process,
                latent_process=latent_process,
                distance=distance,
                latent_mask=latent_mask,
                **start,
            )
            texts = _write(
                writer, latents, mask, logits, text_process, bridge, generator, latent_mask, score
            )
        if policy.freeze_bridge:
            refuse_reentrant([in_the_graph(logits)], bridge=latents)
    named = y_hat is None or bridge != TextBridge()
    origin = f"of the {str(bridge)!r} bridge" if named else "given as `y_hat`"
    relaxed = texts[0].is_floating_point()
    if policy.bridge != "detach" and not (relaxed or bridge.name == "rloo"):
        raise ValueError(
            f"the pseudo-text {origin} is a choice of ids and has no gradient, so the latent cycle "
            f"cannot use policy.bridge={policy.bridge!r}; use 'detach'"
        )
    if noise is None:
        noise = draw_noise(
            len(latents), latent_process, at=latents, like=latents, generator=generator
        )
    z_hats = []
    with policy.reading_pass(denoiser), reading_relaxed(origin) if relaxed else nullcontext():
        for text in texts:
            encoded = t2l(
                denoiser,
                *text_process.cut(text, mask),
                text_process=text_process,
                latent_process=latent_process,
                latents=latents if show_latent else None,
                start=None if show_latent else "noise",
                time=time,
                noise=noise,
                latent_mask=latent_mask,
            )
            z_hats.append(encoded.z_hat(latent_process))
    if policy.freeze:
        for text, z_hat in zip(texts, z_hats, strict=True):
            refuse_reentrant([z_hat], bridge=text)
    compared: dict[str, Any] = {"distance": distance, "latent_mask": latent_mask}
    losses = [
        latent_loss(z_hat, latents, **compared, reduction=reduction, count=count)
        for z_hat in z_hats
    ]
    loss = torch.stack(losses).mean(dim=0)
    if bridge.name != "rloo" or logits is None:
        return loss
    with detach():
        errors = torch.stack(
            [latent_loss(z_hat, latents, **compared, reduction="none") for z_hat in z_hats]
        )
        rewards = -errors[..., None].flatten(2).sum(dim=-1)
        if bridge.marginal_weight:
            rates = stratified_times(len(latents), device=latents.device, generator=generator)
            marginal = [
                text_marginal_loss(
                    denoiser,
                    *text_process.cut(text, mask),
                    text_process=text_process,
                    latent_process=latent_process,
                    text_time=rates,
                    noise=noise,
                    generator=generator,
                    reduction="none",
                    latent_mask=latent_mask,
                ).sum(dim=1)
                for text in texts
            ]
            # reduction="nats" halves what it is given, as it does to a squared error
            nat = bridge.marginal_weight * (2 if reduction == "nats" else 1)
            rewards = rewards - nat * torch.stack(marginal)
    log_probs = text_log_prob(
        logits,
        torch.stack(texts),
        mask,
        text_process=text_process,
        temperature=bridge.temperature,
    )
    surrogate = rloo_surrogate(log_probs, rewards)
    # of value 0, spread over the elements of a row so that it is reduced as they are
    per_row = (surrogate - surrogate.detach()) / errors_per_row(errors[0], latent_mask)
    spread = per_row.view(-1, *[1] * (errors.ndim - 2)).expand_as(errors[0])
    return loss + reduce_latents(spread, reduction=reduction, latent_mask=latent_mask, count=count)


def _write(
    denoiser: Denoiser,
    latents: Latents,
    mask: Mask,
    logits: AnyLogits,
    text_process: TextProcess,
    bridge: TextBridge,
    generator: torch.Generator | None,
    latent_mask: LatentMask | None,
    score: Callable[[Tokens], ScoredText],
) -> list[AnyTokens]:
    """The pseudo-texts of a bridge: one, or the samples of `rloo`."""
    if bridge.name in ("unmask", "best"):
        written = (
            write_words(
                denoiser,
                latents,
                mask,
                text_process=text_process,
                steps=bridge.steps,
                logits=logits,
                temperature=bridge.temperature if bridge.candidates else None,
                generators=(generator,),
                latent_mask=latent_mask,
            )
            for _ in range(max(bridge.candidates, 1))
        )
        return [best_of(map(score, written)).tokens if bridge.candidates else next(written)]
    texts = 1
    if bridge.name == "rloo":
        texts = bridge.samples
        bridge = TextBridge("categorical", temperature=bridge.temperature)
    return [
        pseudo_text(logits, mask, text_process=text_process, bridge=bridge, generator=generator)
        for _ in range(texts)
    ]
