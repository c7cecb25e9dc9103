"""The rows of all ranks, so that a statistic of the batch is that of the joined batch."""

from math import prod
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from cyclevae._precision import fp32


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
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) <= 1:
        return z
    apart: Any = torch.compiler.disable  # at the call, because it imports dynamo; no annotations
    pooled: Tensor = apart(_pool)(z, group)
    return pooled


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
        ctx.start, ctx.rows, ctx.group = sum(rows[:rank]), rows[rank], group
        pooled = z.new_zeros(sum(rows), *z.shape[1:])
        pooled.narrow(0, ctx.start, ctx.rows).copy_(z)
        dist.all_reduce(pooled, group=group)
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        total = fp32(gradient).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.narrow(0, ctx.start, ctx.rows).to(gradient.dtype), None, None, None
