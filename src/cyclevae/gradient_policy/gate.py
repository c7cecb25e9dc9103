"""How parameters are frozen: gradient-stopping aliases, lent to the modules and taken back.

An alias still requires grad, so a forward and its recomputation under activation checkpointing save
the same tensors. `cyclevae.gradient_policy.freeze` is the public face of this file.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from cyclevae.gradient_policy.selection import Home, Patterns, homes, select

# What a group of parameters is lent instead: one alias for each, which decides about its gradient.
# A parameter with hooks is a group of its own.
Gate = Callable[[Sequence[Tensor]], Sequence[Tensor]]

# One autograd node for several parameters costs less Python than one node each, but it holds the
# gradients it is about to drop until the last of them has come: hence groups of about one block.
_PARAMETERS_PER_GATE = 12


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


class _ZeroGate(torch.autograd.Function):
    """The same for one parameter with hooks that must fire: with zeros, for None is no gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


class FunctionalGate(torch.autograd.Function):
    """The same for one tensor, under the transforms of `torch.func` too; it costs more Python."""

    generate_vmap_rule = True

    @staticmethod
    def forward(parameter: Tensor) -> Tensor:
        """An alias of the parameter."""
        return parameter.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """A gradient that never came is None, not zeros."""
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> None:
        """No gradient."""
        return None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None) -> Tensor | None:
        """Nor a tangent, in forward mode."""
        return None if tangent is None else torch.zeros_like(tangent)


