"""Which parameters learn from a loss, asked of autograd."""

from collections.abc import Iterable

import torch
from torch import Tensor

from cyclevae.gradient_policy.gate import refuse_reentrant


def assert_frozen(loss: Tensor, parameters: Iterable[Tensor | tuple[str, Tensor]]) -> None:
    """Assert that no gradient of `loss` reaches any of `parameters`.

    Exact, whatever the model did: it asks autograd, without touching any `.grad`.

    Args:
        loss: a scalar with a graph, which is kept.
        parameters: tensors, or `(name, tensor)` pairs such as `module.named_parameters()` gives
            outside of `freeze`.

    Raises:
        AssertionError: names the parameters that would learn.
        RuntimeError: if the graph holds reentrant activation checkpointing.
        ValueError: if nothing would be tested: no graph, no parameters, or
            sharded ones, or the aliases that `freeze` lends.

    Examples:
        >>> from cyclevae import freeze
        >>> layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
        >>> with freeze(layer):
        ...     y = layer(x)
        >>> assert_frozen(y.sum(), layer.named_parameters())
        >>> assert_frozen(layer(x).sum(), layer.named_parameters())
        Traceback (most recent call last):
        AssertionError: expected no gradient, but these would learn: weight, bias
    """
    leaking = [name for name, gradient in _gradients(loss, parameters) if gradient is not None]
    if leaking:
        raise AssertionError(f"expected no gradient, but these would learn: {', '.join(leaking)}")


def assert_learns(loss: Tensor, parameters: Iterable[Tensor | tuple[str, Tensor]]) -> None:
    """Assert that a gradient of `loss` reaches all `parameters` and is not zero in all of them.

    Args:
        loss: a scalar with a graph, which is kept.
        parameters: as `assert_frozen`.

    Raises:
        AssertionError: names the parameters that the gradient does not reach, or in which it is no
            number.
        RuntimeError: if the graph holds reentrant activation checkpointing.
        ValueError: if nothing would be tested: no graph, no parameters, or
            sharded ones, or the aliases that `freeze` lends.

    Examples:
        >>> layer = torch.nn.Linear(2, 2)
        >>> assert_learns(layer(torch.ones(1, 2)).sum(), layer.named_parameters())
    """
    found = _gradients(loss, parameters)
    missed = [name for name, gradient in found if gradient is None]
    if missed:
        raise AssertionError(f"expected a gradient, but none reaches: {', '.join(missed)}")
    gradients = [(name, gradient) for name, gradient in found if gradient is not None]
    bad = [name for name, gradient in gradients if not bool(torch.isfinite(gradient).all())]
    if bad:
        raise AssertionError(f"expected a gradient, but it is NaN or infinite in: {', '.join(bad)}")
    if not any(gradient.any() for _, gradient in gradients):
        names = ", ".join(name for name, _ in gradients)
        raise AssertionError(f"expected a gradient, but it is zero in all of: {names}")


def _gradients(
    loss: Tensor, parameters: Iterable[Tensor | tuple[str, Tensor]]
) -> list[tuple[str, Tensor | None]]:
    named = [
        (f"parameter {i}", entry) if isinstance(entry, Tensor) else entry
        for i, entry in enumerate(parameters)
    ]
    if not named:
        raise ValueError("`parameters` is empty, so nothing would be tested")
    if not loss.requires_grad:
        raise ValueError("`loss` has no graph, so nothing would be tested; was it detached?")
    if any(type(tensor.grad_fn).__name__ == "_GateBackward" for _, tensor in named):
        raise ValueError(
            "`parameters` were taken inside freeze(), which holds aliases: take them outside"
        )
    if any(type(tensor).__name__ == "DTensor" for _, tensor in named):
        raise ValueError(
            "`parameters` are sharded, and FSDP2 hides their gradients from autograd: test the "
            "model before fully_shard"
        )
    refuse_reentrant([loss])
    # autograd.grad refuses tensors that do not require grad; they learn nothing.
    learning = [tensor for _, tensor in named if tensor.requires_grad]
    found = iter(
        torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True)
        if learning
        else ()
    )
    return [(name, next(found) if tensor.requires_grad else None) for name, tensor in named]
