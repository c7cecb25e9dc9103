"""The second preregistered test of `docs/preregistration.md`: its table, from stored results."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from bootstrap import Estimate, Resampled, Values, holm
from matrix import CONFIRMED, MORE
from stored import Key, Results, key_of
from tables import interval, p_value, table, verdict

TITLES = {
    "fresh_sentences": "sentences",
    "fresh_pictures": "pictures",
    "fresh_glosses": "glosses",
}
PRIMARIES = 4  # of a corpus
Found = Mapping[str, Results]  # by corpus


class Question(NamedTuple):
    """A primary comparison of one corpus.

    Attributes:
        title: as the table names it.
        better: the sign of an improvement of the recipe.
        difference: the recipe's values minus those of its opponent, `[seeds, rows]`.
        weights: of the rows, `[rows]`, where values are sums over words.
    """

    title: str
    better: int
    difference: Values
    weights: Values | None


def questions(results: Results, pairs: int) -> Iterator[Question]:
    """Decoder against pseudo-pairs, twice; encoder against pairs only; critic against greedy."""
    recipe, pseudo, paired = (key_of(r, pairs) for r in ("half", "pseudo_ridge", "paired"))
    seeds = results.seeds(recipe, pseudo, paired)
    for title, measure in (("on true latents", "ce_true"), ("on its own", "ce_predicted")):
        difference = each(results, recipe, "text", measure, seeds)
        difference = difference - each(results, pseudo, "text", measure, seeds)
        title = f"decoder, CE {title} ↓, minus pseudo-pairs by ridge"
        yield Question(title, -1, difference, results.words)
    difference = each(results, recipe, "latent", "t2l_mse", seeds)
    difference = difference - each(results, paired, "latent", "t2l_mse", seeds)
    yield Question("encoder, T2L MSE ↓, minus pairs only", -1, difference, None)
    decoded = [r["decodings"] for r in results.of(recipe, seeds)]
    difference = np.array([d["critic"] for d in decoded]) - [d["greedy"] for d in decoded]
    yield Question("decoding, best of 32 minus greedy ↑", 1, difference, None)


def each(results: Results, key: Key, direction: str, measure: str, seeds: Sequence[int]) -> Values:
    """Values `[seeds, rows]` of the checkpoints that a direction chose.

    Of pairs only, at the decay that did best by that direction's score on validation pairs.
    """
    score = {"text": "l2t_ce", "latent": "t2l_mse"}[direction]
    decays = [
        [r for r in found if r["cell"]["seed"] in seeds] for found in results.decays[key].values()
    ]
    best = min(decays, key=lambda found: np.mean([min(r["validation"][score]) for r in found]))
    best = sorted(best, key=lambda result: result["cell"]["seed"])
    return np.array([r["directions_each"][direction][measure] for r in best])


def primary(found: Found) -> str:
    """All questions of all corpora, corrected together by Holm's method.

    A corpus that has not run yet counts with it, as if it had shown nothing.
    """
    asked = [
        (TITLES[corpus], CONFIRMED[corpus], question, estimate(question))
        for corpus, results in found.items()
        for question in questions(results, CONFIRMED[corpus])
    ]
    unasked = [1.0] * (PRIMARIES * len(CONFIRMED) - len(asked))
    adjusted = holm([*(difference.p for *_, difference in asked), *unasked])[: len(asked)]
    lines = [
        [corpus, f"{pairs:,}", question.title, interval(difference), p_value(p),
         verdict(difference, p, question.better)]
        for (corpus, pairs, question, difference), p in zip(asked, adjusted, strict=True)
    ]  # fmt: skip
    return table(["corpus", "pairs", "question", "difference", "p, Holm", "verdict"], lines)


def estimate(question: Question) -> Estimate:
    drawn = Resampled.draw(*question.difference.shape)
    return drawn.mean(question.difference, question.weights)


def worth(found: Found) -> str:
    """The aim: is the recipe as good as pairs alone of which there are three times as many?"""
    lines = []
    for corpus, results in found.items():
        pairs = CONFIRMED[corpus]
        recipe, more = key_of("half", pairs), key_of("paired", MORE * pairs)
        seeds = results.seeds(recipe, more)
        for title, direction, measure, weights in (
            ("decoder, CE ↓", "text", "ce_true", results.words),
            ("encoder, T2L MSE ↓", "latent", "t2l_mse", None),
        ):
            difference = each(results, recipe, direction, measure, seeds)
            difference = difference - each(results, more, direction, measure, seeds)
            found_here = estimate(Question(title, -1, difference, weights))
            lines.append([TITLES[corpus], f"{pairs:,}", title, interval(found_here)])
    return table(
        ["corpus", "pairs", f"minus pairs only, {MORE} times as many", "difference"], lines
    )
