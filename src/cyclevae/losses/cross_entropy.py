"""The cross-entropy of tokens, without a copy of the logits in fp32."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cyclevae._base.checks import reads_values
from cyclevae._base.derivatives import transformed
from cyclevae._base.precision import fp32
from cyclevae._base.types import Logits, Tokens
from cyclevae.model.chunks import chunk_of

_IGNORED = -100


def token_nll(logits: Logits, tokens: Tokens, mask: Tensor) -> Float[Tensor, "b s"]:
    """Cross-entropy of each token where the mask is True, 0 elsewhere.

    Keeps the logits as they came, and no copy of them in fp32: see `_TokenNLL`. The error is some
    1e-7 of the larger of 1 and the value, so that a token of a probability above 1 - 1e-7 reads 0.
    """
    x, uncounted = logits.flatten(0, 1), ~mask
    labels = tokens.long().masked_fill(uncounted, _IGNORED)
    # the compiler fuses plain code, transforms follow no other, and one chunk saves nothing
    if torch.compiler.is_compiling() or transformed(logits) or len(x) <= chunk_of(x):
        x = fp32(x).masked_fill(uncounted.view(-1, 1), 0.0)  # also where they are NaN
        plain = F.cross_entropy(x, labels.flatten(), ignore_index=_IGNORED, reduction="none")
        return plain.view_as(labels)
    y, counts = labels.flatten().clamp(min=0), mask.flatten()
    rows, counts_of_rows = _counted(counts)
    kept = x
    if rows is not None:
        kept, y = x.index_select(0, rows), y[rows]
    chunked: Tensor = _TokenNLL.apply(x, kept, y, counts, rows, counts_of_rows)  # type: ignore[no-untyped-call]
    return chunked.view_as(labels)


class _TokenNLL(torch.autograd.Function):
    """`-log_softmax(x)[y]` per row, in chunks of rows whose fp32 copies are small, in one memory.

    The gradient `softmax(x) - onehot(y)` comes from the logits again. A row that does not count has
    none, be it NaN. On a CPU, where their number may be read, only the rows that count are kept.
    The gradient goes to all rows at once; those that are kept are an input of their own so that a
    second derivative finds its way from them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        kept: Tensor,
        labels: Tensor,
        mask: Tensor,
        rows: Tensor | None,
        counts: Tensor | None,
    ) -> Tensor:
        space = _space(kept)
        nll = torch.cat(
            [
                -_into(space[: len(part)], torch.log_softmax, part).gather(1, label[:, None])
                for part, label in _chunks(kept, labels)
            ]
        ).squeeze(1)
        ctx.save_for_backward(kept, labels, mask, rows, counts)
        if rows is not None:
            return nll.new_zeros(len(mask)).index_copy_(0, rows, nll)
        return nll if counts is None else torch.where(mask, nll, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, mask, rows, counts = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative may follow
            return _followed(x, y, gradient, rows, counts), *(None,) * 5
        result = places = x.new_empty(len(mask), x.shape[1])
        if rows is not None:
            result.index_fill_(0, (~mask).nonzero().squeeze(1), 0.0)
            places, gradient, mask = rows, gradient[rows], mask[rows]
        space = _space(x)
        direct = rows is None and result.dtype == space.dtype
        for place, logits, label, g, counted in _chunks(places, x, y, gradient, mask):
            p = _into(place if direct else space[: len(logits)], torch.softmax, logits)
            p.scatter_add_(1, label[:, None], p.new_full((len(p), 1), -1.0))
            p.mul_(g[:, None])
            if counts is not None:  # a row that does not count may be NaN
                p.masked_fill_(~counted[:, None], 0.0)
            if rows is not None:
                result.index_copy_(0, place, p.to(result.dtype))
            elif not direct:
                place.copy_(p)
        return result, *(None,) * 5


def _followed(
    x: Tensor, y: Tensor, gradient: Tensor, rows: Tensor | None, counts: Tensor | None
) -> Tensor:
    """The gradient by operations that autograd follows, for all rows at once."""
    logits = fp32(x)
    if counts is not None:
        logits = logits.masked_fill(~counts[:, None], 0.0)
        gradient = gradient.masked_fill(~counts, 0.0)
    p = logits.softmax(dim=1)
    off = p.scatter_add(1, y[:, None], p.new_full((len(p), 1), -1.0))
    if rows is None:
        return (off * gradient[:, None]).to(x.dtype)
    found = (off * gradient[rows, None]).to(x.dtype)
    return found.new_zeros(len(gradient), x.shape[1]).index_copy(0, rows, found)


def _space(x: Tensor) -> Tensor:
    """Memory for a chunk in fp32 or better, which all chunks use: new memory is slow on a CPU."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(min(chunk_of(x), len(x)), x.shape[1], dtype=dtype)


def _into(space: Tensor, softmax: Callable[..., Tensor], logits: Tensor) -> Tensor:
    """The softmax of some rows, or its logarithm, and no other copy of them."""
    return softmax(logits if logits.dtype == space.dtype else space.copy_(logits), 1, out=space)


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
