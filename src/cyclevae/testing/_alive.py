"""Parameters moved for a while, to see what depends on them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


@contextmanager
def alive(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters whose numbers are all equal, as a head that begins at 0, as if they had learned.

    A gate or a head at 0 silences what stands before it, so that nothing could be seen.
    """
    known = [p for p in parameters if not is_lazy(p)]
    with _changed([p for p in known if p.is_floating_point()], _grown):
        yield


@contextmanager
def moved(parameters: Sequence[Tensor]) -> Iterator[None]:
    """All parameters somewhere else."""
    with _changed([p for p in parameters if p.is_floating_point()], _elsewhere):
        yield


def _grown(values: Tensor, generator: torch.Generator) -> Tensor | None:
    if not bool(values.numel()) or bool((values != values.flatten()[0]).any()):
        return None
    if values.ndim < 2:  # a bias, a norm's weight, a gate: to one side, so that no gate stays shut
        step = _draw(torch.rand, values, generator) * 0.2 + 0.1
    else:
        step = _draw(torch.randn, values, generator) / values[0].numel() ** 0.5
    grown: Tensor = values + step
    return grown


def _elsewhere(values: Tensor, generator: torch.Generator) -> Tensor:
    size = 0.1 * (values.abs().mean() + 0.1)
    elsewhere: Tensor = values + size * _draw(torch.randn, values, generator)
    return elsewhere


def _draw(how: Callable[..., Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    return how(like.shape, generator=generator).to(like)


@contextmanager
def _changed(
    parameters: Sequence[Tensor], change: Callable[[Tensor, torch.Generator], Tensor | None]
) -> Iterator[None]:
    """Numbers changed in place, of shards too, and then what they were to the last bit."""
    generator = torch.Generator().manual_seed(0)
    before = []
    with torch.no_grad():
        for parameter in parameters:
            to_local = getattr(parameter, "to_local", None)
            local: Tensor = to_local() if to_local else parameter.detach()
            changed = change(local, generator)
            if changed is not None:
                before.append((local, local.clone()))
                local.copy_(changed)
    try:
        yield
    finally:
        with torch.no_grad():
            for local, values in before:
                local.copy_(values)
