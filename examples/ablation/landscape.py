"""The map of `docs/evidence.md`: what each row is worth by latents and by the number of pairs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from bootstrap import pair_equivalents
from matrix import ALL, MAP, MAPPED, ROWS
from stored import Results, key_of
from tables import table

TITLES = {
    "sentences": "sentence encoder",
    "inner": "a state inside it",
    "pictures": "pictures, PCA",
    "autoencoder": "pictures, autoencoder",
}
Found = Mapping[str, Results]  # by corpus


class Direction(NamedTuple):
    """A direction, the measure of it, and the checkpoints that it chooses."""

    title: str
    chosen_by: str
    measure: str


DECODER = Direction("L2T CE", "text", "l2t_ce_true")
ENCODER = Direction("T2L MSE", "latent", "t2l_mse")


def value(results: Results, row: str, pairs: int, direction: Direction) -> float | None:
    """The mean over seeds, each at the checkpoint that this direction chose."""
    found = _each(results, row, pairs, direction) if key_of(row, pairs) in results else []
    return float(np.mean(found)) if found else None


def ridge(results: Results, pairs: int) -> float | None:
    found = [told["t2l_mse"] for told in results.baselines if told["pairs"] == pairs]
    return float(np.mean(found)) if found else None


def linearity(found: Found) -> str:
    """How much of each kind of latent ridge regression on words explains."""
    budgets = sorted({pairs for each in MAP.values() for pairs in each})
    lines = []
    for corpus, results in found.items():
        errors = [ridge(results, pairs) for pairs in (*budgets, ALL)]
        lines.append([TITLES[corpus], *("" if e is None else f"{e:.3f}" for e in errors)])
    return table(["latents", *(f"{pairs:,} pairs" for pairs in budgets), "all"], lines)


def values(found: Found, direction: Direction) -> str:
    """Each row by latents and pairs; the best of a line in bold."""
    rows = [*MAPPED, *(["ridge"] if direction is ENCODER else [])]
    lines = []
    for corpus, results in found.items():
        for pairs in MAP[corpus]:
            each = [
                ridge(results, pairs) if row == "ridge" else value(results, row, pairs, direction)
                for row in rows
            ]
            if each[0] is None:
                continue
            best = min(v for v in each if v is not None)
            lines.append(
                [
                    TITLES[corpus],
                    f"{pairs:,}",
                    *("" if v is None else _bold(f"{v:.3f}", v == best) for v in each),
                ]
            )
    titles = [ROWS[row].label if row in ROWS else "ridge regression" for row in rows]
    return table(["latents", "pairs", *titles], lines)


def differences(found: Found, row: str, opponent: str) -> str:
    """A row minus another, each seed by itself: what two seeds can say."""
    measures = (
        ("L2T CE", DECODER),
        ("CE, predicted z", DECODER._replace(measure="l2t_ce_predicted")),
        ("T2L MSE", ENCODER),
    )
    lines = []
    for corpus, results in found.items():
        for pairs in MAP[corpus]:
            seeds = results.seeds(key_of(row, pairs), key_of(opponent, pairs))
            if seeds:
                each = (
                    ", ".join(
                        f"{one - other:+.3f}"
                        for one, other in zip(
                            *(_each(results, r, pairs, direction, seeds) for r in (row, opponent)),
                            strict=True,
                        )
                    )
                    for _, direction in measures
                )
                lines.append([TITLES[corpus], f"{pairs:,}", *each])
    return table(["latents", "pairs", *(f"{title}, each seed ↓" for title, _ in measures)], lines)


def _each(
    results: Results,
    row: str,
    pairs: int,
    direction: Direction,
    seeds: Sequence[int] | None = None,
) -> list[float]:
    found = results.of(key_of(row, pairs), seeds)
    return [r["directions"][direction.chosen_by][direction.measure] for r in found]


def worth(found: Found, direction: Direction) -> str:
    """How many times its pairs a row is worth, read off the curve of pairs only."""
    rows = MAPPED[1:]
    lines = []
    for corpus, results in found.items():
        curve = [(n, v) for n in MAP[corpus] if (v := value(results, "paired", n, direction))]
        if len(curve) < 2:
            continue
        for pairs, _ in curve:
            each = [value(results, row, pairs, direction) for row in rows]
            lines.append([TITLES[corpus], f"{pairs:,}", *(times(curve, pairs, v) for v in each)])
    return table(["latents", "pairs", *(ROWS[row].label for row in rows)], lines)


def times(curve: Sequence[tuple[int, float]], pairs: int, own: float | None) -> str:
    """How many times as many pairs the curve of pairs only needs for a value."""
    if own is None:
        return ""
    numbers, values = (np.array(part, dtype=float) for part in zip(*curve, strict=True))
    worth = float(pair_equivalents(numbers, values[None], np.array([own]))[0]) / pairs
    if worth == 0:
        return f"< {numbers[0] / pairs:.2g}"
    return f"> {numbers[-1] / pairs:.2g}" if np.isinf(worth) else f"{worth:.2g}"


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text
