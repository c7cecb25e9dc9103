"""Logits are read a few rows at a time, whose copies in fp32 stay small and in the cache."""

from torch import Tensor


def chunk_of(rows: Tensor) -> int:
    """Rows of `[n, v]` at a time: a sixteenth of all, or a MB of them."""
    n, width = rows.shape
    return max(1, -(-n // 16), 2**18 // max(width, 1))
