"""The bytes that are alive at the peak of a call."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages:
    """The bytes of the storages it has met and that are still alive, views counted once."""

    def __init__(self) -> None:
        self.bytes, self.known = 0, {}

    def sizes(self) -> list[int]:
        """Of those that are alive and were made inside."""
        return [size for _, size in self.known.values() if size]

    def meet(self, tensors: Any, *, count: bool = True) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()  # the same object as long as it is alive
                key, size = id(storage), storage.nbytes() if count else 0
                if key not in self.known:
                    ends = weakref.ref(storage, partial(self.forget, key, size))
                    self.known[key] = ends, size
                    self.bytes += size

    def forget(self, key: int, size: int, _: Any) -> None:
        del self.known[key]
        self.bytes -= size


class PeakBytes(TorchDispatchMode):
    """The bytes of the tensors made inside, forward and backward: `live` now, `peak` at most.

    On the CPU, where the backward runs in the thread that asks for it. What an operator needs
    while it runs is not seen.
    """

    def __init__(self, *, itemise: bool = False) -> None:
        super().__init__()
        self.storages, self.peak = Storages(), 0
        self.itemise, self.sizes = itemise, []  # what was alive at the peak

    @property
    def live(self) -> int:
        return self.storages.bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.storages.meet((args, kwargs), count=False)  # made outside, where not met before
        output = function(*args, **kwargs or {})
        self.storages.meet(output)
        if self.live > self.peak:
            self.peak = self.live
            if self.itemise:
                self.sizes = self.storages.sizes()
        return output


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The bytes a call needs at its peak, above those that were there before it."""
    if device.type == "cpu":
        with PeakBytes() as held:
            call()
        return held.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
