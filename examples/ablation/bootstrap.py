"""Paired differences and their intervals: a bootstrap over seeds and over test sentences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
DRAWS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A value, and the 2.5 % and 97.5 % quantiles of its bootstrap draws."""

    value: float
    low: float
    high: float
    draws: Values

    @property
    def p(self) -> float:
        """Twice the smaller share of draws at or beyond 0; no draw counts as half a draw."""
        tail = min((self.draws <= 0).sum(), (self.draws >= 0).sum())
        return float(min(1.0, 2 * max(tail, 0.5) / len(self.draws)))

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Resampled:
    """How often each seed and each sentence was drawn: the same draws for every row.

    Attributes:
        seeds: counts `[draws, seeds]`.
        sentences: counts `[draws, sentences]`.
    """

    seeds: Values
    sentences: Values

    @classmethod
    def draw(cls, seeds: int, sentences: int, draws: int = DRAWS) -> "Resampled":
        random = np.random.default_rng(0)
        return cls(
            *(
                random.multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
                for n in (seeds, sentences)
            )
        )

    def mean(self, values: Values, weights: Values | None = None) -> Estimate:
        """The weighted mean of `values`, `[seeds, sentences]`, and its draws.

        `weights`, `[sentences]`, are words per sentence where values are sums over words.
        """
        weights = np.ones(values.shape[1]) if weights is None else weights
        sums = ((self.sentences @ values.T) * self.seeds).sum(axis=1)
        draws = sums / (len(values) * (self.sentences @ weights))
        return estimate(values.sum() / (len(values) * weights.sum()), draws)


def estimate(value: float, draws: Values) -> Estimate:
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given (Scand. J. Statist. 6, 65, 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def pair_equivalents(pairs: Values, curve: Values, value: Values) -> Values:
    """How many pairs the curve needs for each value: linear in log pairs; inf or 0 beyond its ends.

    Args:
        pairs: `[n]`, rising.
        curve: `[draws, n]`, the measure at these numbers of pairs, one curve a draw.
        value: `[draws]`.

    The first crossing from worse to better counts, so a curve need not be monotone. The sign of
    better is that of the curve from its first to its last point.
    """
    sign = np.sign(curve[:, -1] - curve[:, 0])[:, None]
    above = sign * (curve - value[:, None])
    reached = above >= 0
    first = reached.argmax(axis=1)
    rows = np.arange(len(curve))
    before = np.maximum(first - 1, 0)
    low, high = above[rows, before], above[rows, first]
    share = np.divide(-low, high - low, out=np.zeros_like(low), where=high > low)
    logs = np.log(pairs)
    found = np.exp(logs[before] + share * (logs[first] - logs[before]))
    found[first == 0] = 0.0
    found[~reached.any(axis=1)] = np.inf
    return found
