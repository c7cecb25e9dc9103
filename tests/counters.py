"""What a step does, counted: host synchronisations, and bytes that are alive."""

import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parents[1] / "examples" / "bench"))
from memory import PeakBytes as PeakBytes
from memory import Storages

_READERS = {
    "_local_scalar_dense",
    "allclose",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
}
_INDEXERS = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class HostSyncs(TorchDispatchMode):
    """Collects the operators that make the host wait for values of a device.

    On `meta` there are no values, and most reads fail by themselves, also those that are no
    operators, such as `.tolist()`.
    """

    def __init__(self, device="meta"):
        super().__init__()
        self.device, self.found = torch.device(device), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.reads(function, args, kwargs) and args[0].device.type == self.device.type:
            self.found.append(str(function))
        return function(*args, **kwargs)

    @staticmethod
    def reads(function, args, kwargs):
        name = function.overloadpacket.__name__
        if name in _INDEXERS:
            return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name == "repeat_interleave":  # by a tensor of repeats, whose sum is the size
            return kwargs.get("output_size") is None and not isinstance(args[-1], int)
        return name in _READERS


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """The bytes that what ran inside keeps for its backward, without those of the parameters.

    In checkpointed regions it counts what they keep, and not what they will compute again.
    """

    def __init__(self, parameters=()):
        super().__init__(self.pack, lambda saved: saved)
        self.storages = Storages()
        self.storages.meet(list(parameters), count=False)

    def __enter__(self):
        super().__enter__()
        return self

    def pack(self, tensor):
        self.storages.meet(tensor)
        return tensor.detach()  # an output that kept itself would never be freed

    @property
    def live(self):
        return self.storages.bytes
