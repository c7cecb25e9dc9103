"""A network on the meta device, of the same shapes and dtypes and without a number."""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cyclevae.diagnostics._meter import FusedAttention


def meta_twin(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The network without its numbers, wherever it is; nothing of its size is allocated.

    Parameters that learn have a gradient already, as after the first step.

    Raises:
        ValueError: sharded parameters, or a network that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for part in network.modules():
        for tensor in tree_leaves(vars(part)):
            if isinstance(tensor, Tensor):
                memo[id(tensor)] = _twin(tensor, dtype)
    try:
        twin = copy.deepcopy(network, memo)
    except Exception as error:
        raise ValueError(
            f"no copy of the {type(network).__name__} can be made on meta ({error}): give the "
            "plain network, before it is wrapped, sharded or compiled"
        ) from error
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    attention = FusedAttention()
    for part in twin.modules():
        if type(part) is not nn.Linear:  # has neither, and may be a head that is left unread
            _run_on_meta(part, attention)
    return twin


def _twin(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if type(tensor).__name__ == "DTensor":
        raise ValueError(
            "the network's parameters are sharded (DTensor): give the plain network, before "
            "fully_shard; divide by the ranks what they share"
        )
    cast = dtype if tensor.is_floating_point() else None
    twin = torch.empty_like(tensor, device="meta", dtype=cast or tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, tensor.requires_grad)
    return twin


def _run_on_meta(part: nn.Module, attention: FusedAttention) -> None:
    """Each part enters the modes by itself: where a part is checkpointed, a backward has none."""
    forward = part.forward

    @functools.wraps(forward)
    def on_meta(*args: Any, **kwargs: Any) -> Any:
        if attention.entered:
            return forward(*args, **kwargs)
        with torch.device("meta"), attention:
            return forward(*args, **kwargs)

    part.forward = on_meta
