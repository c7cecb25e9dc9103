"""How every diagnostic runs a model: no graph, no dropout, draws of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.masked import kept_latents, only_kept
from cyclevae._base.types import LatentMask, Latents, Mask, Tokens
from cyclevae.gradient_policy.contexts import detach
from cyclevae.model.denoiser import Denoiser, need_logits
from cyclevae.model.evaluation import evaluating
from cyclevae.model.padding import tell_latent_mask
from cyclevae.model.unread import AnyLogits
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess


@contextmanager
def measuring(denoiser: Denoiser) -> Iterator[None]:
    """No graph and no dropout; then every submodule is in its mode again."""
    with evaluating(getattr(denoiser, "module", None)), detach():
        yield


def seeded(generator: torch.Generator | None, at: Tensor) -> torch.Generator:
    """The generator, or one seeded with 0: so that training's random state is left alone."""
    return torch.Generator(at.device).manual_seed(0) if generator is None else generator


def check_rows(name: str, z: Tensor) -> None:
    """Refuse a batch in which nothing can be compared."""
    if len(z) < 2:
        raise ValueError(
            f"`{name}` needs at least 2 rows to compare, got shape {list(z.shape)}; "
            "give a larger batch"
        )


def as_pairs(
    tokens: Tensor,
    latents: Tensor,
    attention_mask: Tensor,
    text_process: TextProcess,
    latent_mask: Tensor | None,
) -> tuple[Tensor, Mask, Latents, LatentMask | None]:
    """The texts and latents of pairs, which are both for each of at least 2 rows."""
    latents, latent_mask = kept_latents("latents", latents, latent_mask)
    checks.check_rows("tokens", tokens, "latents", latents)
    check_rows("latents", latents)
    return *text_process.as_text(tokens, attention_mask), latents, latent_mask


def another(mask: LatentMask | None) -> LatentMask | None:
    """That of another row: of the one before."""
    return None if mask is None else mask.roll(1, 0)


def without_latent(
    denoiser: Denoiser,
    noise: Latents,
    mask: Mask,
    text_process: TextProcess,
    latent_process: LatentProcess,
    tokens: Tokens,
    latent_mask: LatentMask | None = None,
) -> AnyLogits:
    """What the decoder says of a text at full noise where the latent is pure noise."""
    full = checks.as_time("time", 1.0, noise)
    output = denoiser.denoise(
        tokens,
        latent_process.started(only_kept(noise, latent_mask), full),
        text_time=full,
        latent_time=full,
        attention_mask=mask,
        need="logits",
        **tell_latent_mask(denoiser, latent_mask),
    )
    return need_logits(output, tokens, text_process.vocab_size)


def of_kept(latents: Latents, latent_mask: LatentMask | None) -> Float[Tensor, "..."]:
    """The kept vectors, one below the other; all latents without a mask."""
    return latents if latent_mask is None else latents[latent_mask]


def statistics(latents: Latents, latent_mask: LatentMask | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance of a batch in the shape of one latent, in float64 on the CPU.

    With a mask, of the kept vectors. A dimension that hardly varies gets a variance of 1e-6 of the
    average, to be divided by.
    """
    rows = of_kept(latents, latent_mask).detach().cpu().double()
    variance = rows.var(dim=0)
    if not bool(variance.any()):
        raise ValueError(
            "`latents` are equal in all rows, so they tell no texts apart; are they those of the "
            "batch's texts?"
        )
    return rows.mean(dim=0), torch.maximum(variance, 1e-6 * variance.mean())
