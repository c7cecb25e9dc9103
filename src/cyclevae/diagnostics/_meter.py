"""What runs, counted: FLOPs, and bytes of storages that are alive, by who made them."""

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, ItemsView, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

IN_BACKWARD = object()
_OWNER = "cyclevae owner"


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among values, and in lists, tuples and unread logits of them."""
    yield from (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


class Storages:
    """The bytes of the storages it has met and that are still alive, views counted once."""

    def __init__(self) -> None:
        self.bytes = 0
        self.known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.owned: Counter[Hashable] = Counter()

    def sizes(self) -> list[int]:
        """Of those that are alive and were made inside."""
        return [size for _, size in self.known.values() if size]

    def meet(
        self, tensors: Iterable[Tensor], *, count: bool = True, owner: Hashable = None
    ) -> None:
        """See tensors; those that are new count, and are their owner's, unless said otherwise."""
        for tensor in tensors:
            storage = tensor.untyped_storage()  # the same object as long as it is alive
            key, size = id(storage), storage.nbytes() if count else 0
            if key not in self.known:
                ends = weakref.ref(storage, partial(self._forget, key, size, owner))
                self.known[key] = ends, size
                self.bytes += size
                self.owned[owner] += size

    def _forget(self, key: int, size: int, owner: Hashable, _: object) -> None:
        del self.known[key]
        self.bytes -= size
        self.owned[owner] -= size


class Meter(TorchDispatchMode):
    """FLOPs of what runs inside, forward and backward, and bytes at the peak, by owner.

    On meta. In a backward, what a node of the graph runs is its owner's: see `own`. What an
    operator needs while it runs is not seen.

    Attributes:
        owner: of what runs now.
        forward: FLOPs by owner, before the backward.
        backward: FLOPs by owner, in it.
        peak: the most bytes that were alive at a time.
        live: bytes by owner then; those that were made in the backward are `IN_BACKWARD`'s.
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # which imports much

        super().__init__()  # type: ignore[no-untyped-call]
        self._formulas = flop_registry
        self.storages = Storages()
        self.owner: Hashable = None
        self.forward: Counter[Hashable] = Counter()
        self.backward: Counter[Hashable] = Counter()
        self.peak, self.live = 0, dict[Hashable, int]()
        self._backward = False
        self._shapes: dict[Hashable, list[Any]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        self.storages.meet(tensors_in(given), count=False)  # made outside, where not met before
        output = self._call(function, args, kwargs)
        made = [x for x in tensors_in([output]) if x.is_meta]
        if not made:  # of the host, as tables that are made once
            return output
        self.storages.meet(made, owner=IN_BACKWARD if self._backward else self.owner)
        count = self._formulas.get(function.overloadpacket)
        if count is not None and self.owner is not None:  # nobody's are checks of a first step
            flops = self.backward if self._backward else self.forward
            flops[self.owner] += count(*args, **kwargs, out_val=output)
        if self.storages.bytes > self.peak:
            self.peak, self.live = self.storages.bytes, dict(self.storages.owned)
        return output

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator, or as many empty tensors: of equal arguments torch finds the same shapes.

        It finds them in Python, which takes ten times as long as all else here.
        """
        try:
            key = function, _signature(args), _signature(kwargs.items())
            known = self._shapes.get(key)
        except TypeError:  # not hashable
            return function(*args, **kwargs)
        if known:
            made = [torch.empty_strided(*shape, dtype=t, device="meta") for *shape, t in known]
            return made[0] if len(made) == 1 else tuple(made)
        output = function(*args, **kwargs)
        if known is None:
            self._shapes[key] = _new_shapes(function, args, output)
        return output

    @contextmanager
    def owned_by(self, owner: Hashable) -> Iterator[None]:
        """What runs inside is the owner's."""
        before, self.owner = self.owner, owner
        try:
            yield
        finally:
            self.owner = before

    def own(self, outputs: Iterable[Any], owner: Hashable) -> None:
        """What the backward of these outputs runs is the owner's, as far as it is nobody's yet."""
        pending = [x.grad_fn for x in tensors_in(outputs)]
        while pending:
            node: Any = pending.pop()
            if node is not None and _OWNER not in node.metadata and node.next_functions:
                node.metadata[_OWNER] = owner
                node.register_prehook(partial(self._begin, owner))
                pending += [parent for parent, _ in node.next_functions]

    def run_backward(self, loss: Tensor) -> None:
        """The backward of a loss."""
        self._backward = True
        loss.backward()  # type: ignore[no-untyped-call]

    def _begin(self, owner: Hashable, _: object) -> None:
        self.owner = owner


def _signature(value: Any) -> Hashable:
    """What the shape of an output depends on; numbers with their type, as 1 is not 1.0."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple | ItemsView):
        return tuple([_signature(each) for each in value])
    return type(value), value


def _new_shapes(function: Any, args: tuple[Any, ...], output: Any) -> list[Any]:
    """Size, stride and dtype of what an operator returns; none where that is no new tensor."""
    outputs = list(output) if isinstance(output, tuple) else [output]
    plain = all(type(x) is Tensor and x.is_meta and x.layout == torch.strided for x in outputs)
    if function._schema.is_mutable or not plain or (isinstance(output, tuple) and len(output) < 2):
        return []
    given = {id(x.untyped_storage()) for x in tensors_in(args)}
    if any(id(x.untyped_storage()) in given for x in outputs):
        return []
    return [(x.shape, x.stride(), x.dtype) for x in outputs]


class FusedAttention(TorchFunctionMode):
    """Attention on meta as a GPU runs it, which keeps no scores; torch would write them out."""

    entered = False

    def __enter__(self) -> "FusedAttention":
        self.entered = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        self.entered = False
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Any = None,
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs or {})
        return function(*args, **kwargs or {})


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    shape = query.shape
    query, key, value = (
        x.reshape(-1, *x.shape[-3:]) if x.ndim > 3 else x[:, None] for x in (query, key, value)
    )
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    run: Any = torch.ops.aten._scaled_dot_product_efficient_attention
    learns = torch.is_grad_enabled()
    out: Tensor = run(query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale)[0]
    return out.reshape(*shape[:-1], value.shape[-1])
