"""The cross-entropy of tokens, without a copy of the logits in fp32."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cyclevae._base.checks import reads_values
from cyclevae._base.precision import fp32
from cyclevae._base.types import Logits, Tokens
from cyclevae.model.chunks import chunk_of


def token_nll(logits: Logits, tokens: Tokens, mask: Tensor) -> Float[Tensor, "b s"]:
    """Cross-entropy of each token where the mask is True, 0 elsewhere.

    Keeps the logits as they came, and no copy of them in fp32: see `_TokenNLL`.
    """
    labels = tokens.long().masked_fill(~mask, 0)
    if torch.compiler.is_compiling():  # which fuses by itself what is chunked below
        nll = -fp32(logits).masked_fill(~mask[..., None], 0.0).log_softmax(dim=-1)
        return nll.gather(-1, labels[..., None]).squeeze(-1).masked_fill(~mask, 0.0)
    rows = logits.flatten(0, 1), labels.flatten(), mask.flatten()
    chunked: Tensor = _TokenNLL.apply(*rows)  # type: ignore[no-untyped-call]
    return chunked.view_as(labels)


class _TokenNLL(torch.autograd.Function):
    """`-log_softmax(x)[y]` per row, in chunks of rows whose fp32 copies are small.

    The gradient `softmax(x) - onehot(y)` comes from the logits again. A row that does not count has
    none, be it NaN. On a CPU, where their number may be read, only the rows that count are kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        rows, mask_of_rows = _counted(mask)
        x, y = logits.detach(), labels
        if rows is not None:
            x, y = x.index_select(0, rows), y[rows]
        nll = torch.cat(
            [
                -fp32(part).log_softmax(dim=1).gather(1, label[:, None]).squeeze(1)
                for part, label in _chunks(x, y)
            ]
        )
        ctx.save_for_backward(x, y, mask, rows, mask_of_rows)
        if rows is not None:
            return nll.new_zeros(len(mask)).index_copy_(0, rows, nll)
        return nll if mask_of_rows is None else torch.where(mask, nll, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, y, mask, rows, mask_of_rows = ctx.saved_tensors
        result = places = x.new_empty(len(mask), x.shape[1])
        if rows is not None:
            result.index_fill_(0, (~mask).nonzero().squeeze(1), 0.0)
            places, gradient, mask = rows, gradient[rows], mask[rows]
        for place, logits, label, g, counts in _chunks(places, x, y, gradient, mask):
            p = fp32(logits).softmax(dim=1)
            p.scatter_add_(1, label[:, None], p.new_full((len(p), 1), -1.0))
            p.mul_(g[:, None])
            if mask_of_rows is not None:  # a row that does not count may be NaN
                p.masked_fill_(~counts[:, None], 0.0)
            if rows is None:
                place.copy_(p)
            else:
                result.index_copy_(0, place, p.to(result.dtype))
        return result, None, None


def _chunks(*parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each at a time; the logits are the widest."""
    size = min(chunk_of(part) for part in parts if part.ndim == 2)
    return zip(*(torch.split(part, size) for part in parts), strict=True)


def _counted(mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The rows to compute, and which of them count; all of them where None."""
    if mask.device.type == "cpu" and reads_values(mask):
        count = int(mask.sum())
        if count == len(mask):
            return None, None
        if 8 * count < 7 * len(mask):  # the others are cheaper to copy than to compute
            return mask.nonzero().squeeze(1), None
    return None, mask
