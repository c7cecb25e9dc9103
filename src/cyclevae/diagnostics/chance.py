"""What can be guessed without reading: what a model must beat to have learned anything."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cyclevae._base.precision import fp32
from cyclevae._base.types import Latents, Logits, Mask, Tokens


class Chance(NamedTuple):
    """The decoder beside a guess that knows the batch's texts, but not the latent.

    Only words that a text process leaves to choose are counted: a placed first or last token is
    right in every model.

    Attributes:
        words: how many.
        accuracy: of the decoder, from the true latents.
        guess: of the most frequent word of each position, as another part of the rows has it.
        loss: of the decoder, in nats per word.
        entropy: of the words at each position, which no guess without the latent goes below.
        alike: the share of rows that have the most frequent latent; `1/n` where all differ.

    Examples:
        >>> Chance(words=100, accuracy=0.05, guess=0.05, loss=3.2, entropy=3.0, alike=0.01).gain
        0.0
    """

    words: int
    accuracy: float
    guess: float
    loss: float
    entropy: float
    alike: float

    @property
    def gain(self) -> float:
        """What the decoder gets right of the words that the guess gets wrong."""
        return (self.accuracy - self.guess) / (1 - self.guess) if self.guess < 1 else 0.0

    @property
    def gain_error(self) -> float:
        """Two standard errors of the gain: what luck can make of it."""
        spread = math.sqrt(max(self.guess * (1 - self.guess), 1 / self.words) / self.words)
        return 2 * spread / (1 - self.guess) if self.guess < 1 else math.inf


def chance(logits: Logits, tokens: Tokens, mask: Mask, latents: Latents) -> Chance:
    """Measure it on a batch; `mask` are the positions whose word a decoder chooses."""
    words, kept = tokens.cpu(), mask.cpu()
    found = logits.argmax(dim=-1).cpu()
    nats = -fp32(logits).log_softmax(dim=-1).gather(2, tokens[..., None])[..., 0].cpu().double()
    guessed, entropy = torch.zeros_like(kept), 0.0
    for position in range(words.shape[1]):
        column, rows = words[:, position], kept[:, position].nonzero().flatten()
        for own, others in ((rows[::2], rows[1::2]), (rows[1::2], rows[::2])):
            if len(others):
                guessed[own, position] = column[own] == column[others].mode().values
        entropy += _entropy(column[rows])
    count = int(kept.sum())
    _, copies = torch.unique(latents.cpu().flatten(1), dim=0, return_counts=True)
    return Chance(
        words=count,
        accuracy=_share((found == words) & kept, count),
        guess=_share(guessed & kept, count),
        loss=nats[kept].sum().item() / max(count, 1),
        entropy=entropy / max(count, 1),
        alike=copies.max().item() / len(latents),
    )


def _entropy(words: Tensor) -> float:
    """Of some words, all of them together, in nats."""
    counts = words.bincount().double()
    return float(-torch.special.xlogy(counts, counts / max(len(words), 1)).sum())


def _share(hits: Tensor, count: int) -> float:
    return float(hits.sum()) / max(count, 1)
