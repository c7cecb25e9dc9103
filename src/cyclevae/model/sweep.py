"""Unread logits, computed some positions at a time, of those that count."""

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclevae._base.checks import reads_values
from cyclevae._base.precision import no_autocast
from cyclevae._base.types import Mask
from cyclevae.model.unread import UnreadLogits, check_held


def rows_at_a_time(weight: Tensor) -> int:
    """Of the logits: so many that they are half as large as the weight, within bounds."""
    return min(max(weight.shape[1] // 2, 128), 1024)


def kept_rows(mask: Mask) -> Tensor | None:
    """The numbers of the positions `[b s]` that count; None where the device alone knows them."""
    flat = mask.flatten()
    if flat.device.type != "cpu" or not reads_values(flat):
        return None
    return flat.nonzero().squeeze(1)


def for_products(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a dtype, in that of the products of matrices.

    On a CPU that is fp32 for fp16, and for bf16 where there are no units for it: several times
    faster.
    """
    rounded = tensor.to(dtype)
    slow = dtype == torch.float16 or (dtype == torch.bfloat16 and not has_units())
    return rounded.float() if slow and tensor.device.type == "cpu" else rounded


@cache
def has_units() -> bool:
    """Whether this CPU multiplies bf16 in units of its own, as far as torch can tell."""
    told = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any([getattr(torch.cpu, name, lambda: False)() for name in told])


def chunks_of(
    hidden: Tensor, matrix: Tensor, bias: Tensor | None, *more: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Hidden states `[n, h]`, their logits, and more, some rows at a time.

    The weight comes as a `matrix` for products, of which one copy serves forward and gradient.
    """
    dtype, size = hidden.dtype, rows_at_a_time(matrix)
    shift = None if bias is None else for_products(bias, dtype)
    for x, *rest in zip(*(torch.split(part, size) for part in (hidden, *more)), strict=True):
        x = for_products(x, dtype)
        yield x, F.linear(x, matrix, shift).to(dtype), *rest


def over_rows(
    logits: UnreadLogits, mask: Mask, function: Callable[..., Tensor], *more: Tensor
) -> Tensor:
    """A function of logits `[n, v]` and more `[n, ...]`, where the mask is True; 0 elsewhere.

    Without a graph: `[b, s]` of what the function gives for each row.
    """
    check_held(logits.weight)
    hidden, rows = logits.hidden.detach().flatten(0, -2), kept_rows(mask)
    if rows is not None:
        hidden, more = hidden[rows.to(hidden.device)], tuple([part[rows] for part in more])
    found = []
    with torch.no_grad(), no_autocast(hidden):
        matrix = for_products(logits.weight, hidden.dtype)
        for _, *parts in chunks_of(hidden, matrix, logits.bias, *more):
            found.append(function(*parts))
    result = torch.cat(found)
    if rows is not None:
        result = result.new_zeros(mask.numel()).index_copy_(0, rows.to(result.device), result)
    else:
        result = torch.where(mask.flatten(), result, torch.zeros_like(result))
    return result.view(mask.shape)
