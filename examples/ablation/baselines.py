"""What costs nothing: ridge regression from words to the latent, and the text of a near latent.

Both see the same pairs as the rows of the matrix. A model that does not beat them has
learned little.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from batches import data_of
from data import DemoError, Regime, Sentences, Split
from matrix import ALL, SEEDS, Cell
from measure import DECODED, Encoder
from torch import Tensor

PENALTIES = torch.logspace(-3, 3, 37, dtype=torch.float64)
BUDGETS = (300, 1000, 3000, 6000, ALL)


def baselines(
    corpus: str,
    load: Callable[[int, int], Sentences],
    encode: Encoder | None,
    seeds: Sequence[int] = SEEDS,
    budgets: Sequence[int] = BUDGETS,
) -> list[dict[str, float]]:
    """Both baselines on every number of pairs there are and seed, measured on the test pairs."""
    found = []
    for pairs in budgets:
        for seed in seeds if pairs != ALL else seeds[:1]:  # all are the same pairs
            data = load(pairs, seed)
            if pairs > len(data.train):
                continue
            # The regime is all that is read of the cell.
            cell = Cell(corpus, "paired", pairs, 0, seed, 0.0, 0.0, 0.0)
            _, dealt = data_of(cell, data)
            measures = ridge(data, dealt)
            if encode is not None:
                measures |= nearest_text(data, dealt, encode)
            found.append({"pairs": pairs, "seed": seed, **measures})
    return found


class Ridge(NamedTuple):
    """A ridge regression with an intercept, and the penalty that it chose."""

    weights: Tensor
    intercept: Tensor
    penalty: float


def fit_ridge(data: Sentences, pairs: Tensor) -> Ridge:
    """Bags of words to latents, the penalty chosen by leaving out one pair at a time.

    In closed form: leaving out row `i` makes of its residual `r_i / (1 - h_i)`, where `h` is the
    diagonal of the hat matrix. As scikit-learn's `RidgeCV`, which takes minutes for more rows than
    words.

    Raises:
        DemoError: an end of the grid was chosen, so that the best may lie beyond.
    """
    words, z = bags(data.train, len(data.vocabulary))[pairs].double(), data.train.latents[pairs]
    centre, offset = words.mean(dim=0), z.double().mean(dim=0)
    x, y = words - centre, z.double() - offset
    few = len(x) <= x.shape[1]  # the smaller of the two matrices of products
    values, vectors = torch.linalg.eigh(x @ x.T if few else x.T @ x)
    values, vectors = values[values > 1e-9], vectors[:, values > 1e-9]
    rows = vectors if few else x @ vectors / values.sqrt()
    target, errors = rows.T @ y, []
    for penalty in PENALTIES.tolist():
        shrunk = values / (values + penalty)
        left = 1 - 1 / len(x) - rows.square() @ shrunk
        errors.append(((y - rows @ (shrunk[:, None] * target)) / left[:, None]).square().mean())
    best = int(torch.stack(errors).argmin())
    if best in (0, len(PENALTIES) - 1):
        raise DemoError(f"ridge chose {PENALTIES[best]:g}, an end of its grid: widen PENALTIES")
    penalty = PENALTIES[best].item()
    columns = x.T @ vectors / values.sqrt() if few else vectors
    weights = columns @ ((values.sqrt() / (values + penalty))[:, None] * target)
    return Ridge(weights.float(), (offset - centre @ weights).float(), penalty)


def ridge_latents(data: Sentences, pairs: Tensor, texts: Split) -> Tensor:
    """What ridge, fitted to some pairs, makes of texts, `[n, d]`."""
    found = fit_ridge(data, pairs)
    return bags(texts, len(data.vocabulary)) @ found.weights + found.intercept


def ridge(data: Sentences, dealt: Regime) -> dict[str, float]:
    """Its measures on the test pairs."""
    z_hat = ridge_latents(data, dealt.paired, data.test)
    z = data.test.latents
    similarity = F.normalize(z_hat, dim=1) @ F.normalize(z, dim=1).T
    rank = (similarity > similarity.diagonal()[:, None]).sum(dim=1)
    return {
        "t2l_mse": (z_hat - z).square().mean().item(),
        "t2l_cosine": similarity.diagonal().mean().item(),
        "t2l_r1": (rank < 1).float().mean().item(),
        "t2l_r10": (rank < 10).float().mean().item(),
    }


def nearest_text(data: Sentences, dealt: Regime, encode: Encoder) -> dict[str, float]:
    """The text of the paired latent that is nearest by the cosine; no words are predicted."""
    known, z = data.train.latents[dealt.paired], data.test.latents
    nearest = (F.normalize(z, dim=1) @ F.normalize(known, dim=1).T).argmax(dim=1)
    rows = dealt.paired[nearest]
    width = data.test.tokens.shape[1]
    hits = data.train.tokens[rows][:, :width] == data.test.tokens
    texts = [data.train.sentences[i] for i in rows[:DECODED]]
    again = data.normaliser.normalise(encode(texts))
    return {
        "l2t_accuracy_true": hits[data.test.attention_mask].float().mean().item(),
        "reencoded_true": F.cosine_similarity(again, z[:DECODED]).mean().item(),
    }


def bags(split: Split, size: int) -> Tensor:
    """How often each word piece stands in each sentence, `[n, size]`, scaled to unit length."""
    counts = torch.zeros(len(split), size)
    counts.scatter_add_(1, split.tokens, split.attention_mask.float())
    return F.normalize(counts, dim=1)
