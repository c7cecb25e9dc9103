"""How every diagnostic runs a model: no graph, no dropout, draws of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.types import Latents, Logits, Mask, Tokens
from cyclevae.gradient_policy.contexts import detach
from cyclevae.model.denoiser import Denoiser, need_logits
from cyclevae.model.evaluation import evaluating
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
    tokens: Tensor, latents: Tensor, attention_mask: Tensor, text_process: TextProcess
) -> tuple[Tensor, Mask]:
    """The texts of pairs, which are a text and a latent for each of at least 2 rows."""
    checks.check_latents("latents", latents)
    checks.check_rows("tokens", tokens, "latents", latents)
    check_rows("latents", latents)
    return text_process.as_text(tokens, attention_mask)


def without_latent(
    denoiser: Denoiser,
    noise: Latents,
    mask: Mask,
    text_process: TextProcess,
    latent_process: LatentProcess,
    tokens: Tokens,
) -> Logits:
    """What the decoder says of a text at full noise where the latent is pure noise."""
    full = checks.as_time("time", 1.0, noise)
    output = denoiser.denoise(
        tokens,
        latent_process.started(noise, full),
        text_time=full,
        latent_time=full,
        attention_mask=mask,
        need="logits",
    )
    return need_logits(output, tokens, text_process.vocab_size)


def statistics(latents: Latents) -> tuple[Tensor, Tensor]:
    """Mean and variance of a batch in the shape of one latent, in float64 on the CPU.

    A dimension that hardly varies gets a variance of 1e-6 of the average, to be divided by.
    """
    rows = latents.detach().cpu().double()
    variance = rows.var(dim=0)
    if not bool(variance.any()):
        raise ValueError(
            "`latents` are equal in all rows, so they tell no texts apart; are they those of the "
            "batch's texts?"
        )
    return rows.mean(dim=0), torch.maximum(variance, 1e-6 * variance.mean())
