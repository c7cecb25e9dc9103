"""Losses are computed in fp32 or better, whatever the dtype of the batch."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def fp32(tensor: Tensor) -> Tensor:
    """A tensor in fp32 or better."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Keep autocast from rounding matrix products to half precision."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)
