"""Which parameters a pattern means, and where a module keeps them.

Names are resolved at every entry of `freeze`. To be cheap, the answer is kept with weak references
to all it was made from, and holds as long as a walk over the module finds these again.
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from cyclevae.gradient_policy.roles import ROLES, Roles, matches

# Attributes of wrappers that never appear in the names users write.
_TRANSPARENT = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
# Answers kept for a module; more than this many different questions are no training loop.
_ANSWERS = 32

Patterns = tuple[str | nn.Module, ...]
Home = tuple[dict[str, Any], str]  # a module's dictionary of parameters, and the key in it


class Slot(NamedTuple):
    """A place that holds a parameter; tied parameters have several."""

    name: str
    owner: nn.Module
    key: str
    parameter: Tensor
    unit: nn.Module | None  # the FSDP2 unit that shards it


class _Survey(NamedTuple):
    """All that names are resolved from, in the order of one walk."""

    shape: list[
        object
    ]  # of each module: its type, the keys of its parameters, its children's names
    modules: list[nn.Module | None]
    parameters: list[Tensor | None]


class _Answer(NamedTuple):
    """Where the chosen parameters are: numbers of modules in the survey, by number of the unit."""

    shape: list[object]
    contents: Sequence[Callable[[], object]]  # weak, so that the answer keeps no module alive
    places: list[tuple[int | None, list[tuple[int, str]]]]

    def holds(self, survey: _Survey) -> bool:
        found = [reference() for reference in self.contents]
        return self.shape == survey.shape and all(
            map(is_, found, [*survey.modules, *survey.parameters])
        )


_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], _Answer]]
_known = weakref.WeakKeyDictionary()


def homes(target: object, patterns: Patterns) -> list[tuple[nn.Module | None, list[Home]]]:
    """Where the chosen parameters are, by the FSDP2 unit that shards them."""
    module = _module_of(target)
    for pattern in patterns:
        if not isinstance(pattern, (str, nn.Module)):
            raise ValueError(
                f"a pattern of freeze() must be a string such as 'decoder.*' or a submodule, got "
                f"{pattern!r}: unpack collections, freeze(model, *patterns)."
            )
    if torch.compiler.is_compiling():  # paid once, and dynamo knows no weak references
        return _by_unit(select(target, patterns))
    survey = _look([module, *[p for p in patterns if isinstance(p, nn.Module)]])
    known = _known.setdefault(module, {})
    asked = [weakref.ref(p) if isinstance(p, nn.Module) else p for p in patterns]
    question = (_roles_of(target), *asked)
    answer = known.get(question)
    if answer is None or not answer.holds(survey):
        answer = _answer(survey, select(target, patterns))
        if len(known) >= _ANSWERS:
            known.clear()
        known[question] = answer
    modules: list[Any] = survey.modules
    return [
        (
            None if unit is None else modules[unit],
            [(modules[owner]._parameters, key) for owner, key in places],
        )
        for unit, places in answer.places
    ]


def select(target: object, patterns: Patterns) -> list[Slot]:
    """The slots of every parameter that a pattern matches, under whatever name it matches."""
    slots = _slots(_module_of(target))
    chosen, roles = [] if patterns else slots, _roles_of(target)
    for pattern in patterns:
        if roles is not None and isinstance(pattern, str) and pattern in ROLES:
            members = roles.members([(slot.name, slot.parameter) for slot in slots])[pattern]
            chosen = chosen + [slot for slot in slots if id(slot.parameter) in members]
            continue  # a role may be empty, as the shared one of two networks is
        if isinstance(pattern, str):
            hits = matches(tuple([slot.name for slot in slots]), pattern)
            found = [slots[hit] for hit in hits]
        else:
            inside = {id(module) for module in pattern.modules()}
            found = [slot for slot in slots if id(slot.owner) in inside]
        if not found:
            raise ValueError(_not_found(pattern, slots))
        chosen = chosen + found
    if not chosen:
        raise ValueError(
            f"freeze() was given the roles {', '.join(map(repr, patterns))}, which hold no "
            "parameters: name others, or leave the context out"
        )
    parameters = {id(slot.parameter) for slot in chosen}
    selected = [slot for slot in slots if id(slot.parameter) in parameters]
    for slot in selected:
        if slot.unit is None and type(slot.parameter).__name__ == "DTensor":
            raise ValueError(
                f"{slot.name!r} is a DTensor outside of any FSDP2 unit of the target, and FSDP2 "
                f"would undo the swap: freeze the module that was given to fully_shard, with a "
                f"pattern for the part. Tensor parallelism without FSDP2 is not supported."
            )
        if isinstance(slot.parameter, UninitializedParameter):
            raise ValueError(
                f"{slot.name!r} has no shape yet: run the lazy module once before it is frozen."
            )
        if isinstance(slot.owner, torch.jit.ScriptModule) or hasattr(slot.parameter, "ds_id"):
            raise ValueError(
                f"{slot.name!r} belongs to a {type(slot.owner).__name__} whose parameters "
                "TorchScript, or DeepSpeed's ZeRO stage 3, keeps elsewhere, where freeze() cannot "
                "reach them: script it later, or shard with torch's fully_shard."
            )
        if isinstance(slot.owner, nn.RNNBase):
            raise ValueError(
                f"{slot.name!r} belongs to a {type(slot.owner).__name__}, which computes with a "
                f"list of its parameters that freeze() cannot reach: leave it out."
            )
    return selected


def _look(roots: Sequence[nn.Module]) -> _Survey:
    survey = _Survey([], [*roots], [])
    shape, modules, parameters = survey
    for module in modules:  # which grows as it is read
        if module is None:
            continue
        shape.append(type(module))  # fully_shard changes it in place
        shape += module._parameters.keys()
        parameters += module._parameters.values()
        shape.append(None)
        shape += module._modules.keys()
        modules += module._modules.values()
    return survey


def _answer(survey: _Survey, slots: list[Slot]) -> _Answer:
    number = {id(module): i for i, module in enumerate(survey.modules)}
    places: dict[int | None, list[tuple[int, str]]] = {}
    for slot in slots:
        unit = None if slot.unit is None else number[id(slot.unit)]
        places.setdefault(unit, []).append((number[id(slot.owner)], slot.key))
    contents = [
        (lambda: None) if held is None else weakref.ref(held)
        for held in [*survey.modules, *survey.parameters]
    ]
    return _Answer(survey.shape, contents, list(places.items()))


def _by_unit(slots: list[Slot]) -> list[tuple[nn.Module | None, list[Home]]]:
    return [
        (unit, [(slot.owner._parameters, slot.key) for slot in slots if slot.unit is unit])
        for unit in dict.fromkeys([slot.unit for slot in slots])
    ]


def _module_of(target: object) -> nn.Module:
    module = target if isinstance(target, nn.Module) else getattr(target, "module", None)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"freeze() needs a torch.nn.Module or an object whose `.module` is one, got "
            f"{type(target).__name__}: give your denoiser a `.module` that returns its network."
        )
    return module


def _roles_of(target: object) -> Roles | None:
    roles = getattr(target, "roles", None)
    return roles if isinstance(roles, Roles) else None


def _slots(module: nn.Module) -> list[Slot]:
    # Looked up, not imported: a module can only be sharded if FSDP2 is there already.
    homes = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")
    sharded = tuple(
        sys.modules[home].FSDPModule
        for home in homes
        if hasattr(sys.modules.get(home), "FSDPModule")
    )
    slots: list[Slot] = []
    _collect(module, "", None, sharded, slots)
    if not slots:
        raise ValueError(f"freeze() got a {type(module).__name__} that holds no parameters.")
    return slots


def _collect(
    module: nn.Module,
    prefix: str,
    unit: nn.Module | None,
    sharded: tuple[type, ...],
    slots: list[Slot],
) -> None:
    if isinstance(module, sharded):
        unit = module
    for key, parameter in module._parameters.items():
        if parameter is not None:
            slots.append(Slot(prefix + key, module, key, parameter, unit))
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


def _not_found(pattern: str | nn.Module, slots: list[Slot]) -> str:
    names = list(dict.fromkeys(slot.name for slot in slots))
    if isinstance(pattern, nn.Module):
        return (
            f"freeze() got the submodule {type(pattern).__name__}, which holds no parameter of the "
            f"target: pass a submodule of the target itself, not of a copy of it. Its parameters "
            f"are {', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else '.'}"
        )
    if pattern in ROLES:
        return (
            f"{pattern!r} is a role, and the target of freeze() has none: give "
            "as_denoiser(network, roles=Roles(encoder_only=(...), decoder_only=(...)))"
        )
    parts = [name.split(".") for name in names]
    groups = dict.fromkeys(".".join(p[:i]) + ".*" for p in parts for i in range(1, len(p)))
    near = get_close_matches(pattern, [*groups, *names], n=3, cutoff=0.5) or [*groups, *names][:5]
    return (
        f"pattern {pattern!r} of freeze() matches no parameter name; it must match a full name, as "
        f"in 'decoder.*' or '*.bias'. Nearest: {', '.join(map(repr, near))}."
    )
