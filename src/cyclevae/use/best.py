"""Several texts of a latent, of which the encoder chooses."""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.draws import seeded
from cyclevae._base.masked import kept_latents
from cyclevae._base.types import LatentMaskLike, Latents, Number
from cyclevae.bridges.latent import ONE_SHOT, LatentBridge
from cyclevae.bridges.text import draw_lengths
from cyclevae.bridges.unmasking import write_words
from cyclevae.gradient_policy.contexts import detach
from cyclevae.losses.critic import ScoredText, best_of, score_text
from cyclevae.losses.latent import AnyDistance, check_distance
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.evaluation import evaluated
from cyclevae.model.padding import tell_latent_mask
from cyclevae.model.passes import l2t
from cyclevae.model.unread import UnreadLogits
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.noise import draw_noise
from cyclevae.processes.text import TextProcess

Length = Literal["given", "drawn", "tried"]


@at_the_door
def best_text(
    denoiser: Denoiser,
    latents: Latents,
    attention_mask: Shaped[Tensor, "n s"],
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    samples: int = 32,
    temperature: Number = 0.8,
    steps: int = 8,
    length: Length = "given",
    distance: AnyDistance = "mse",
    bridge: LatentBridge = ONE_SHOT,
    time: Number = 1.0,
    noise: Latents | None = None,
    at_once: int | None = None,
    generator: torch.Generator | None = None,
    latent_mask: LatentMaskLike | None = None,
) -> ScoredText:
    """Decoding with the cycle as critic: of several sampled texts the one that is read best.

    `argmin_k d(z, z_hat(y_k))` over `samples` texts `y_k` of `unmask_text` at a `temperature`, all
    encoded from the same noise. In evaluation mode, without a gradient.

    It takes `1 + samples (steps - 1)` decoder passes and `samples` times `bridge.steps` encoder
    passes of `b` rows: the first decoder pass serves all samples, unless lengths are tried or noise
    is random words, where each takes its own.

    Args:
        denoiser: the model.
        latents: clean latents, `[b, ...]`.
        attention_mask: lengths, True = keep: those of the texts to write, `[b, s]`, or `[n, s]` of
            any texts, from which they are drawn or tried.
        text_process: the text process.
        latent_process: the latent process.
        samples: how many texts are written of each latent.
        temperature: of their words.
        steps: decoder passes of each.
        length: `given` for each latent; `drawn`, one for each latent; or `tried`, in turn by the
            samples of a latent, so that the critic chooses the length too.
        distance: by which texts are compared, as that of `latent_loss`: the mean over elements, or
            over vectors for the cosine.
        bridge: how the encoder makes a latent; its noise is not added.
        time: at which the encoder starts.
        noise: standard normal noise that it starts from, in the shape of the latents; drawn with
            `generator` if not given.
        at_once: how many samples of each latent go through the model together; all if None. With 1
            every pass is as large as that of a single text, and the logits of the first are kept
            beside. The texts are the same.
        generator: random state of all draws.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`.

    Returns:
        The best texts `[b, s]`, their mask and their scores.

    Raises:
        ValueError: wrong shapes or values, fewer than 1 sample or step, a temperature that is not
            above 0, fewer samples than lengths to try, a prediction whose gain at `time` is above
            `max_gain`, or scores that are not finite.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> _, mask, latents = toy_batch(seed=0)[:3]
        >>> options = {"text_process": text_process, "latent_process": latent_process}
        >>> found = [
        ...     best_text(
        ...         denoiser, latents, mask, samples=samples, **options,
        ...         generator=torch.Generator().manual_seed(0),
        ...     )
        ...     for samples in (1, 8)
        ... ]
        >>> bool((found[1].scores <= found[0].scores).all())
        True
    """
    checks.check_count("samples", samples)
    checks.check_count("steps", steps)
    checks.check_positive("temperature", temperature)
    checks.check_choice("length", length, get_args(Length))
    at_once = samples if at_once is None else at_once
    checks.check_count("at_once", at_once)
    check_distance("distance", distance, latents.shape[1:])
    latent_process.refuse_ill_conditioned(time)
    latents, latent_mask = kept_latents("latents", latents, latent_mask, latent_process.shape)
    bridge.check_shape(latents.shape[1:])
    tell_latent_mask(denoiser, latent_mask)
    masks = _masks(attention_mask, latents, samples, length, generator)
    if noise is None:
        noise = draw_noise(
            len(latents), latent_process, at=latents, like=latents, generator=generator
        )
    else:
        noise, _ = kept_latents("noise", noise, latent_mask, latents.shape[1:])
        checks.check_rows("noise", noise, "latents", latents)
    model = evaluated(denoiser)

    def written(chosen: Bool[Tensor, "k b s"], seeds: list[int]) -> Iterator[ScoredText]:
        """The texts of some samples, scored."""
        k = len(chosen)
        z, start = _repeated(latents, k), _repeated(noise, k)
        kept = None if latent_mask is None else _repeated(latent_mask, k)
        mask = chosen.flatten(0, 1)
        tokens = write_words(
            model,
            z,
            mask,
            text_process=text_process,
            steps=steps,
            logits=None if first is None else _repeated(first, k),
            temperature=temperature,
            generators=[torch.Generator(z.device).manual_seed(seed) for seed in seeds],
            latent_mask=kept,
        )
        scored = score_text(
            model,
            tokens,
            mask,
            z,
            text_process=text_process,
            latent_process=latent_process,
            noise=start,
            bridge=bridge,
            time=time,
            distance=distance,
            latent_mask=kept,
        )
        for parts in zip(*(part.tensor_split(k) for part in scored), strict=True):
            yield ScoredText(*parts)

    draw = torch.randint(2**63 - 1, (samples,), device=latents.device, **seeded(generator))
    groups = zip(torch.split(masks, at_once), torch.split(draw, at_once), strict=True)
    with detach():
        first = None
        if length != "tried" and not text_process.replaces:
            first = l2t(
                model, latents, masks[0], text_process=text_process, latent_mask=latent_mask
            )
        best = best_of(text for chosen, seeds in groups for text in written(chosen, seeds.tolist()))
    checks.check_finite("scores", best.scores, "has training diverged?")
    return best


def _masks(
    attention_mask: Tensor,
    latents: Latents,
    samples: int,
    length: Length,
    generator: torch.Generator | None,
) -> Bool[Tensor, "k b s"]:
    """The mask of each sample of each latent."""
    mask = checks.as_mask("attention_mask", attention_mask)
    checks.check_kept("attention_mask", mask)
    if length == "given":
        checks.check_rows("attention_mask", mask, "latents", latents)
    elif not len(mask):
        raise ValueError(f"length={length!r} takes it from `attention_mask`, which has no row")
    if length == "tried":
        if samples < len(mask):
            raise ValueError(
                f"`samples` must be at least the {len(mask)} lengths that are to be tried, got "
                f"{samples}: give more, or fewer rows of `attention_mask`"
            )
        turns = torch.arange(samples, device=mask.device) % len(mask)
        return mask[turns][:, None].expand(-1, len(latents), -1)
    if length == "drawn":
        mask = draw_lengths(mask, len(latents), generator=generator)
    return mask.expand(samples, *mask.shape)


def _repeated(rows: Any, times: int) -> Any:
    """All rows, so many times one after the other."""
    if isinstance(rows, UnreadLogits):
        return rows.with_hidden(_repeated(rows.hidden, times))
    return rows.repeat(times, *[1] * (rows.ndim - 1))
