"""Who learns: the passes and parameters that receive a gradient from a term, and those that do not.

Toggling `requires_grad` would be silently wrong under activation checkpointing and breaks DDP, so
`freeze` lends the modules aliases of their parameters that stop the gradient.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

# Attributes of wrappers that never appear in the names users write.
_TRANSPARENT = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
# One autograd node for several parameters costs less Python than one node each, but it holds the
# gradients it is about to drop until the last of them has come: hence small groups.
_PARAMETERS_PER_GATE = 8


@dataclass(frozen=True)
class GradientPolicy:
    """Declares which parts of a two-pass term learn from it.

    A cycle runs one pass that makes the bridge and one pass behind it. With `bridge="detach"`
    the first pass learns nothing; with `bridge="full"` the gradient flows through the bridge
    into the first pass. Patterns are those of `freeze`.

    Args:
        bridge: what happens at the bridge, `"detach"` or `"full"`.
        freeze: patterns of the parameters that are frozen in the pass behind the bridge.
        freeze_bridge: patterns of the parameters that are frozen in the pass that makes the
            bridge; only with `bridge="full"`.

    Raises:
        ValueError: if a value is unknown, a pattern is not a string in a tuple, or the policy
            leaves nothing that could learn.

    Reference: stop-gradient at the bridge, as in SimSiam (Chen & He 2021, arXiv:2011.10566).

    Example:
        >>> GradientPolicy(bridge="full", freeze=("decoder.*",))
        GradientPolicy(bridge='full', freeze=('decoder.*',), freeze_bridge=())
    """

    bridge: Literal["detach", "full"] = "detach"
    freeze: tuple[str, ...] = ()
    freeze_bridge: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bridge not in ("detach", "full"):
            raise ValueError(
                f"`bridge` must be 'detach' (the pass that makes the bridge learns nothing) or "
                f"'full' (gradient flows through the bridge), got {self.bridge!r}."
            )
        for name, patterns in (("freeze", self.freeze), ("freeze_bridge", self.freeze_bridge)):
            if isinstance(patterns, str):
                raise ValueError(
                    f"`{name}` must be a tuple of patterns, got the bare string {patterns!r}: "
                    f"write ({patterns!r},)."
                )
            if not isinstance(patterns, tuple) or not all(isinstance(p, str) for p in patterns):
                raise ValueError(
                    f"`{name}` must be a tuple of shell patterns on parameter names such as "
                    f"('decoder.*',), got {patterns!r}."
                )
        if self.bridge == "detach" and self.freeze_bridge:
            raise ValueError(
                f"`freeze_bridge`={self.freeze_bridge!r} has no meaning with bridge='detach', "
                f"because that bridge teaches nobody: drop `freeze_bridge` or set bridge='full'."
            )
        if "*" in self.freeze and (self.bridge == "detach" or "*" in self.freeze_bridge):
            raise ValueError(
                f"nothing would learn with bridge={self.bridge!r}, freeze={self.freeze!r} and "
                f"freeze_bridge={self.freeze_bridge!r}: freeze less, or give the term weight zero."
            )


def freeze(target: object, *patterns: str | nn.Module) -> AbstractContextManager[None]:
    """Give the chosen parameters no gradient from the forward passes that run inside.

    Gradient still flows *through* them to everything else, and passes outside, before or after, in
    the same graph or not, learn as usual: the backward pass may run anywhere. Exact under
    non-reentrant activation checkpointing, autocast, `torch.compile`, DDP and FSDP2.

    Names are resolved at every entry, without the prefixes of wrappers (DDP's `module.`,
    `_orig_mod.`). A tied parameter is frozen wherever it is used. The swap is seen by every thread.
    It cannot hold where a pass bypasses the modules: reentrant checkpointing, which
    `refuse_reentrant` finds; `functional_call`, or a list that holds parameters, which
    `cyclevae.testing.assert_frozen` finds; an FSDP2 unit entered by another method than its call.
    Inside, do not move the module, load its state, or hand `.parameters()` to anything.

    Args:
        target: a module, or a denoiser that exposes one as `.module`.
        patterns: shell patterns on parameter names (`"decoder.*"`, `"*.bias"`) or submodules of
            the target; none means all parameters.

    Raises:
        ValueError: on entry, if the target is no module or holds none of the chosen parameters, or
            if they cannot be frozen exactly (recurrent layers, FSDP1, a part of an FSDP2 unit).
        RuntimeError: on exit, if a frozen parameter was replaced inside.

    Reference: stop-gradient on one pass of shared weights, as in SimSiam,
    https://arxiv.org/abs/2011.10566.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
        >>> with freeze(model, "decoder.*"):
        ...     y = model["decoder"](model["encoder"](torch.ones(1, 2)))
        >>> y.sum().backward()
        >>> [name for name, p in model.named_parameters() if p.grad is not None]
        ['encoder.weight', 'encoder.bias']
    """
    return _Frozen(target, patterns)


def detach() -> AbstractContextManager[None]:
    """Compute a bridge without a graph: nothing inside learns.

    Cheaper than computing the graph and dropping it, and safe inside an autocast region whose
    other passes learn.

    Reference: older PyTorch caches the casts made under `no_grad` and loses the gradients of later
    passes, https://github.com/pytorch/pytorch/issues/112583.

    Example:
        >>> encoder = nn.Linear(2, 2)
        >>> with detach():
        ...     bridge = encoder(torch.ones(1, 2))
        >>> bridge.requires_grad
        False
    """
    return torch.no_grad() if torch.compiler.is_compiling() else _no_grad_no_cache()


def refuse_reentrant(outputs: Iterable[Tensor], *, bridge: Tensor | None = None) -> None:
    """Raise if the passes that made `outputs` used reentrant activation checkpointing.

    It runs the pass again during backward, after `freeze` has ended, and so leaks gradient into
    frozen parameters. Walks the graph of the outputs, about 2 ms for 24 layers: call it on the
    first steps.

    Args:
        outputs: what came out of the frozen pass.
        bridge: what went into it; the passes before it are not looked at.

    Raises:
        RuntimeError: if reentrant checkpointing was used.

    Reference: https://docs.pytorch.org/docs/stable/checkpoint.html

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
        >>> refuse_reentrant([checkpoint(layer, x, use_reentrant=False)])
        >>> refuse_reentrant([checkpoint(layer, x, use_reentrant=True)])
        Traceback (most recent call last):
        RuntimeError: reentrant activation checkpointing ...
    """
    pending = [output.grad_fn for output in outputs]
    seen: set[Node | None] = {None, bridge.grad_fn if bridge is not None else None}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():
            raise RuntimeError(
                "reentrant activation checkpointing was found in the graph; it would leak gradient "
                "into frozen parameters: use checkpoint(..., use_reentrant=False), or "
                "gradient_checkpointing_kwargs={'use_reentrant': False} in Hugging Face models."
            )
        pending += [parent for parent, _ in node.next_functions]


@contextmanager
def _no_grad_no_cache() -> Iterator[None]:
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)


class _Gate(torch.autograd.Function):
    """Identity whose backward drops the gradient.

    Its outputs still require grad, so that a forward, and its recomputation outside of `freeze`,
    save the same tensors; and so that the hooks of DDP fire.
    """

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # Views would forbid in-place updates, which nn.Embedding(max_norm=) makes.
        return tuple([parameter.detach() for parameter in parameters])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        return (None,) * len(gradients)


class _Slot(NamedTuple):
    """A place that holds a parameter; tied parameters have several."""

    name: str
    owner: nn.Module
    key: str
    parameter: Tensor
    unit: nn.Module | None  # the FSDP2 unit that shards it


class _Swap:
    """Lends slots their gated parameters; both methods also serve as forward hooks."""

    def __init__(self, slots: Sequence[_Slot]) -> None:
        self.slots = slots
        self.lent: list[tuple[dict[str, Any], str, Any, Any]] = []

    def lend(self, *_: object) -> None:
        # Read again, not taken from the slots: FSDP2 has put the unsharded parameters in place.
        homes = [(slot.owner._parameters, slot.key) for slot in self.slots]
        held = [(home, key, home[key]) for home, key in homes]
        learning = {id(p): p for _, _, p in held if p is not None and p.requires_grad}
        parameters, gated = list(learning.values()), []
        for start in range(0, len(parameters), _PARAMETERS_PER_GATE):
            gated += _Gate.apply(  # type: ignore[no-untyped-call]
                *parameters[start : start + _PARAMETERS_PER_GATE]
            )
        gates = dict(zip(learning, gated, strict=True))
        self.lent = [(*place, gates[id(place[2])]) for place in held if id(place[2]) in gates]
        for home, key, _, alias in self.lent:
            home[key] = alias

    def give_back(self, *_: object) -> None:
        lent, self.lent = self.lent, []
        intact = all([home.get(key) is alias for home, key, _, alias in lent])
        for home, key, parameter, _ in lent:
            # A parameter that somebody else has put here is theirs to keep.
            if not isinstance(home.get(key), nn.Parameter):
                home[key] = parameter
        if not intact:
            raise RuntimeError(
                "a frozen parameter was replaced inside freeze(), so gradient may have leaked: "
                "leave nested contexts in reverse order, and do not move the module or load "
                "weights inside."
            )


class _Frozen(AbstractContextManager[None]):
    def __init__(self, target: object, patterns: tuple[str | nn.Module, ...]) -> None:
        self.target, self.patterns = target, patterns
        self.entered: list[tuple[list[_Swap], list[RemovableHandle]]] = []

    def __enter__(self) -> None:
        slots = _select(_slots(_module_of(self.target)), self.patterns)
        swaps, hooks = [], []
        for unit in dict.fromkeys(slot.unit for slot in slots):
            swap = _Swap([slot for slot in slots if slot.unit is unit])
            swaps.append(swap)
            if unit is None:
                swap.lend()
            else:
                # FSDP2 sets the unsharded parameters in its own hook, over any earlier swap.
                hooks.append(unit.register_forward_pre_hook(swap.lend))
                hooks.append(
                    unit.register_forward_hook(swap.give_back, prepend=True, always_call=True)
                )
        self.entered.append((swaps, hooks))

    def __exit__(self, *exception: object) -> None:
        swaps, hooks = self.entered.pop()
        for hook in hooks:
            hook.remove()
        for swap in swaps:
            swap.give_back()


def _module_of(target: object) -> nn.Module:
    module = target if isinstance(target, nn.Module) else getattr(target, "module", None)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"freeze() needs a torch.nn.Module or an object whose `.module` is one, got "
            f"{type(target).__name__}: give your denoiser a `.module` that returns its network."
        )
    return module


def _slots(module: nn.Module) -> list[_Slot]:
    # Looked up, not imported: a module can only be sharded if FSDP2 is there already.
    homes = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")
    sharded = tuple(
        sys.modules[home].FSDPModule
        for home in homes
        if hasattr(sys.modules.get(home), "FSDPModule")
    )
    slots: list[_Slot] = []
    _collect(module, "", None, sharded, slots)
    if not slots:
        raise ValueError(f"freeze() got a {type(module).__name__} that holds no parameters.")
    return slots


def _collect(
    module: nn.Module,
    prefix: str,
    unit: nn.Module | None,
    sharded: tuple[type, ...],
    slots: list[_Slot],
) -> None:
    if isinstance(module, sharded):
        unit = module
    for key, parameter in module._parameters.items():
        if parameter is not None:
            slots.append(_Slot(prefix + key, module, key, parameter, unit))
    wraps = isinstance(module, nn.parallel.DistributedDataParallel)
    for name, child in module._modules.items():
        if name == "_fsdp_wrapped_module":
            raise ValueError(
                "freeze() is not exact under FullyShardedDataParallel (FSDP1), which replaces "
                "parameters during forward: shard with torch's fully_shard (FSDP2) instead."
            )
        if child is not None:
            path = prefix if wraps or name in _TRANSPARENT else f"{prefix}{name}."
            _collect(child, path, unit, sharded, slots)


def _select(slots: list[_Slot], patterns: tuple[str | nn.Module, ...]) -> list[_Slot]:
    """The slots of every parameter that a pattern matches, under whatever name it matches."""
    chosen = [] if patterns else slots
    for pattern in patterns:
        if isinstance(pattern, str):
            hits = _matches(tuple([slot.name for slot in slots]), pattern)
            found = [slots[hit] for hit in hits]
        elif isinstance(pattern, nn.Module):
            inside = {id(module) for module in pattern.modules()}
            found = [slot for slot in slots if id(slot.owner) in inside]
        else:
            raise ValueError(
                f"a pattern of freeze() must be a string such as 'decoder.*' or a submodule, got "
                f"{pattern!r}: unpack collections, freeze(model, *patterns)."
            )
        if not found:
            raise ValueError(_not_found(pattern, slots))
        chosen = chosen + found
    parameters = {id(slot.parameter) for slot in chosen}
    selected = [slot for slot in slots if id(slot.parameter) in parameters]
    for slot in selected:
        if slot.unit is None and type(slot.parameter).__name__ == "DTensor":
            raise ValueError(
                f"{slot.name!r} is a DTensor outside of any FSDP2 unit of the target, and FSDP2 "
                f"would undo the swap: freeze the module that was given to fully_shard, with a "
                f"pattern for the part. Tensor parallelism without FSDP2 is not supported."
            )
        if isinstance(slot.owner, nn.RNNBase):
            raise ValueError(
                f"{slot.name!r} belongs to a {type(slot.owner).__name__}, which computes with a "
                f"list of its parameters that freeze() cannot reach: leave it out."
            )
    return selected


def _matches(names: tuple[str, ...], pattern: str) -> tuple[int, ...]:
    return tuple([i for i, name in enumerate(names) if fnmatchcase(name, pattern)])


# What torch.compiler.assume_constant_result does, less its import of dynamo, which takes a second:
# dynamo cannot trace fnmatch, but the answer is a constant of the names.
_matches._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _not_found(pattern: str | nn.Module, slots: list[_Slot]) -> str:
    names = list(dict.fromkeys(slot.name for slot in slots))
    if isinstance(pattern, nn.Module):
        return (
            f"freeze() got the submodule {type(pattern).__name__}, which holds no parameter of the "
            f"target: pass a submodule of the target itself, not of a copy of it. Its parameters "
            f"are {', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else '.'}"
        )
    parts = [name.split(".") for name in names]
    groups = dict.fromkeys(".".join(p[:i]) + ".*" for p in parts for i in range(1, len(p)))
    near = get_close_matches(pattern, [*groups, *names], n=3, cutoff=0.5) or [*groups, *names][:5]
    return (
        f"pattern {pattern!r} of freeze() matches no parameter name; it must match a full name, as "
        f"in 'decoder.*' or '*.bias'. Nearest: {', '.join(map(repr, near))}."
    )
