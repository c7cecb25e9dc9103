"""One forward of the denoiser in one mode, with the diffusion state explicit."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.masked import as_latent_mask, kept_latents, only_kept
from cyclevae._base.types import (
    AnyTokens,
    LatentMask,
    LatentMaskLike,
    Latents,
    MaskLike,
    Number,
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


@at_the_door
def l2t(
    denoiser: Denoiser,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    tokens: Tokens | None = None,
    text_time: Number | Time = 1.0,
    generator: torch.Generator | None = None,
    latent_mask: LatentMaskLike | None = None,
) -> AnyLogits:
    """Decode: clean latents and a text at full noise, in one pass.

    Args:
        denoiser: the model.
        latents: clean latents, `[b, ...]`.
        attention_mask: `[b, s]`, True = keep: the lengths of the texts to write.
        text_process: the text process.
        tokens: a text in which only some words are noise, as `unmask_text` makes them; at full
            noise if not given.
        text_time: the time of its noise, for masks the share of masked ones; a number or `[b]`.
        generator: random state of full noise that is random words.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`; the rest is never looked at.

    Returns:
        Logits `[b, s, v]`, unread ones of a network that leaves them so.

    Raises:
        ValueError: wrong shapes, latents that are not finite, a model that returns no logits, or
            one that takes no `latent_mask` where there is one.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, _ = toy_denoiser(seed=0)
        >>> _, mask, latents = toy_batch(seed=0)[:3]
        >>> l2t(denoiser, latents, mask, text_process=text_process).shape
        torch.Size([3, 5, 7])
    """
    asked = _ask_l2t(
        denoiser, latents, attention_mask, text_process, tokens, text_time, generator, latent_mask
    )
    return need_logits(
        denoiser.denoise(**asked, need="logits"), asked["tokens"], text_process.vocab_size
    )


class T2L(NamedTuple):
    """A pass of the encoder direction.

    Attributes:
        prediction: what the latent head returned, in the process's prediction type.
        z_t: the noised latents it saw.
        noise: the standard normal noise that they were made with.
        time: their time `[b]`.
        stated_time: the time as it was given; a number is checked where tensors are not read.
        latent_mask: what is kept of latents `[b, n, d]`, all if None; the rest is 0 everywhere.
    """

    prediction: Latents
    z_t: Latents
    noise: Latents
    time: Time
    stated_time: Number | Time
    latent_mask: LatentMask | None = None

    def z_hat(self, latent_process: LatentProcess) -> Latents:
        """The clean latents this pass means; refused where the gain is above `max_gain`."""
        latent_process.refuse_ill_conditioned(self.stated_time)
        return latent_process.to_x0(self.prediction, self.z_t, self.time)


@at_the_door
def t2l(
    denoiser: Denoiser,
    tokens: AnyTokens,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    latents: Latents | None = None,
    start: Literal["noise"] | Latents | None = None,
    time: Number | Time = 1.0,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    latent_mask: LatentMaskLike | None = None,
) -> T2L:
    """Encode: a clean text, and latents that are noised or nothing but noise, in one pass.

    Args:
        denoiser: the model.
        tokens: clean ids `[b, s]`, or a relaxed text `[b, s, v]`, as the differentiable text
            bridges make them.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process.
        latents: clean latents to be noised to `time`; the pass then sees them, unless alpha is 0.
        start: `"noise"` starts from pure noise at `time`, `sqrt(alpha^2 + sigma^2) noise`, the law
            of `z_t` for latents of variance 1, and shows the model no latent; or the `z_t` itself,
            as DDIM makes it on the way. One of `latents` and `start` is needed.
        time: a number or `[b]` in [0, 1].
        noise: standard normal noise; drawn with `generator` if not given.
        generator: random state of the draw.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`: what there is to write.

    Raises:
        ValueError: wrong shapes or values, both or none of `latents` and `start`, a model that
            takes no `latent_mask` where there is one, or noise that cannot be drawn because the
            shape of a latent is unknown.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, _ = toy_batch(seed=0)[:3]
        >>> encoded = t2l(
        ...     denoiser, tokens, mask, start="noise",
        ...     text_process=text_process, latent_process=latent_process,
        ... )
        >>> encoded.z_hat(latent_process).shape
        torch.Size([3, 4])
    """
    asked, encoded = _ask_t2l(
        denoiser,
        tokens,
        attention_mask,
        text_process,
        latent_process,
        latents,
        start,
        time,
        noise,
        generator,
        latent_mask,
    )
    output = denoiser.denoise(**asked, need="latents")
    prediction = only_kept(need_latents(output, encoded.z_t), encoded.latent_mask)
    return encoded._replace(prediction=prediction)


@at_the_door
def l2t_and_t2l(
    denoiser: Denoiser,
    latents: Latents,
    lengths: MaskLike,
    tokens: Integer[Tensor, "c t"],
    attention_mask: Shaped[Tensor, "c t"],
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    noise: Float[Tensor, "c *n d"] | None = None,
    generator: torch.Generator | None = None,
    latent_mask: LatentMaskLike | None = None,
    text_latent_mask: Shaped[Tensor, "c n"] | None = None,
) -> tuple[AnyLogits, T2L]:
    """`l2t` of some rows and `t2l` from pure noise of others, in one pass over all of them.

    Quicker than two where operators take longer to launch than to run. Both heads read every row.

    Args:
        denoiser: the model, which reads each row by itself and ignores padding.
        latents: to decode, `[b, ...]`.
        lengths: `[b, s]`, True = keep: of the texts to write.
        tokens: to encode, `[c, t]`.
        attention_mask: theirs, True = keep.
        text_process: the text process.
        latent_process: the latent process.
        noise: that the encoder starts from; drawn with `generator` if not given.
        generator: random state of the draws.
        latent_mask: `[b, n]`, True = keep, of the latents to decode.
        text_latent_mask: `[c, n]`, of those to write of the texts; both masks are given, or none.

    Returns:
        The logits `[b, s, v]`, and the encoder's half.

    Raises:
        ValueError: wrong shapes or values, or a model that returns but one half.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, latents = toy_batch(seed=0)[:3]
        >>> logits, encoded = l2t_and_t2l(
        ...     denoiser, latents, mask, tokens, mask,
        ...     text_process=text_process, latent_process=latent_process,
        ... )
        >>> logits.shape, encoded.prediction.shape
        (torch.Size([3, 5, 7]), torch.Size([3, 4]))
    """
    if (latent_mask is None) != (text_latent_mask is None):
        raise ValueError(
            "give both `latent_mask` and `text_latent_mask`, or none: one pass tells the model one "
            "mask; give torch.ones where nothing is padded"
        )
    decode = _ask_l2t(denoiser, latents, lengths, text_process, None, 1.0, generator, latent_mask)
    encode, encoded = _ask_t2l(
        denoiser,
        tokens,
        attention_mask,
        text_process,
        latent_process,
        None,
        "noise",
        1.0,
        noise,
        generator,
        text_latent_mask,
    )
    rows, length = decode["tokens"].shape
    longest = max(length, encode["tokens"].shape[1])

    def stack(name: str, fill: int | None = None) -> Tensor:
        parts = [decode[name], encode[name]]
        if fill is not None:
            parts = [F.pad(x, (0, longest - x.shape[1]), value=fill) for x in parts]
        return torch.cat(parts)

    tokens, both = stack("tokens", text_process.fill_id), stack("latents")
    told: dict[str, Any] = {} if latent_mask is None else {"latent_mask": stack("latent_mask")}
    output = denoiser.denoise(
        tokens,
        both,
        text_time=stack("text_time"),
        latent_time=stack("latent_time"),
        attention_mask=stack("attention_mask", False),
        **told,
    )
    logits = need_logits(output, tokens, text_process.vocab_size)
    prediction = only_kept(need_latents(output, both)[rows:], encoded.latent_mask)
    return logits[:rows, :length], encoded._replace(prediction=prediction)


def _ask_l2t(
    denoiser: Denoiser,
    latents: Latents,
    attention_mask: MaskLike,
    text_process: TextProcess,
    tokens: Tokens | None,
    text_time: Number | Time,
    generator: torch.Generator | None,
    latent_mask: LatentMaskLike | None,
) -> dict[str, Any]:
    """What a decoder pass asks of the model."""
    latents, latent_mask = kept_latents("latents", latents, latent_mask)
    checks.check_rows("attention_mask", attention_mask, "latents", latents)
    mask = checks.as_mask("attention_mask", attention_mask)
    checks.check_kept("attention_mask", mask)
    if tokens is None:
        tokens = text_process.at_full_noise(mask, generator=generator)
    else:
        tokens = checks.as_tokens("tokens", tokens, text_process.vocab_size)
        checks.as_mask("attention_mask", mask, tokens.shape)
        tokens = text_process.pad(tokens, text_process.taught(mask))
    return {
        "tokens": tokens,
        "latents": latents,
        "text_time": checks.as_time("text_time", text_time, latents),
        "latent_time": checks.as_time("latent_time", 0.0, latents),
        "attention_mask": mask,
        **tell_latent_mask(denoiser, latent_mask),
    }


def _ask_t2l(
    denoiser: Denoiser,
    tokens: AnyTokens,
    attention_mask: MaskLike,
    text_process: TextProcess,
    latent_process: LatentProcess,
    latents: Latents | None,
    start: Literal["noise"] | Latents | None,
    time: Number | Time,
    noise: Latents | None,
    generator: torch.Generator | None,
    latent_mask: LatentMaskLike | None,
) -> tuple[dict[str, Any], T2L]:
    """What an encoder pass asks of the model, and the pass before it has an answer."""
    if (latents is None) == (start is None):
        raise ValueError(
            "give either `latents` to be noised or start='noise', "
            f"got {'neither' if latents is None else 'both'}"
        )
    if start is not None and not isinstance(start, Tensor):
        checks.check_choice("start", start, ("noise",))
    tokens, mask = text_process.as_text(tokens, attention_mask, relaxed=True)
    if latents is not None:
        latents, latent_mask = kept_latents("latents", latents, latent_mask, latent_process.shape)
        checks.check_rows("latents", latents, "tokens", tokens)
        latents = in_its_dtype(latents, denoiser)
    stated_time = time
    time = checks.as_time("time", time, mask if latents is None else latents)
    if isinstance(start, Tensor):
        if noise is not None:
            raise ValueError("`start` is a `z_t` as it is: give no `noise` beside it")
        noise = start
    as_given = start is noise
    if noise is None:
        noise = draw_noise(
            len(tokens), latent_process, like=latents, generator=generator, at=tokens
        )
        if latent_mask is not None:
            latent_mask = as_latent_mask("latent_mask", latent_mask, noise.shape)
            noise = only_kept(noise, latent_mask)
    else:
        name = "start" if as_given else "noise"
        noise, latent_mask = kept_latents(name, noise, latent_mask, latent_process.shape)
        checks.check_rows(name, noise, "tokens", tokens)
    noise = in_its_dtype(noise, denoiser)
    if latents is not None:
        z_t = latent_process.noised(latents, noise, time)
    else:
        z_t = noise if as_given else latent_process.started(noise, time)
    asked = {
        "tokens": text_process.pad(tokens, mask),
        "latents": z_t,
        "text_time": torch.zeros_like(time),
        "latent_time": time,
        "attention_mask": mask,
        **tell_latent_mask(denoiser, latent_mask),
    }
    return asked, T2L(z_t, z_t, noise, time, stated_time, latent_mask)
