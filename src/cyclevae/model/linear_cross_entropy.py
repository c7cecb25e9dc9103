"""The cross-entropy of unread logits: head and loss in one sweep, some positions at a time.

Reference: the order is that of Liger's fused linear cross-entropy, https://arxiv.org/abs/2410.10989,
and of Wijmans et al., Cut Your Losses, https://arxiv.org/abs/2411.09009.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from cyclevae._base.precision import fp32, no_autocast
from cyclevae._base.types import Mask, Tokens
from cyclevae.model.sweep import chunks_of, for_products, kept_rows
from cyclevae.model.unread import UnreadLogits, check_held, in_dtype


class Swept(NamedTuple):
    """What a sweep over the positions found.

    Attributes:
        total: the weighted sum of the cross-entropies.
        best: the most probable words `[b, s]`, 0 where nothing counts.
    """

    total: Float[Tensor, ""]
    best: Tokens


def swept(
    logits: UnreadLogits,
    tokens: Tokens,
    mask: Mask,
    weight: Float[Tensor, "b s"] | None = None,
) -> Swept:
    """`sum_l w_l (-log softmax(logits_l)[y_l])` over the positions where the mask is True.

    Its gradient is taken in the same sweep and scaled in the backward: the head is run once for
    each of the three products. Kept until then: the gradients of the hidden states and the weight.
    """
    hidden, labels, weights, rows = _picked(logits, tokens[..., None], mask, weight)
    learns = torch.is_grad_enabled() and logits.requires_grad
    total, best = _Sum.apply(hidden, logits.weight, logits.bias, labels, weights, learns)  # type: ignore[no-untyped-call]
    if rows is not None:
        best = best.new_zeros(mask.numel()).index_copy_(0, rows, best)
    return Swept(total, best.view(mask.shape))


def each_nll(
    logits: UnreadLogits, tokens: Integer[Tensor, "b s k"], mask: Mask
) -> Float[Tensor, "b s k"]:
    """The cross-entropy of `k` words at each position where the mask is True, 0 elsewhere.

    What the gradient of each weighs is known in the backward alone, which runs the head again.
    """
    hidden, labels, _, rows = _picked(logits, tokens, mask, None)
    nll: Tensor = _Each.apply(hidden, logits.weight, logits.bias, labels)  # type: ignore[no-untyped-call]
    if rows is not None:
        nll = nll.new_zeros(mask.numel(), nll.shape[1]).index_copy(0, rows, nll)
    return torch.where(mask[..., None], nll.view_as(tokens), 0.0)


def _picked(
    logits: UnreadLogits, tokens: Tensor, mask: Mask, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Hidden states, labels and weights of the positions that count, and their numbers.

    Where the device alone knows which they are, all of them: the others weigh 0.
    """
    check_held(logits.weight)
    hidden, rows = logits.hidden.flatten(0, 1), kept_rows(mask)
    labels = tokens.long().masked_fill(~mask[..., None], 0).flatten(0, 1)
    if rows is None:
        if weight is not None:
            weight = torch.where(mask, weight, 0.0)
        else:
            weight = mask.to(torch.promote_types(hidden.dtype, torch.float32))
        return hidden.masked_fill(~mask.flatten()[:, None], 0.0), labels, weight.flatten(), None
    rows = rows.to(hidden.device)
    if len(rows) < len(hidden):
        hidden, labels = hidden.index_select(0, rows), labels[rows]
    return hidden, labels, None if weight is None else weight.flatten()[rows], rows


class _Sum(torch.autograd.Function):
    """The weighted sum, with its gradient computed beside it.

    The first backward hands that on, scaled in place, so that no second one of the size of the
    weight is made; a further backward of a graph that was kept sweeps again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor | None,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = [learns and needed for needed in ctx.needs_input_grad[:3]]
        total, best, ctx.found = _sweep(hidden, weight, bias, labels, weights, wanted)
        ctx.mark_non_differentiable(best)
        ctx.save_for_backward(hidden, weight, bias, labels, weights)
        return total, best

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative may follow
            nll = _plain(hidden, weight, bias, labels)[:, 0]
            total = (nll if weights is None else nll * weights).sum()
            return *_gradients(ctx, total, (hidden, weight, bias), gradient), None, None, None
        found, ctx.found = ctx.found, None
        if found is None:
            wanted = list(ctx.needs_input_grad[:3])
            found = _sweep(hidden, weight, bias, labels, weights, wanted)[2]
        scaled = [
            None if part is None else part.mul_(gradient).to(like.dtype)
            for part, like in zip(found, (hidden, weight, bias), strict=True)
        ]
        return *scaled, None, None, None


class _Each(torch.autograd.Function):
    """The cross-entropy of each label; the backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        nll, total = [], []
        with no_autocast(hidden):
            matrix = for_products(weight, hidden.dtype)
            for _, logits, label in chunks_of(hidden, matrix, bias, labels):
                logits = fp32(logits)
                total.append(logits.logsumexp(dim=1, keepdim=True))
                nll.append(total[-1] - logits.gather(1, label))
        ctx.save_for_backward(hidden, weight, bias, labels, torch.cat(total))
        return torch.cat(nll)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, total = ctx.saved_tensors
        if torch.is_grad_enabled():
            nll = _plain(hidden, weight, bias, labels)
            return *_gradients(ctx, nll, (hidden, weight, bias), gradient), None
        with no_autocast(hidden):
            matrix = for_products(weight, hidden.dtype)
            sums = _Sums(hidden, weight, bias, matrix, ctx.needs_input_grad[:3])
            for x, logits, label, norm, g in chunks_of(
                hidden, matrix, bias, labels, total, gradient
            ):
                off = fp32(logits).sub_(norm).exp_().mul_(g.sum(dim=1, keepdim=True))
                sums.add(off.scatter_add_(1, label, -g), x, None)
            return *sums.found(), None


