"""The cross-entropy of tokens, of logits or of unread ones."""

from typing import get_args

from jaxtyping import Float
from torch import Tensor

from cyclevae._base.checks import check_choice
from cyclevae._base.reduce import divided, reduce_text
from cyclevae._base.types import Count, Loss, Mask, Reduction, Tokens
from cyclevae.losses.cross_entropy import token_nll
from cyclevae.model.linear_cross_entropy import each_nll, swept
from cyclevae.model.unread import AnyLogits, UnreadLogits, readable


def reduced_nll(
    logits: AnyLogits,
    tokens: Tokens,
    mask: Mask,
    *,
    reduction: Reduction,
    count: Count | None = None,
) -> Loss:
    """The cross-entropy of tokens where the mask is True, reduced."""
    logits = readable(logits)
    if isinstance(logits, UnreadLogits) and reduction != "none":
        check_choice("reduction", reduction, get_args(Reduction))
        total = swept(logits, tokens, mask).total
        return divided(total, mask, reduction=reduction, count=count)
    return reduce_text(nll(logits, tokens, mask), mask, reduction=reduction, count=count)


def nll(logits: AnyLogits, tokens: Tokens, mask: Mask) -> Float[Tensor, "b s"]:
    """The cross-entropy of each token where the mask is True, 0 elsewhere."""
    logits = readable(logits)
    if isinstance(logits, UnreadLogits):
        return each_nll(logits, tokens[..., None], mask)[..., 0]
    return token_nll(logits, tokens, mask)
