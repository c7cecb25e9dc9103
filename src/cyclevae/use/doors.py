"""The plain doors to a trained model: a text to its latent, a latent to a text."""

import torch

from cyclevae._base.checks import as_mask
from cyclevae._base.types import LatentMaskLike, Latents, MaskLike, Number, Time, Tokens
from cyclevae.bridges.latent import ONE_SHOT, LatentBridge, encode_text
from cyclevae.bridges.unmasking import unmask_text
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.evaluation import evaluated
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess


@at_the_door
def encode(
    denoiser: Denoiser,
    tokens: Tokens,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    bridge: LatentBridge = ONE_SHOT,
    time: Number | Time = 1.0,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    latent_mask: LatentMaskLike | None = None,
) -> Latents:
    """The latents of texts: `encode_text` in evaluation mode, without a gradient.

    One pass from pure noise, or as many as `LatentBridge(steps=...)` says. Submodules are then in
    the modes that they were in.

    Args:
        denoiser: the model.
        tokens: clean ids `[b, s]`.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process; its `shape` says what to draw if `noise` is not given.
        bridge: the number of passes, and the guards; the noise of a bridge is not added.
        time: at which the first pass starts: below 1 for a model that predicts epsilon.
        noise: standard normal noise to start from; drawn with `generator` if not given.
        generator: random state of the draw.
        latent_mask: `[b, n]`, True = keep, of the latents `[b, n, d]` to write.

    Returns:
        Latents `[b, ...]`, standardised as those of training.

    Raises:
        ValueError: as `encode_text`.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask = toy_batch(seed=0)[:2]
        >>> z_hat = encode(
        ...     denoiser, tokens, mask, text_process=text_process, latent_process=latent_process
        ... )
        >>> z_hat.shape, z_hat.requires_grad
        (torch.Size([3, 4]), False)
    """
    return encode_text(
        evaluated(denoiser),
        tokens,
        attention_mask,
        text_process=text_process,
        latent_process=latent_process,
        bridge=bridge,
        time=time,
        noise=noise,
        generator=generator,
        latent_mask=latent_mask,
    )


@at_the_door
def decode(
    denoiser: Denoiser,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    steps: int = 8,
    temperature: Number | None = None,
    generator: torch.Generator | None = None,
    latent_mask: LatentMaskLike | None = None,
) -> Tokens:
    """Texts of latents: `unmask_text` in evaluation mode, up to their ends where these are written.

    With one step it is the most probable text of one pass. More ask for a decoder that was trained
    on partly masked texts, as the recommended recipe does. `best_text` draws several and keeps the
    best.

    Args:
        denoiser: the model.
        latents: clean latents, `[b, ...]`.
        attention_mask: `[b, s]`, True = keep: the lengths of the texts to write; `draw_lengths`
            draws some.
        text_process: the text process.
        steps: number of passes; the words that the decoder is surest of stand first.
        temperature: sample the words from `softmax(logits / temperature)` instead of taking the
            most probable ones.
        generator: random state of the draws.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`.

    Returns:
        Ids `[b, s]`, with the padding id where the mask is False or the text has ended.

    Raises:
        ValueError: as `unmask_text`.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, _ = toy_denoiser(seed=0)
        >>> _, mask, latents = toy_batch(seed=0)[:3]
        >>> tokens = decode(denoiser, latents, mask, text_process=text_process)
        >>> bool((tokens[mask] != text_process.mask_id).all())
        True
    """
    mask = as_mask("attention_mask", attention_mask)
    written = unmask_text(
        evaluated(denoiser),
        latents,
        mask,
        text_process=text_process,
        steps=steps,
        temperature=temperature,
        generator=generator,
        latent_mask=latent_mask,
    )
    return text_process.cut(written, mask)[0]
