"""The cross-entropy of tokens, without a copy of the logits in fp32."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    none, be it NaN.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        logits = logits.detach()
        parts = [fp32(x).logsumexp(dim=1) for x in torch.split(logits, chunk_of(logits))]
        log_z = torch.cat(parts) if parts else fp32(logits).sum(dim=1)
        ctx.save_for_backward(logits, labels, mask, log_z)
        picked = fp32(logits.gather(1, labels[:, None]).squeeze(1))
        return torch.where(mask, log_z - picked, torch.zeros_like(log_z))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, mask, log_z = ctx.saved_tensors
        result, size = torch.empty_like(logits), chunk_of(logits)
        whole = (result, logits, labels, mask, log_z, gradient)
        parts = (torch.split(x, size) for x in whole)
        for out, x, label, counts, z, g in zip(*parts, strict=True):
            p = (fp32(x) - z[:, None]).exp_()
            p.scatter_add_(1, label[:, None], p.new_full((len(x), 1), -1.0))
            out.copy_(p.mul_(g[:, None]).masked_fill_(~counts[:, None], 0.0))
        return result, None, None