class _Sums:
    """The gradients of a head, summed over chunks of positions in fp32 or better."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, matrix: Tensor, wanted: Any
    ) -> None:
        to_hidden, to_weight, to_bias = wanted
        # a sum over positions may be more than fp16 holds, before it is divided by their number
        self.kept = torch.promote_types(weight.dtype, torch.bfloat16)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.head, self.to = matrix, hidden.dtype
        self.hidden: list[Tensor] | None = [] if to_hidden else None
        self.learns = to_weight
        self.weight: Tensor | None = None
        self.bias = weight.new_zeros(len(weight), dtype=dtype) if to_bias else None

    def add(self, off: Tensor, x: Tensor, weights: Tensor | None) -> None:
        """Add those of a chunk, of which `off` is the gradient of the logits but for weights."""
        if self.bias is not None:
            self.bias += off.sum(dim=0) if weights is None else weights.to(off.dtype) @ off
        off = off.to(x.dtype)
        if self.hidden is not None:
            to_x = off @ self.head
            to_x = to_x if weights is None else to_x * weights[:, None].to(x.dtype)
            self.hidden.append(to_x.to(self.to))
        if not self.learns:
            return
        x = x if weights is None else x * weights[:, None].to(x.dtype)
        if self.weight is None:  # where one chunk is all, there is nothing to sum
            self.weight = off.t() @ x
            return
        self.weight = fp32(self.weight)
        if x.dtype == self.weight.dtype:
            torch.addmm(self.weight, off.t(), x, out=self.weight)
        else:
            self.weight += off.t() @ x

    def found(self) -> tuple[Tensor | None, ...]:
        """Of the hidden states, the weight and the bias; None where not wanted."""
        return (
            None if self.hidden is None else torch.cat(self.hidden),
            None if self.weight is None else self.weight.to(self.kept),
            None if self.bias is None else self.bias.to(self.kept),
        )


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """The weighted sum, the most probable words, and the gradients that are wanted."""
    with no_autocast(hidden):
        matrix = for_products(weight, hidden.dtype)
        total, best, sums = fp32(hidden[:0]).sum(), [], _Sums(hidden, weight, bias, matrix, wanted)
        more = () if weights is None else (weights,)
        for x, logits, label, *given in chunks_of(hidden, matrix, bias, labels, *more):
            logits = fp32(logits)
            highest, word = logits.max(dim=1, keepdim=True)
            true = logits.gather(1, label)
            mass = logits.sub_(highest).exp_()
            norm = mass.sum(dim=1, keepdim=True)
            nll = (highest - true + norm.log()).squeeze(1)
            best.append(word.squeeze(1))
            total = total + (nll @ given[0].to(nll.dtype) if given else nll.sum())
            if any(wanted):
                off = mass.div_(norm)
                off.scatter_add_(1, label, off.new_full(label.shape, -1.0))
                sums.add(off, x, given[0] if given else None)
        return total, torch.cat(best), sums.found() if any(wanted) else (None,) * 3


def _plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """The cross-entropy of each label by operations that autograd follows, of all rows at once."""
    with no_autocast(hidden):
        logits = F.linear(hidden, *in_dtype(hidden.dtype, weight, bias))
    return -fp32(logits).log_softmax(dim=1).gather(1, labels)


def _gradients(
    ctx: Any, value: Tensor, inputs: tuple[Tensor | None, ...], gradient: Tensor
) -> list[Tensor | None]:
    """The gradients that are wanted, with a graph."""
    needed = ctx.needs_input_grad[:3]
    wanted = [part for part, need in zip(inputs, needed, strict=True) if need and part is not None]
    found = iter(torch.autograd.grad(value, wanted, gradient, create_graph=True))
    return [next(found) if need else None for need in needed]
