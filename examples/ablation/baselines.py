"""What costs nothing: ridge regression from words to the latent, and the text of a near latent.

Both see the same pairs as the rows of the matrix. A model that does not beat them has
learned little.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from batches import data_of
from data import Regime, Sentences, Split
from matrix import ALL, SEEDS, Cell
from measure import DECODED, Encoder
from torch import Tensor

PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)
BUDGETS = (300, 1000, 3000, 6000, ALL)


def baselines(
    corpus: str, data: Sentences, encode: Encoder, seeds: Sequence[int] = SEEDS
) -> list[dict[str, float]]:
    """Both baselines on every number of pairs there are and seed, measured on the test pairs."""
    found = []
    for pairs in (n for n in BUDGETS if n <= len(data.train)):
        for seed in seeds:
            # The regime is all that is read of the cell.
            cell = Cell(corpus, "paired", pairs, 0, seed, 0.0, 0.0, 0.0)
            _, dealt = data_of(cell, data)
            measures = ridge(data, dealt) | nearest_text(data, dealt, encode)
            found.append({"pairs": pairs, "seed": seed, **measures})
    return found


def ridge(data: Sentences, dealt: Regime) -> dict[str, float]:
    """Bags of words to latents, the penalty chosen on the validation pairs."""
    size = len(data.vocabulary)
    train = bags(data.train, size)[dealt.paired]
    centre = train.mean(dim=0)
    targets = data.train.latents[dealt.paired]
    offset = targets.mean(dim=0)
    # In the smaller of the two spaces: as many unknowns as there are pairs, or as words.
    x, y = train - centre, targets - offset
    dual = len(x) < size
    gram = x @ x.T if dual else x.T @ x
    best, chosen = float("inf"), None
    for penalty in PENALTIES:
        shifted = gram + penalty * torch.eye(len(gram))
        weights = x.T @ torch.linalg.solve(shifted, y) if dual else torch.linalg.solve(
            shifted, x.T @ y
        )  # fmt: skip
        guess = (bags(data.validation, size) - centre) @ weights + offset
        error = (guess - data.validation.latents).square().mean().item()
        if error < best:
            best, chosen = error, weights
    z_hat = (bags(data.test, size) - centre) @ chosen + offset
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
