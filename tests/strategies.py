"""Hypothesis strategies: small batches, masks with empty rows, magnitudes from 1e-6 to 1e6."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

quick = settings(max_examples=25, deadline=None, derandomize=True)

seeds = st.integers(0, 2**31 - 1)
magnitudes = st.sampled_from([1e-6, 1.0, 30.0, 1e6])


@st.composite
def masks(draw, rows=None, length=None, kept=False):
    """Any bool mask `[b, s]`; holes and, unless `kept`, empty rows and full padding included."""
    rows = draw(st.integers(1, 4)) if rows is None else rows
    length = draw(st.integers(1, 5)) if length is None else length
    bits = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    mask = torch.tensor(bits).view(rows, length)
    if kept:
        mask[:, draw(st.integers(0, length - 1))] |= ~mask.any(dim=1)
    return mask


@st.composite
def texts(draw, vocab=None, dtype=torch.float64):
    """Logits `[b, s, v]`, tokens and mask."""
    mask, vocab = draw(masks()), draw(st.integers(2, 6)) if vocab is None else vocab
    generator = torch.Generator().manual_seed(draw(seeds))
    logits = torch.randn(*mask.shape, vocab, generator=generator, dtype=dtype) * draw(magnitudes)
    return logits, torch.randint(vocab, mask.shape, generator=generator), mask


@st.composite
def latents(draw, rows=None, scale=None):
    """Float64 latents `[b, d]` or `[b, n, d]`."""
    rows = draw(st.integers(1, 5)) if rows is None else rows
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    generator = torch.Generator().manual_seed(draw(seeds))
    z = torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
    return z * (draw(magnitudes) if scale is None else scale)


def splits(rows):
    """Boundaries that cut `rows` rows into accumulation steps, some of them empty."""
    return st.lists(st.integers(0, rows), max_size=3).map(lambda cuts: [0, *sorted(cuts), rows])
