"""Logits that nobody has read yet: what a text head reads, and its weight in place of `[b, s, v]`.

At a vocabulary of 126,464 the logits of 4,096 positions are a gigabyte in bf16. Losses, draws and
accuracies need them some rows at a time, at the positions that count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cyclevae._base.checks import check_tensor
from cyclevae._base.derivatives import transformed
from cyclevae._base.precision import no_autocast
from cyclevae._base.types import Logits


@dataclass(eq=False, repr=False)
class UnreadLogits:
    """Logits `[b, s, v]` before they are computed; made by `unread_logits`.

    The losses, the bridges and the measures of this library compute of them what they read, some
    positions at a time. To all else they are logits: what is asked of them as of a tensor, by
    `torch` or by a method, is asked of `read()`, which computes all of them. Slices of rows and
    positions stay unread.

    Attributes:
        hidden: what the head reads, `[b, s, h]`, in the dtype in which it computes.
        weight: that of the head, `[v, h]`, or inside of `freeze` its alias.
        bias: `[v]`, if the head has one.

    Examples:
        >>> logits = UnreadLogits(torch.ones(1, 2, 3), torch.eye(3)[:2])
        >>> logits.shape, logits[:, :1].shape
        (torch.Size([1, 2, 2]), torch.Size([1, 1, 2]))
        >>> logits.argmax(dim=-1)
        tensor([[0, 0]])
    """

    hidden: Float[Tensor, "*n h"]
    weight: Float[Tensor, "v h"]
    bias: Float[Tensor, " v"] | None = None

    @property
    def shape(self) -> torch.Size:
        """`[b, s, v]`."""
        return torch.Size((*self.hidden.shape[:-1], len(self.weight)))

    @property
    def ndim(self) -> int:
        """3."""
        return self.hidden.ndim

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits."""
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """That of the logits."""
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        """Whether somebody learns from them."""
        return any(part.requires_grad for part in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What they are made of."""
        return (self.hidden, self.weight) + (() if self.bias is None else (self.bias,))

    def read(self) -> Logits:
        """The logits themselves, in memory."""
        check_held(self.weight)
        with no_autocast(self.hidden):
            return F.linear(self.hidden, *in_dtype(self.dtype, self.weight, self.bias))

    def map(self, function: Callable[[Tensor], Tensor]) -> "UnreadLogits":
        """The same of a function of each tensor that they are made of."""
        bias = None if self.bias is None else function(self.bias)
        return UnreadLogits(function(self.hidden), function(self.weight), bias)

    def with_hidden(self, hidden: Float[Tensor, "*n h"]) -> "UnreadLogits":
        """What the same head makes of something else."""
        return UnreadLogits(hidden, self.weight, self.bias)

    def detach(self) -> "UnreadLogits":
        """The same without a graph."""
        return self.map(Tensor.detach)

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: Any) -> "UnreadLogits | Tensor":
        slices = index if isinstance(index, tuple) else (index,)
        if len(slices) < self.ndim and all(isinstance(part, slice) for part in slices):
            return self.with_hidden(self.hidden[index])
        return self.read()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"UnreadLogits, as a tensor, has no attribute {name!r}")
        return getattr(self.read(), name)

    def __repr__(self) -> str:
        return f"UnreadLogits(shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map(read_logits, (args, kwargs or {}), is_leaf=_unread)
        return function(*args, **kwargs)


def _operator(name: str) -> Callable[..., Any]:
    return lambda logits, *others: getattr(logits.read(), name)(*map(read_logits, others))


for _name in ("add", "sub", "mul", "truediv", "neg", "eq", "lt", "gt", "le", "ge", "ne"):
    setattr(UnreadLogits, f"__{_name}__", _operator(f"__{_name}__"))

AnyLogits = Logits | UnreadLogits


def _unread(value: object) -> bool:
    return isinstance(value, UnreadLogits)


# FSDP2 looks for tensors in what a module returns
pytree.register_pytree_node(
    UnreadLogits,
    lambda logits: ([logits.hidden, logits.weight, logits.bias], None),
    lambda parts, _: UnreadLogits(*parts),
)


def read_logits(logits: Any) -> Any:
    """Logits as a tensor; anything else as it is."""
    return logits.read() if isinstance(logits, UnreadLogits) else logits


def in_the_graph(logits: AnyLogits) -> Tensor:
    """What the network returned, as autograd sees it."""
    return logits.hidden if isinstance(logits, UnreadLogits) else logits


def readable(logits: Any) -> Any:
    """Logits as they can be read: compilers fuse plain code, and `torch.func` follows no other."""
    unread = isinstance(logits, UnreadLogits)
    if unread and (torch.compiler.is_compiling() or transformed(logits.hidden)):
        return logits.read()
    return logits


def unread_logits(head: nn.Module, hidden: Float[Tensor, "b s h"]) -> AnyLogits:
    """`head(hidden)`, of which nothing is computed before somebody reads it.

    One line of a network's forward, in place of `self.text_head(hidden)`:
    `logits = cyclevae.unread_logits(self.text_head, hidden)`. Its cross-entropy, accuracy and draws
    are then computed some positions at a time, of those that count alone, and equal those of the
    logits to rounding, as do the gradients. Names of parameters stay as they are, tied weights
    tied; the dtype is that of the head under autocast.

    Only an `nn.Linear` can be left unread: any other head is called, and so is one with hooks of
    its own, as FSDP2 gives a unit. So leave it in the root unit, that of a `StepModule`.

    Args:
        head: the text head.
        hidden: what it reads, `[b, s, h]`.

    Raises:
        TypeError: hidden states that are no tensor, or in another dtype than the weight, outside
            of autocast.

    Reference: the order of the sweep is that of Liger, https://arxiv.org/abs/2410.10989, and of
    Wijmans et al., Cut Your Losses, https://arxiv.org/abs/2411.09009.

    Examples:
        >>> import cyclevae as cv
        >>> head, hidden = nn.Linear(4, 10), torch.randn(2, 3, 4, requires_grad=True)
        >>> logits = unread_logits(head, hidden)
        >>> logits
        UnreadLogits(shape=[2, 3, 10], dtype=torch.float32)
        >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 0]])
        >>> loss, plain = (cv.text_loss(x, tokens, tokens > 0) for x in (logits, head(hidden)))
        >>> bool((loss - plain).abs() < 1e-6)
        True
    """
    check_tensor("hidden", hidden)
    plain = type(head).forward is nn.Linear.forward and not transformed(hidden)
    if isinstance(head, nn.Linear) and plain and is_nothing_else(head):
        return left_unread(head, hidden)
    logits: AnyLogits = head(hidden)
    return logits


class TextHead(nn.Linear):
    """An `nn.Linear` whose logits stay unread: `unread_logits(head, hidden)`, as a module.

    For networks that call their head somewhere inside, and hand its logits on as they are:
    `model.set_output_embeddings(cyclevae.TextHead.of(model.get_output_embeddings()))`.

    Examples:
        >>> head = nn.Linear(4, 10)
        >>> same = TextHead.of(head)
        >>> same.weight is head.weight, list(same.state_dict())
        (True, ['weight', 'bias'])
        >>> same(torch.randn(2, 3, 4))
        UnreadLogits(shape=[2, 3, 10], dtype=torch.float32)
    """

    @classmethod
    def of(cls, head: nn.Linear) -> "TextHead":
        """A head of the same parameters.

        Raises:
            TypeError: another head than a plain `nn.Linear`, whose logits are made otherwise.
        """
        if type(head) is not nn.Linear:
            raise TypeError(
                f"`head` must be an nn.Linear, got {type(head).__name__}, whose logits may be more "
                "than its weight says: leave it as it is"
            )
        made = cls(head.in_features, head.out_features, bias=False, device="meta")
        made.weight, made.bias = head.weight, head.bias
        return made.train(head.training)

    def forward(self, hidden: Tensor) -> AnyLogits:  # type: ignore[override]
        """The logits, unread; read where a hook of the head looks at them."""
        if is_nothing_else(self) and not transformed(hidden):
            return left_unread(self, hidden)
        return super().forward(hidden)


def left_unread(head: nn.Linear, hidden: Tensor) -> UnreadLogits:
    """What a linear head would read, and aliases of its parameters."""
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    # Aliases with a node of their own, by which DDP finds the parameters, and on which FSDP2 may
    # leave its hooks.
    weight = weight.view_as(weight)
    bias = None if bias is None else bias.view_as(bias)
    dtype = hidden.dtype
    kind = hidden.device.type
    if not hidden.is_meta and dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif dtype != weight.dtype:
        raise TypeError(
            f"`hidden` has dtype {dtype} and the head's weight {weight.dtype}: cast what it reads, "
            "as in hidden.to(head.weight.dtype), or use autocast"
        )
    return UnreadLogits(hidden.to(dtype), weight, bias)


def is_nothing_else(head: Any) -> bool:
    """Whether a linear head is nothing but its weight and bias."""
    return (
        "forward" not in vars(head)
        and not (head._forward_hooks or head._forward_pre_hooks)
        and not (head._backward_hooks or head._backward_pre_hooks)
        and not hasattr(head.weight, "full_tensor")  # sharded: its unit must be entered
    )


def in_dtype(
    dtype: torch.dtype, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype in which the head computes."""
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def check_held(weight: Tensor) -> None:
    """Refuse a weight whose memory FSDP2 has given back: its kernels would read nothing.

    Raises:
        RuntimeError: such a weight.
    """
    if torch.compiler.is_compiling() or transformed(weight) or weight.is_meta:
        return
    if weight.numel() and not weight.untyped_storage().size():
        raise RuntimeError(
            "the weight of the text head was sharded again before its logits were read: leave the "
            "head in the root unit of FSDP2, that of fully_shard(StepModule(...)), call "
            "fully_shard(..., reshard_after_forward=False) on the unit that holds it, or return "
            "its logits in place of unread ones"
        )
