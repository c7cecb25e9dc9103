"""The cross-entropy of tokens, without a copy of the logits in fp32."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cyclevae._checks import reads_values
from cyclevae._chunks import chunk_of
from cyclevae._precision import fp32
from cyclevae._types import Logits, Tokens


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
    """`logsumexp(x) - x[y]` per row, in chunks of rows whose fp32 copies are small.

    The gradient `softmax(x) - onehot(y)` comes from the logits again. A row that does not count has
    none, be it NaN. On a CPU, where their number may be read, only the rows that count are kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        rows = mask.nonzero().squeeze(1) if _compacts(mask) else None
        x = logits.detach() if rows is None else logits.detach()[rows]
        y = labels if rows is None else labels[rows]
        parts = [fp32(part).logsumexp(dim=1) for part in torch.split(x, chunk_of(x))]
        log_z = torch.cat(parts)
        ctx.save_for_backward(x, y, mask, log_z, rows)
        nll = log_z - fp32(x.gather(1, y[:, None]).squeeze(1))
        if rows is not None:
            return nll.new_zeros(len(mask)).index_copy_(0, rows, nll)
        return torch.where(mask, nll, torch.zeros_like(nll))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, y, mask, log_z, rows = ctx.saved_tensors
        if rows is None:
            result = places = torch.empty_like(x)
        else:
            result, places = x.new_zeros(len(mask), x.shape[1]), rows
            mask, gradient = mask[rows], gradient[rows]
        whole = (places, x, y, mask, log_z, gradient)
        parts = (torch.split(part, chunk_of(x)) for part in whole)
        for place, logits, label, counts, z, g in zip(*parts, strict=True):
            p = (fp32(logits) - z[:, None]).exp_()
            p.scatter_add_(1, label[:, None], p.new_full((len(p), 1), -1.0))
            p.mul_(g[:, None]).masked_fill_(~counts[:, None], 0.0)
            if rows is None:
                place.copy_(p)
            else:
                result.index_copy_(0, place, p.to(result.dtype))
        return result, None, None


def _compacts(mask: Tensor) -> bool:
    """Whether to leave out the rows that do not count: where copying the others is cheaper."""
    return mask.device.type == "cpu" and reads_values(mask) and 8 * int(mask.sum()) < 7 * len(mask)
