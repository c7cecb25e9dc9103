"""Averages: the one home of padding, missing rows, reductions and global counts."""

from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base.checks import check_choice, check_nonnegative
from cyclevae._base.masked import only_kept
from cyclevae._base.types import Count, LatentMask, Mask, Number, Reduction, Rows


def reduce_text(
    per_token: Float[Tensor, "b s"],
    attention_mask: Mask,
    *,
    reduction: Reduction,
    rows: Rows | None = None,
    count: Count | None = None,
) -> Float[Tensor, "..."]:
    """Reduce per-token losses; padding never counts, and no token at all gives 0 with a graph.

    `mean` divides by the kept tokens, or by `count`; `nats` sums over tokens and averages over
    rows, or divides by `count` rows. Only `rows` count, if given.
    """
    check_choice("reduction", reduction, get_args(Reduction))
    if rows is not None:
        attention_mask = attention_mask & rows[:, None]
    kept = torch.where(attention_mask, per_token, 0.0)
    if reduction == "none":
        return kept
    return divided(kept.sum(), attention_mask, reduction=reduction, rows=rows, count=count)


def divided(
    total: Float[Tensor, ""],
    attention_mask: Mask,
    *,
    reduction: Reduction,
    rows: Rows | None = None,
    count: Count | None = None,
) -> Float[Tensor, ""]:
    """A sum over kept tokens, reduced as `reduce_text` says."""
    if reduction == "mean":
        return total / (
            attention_mask.sum().clamp(min=1) if count is None else _at_least_one(count)
        )
    number = len(attention_mask) if rows is None else rows.sum()
    return total / _divisor(reduction, number, count)


def reduce_latents(
    error: Float[Tensor, " b *n"],
    *,
    reduction: Reduction,
    variance: Number | Tensor = 1.0,
    rows: Rows | None = None,
    latent_mask: LatentMask | None = None,
    count: Count | None = None,
) -> Float[Tensor, "..."]:
    """Reduce errors per element or per vector; no row at all gives 0 with a graph.

    `mean` divides by their number, or by `count`; `nats` is half the (squared) error over
    `variance`, summed over dimensions, averaged over rows, or divided by `count` rows. Only `rows`
    count, and of them what `latent_mask` keeps, if given.
    """
    check_choice("reduction", reduction, get_args(Reduction))
    number: Count = len(error)
    if rows is not None:
        error, number = only_present(error, rows), rows.sum()
    error = only_kept(error, latent_mask)
    if reduction == "none":
        return error
    if reduction == "mean":
        if count is None:
            count = number_of_errors(error, number, rows, latent_mask)
        return error.sum() / _at_least_one(count)
    if reduction == "nats":
        error = error / (2 * variance)
    return error.sum() / _divisor(reduction, number, count)


def number_of_errors(
    error: Tensor, number: Count, rows: Rows | None, latent_mask: LatentMask | None
) -> Count:
    """How many errors count, of a number of rows."""
    if latent_mask is None:
        return number * error[:1].numel()
    kept = latent_mask if rows is None else latent_mask & rows[:, None]
    return kept.sum() * error[:1, :1].numel()


def only_present(values: Tensor, rows: Rows, otherwise: Number | Tensor = 0.0) -> Tensor:
    """Values of the rows that have them; others, without a gradient to the values, elsewhere."""
    return torch.where(rows.view(-1, *[1] * (values.ndim - 1)), values, otherwise)


def _divisor(reduction: Reduction, rows: Count, count: Count | None) -> Count:
    if reduction == "sum":
        return 1.0
    return _at_least_one(rows if count is None else count)


def _at_least_one(count: Count) -> Count:
    if not isinstance(count, Tensor):
        check_nonnegative("count", count)
    # A count over ranks may be a fraction, but an empty one must not divide by zero.
    if isinstance(count, Tensor):
        return torch.where(count > 0, count, torch.ones_like(count))
    return count if count > 0 else 1.0
