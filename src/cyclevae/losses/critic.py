"""The cycle as a critic: of several texts of a latent, the one whose own latent comes nearest."""

import math
from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base.types import LatentMask, Latents, Loss, Mask, Number, Time, Tokens
from cyclevae.bridges.latent import LatentBridge, encode_text
from cyclevae.losses.latent import AnyDistance, latent_loss
from cyclevae.model.denoiser import Denoiser
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess


class ScoredText(NamedTuple):
    """Texts of latents, and how far from these their own latents are.

    Attributes:
        tokens: ids `[b, s]`.
        attention_mask: `[b, s]`, True = keep.
        scores: `[b]`, the distance of the latent that T2L predicts of a text to the one that it was
            written for: lower is better.

    Examples:
        >>> tokens = torch.tensor([[3, 4]])
        >>> ScoredText(tokens, tokens > 0, torch.tensor([0.5])).scores
        tensor([0.5000])
    """

    tokens: Tokens
    attention_mask: Mask
    scores: Float[Tensor, " b"]


def score_text(
    denoiser: Denoiser,
    tokens: Tokens,
    mask: Mask,
    latents: Latents,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    noise: Latents,
    bridge: LatentBridge,
    time: Number | Time,
    distance: AnyDistance,
    latent_mask: LatentMask | None,
) -> ScoredText:
    """Texts up to their ends, with the mean error of the latents that T2L makes of them."""
    tokens, mask = text_process.cut(tokens, mask)
    z_hat = encode_text(
        denoiser,
        tokens,
        mask,
        text_process=text_process,
        latent_process=latent_process,
        bridge=bridge,
        time=time,
        noise=noise,
        latent_mask=latent_mask,
    )
    errors = latent_loss(
        z_hat, latents, distance=distance, reduction="none", latent_mask=latent_mask
    )
    total = errors[..., None].flatten(1).sum(dim=1)
    return ScoredText(tokens, mask, total / errors_per_row(errors, latent_mask))


def errors_per_row(errors: Loss, latent_mask: LatentMask | None) -> int | Tensor:
    """How many errors of each row count."""
    if latent_mask is None:
        return math.prod(errors.shape[1:])
    return latent_mask.sum(dim=1).clamp(min=1) * math.prod(errors.shape[2:])


def best_of(texts: Iterable[ScoredText]) -> ScoredText:
    """Row by row the text with the lowest score, and of equal ones the first."""
    return reduce(_better, texts)


def _better(first: ScoredText, other: ScoredText) -> ScoredText:
    wins = (other.scores < first.scores) | first.scores.isnan()
    pairs = zip(first, other, strict=True)
    return ScoredText(*[torch.where(wins.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in pairs])
