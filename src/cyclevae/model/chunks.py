"""Logits are read a few rows at a time, whose copies in fp32 stay small and in the cache."""

from torch import Tensor


def chunk_of(rows: Tensor) -> int:
    """Rows of `[n, v]` at a time: a MB of them, or, where launches cost, a sixteenth of all."""
    n, width = rows.shape
    launched = 1 if rows.device.type == "cpu" else -(-n // 16)
    return max(1, launched, 2**18 // max(width, 1))
