"""In what precision: losses in fp32 or better, distances in float64, whatever the batch's dtype."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)  # devices


def fp32(tensor: Tensor) -> Tensor:
    """A tensor in fp32 or better."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def fp64(tensor: Tensor) -> Tensor:
    """A tensor in float64: for differences of large numbers, such as distances far from 0.

    In fp32 on devices that have none.
    """
    return fp32(tensor) if tensor.device.type in WITHOUT_FLOAT64 else tensor.double()


def rounded(value: Tensor, like: Tensor) -> Tensor:
    """What was computed in float64, in the precision of the losses of such a tensor."""
    return value.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Keep autocast from rounding matrix products to half precision."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)