def drop_gradients(parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gate of `freeze`: aliases that require grad and pass none on."""
    (first, *_) = parameters
    if _has_hooks(first):  # which autograd would call with None
        if dist.is_available() and dist.is_initialized():  # but DDP waits for its own beside them
            return (_ZeroGate.apply(first),)  # type: ignore[no-untyped-call]
        parameters = [first.detach().requires_grad_()]
    aliases: tuple[Tensor, ...] = _Gate.apply(*parameters)  # type: ignore[no-untyped-call]
    return aliases


def _has_hooks(parameter: Any) -> bool:
    """Whether somebody looks at the gradient of a parameter, such as to clamp it."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


class _Swap:
    """Lends the homes of parameters their aliases; both methods also serve as forward hooks."""

    def __init__(self, homes: Sequence[Home], gate: Gate) -> None:
        self.homes, self.gate = homes, gate
        self.lent: list[tuple[dict[str, Any], str, Any, Any]] = []

    def lend(self, *_: object) -> None:
        # Read only now: FSDP2 has put the unsharded parameters in place.
        held = [home[key] for home, key in self.homes]
        learning = {id(p): p for p in held if p is not None and p.requires_grad}
        groups, plain = [], []
        for parameter in learning.values():
            if _has_hooks(parameter):
                groups.append([parameter])
            else:
                plain.append(parameter)
        for start in range(0, len(plain), _PARAMETERS_PER_GATE):
            groups.append(plain[start : start + _PARAMETERS_PER_GATE])
        alias_of = {}
        for group in groups:
            for parameter, alias in zip(group, self.gate(group), strict=True):
                alias_of[id(parameter)] = alias
        self.lent = [
            (home, key, parameter, alias_of[id(parameter)])
            for (home, key), parameter in zip(self.homes, held, strict=True)
            if id(parameter) in alias_of
        ]
        for home, key, _, alias in self.lent:
            home[key] = alias

    def give_back(self, *_: object) -> None:
        lent, self.lent = self.lent, []
        intact = all([home.get(key) is alias for home, key, _, alias in lent])
        for home, key, parameter, _ in lent:
            # A parameter that somebody else has put here is theirs to keep.
            if intact or not isinstance(home.get(key), nn.Parameter):
                home[key] = parameter
        if not intact:
            raise RuntimeError(
                "a frozen parameter was replaced inside freeze(), so gradient may have leaked: "
                "leave nested contexts in reverse order, and do not move the module or load "
                "weights inside."
            )


class Frozen(AbstractContextManager["Frozen"]):
    """The context manager behind `freeze`; reusable and re-entrant, left in reverse order.

    Args:
        target: a module, or what has one as `.module`.
        patterns: of the parameters that are lent their aliases.
        gate: makes the aliases of a small group; called with gradients on or off, as at the entry.
    """

    def __init__(self, target: object, patterns: Patterns, gate: Gate = drop_gradients) -> None:
        self.target, self.patterns, self.gate = target, patterns, gate
        self.entered: list[tuple[list[_Swap], list[RemovableHandle], Any]] = []

    def __enter__(self) -> "Frozen":
        swaps, hooks = [], []
        for unit, places in homes(self.target, self.patterns):
            swap = _Swap(places, self.gate)
            swaps.append(swap)
            if unit is None:
                swap.lend()
            else:
                # FSDP2 sets the unsharded parameters in its own hook, over any earlier swap.
                hooks.append(unit.register_forward_pre_hook(swap.lend))
                hooks.append(
                    unit.register_forward_hook(swap.give_back, prepend=True, always_call=True)
                )
        # Weights that parametrize.cached() keeps were made of the parameters outside.
        cached = None
        if not torch.compiler.is_compiling():
            cached, parametrize.__dict__["_cache"] = parametrize.__dict__["_cache"], {}
        self.entered.append((swaps, hooks, cached))
        return self

    def __exit__(self, *exception: object) -> None:
        swaps, hooks, cached = self.entered.pop()
        if cached is not None:
            enabled = parametrize.__dict__["_cache_enabled"]
            parametrize.__dict__["_cache"] = cached if enabled else {}
        for hook in hooks:
            hook.remove()
        for swap in swaps:
            swap.give_back()

    def probe(self, loss: Tensor) -> None:
        """Raise if a gradient of `loss` reaches what was frozen: for tests and first steps.

        Exact, whatever the model did: it asks autograd, and touches no `.grad`. It costs a backward
        pass, and the graph is kept. Call it after the context has ended.

        Args:
            loss: a scalar of passes inside of the context alone, from a bridge without a graph.

        Raises:
            RuntimeError: names the parameters that would learn.
            ValueError: if nothing could be found: no graph, inside of the context, or sharded
                parameters, whose gradients FSDP2 hides from autograd.

        Examples:
            >>> layer, x = nn.Linear(2, 2), torch.ones(1, 2)
            >>> weight = layer.weight
            >>> with Frozen(layer, ()) as frozen:
            ...     loss = nn.functional.linear(x, weight).sum()
            >>> frozen.probe(loss)
            Traceback (most recent call last):
            RuntimeError: these frozen parameters would learn from `loss`: 'weight'. ...
        """
        slots = select(self.target, self.patterns)
        if not loss.requires_grad:
            raise ValueError("`loss` has no graph, so nothing would be found; was it detached?")
        if not all(slot.parameter.is_leaf for slot in slots):
            raise ValueError(
                "probe() was called inside of freeze(), where modules hold aliases: call it after "
                "the context has ended"
            )
        if any(slot.unit is not None for slot in slots):
            raise ValueError(
                "the parameters are sharded, and FSDP2 hides their gradients from autograd: probe "
                "the model before fully_shard"
            )
        refuse_reentrant([loss])
        learning = {id(slot.parameter): slot for slot in reversed(slots)}
        named = [slot for slot in learning.values() if slot.parameter.requires_grad]
        gradients = torch.autograd.grad(
            loss, [slot.parameter for slot in named], retain_graph=True, allow_unused=True
        )
        leaking = [
            repr(slot.name)
            for slot, gradient in zip(named, gradients, strict=True)
            if gradient is not None
        ]
        if leaking:
            raise RuntimeError(
                f"these frozen parameters would learn from `loss`: {', '.join(leaking[::-1])}. A "
                "pass has read them around their modules, as a Python alias of a parameter (an "
                "attribute or list that holds it) or torch.func.functional_call does; or `loss` "
                "holds a pass outside of freeze(), or a bridge that was not detached."
            )


def refuse_reentrant(outputs: Iterable[Tensor], *, bridge: Tensor | None = None) -> None:
    """Raise if the passes that made `outputs` used reentrant activation checkpointing.

    It runs the pass again during backward, after `freeze` has ended, and so leaks gradient into
    frozen parameters. Walks the graph of the outputs on the host, about 2 ms for 24 layers. Under
    `torch.compile`, which checkpoints in a way of its own, it does nothing.

    Args:
        outputs: what came out of the frozen pass.
        bridge: what went into it; the passes before it are not looked at.

    Raises:
        RuntimeError: if reentrant checkpointing was used.

    Reference: https://docs.pytorch.org/docs/stable/checkpoint.html

    Examples:
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
        >>> refuse_reentrant([checkpoint(layer, x, use_reentrant=False)])
        >>> refuse_reentrant([checkpoint(layer, x, use_reentrant=True)])
        Traceback (most recent call last):
        RuntimeError: reentrant activation checkpointing ...
    """
    if torch.compiler.is_compiling():
        return
    pending = [output.grad_fn for output in outputs]
    seen: set[Node | None] = {None, bridge.grad_fn if bridge is not None else None}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "Checkpoint" in type(node).__name__:  # torch's, DeepSpeed's, Megatron's, Unsloth's
            raise RuntimeError(
                "reentrant activation checkpointing was found in the graph; it runs a pass again "
                "in the backward, where nothing is frozen: use checkpoint(..., "
                "use_reentrant=False), or "
                "gradient_checkpointing_kwargs={'use_reentrant': False} in Hugging Face models."
            )
        pending += [parent for parent, _ in node.next_functions]


def check_patterns(target: object, patterns: Sequence[str]) -> None:
    """Refuse patterns that match no parameter, before anything runs."""
    if patterns:
        homes(target, tuple(patterns))
