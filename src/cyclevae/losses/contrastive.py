"""InfoNCE: does an encoded text tell its own latent from those of the other texts?"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.masked import kept_latents, mean_vector
from cyclevae._base.precision import fp64, no_autocast, rounded
from cyclevae._base.types import LatentMaskLike, Latents, MaskLike, Number, Rows, Scalar, Tokens
from cyclevae.model.door import at_the_door
from cyclevae.processes.latent import direction

Critic = Literal["cosine", "euclidean"]


@at_the_door
def infonce_loss(
    z_hat: Latents,
    latents: Latents,
    *,
    temperature: Number = 0.1,
    critic: Critic = "cosine",
    duplicates: Bool[Tensor, "b b"] | None = None,
    rows: Rows | None = None,
    latent_mask: LatentMaskLike | None = None,
) -> Scalar:
    """Symmetric InfoNCE between encoded texts and their latents.

    With scores `f_ij`, which are `cos(z_hat_i, z_j) / temperature` or, for `euclidean`,
    `-||z_hat_i - z_j||^2 / (2 temperature)`:
    `-1/(2b) sum_i [log softmax_j(f_ij)_i + log softmax_j(f_ji)_i]`. The denominators hold the
    positive, so that of independent pairs, compared with all others, `log b - loss` is in the mean
    at most the mutual information, and at most `log b`; a critic that cannot tell gives `log b`.
    With `duplicates` there are fewer negatives, and it bounds nothing; of some `rows`, it is their
    number that takes the place of `b`. It asks that latents tell texts apart,
    which a prior on their aggregate does not, and needs pairs. The cosine knows no norm; an encoder
    may grow one without end to sharpen the euclidean critic. A statistic of the batch: it takes no
    reduction, and its value on half a batch is another.

    Args:
        z_hat: latents of the encoder, `[b, ...]`, each row one vector.
        latents: the true latents of the same rows, of equal shape.
        temperature: of the scores.
        critic: `cosine` or `euclidean`.
        duplicates: `[b, b]`, pairs of rows that must not count as negatives of each other, such as
            `same_text`; the diagonal is ignored. An objective always gives them.
        rows: `[b]`, the pairs to be compared; the others are neither anchors nor negatives.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`: rows are compared by the mean of
            their kept vectors, which does not tell how many there are.

    Raises:
        ValueError: fewer than 2 rows, unequal shapes, latents that are not finite, a temperature
            that is not above 0, an unknown critic.

    Reference: van den Oord et al., https://arxiv.org/abs/1807.03748; Poole et al.,
    https://arxiv.org/abs/1905.06922, section 2.3, prove the bound.

    Examples:
        >>> z = torch.eye(3)
        >>> infonce_loss(z, z, temperature=0.1) < infonce_loss(z, z.roll(1, 0), temperature=0.1)
        tensor(True)
        >>> infonce_loss(torch.zeros(3, 2), torch.zeros(3, 2))  # log 3
        tensor(1.0986)
    """
    checks.check_choice("critic", critic, get_args(Critic))
    checks.check_positive("temperature", temperature)
    checks.check_same_shape("z_hat", z_hat, "latents", latents)
    z_hat, mask = kept_latents("z_hat", z_hat, latent_mask, cure="has training diverged?")
    latents, _ = kept_latents("latents", latents, mask)
    checks.warn_without_graph("z_hat", z_hat, latents, cure=checks.ENCODE_WITH_GRAPH)
    if len(z_hat) < 2:
        raise ValueError(
            f"`z_hat` needs at least 2 rows to compare, got shape {list(z_hat.shape)}; raise the "
            "batch size or give the term weight 0"
        )
    _check_pairs(duplicates, len(z_hat))
    x, y = fp64(z_hat), fp64(latents)
    if mask is not None:
        x, y = mean_vector(x, mask), mean_vector(y, mask)
    x, y = x.flatten(1), y.flatten(1)
    with no_autocast(x):
        scores = _cosine(x, y) if critic == "cosine" else -_half_square_distance(x, y)
        scores = scores / temperature
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    if duplicates is not None:
        scores = scores.masked_fill(duplicates & ~itself, -torch.inf)
    pairs: Tensor | int = len(x)
    if rows is not None:
        checks.check_row_mask("rows", rows, z_hat)
        apart = ~(rows & rows[:, None])  # a row alone with itself loses nothing
        scores = scores.masked_fill(apart, -torch.inf).masked_fill(apart & itself, 0.0)
        pairs = rows.sum().clamp(min=1)
    partner = torch.arange(len(x), device=x.device)
    lost = [F.cross_entropy(s, partner, reduction="sum") for s in (scores, scores.T)]
    return rounded(torch.stack(lost).sum() / (2 * pairs), z_hat)


@at_the_door
def same_text(tokens: Tokens, attention_mask: MaskLike) -> Bool[Tensor, "b b"]:
    """Which rows hold the same kept tokens at the same positions, themselves included.

    Args:
        tokens: ids `[b, s]`.
        attention_mask: `[b, s]`, True = keep.

    Raises:
        ValueError: a mask of another shape.

    Examples:
        >>> tokens = torch.tensor([[3, 4, 0], [3, 4, 5], [3, 4, 9]])
        >>> same_text(tokens, torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]]))
        tensor([[ True, False,  True],
                [False,  True, False],
                [ True, False,  True]])
    """
    checks.check_tensor("tokens", tokens)
    mask = checks.as_mask("attention_mask", attention_mask, tokens.shape)
    words = tokens.long().masked_fill(~mask, -1)
    return (words[:, None] == words[None, :]).all(dim=-1)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return direction(x) @ direction(y).T


def _half_square_distance(x: Tensor, y: Tensor) -> Tensor:
    # ||a||^2 + ||b||^2 - 2ab cancels far from the origin, and distances know no origin
    center = y.mean(dim=0).detach()
    x, y = x - center, y - center
    square = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)[None, :]
    return (square / 2 - x @ y.T).clamp(min=0)


def _check_pairs(duplicates: Tensor | None, rows: int) -> None:
    if duplicates is None:
        return
    if duplicates.dtype != torch.bool or duplicates.shape != (rows, rows):
        raise ValueError(
            f"`duplicates` must be bool [{rows}, {rows}], got {duplicates.dtype} "
            f"{list(duplicates.shape)}"
        )
