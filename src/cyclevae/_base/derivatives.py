"""Derivatives beyond the first backward pass: followed where they can be, refused where not."""

from typing import Any, NoReturn

import torch
from torch import Tensor


def transformed(tensor: Tensor) -> bool:
    """Whether `torch.func` transforms are at work, or forward mode: both follow plain code alone.

    Values cannot be read in them, and a custom backward would have to say much more.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    dual = torch.autograd.forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return dual.tangent is not None


def once(surrogate: Tensor, name: str, *, value: Tensor | None = None) -> Tensor:
    """The same, or a `value` in place of its own, differentiable once, by a backward pass.

    A surrogate has the gradient of something else than its value, such as of an expectation. What
    autograd would make of a second derivative is not that thing's second derivative, so that it is
    refused: also where the incoming gradient is constant, for which torch's `once_differentiable`
    returns a value that lacks these terms.
    """
    if torch.compiler.is_compiling():  # a compiled backward is differentiable once, torch says so
        if value is None:
            return surrogate
        return value + (surrogate - surrogate.detach())  # in this order exact to the last bit
    value = surrogate if value is None else value
    followed: Tensor = _Once.apply(surrogate, value.detach(), name)  # type: ignore[no-untyped-call]
    return followed


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(
        f"{name} is a surrogate with a gradient of its own, for one backward pass: its second "
        "derivatives and forward-mode derivatives are not those of the objective. Leave it out of "
        "the loss that is differentiated so; a bridge that is detached needs none"
    )


class _Once(torch.autograd.Function):
    """A value with the gradient of a surrogate, on which it depends, as autograd sees it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(surrogate: Tensor, value: Tensor, name: str) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        surrogate, _, ctx.surrogate = inputs
        ctx.save_for_backward(surrogate)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if not torch.is_grad_enabled():
            return gradient, None, None
        (surrogate,) = ctx.saved_tensors
        refusing: Tensor = _Refused.apply(gradient, surrogate, ctx.surrogate)  # type: ignore[no-untyped-call]
        return refusing, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _refuse(ctx.surrogate)


class _Refused(torch.autograd.Function):
    """Identity of a gradient that has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, value: Tensor, name: str) -> Tensor:
        return gradient.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.surrogate = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> NoReturn:
        _refuse(ctx.surrogate)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _refuse(ctx.surrogate)
