"""How parameters are frozen: gradient-stopping aliases, lent to the modules and taken back.

An alias still requires grad, so a forward and its recomputation under activation checkpointing save
the same tensors. `cyclevae.gradient_policy.freeze` is the public face of this file.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# What a group of parameters is lent instead: one alias for each, which decides about its gradient.
Gate = Callable[[Sequence[Tensor]], Sequence[Tensor]]

# Attributes of wrappers that never appear in the names users write.
_TRANSPARENT = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
# One autograd node for several parameters costs less Python than one node each, but it holds the
# gradients it is about to drop until the last of them has come: hence small groups.
_PARAMETERS_PER_GATE = 8


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


def drop_gradients(parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gate of `freeze`: aliases that require grad and pass none on."""
    aliases: tuple[Tensor, ...] = _Gate.apply(*parameters)  # type: ignore[no-untyped-call]
    return aliases


class _Slot(NamedTuple):
    """A place that holds a parameter; tied parameters have several."""

    name: str
    owner: nn.Module
    key: str
    parameter: Tensor
    unit: nn.Module | None  # the FSDP2 unit that shards it


class _Swap:
    """Lends slots their gated parameters; both methods also serve as forward hooks."""

    def __init__(self, slots: Sequence[_Slot], gate: Gate) -> None:
        self.slots, self.gate = slots, gate
        self.lent: list[tuple[dict[str, Any], str, Any, Any]] = []

    def lend(self, *_: object) -> None:
        # Read again, not taken from the slots: FSDP2 has put the unsharded parameters in place.
        homes = [(slot.owner._parameters, slot.key) for slot in self.slots]
        held = [(home, key, home[key]) for home, key in homes]
        learning = {id(p): p for _, _, p in held if p is not None and p.requires_grad}
        parameters: list[Tensor] = list(learning.values())
        gated: list[Tensor] = []
        for start in range(0, len(parameters), _PARAMETERS_PER_GATE):
            gated += self.gate(parameters[start : start + _PARAMETERS_PER_GATE])
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


class Frozen(AbstractContextManager[None]):
    """The context manager behind `freeze`; reusable and re-entrant, left in reverse order.

    Args:
        target: a module, or what has one as `.module`.
        patterns: of the parameters that are lent their aliases.
        gate: makes the aliases of a small group; called with gradients on or off, as at the entry.
    """

    def __init__(
        self,
        target: object,
        patterns: tuple[str | nn.Module, ...],
        gate: Gate = drop_gradients,
    ) -> None:
        self.target, self.patterns, self.gate = target, patterns, gate
        self.entered: list[tuple[list[_Swap], list[RemovableHandle]]] = []

    def __enter__(self) -> None:
        slots = _select(_slots(_module_of(self.target)), self.patterns)
        swaps, hooks = [], []
        for unit in dict.fromkeys(slot.unit for slot in slots):
            swap = _Swap([slot for slot in slots if slot.unit is unit], self.gate)
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


def check_patterns(target: object, patterns: Sequence[str]) -> None:
    """Refuse patterns that match no parameter, before anything runs."""
    if patterns:
        _select(_slots(_module_of(target)), tuple(patterns))


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
