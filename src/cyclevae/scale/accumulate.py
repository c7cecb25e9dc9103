"""A statistic of the batch over accumulation steps, with the graph of one step at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from cyclevae._base.checks import reads_values
from cyclevae._base.types import Latents, Scalar
from cyclevae.gradient_policy.contexts import detach

Part = TypeVar("Part")


def two_pass(
    statistic: Callable[[Latents], Scalar],
    encode: Callable[[Part], Latents],
    parts: Sequence[Part],
    *,
    generator: torch.Generator | None = None,
) -> Iterator[Scalar]:
    """A loss for each part of a batch; value and gradient of their sum are those of `statistic`.

    The first pass encodes every part without a graph and takes `g = d statistic / d z_hat` at all
    latents at once. The second encodes each part again, when its turn comes, and returns
    `sum(z_hat * g)`, shifted to an equal share of the value. Both draw the same noise: the random
    state before each part is kept, and set again. It costs one pass without a graph per part.

    Over ranks, pool the rows in the statistic, as in `lambda z: mmd_prior(pool_rows(z))`: with
    gradients averaged over ranks, the result is that of the joined batch, whatever the number of
    parts on each rank.

    Args:
        statistic: of the latents of all parts, in their order; a scalar.
        encode: makes the latents of a part, with a graph; drawing from the global random states or
            from `generator`. What it does must not depend on what other parts did before.
        parts: what `encode` takes, such as batches.
        generator: the one from which `encode` draws, where it has one.

    Yields:
        A loss per part, whose `backward` is to be run before the next.

    Raises:
        ValueError: no parts, a statistic that is no scalar, latents without a graph, or latents
            that come out otherwise the second time.

    Reference: GradCache, Gao et al. 2021, https://arxiv.org/abs/2101.06983.

    Examples:
        >>> from cyclevae import moment_prior
        >>> layer, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> for loss in two_pass(moment_prior, layer, x.split(2)):
        ...     loss.backward()
        >>> joined = torch.autograd.grad(moment_prior(layer(x)), layer.weight)[0]
        >>> torch.testing.assert_close(layer.weight.grad, joined)
    """
    if not len(parts):
        raise ValueError("`parts` is empty, so there are no latents; give at least one part")
    states, encoded = [], []
    with detach():
        for part in parts:
            states.append(_random_state(generator))
            encoded.append(encode(part))
    joined = torch.cat(encoded).requires_grad_()
    with torch.enable_grad():
        value = statistic(joined)
    if value.ndim or not value.requires_grad:
        raise ValueError(
            "`statistic` must return a scalar with a graph to the latents, got shape "
            f"{list(value.shape)}{'' if value.requires_grad else ' without a graph'}"
        )
    (gradient,) = torch.autograd.grad(value, [joined])
    share = value.detach() / len(parts)
    gradients = torch.split(gradient, [len(z_hat) for z_hat in encoded])
    for part, state, before, direction in zip(parts, states, encoded, gradients, strict=True):
        with _random_state_set(state, generator):
            z_hat = encode(part)
        _check_again(z_hat, before)
        loss = (z_hat * direction).sum()
        yield loss - loss.detach() + share


def _check_again(z_hat: Tensor, before: Tensor) -> None:
    """Refuse latents that learn nothing, or that are not those the statistic has seen."""
    if not z_hat.requires_grad:
        raise ValueError(
            "`encode` returned latents without a graph, so nothing would learn; "
            "encode_text needs policy=GradientPolicy('full')"
        )
    same = z_hat.shape == before.shape
    if same and reads_values(z_hat):
        close = torch.finfo(z_hat.dtype).eps ** 0.5
        same = torch.allclose(z_hat.detach(), before, rtol=close, atol=close)
    if not same:
        raise ValueError(
            "`encode` returned other latents the second time, so the gradient would be wrong: give "
            "the `generator` it draws from, and let nothing change between the parts"
        )


def _random_state(generator: torch.Generator | None) -> tuple[Any, ...]:
    cuda: Any = torch.cuda  # whose is_initialized has no annotations
    return (
        torch.get_rng_state(),
        cuda.get_rng_state() if cuda.is_initialized() else None,
        None if generator is None else generator.get_state(),
    )


@contextmanager
def _random_state_set(state: tuple[Any, ...], generator: torch.Generator | None) -> Iterator[None]:
    """As it was; afterwards as it is now, so that other draws go on where they were."""

    def put(state: tuple[Any, ...]) -> None:
        cpu, cuda, own = state
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        if generator is not None:
            generator.set_state(own)

    now = _random_state(generator)
    put(state)
    try:
        yield
    finally:
        put(now)
