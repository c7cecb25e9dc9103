"""The data of a cell: which rows it may see, in which batches."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from data import Regime, Sentences, Split, regime
from matrix import ALL, ROWS, Cell
from torch import Tensor

import cyclevae as cv

PAIRS, UNPAIRED = 8, 8  # rows per step: pairs, and texts and latents without partner
POOL = 16  # batches that are sorted by length together


class Drawn(NamedTuple):
    """A batch, and which training rows its texts and latents without partner are."""

    batch: cv.Batch
    texts: Tensor
    latents: Tensor


def data_of(cell: Cell, data: Sentences) -> tuple[Split, Regime]:
    """The training split as the cell sees it, and which of its rows are paired.

    The same seed gives the same pairs and the same unpaired rows to every row of the matrix.
    """
    train, kind = data.train, ROWS[cell.row].unpaired
    if cell.pairs == ALL:
        return train, regime(train, len(train), cell.seed)
    dealt = regime(train, cell.pairs, cell.seed)
    texts, latents = (
        _share(rows, cell.share, seed=2 * cell.seed + k)
        for k, rows in enumerate((dealt.unpaired_text, dealt.unpaired_latent))
    )
    if kind == "none":
        texts = latents = texts[:0]
    if kind == "corrupted":
        train = corrupted(train, texts, latents, cell.seed)
    if kind == "encoded":  # the partner of every text is known after all
        return train, Regime(torch.cat([dealt.paired, texts]), texts[:0], latents)
    return train, Regime(dealt.paired, texts, latents)


def corrupted(train: Split, texts: Tensor, latents: Tensor, seed: int) -> Split:
    """Unpaired texts of shuffled words and rotated unpaired latents: as frequent, and of no use.

    Words are dealt anew over all the texts, so that lengths and frequencies stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, z = train.tokens.clone(), train.latents.clone()
    words, mask = tokens[texts], train.attention_mask[texts]
    kept = words[mask]
    words[mask] = kept[torch.randperm(len(kept), generator=generator)]
    tokens[texts] = words
    rotation = torch.linalg.qr(torch.randn(2 * (z.shape[1],), generator=generator)).Q
    z[latents] = z[latents] @ rotation
    return replace(train, tokens=tokens, latents=z)


def batches(
    train: Split, dealt: Regime, seed: int, sizes: tuple[int, int] = (PAIRS, UNPAIRED)
) -> Iterator[Drawn]:
    """Endless batches of pairs, and of texts and latents without partner where there are any.

    Pairs and texts of a step are about as long as each other, which saves padding. Latents come in
    random order: a length must not tell of a hidden partner. Each kind has random numbers of its
    own, so the pairs come in the same order whatever is unpaired.
    """
    lengths = train.attention_mask.sum(dim=1)
    pools = (
        _pools(dealt.paired, sizes[0], 3 * seed, lengths),
        _pools(dealt.unpaired_text, sizes[1], 3 * seed + 1, lengths),
        _pools(dealt.unpaired_latent, sizes[1], 3 * seed + 2, None),
    )
    order = torch.Generator().manual_seed(seed)
    for pairs, texts, latents in zip(*pools, strict=True):
        for k in torch.randperm(POOL, generator=order):
            batch = cv.Batch(
                *texts_of(train, pairs[k]),
                train.latents[pairs[k]],
                *(texts_of(train, texts[k]) if len(texts[k]) else (None, None)),
                train.latents[latents[k]] if len(latents[k]) else None,
            )
            yield Drawn(batch, texts[k], latents[k])


def texts_of(train: Split, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and mask of some rows, cut to the longest of them."""
    mask = train.attention_mask[rows]
    longest = int(mask.sum(dim=1).max())
    return train.tokens[rows, :longest], mask[:, :longest]


def _share(rows: Tensor, percent: int, *, seed: int) -> Tensor:
    """A random share of some rows, sorted; a larger share holds the smaller one."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[: round(len(rows) * percent / 100)].sort().values]


def _pools(rows: Tensor, size: int, seed: int, lengths: Tensor | None) -> Iterator[list[Tensor]]:
    """`POOL` batches at a time, the shortest texts first; rows come round before they repeat."""
    generator = torch.Generator().manual_seed(seed)
    left = rows[:0]
    while True:
        while len(rows) > 0 and len(left) < POOL * size:
            left = torch.cat([left, rows[torch.randperm(len(rows), generator=generator)]])
        pool, left = left[: POOL * size], left[POOL * size :]
        if lengths is not None:
            pool = pool[lengths[pool].argsort(stable=True)]
        yield list(pool.split(size)) if len(rows) else [rows] * POOL
