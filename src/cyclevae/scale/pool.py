"""The rows and counts of all ranks, so that a loss is that of the joined batch."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from cyclevae._base.precision import fp32


def pool_rows(
    z: Float[Tensor, "b ..."], group: "dist.ProcessGroup | None" = None
) -> Float[Tensor, "pooled ..."]:
    """The rows of all ranks, in the order of ranks, with a gradient to each rank's own rows.

    `prior(pool_rows(z))` is the value of the joined batch on every rank; ranks may have different
    numbers of rows, or none (`[0, d]`). Its gradient is the joined batch's, exactly, where
    gradients are averaged over ranks, as DDP and FSDP do: each of the `W` ranks computes the same
    value, so the backward, which sums over ranks, hands every row `W` times its gradient, and the
    average divides by `W`. Without DDP, average the gradients of the parameters yourself, or divide
    the loss by `W` and sum them.

    Forward and backward are collectives: every rank of the group must take part in both, and in the
    same order among other collectives, also a rank without rows, or the others wait forever. So no
    rank may skip the term, run it alone under `no_grad`, or pool rows that require no gradient
    where those of others do. Reading the numbers of rows waits for the device, and
    `torch.compile` breaks its graph here.

    Args:
        z: `[b, ...]`, this rank's rows; rows have one shape and dtype on all ranks.
        group: the ranks to pool over; all of them if not given. A rank outside of it gets its own
            rows back, and so does every rank where `torch.distributed` is not in use.

    Raises:
        ValueError: rows of different sizes on different ranks, on all ranks alike.

    Examples:
        >>> import torch
        >>> z = torch.zeros(3, 2)
        >>> pool_rows(z) is z  # one process
        True
    """
    if number_of_ranks(group) <= 1:
        return z
    apart: Any = torch.compiler.disable  # at the call, because it imports dynamo; no annotations
    pooled: Tensor = apart(_pool)(z, group)
    return pooled


def pool_counts(
    counts: Sequence[Mapping[str, Tensor]], group: "dist.ProcessGroup | None" = None
) -> dict[str, Tensor]:
    """The denominators of an optimizer step: summed over its batches and ranks, over their number.

    `counts[name] = 1/W Σ_ranks Σ_batches counts[name]`: with it, and with gradients that are
    averaged over the `W` ranks, as DDP and FSDP do, the gradient of the step is that of all its
    rows in one batch, however they are split. Do not divide the loss by the number of accumulation
    steps then. One collective, in which every rank takes part.

    Args:
        counts: `CycleObjective.counts` of each batch that this rank accumulates.
        group: the ranks to sum over; all of them if not given.

    Raises:
        TypeError: no list of counts.
        ValueError: no batch, or batches that count different things.

    Examples:
        >>> from cyclevae import CycleObjective
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> objective = CycleObjective(*toy_denoiser(seed=0)[1:])
        >>> batches = [toy_batch(seed=0, rows=3), toy_batch(seed=1, rows=2)]
        >>> pool_counts([objective.counts(batch) for batch in batches])["latent_loss"]
        tensor(20.)
    """
    if isinstance(counts, Mapping) or not all(isinstance(each, Mapping) for each in counts):
        raise TypeError(
            "`counts` must be a list, of what objective.counts gives for each batch; without "
            "accumulation pool_counts([objective.counts(batch)])"
        )
    if not counts:
        raise ValueError("`counts` must hold those of one batch or more, got none")
    names = list(counts[0])
    for each in counts:
        if each.keys() != counts[0].keys():
            raise ValueError(
                f"`counts` must be of one objective, got {sorted(counts[0])} and {sorted(each)}"
            )
    if not names:  # statistics of the batch alone
        return {}
    total = torch.stack([torch.stack([each[name] for name in names]) for each in counts]).sum(0)
    if (ranks := number_of_ranks(group)) > 1:
        dist.all_reduce(total, group=group)
        total /= ranks
    return dict(zip(names, total.unbind(), strict=True))


def number_of_ranks(group: Any = None) -> int:
    """How many ranks share a step: 1 where `torch.distributed` is not in use."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def _pool(z: Tensor, group: Any) -> Tensor:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = torch.zeros(world, 2, dtype=torch.long, device=z.device)
    sizes[rank] = sizes.new_tensor([len(z), prod(z.shape[1:])])
    dist.all_reduce(sizes, group=group)
    rows, widths = sizes.T.tolist()
    if len(set(widths)) > 1:
        raise ValueError(
            f"`z` must have rows of one size on all ranks, got {widths} numbers per row; "
            "a rank without rows pools an empty tensor of the same width"
        )
    pooled: Tensor = _Pool.apply(z, rows, rank, group)  # type: ignore[no-untyped-call]
    return pooled


class _Pool(torch.autograd.Function):
    """Sum over ranks of rows put at their places among zeros, which is exact in any dtype.

    The backward sums too, the transpose of a sum over ranks. (`s + (S.detach() - s)`, with S the
    sum, has only the gradient of `s`: `1/W` of the joined batch's after averaging.)
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, rows: list[int], rank: int, group: Any) -> Tensor:
        ctx.all, ctx.rank, ctx.group = rows, rank, group
        pooled = z.new_zeros(sum(rows), *z.shape[1:])
        pooled.narrow(0, sum(rows[:rank]), rows[rank]).copy_(z)
        dist.all_reduce(pooled, group=group)
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        own: Tensor = _Own.apply(gradient, ctx.all, ctx.rank, ctx.group)  # type: ignore[no-untyped-call]
        return own, None, None, None


class _Own(torch.autograd.Function):
    """The transpose of `_Pool`, whose own is `_Pool` again: second derivatives sum over ranks."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, rows: list[int], rank: int, group: Any) -> Tensor:
        ctx.all, ctx.rank, ctx.group = rows, rank, group
        total = fp32(gradient).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.narrow(0, sum(rows[:rank]), rows[rank]).to(gradient.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        pooled: Tensor = _Pool.apply(gradient, ctx.all, ctx.rank, ctx.group)  # type: ignore[no-untyped-call]
        return pooled, None, None, None
