"""One forward of the denoiser in one mode, with the diffusion state explicit."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.types import (
    AnyTokens,
    Latents,
    Logits,
    MaskLike,
    Number,
    Time,
    Tokens,
)
from cyclevae.model.denoiser import Denoiser, in_its_dtype, need_latents, need_logits
from cyclevae.model.door import at_the_door
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
) -> Logits:
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

    Returns:
        Logits `[b, s, v]`.

    Raises:
        ValueError: wrong shapes, latents that are not finite, or a model that returns no logits.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, _ = toy_denoiser(seed=0)
        >>> _, mask, latents = toy_batch(seed=0)[:3]
        >>> l2t(denoiser, latents, mask, text_process=text_process).shape
        torch.Size([3, 5, 7])
    """
    asked = _ask_l2t(latents, attention_mask, text_process, tokens, text_time, generator)
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
    """

    prediction: Latents
    z_t: Latents
    noise: Latents
    time: Time
    stated_time: Number | Time

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

    Raises:
        ValueError: wrong shapes or values, both or none of `latents` and `start`, or noise that
            cannot be drawn because the shape of a latent is unknown.

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
    )
    output = denoiser.denoise(**asked, need="latents")
    return encoded._replace(prediction=need_latents(output, encoded.z_t))


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
) -> tuple[Logits, T2L]:
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
    decode = _ask_l2t(latents, lengths, text_process, None, 1.0, generator)
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
    )
    rows, length = decode["tokens"].shape
    longest = max(length, encode["tokens"].shape[1])

    def stack(name: str, fill: int | None = None) -> Tensor:
        parts = [decode[name], encode[name]]
        if fill is not None:
            parts = [F.pad(x, (0, longest - x.shape[1]), value=fill) for x in parts]
        return torch.cat(parts)

    tokens, both = stack("tokens", text_process.fill_id), stack("latents")
    output = denoiser.denoise(
        tokens,
        both,
        text_time=stack("text_time"),
        latent_time=stack("latent_time"),
        attention_mask=stack("attention_mask", False),
    )
    logits = need_logits(output, tokens, text_process.vocab_size)
    prediction = need_latents(output, both)
    return logits[:rows, :length], encoded._replace(prediction=prediction[rows:])


def _ask_l2t(
    latents: Latents,
    attention_mask: MaskLike,
    text_process: TextProcess,
    tokens: Tokens | None,
    text_time: Number | Time,
    generator: torch.Generator | None,
) -> dict[str, Any]:
    """What a decoder pass asks of the model."""
    checks.check_latents("latents", latents)
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
        checks.check_latents("latents", latents, latent_process.shape)
        checks.check_rows("latents", latents, "tokens", tokens)
        latents = in_its_dtype(latents, denoiser)
    stated_time = time
    time = checks.as_time("time", time, mask if latents is None else latents)
    if isinstance(start, Tensor):
        if noise is not None:
            raise ValueError("`start` is a `z_t` as it is: give no `noise` beside it")
        noise = start
    if noise is None:
        noise = draw_noise(
            len(tokens), latent_process, like=latents, generator=generator, at=tokens
        )
    else:
        name = "noise" if start is not noise else "start"
        checks.check_latents(name, noise, latent_process.shape)
        checks.check_rows(name, noise, "tokens", tokens)
    as_given, noise = start is noise, in_its_dtype(noise, denoiser)
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
    }
    return asked, T2L(z_t, z_t, noise, time, stated_time)
