"""How parameters are frozen: gradient-stopping aliases, lent to the modules and taken back.

An alias still requires grad, so a forward and its recomputation under activation checkpointing save
the same tensors. `cyclevae.gradient_policy.freeze` is the public face of this file.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cyclevae._selection import Home, Patterns, homes

# What a group of parameters is lent instead: one alias for each, which decides about its gradient.
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


def drop_gradients(parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gate of `freeze`: aliases that require grad and pass none on."""
    aliases: tuple[Tensor, ...] = _Gate.apply(*parameters)  # type: ignore[no-untyped-call]
    return aliases


class _Swap:
    """Lends the homes of parameters their aliases; both methods also serve as forward hooks."""

    def __init__(self, homes: Sequence[Home], gate: Gate) -> None:
        self.homes, self.gate = homes, gate
        self.lent: list[tuple[dict[str, Any], str, Any, Any]] = []

    def lend(self, *_: object) -> None:
        # Read only now: FSDP2 has put the unsharded parameters in place.
        held = [home[key] for home, key in self.homes]
        learning = {id(p): p for p in held if p is not None and p.requires_grad}
        parameters: list[Tensor] = list(learning.values())
        aliases: list[Tensor] = []
        for start in range(0, len(parameters), _PARAMETERS_PER_GATE):
            aliases += self.gate(parameters[start : start + _PARAMETERS_PER_GATE])
        alias_of = dict(zip(learning, aliases, strict=True))
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


class Frozen(AbstractContextManager[None]):
    """The context manager behind `freeze`; reusable and re-entrant, left in reverse order.

    Args:
        target: a module, or what has one as `.module`.
        patterns: of the parameters that are lent their aliases.
        gate: makes the aliases of a small group; called with gradients on or off, as at the entry.
    """

    def __init__(self, target: object, patterns: Patterns, gate: Gate = drop_gradients) -> None:
        self.target, self.patterns, self.gate = target, patterns, gate
        self.entered: list[tuple[list[_Swap], list[RemovableHandle]]] = []

    def __enter__(self) -> None:
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
        homes(target, tuple(patterns))
