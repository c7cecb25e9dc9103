"""Labels through a noisy channel: which of some latents a text is likely to be of."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.precision import fp32
from cyclevae._base.types import Latents, Mask, MaskLike, Number, Time, Tokens
from cyclevae.bridges.latent import ONE_SHOT, LatentBridge, encode_text
from cyclevae.gradient_policy.contexts import detach
from cyclevae.losses.token_loss import nll
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.evaluation import evaluated
from cyclevae.model.passes import l2t
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.noise import draw_noise
from cyclevae.processes.text import TextProcess

_NUMBERS = 2**22  # of distances, or of coordinates, at a time


@at_the_door
def channel_latents(
    denoiser: Denoiser,
    tokens: Tokens,
    attention_mask: MaskLike,
    candidates: Float[Tensor, "m *n d"],
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    top: int | None = 64,
    likelihood: Number = 1.0,
    variance: Number | None = None,
    log_prior: Float[Tensor, " m"] | None = None,
    z_hat: Latents | None = None,
    bridge: LatentBridge = ONE_SHOT,
    time: Number | Time = 1.0,
    noise: Latents | None = None,
    at_once: int = 8,
    generator: torch.Generator | None = None,
) -> Latents:
    """The posterior mean of the latents of texts among candidates, with the decoder as a channel.

    `sum_j w_j z_j` with `w = softmax_j(likelihood log p(y | z_j) + log_prior_j
    - ||z_hat - z_j||^2 / (2 variance))`, where `log p(y | z)` sums the words of one decoder pass
    from full noise, as `text_loss` counts them. In evaluation mode, without a gradient.

    Only the `top` candidates nearest to T2L's prediction `z_hat` are weighed, by as many decoder
    passes of `b` rows; they are searched in parts, so there may be a million, on another device
    than the model's. Without `variance`, and with all candidates, the encoder is not asked.

    As every word is counted as independent evidence, weights soon are all on one candidate; a
    `likelihood` below 1 softens them.

    Args:
        denoiser: the model.
        tokens: texts, ids `[b, s]`.
        attention_mask: `[b, s]`, True = keep.
        candidates: clean latents `[m, ...]`, such as those without a partner.
        text_process: the text process.
        latent_process: the latent process.
        top: how many candidates of each text are weighed; all if None.
        likelihood: what a nat of the decoder weighs; 1 is Bayes' rule.
        variance: of the encoder's error in each dimension, around its prediction; without it the
            prediction chooses `top` and weighs nothing.
        log_prior: of each candidate, up to a constant; minus infinity leaves one out.
        z_hat: T2L's predictions, where they are made already.
        bridge: how T2L makes them, if not given; its noise is not added.
        time: at which it starts.
        noise: standard normal noise that it starts from; drawn with `generator` if not given.
        at_once: how many candidates of each text go through the decoder together.
        generator: random state of the draws.

    Returns:
        Latents `[b, ...]` in the dtype of the candidates, on the device of the texts.

    Raises:
        ValueError: wrong shapes or values, no candidate, or none with a prior above 0.

    Reference: a noisy channel, https://arxiv.org/abs/1908.05731.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, _, _, _, candidates = toy_batch(seed=0)[:6]
        >>> labels = channel_latents(
        ...     denoiser, tokens, mask, candidates,
        ...     text_process=text_process, latent_process=latent_process, top=2,
        ... )
        >>> labels.shape
        torch.Size([3, 4])
    """
    if top is not None:
        checks.check_count("top", top)
    checks.check_count("at_once", at_once)
    checks.check_positive("likelihood", likelihood)
    if variance is not None:
        checks.check_positive("variance", variance)
    tokens, mask = text_process.as_text(tokens, attention_mask)
    checks.check_latents("candidates", candidates, latent_process.shape)
    if not len(candidates):
        raise ValueError("`candidates` holds no latent, so a text has none to be of: give some")
    prior = _as_prior(log_prior, candidates)
    few = top is None or len(candidates) <= top
    model = evaluated(denoiser)
    for name, given in (("z_hat", z_hat), ("noise", noise)):
        if given is not None:
            checks.check_latents(name, given, candidates.shape[1:])
            checks.check_rows(name, given, "tokens", tokens)
    with detach():
        if z_hat is None and (not few or variance is not None):
            if noise is None:
                noise = draw_noise(
                    len(tokens), latent_process, at=tokens, like=candidates, generator=generator
                )
            z_hat = encode_text(
                model,
                tokens,
                mask,
                text_process=text_process,
                latent_process=latent_process,
                bridge=bridge,
                time=time,
                noise=noise,
                generator=generator,
            )
        if z_hat is None or top is None or few:
            places = torch.arange(len(candidates), device=prior.device).expand(len(tokens), -1)
        else:
            places = nearest(z_hat, candidates, prior, top)
        found = weigh(
            model,
            tokens,
            mask,
            candidates[places].to(tokens.device),
            prior[places].to(tokens.device),
            text_process=text_process,
            likelihood=likelihood,
            z_hat=z_hat if variance is not None else None,
            variance=1.0 if variance is None else variance,
            at_once=at_once,
            generator=generator,
        )
    return found.latents


class Posterior(NamedTuple):
    """The mean of some candidates `[b, ...]`, and what each weighs `[b, k]`."""

    latents: Latents
    weights: Float[Tensor, "b k"]


def nearest(
    z_hat: Latents, candidates: Float[Tensor, "m *n d"], log_prior: Float[Tensor, " m"], top: int
) -> Integer[Tensor, "b top"]:
    """The places of the candidates that are nearest, on their device; those left out come last."""
    z = fp32(z_hat).flatten(1)
    centre = z.mean(dim=0)  # as products of large numbers lose what distances are made of
    z = z - centre
    best, places = z.new_empty(len(z), 0), torch.empty(len(z), 0, dtype=torch.long, device=z.device)
    size, start = max(1, _NUMBERS // max(len(z), z.shape[1], 1)), 0
    for part, prior in zip(
        torch.split(candidates, size), torch.split(log_prior, size), strict=True
    ):
        x = part.flatten(1).to(z) - centre
        distance = x.square().sum(dim=1) - 2 * z @ x.T
        distance = distance.masked_fill(prior.to(z.device).isneginf(), torch.inf)
        here = torch.arange(start, start + len(x), device=z.device).expand(len(z), -1)
        found = torch.cat([best, distance], dim=1)
        best, order = found.topk(min(top, found.shape[1]), dim=1, largest=False)
        places = torch.cat([places, here], dim=1).gather(1, order)
        start += len(x)
    return places.to(candidates.device)


def weigh(
    denoiser: Denoiser,
    tokens: Tokens,
    mask: Mask,
    candidates: Shaped[Tensor, "b k *n d"],
    log_prior: Float[Tensor, "b k"],
    *,
    text_process: TextProcess,
    likelihood: Number,
    z_hat: Latents | None,
    variance: Number,
    at_once: int,
    generator: torch.Generator | None,
) -> Posterior:
    """The posterior of candidates of each text; a text with none that counts has the mean 0."""
    targets, counted = text_process.targets(tokens, mask)
    noise = text_process.at_full_noise(mask, generator=generator)  # the same for all candidates
    nats = []
    for part in torch.split(candidates, at_once, dim=1):
        k = part.shape[1]
        rows = [x.repeat_interleave(k, dim=0) for x in (mask, noise, targets, counted)]
        logits = l2t(
            denoiser, part.flatten(0, 1), rows[0], text_process=text_process, tokens=rows[1]
        )
        nats.append(nll(logits, *rows[2:]).sum(dim=1).view(-1, k))
    scores = fp32(log_prior) - likelihood * torch.cat(nats, dim=1)
    if z_hat is not None:
        off = fp32(candidates) - fp32(z_hat)[:, None]
        scores = scores - off.flatten(2).square().sum(dim=2) / (2 * variance)
    scores = scores - scores.amax(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    mass = scores.exp()
    weights = mass / mass.sum(dim=1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    mean = (weights[..., None] * fp32(candidates).flatten(2)).sum(dim=1)
    return Posterior(mean.view(len(tokens), *candidates.shape[2:]).to(candidates.dtype), weights)


def _as_prior(log_prior: Tensor | None, candidates: Tensor) -> Float[Tensor, " m"]:
    """The log-prior of each candidate, 0 if none is given, on their device."""
    if log_prior is None:
        return torch.zeros(len(candidates), device=candidates.device)
    if log_prior.shape != (len(candidates),) or not log_prior.is_floating_point():
        raise ValueError(
            f"`log_prior` must be floats of shape [m] = [{len(candidates)}], one for each of "
            f"`candidates`, got {log_prior.dtype} {list(log_prior.shape)}"
        )
    if checks.reads_values(log_prior):
        if not bool((log_prior < torch.inf).all()):
            raise ValueError("`log_prior` must be finite, or minus infinity, got NaN or infinity")
        if bool(log_prior.isneginf().all()):
            raise ValueError("`log_prior` is minus infinity everywhere, which leaves no candidate")
    return log_prior.to(candidates.device)
