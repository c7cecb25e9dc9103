"""What a step does, counted: host synchronisations, for now."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
