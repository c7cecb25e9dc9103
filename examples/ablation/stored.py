"""The stored results of one corpus, and comparisons with their bootstrap."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bootstrap import Estimate, Resampled, Values, pair_equivalents
from matrix import ALL, ROWS, TUNING_SEED

CONTROL = "unimodal"


@dataclass(frozen=True)
class Measure:
    """How a measure is called and written, and which way is better."""

    label: str
    form: str
    better: int  # 1: high is good


MEASURES = {
    "l2t_ce_true": Measure("L2T CE", ".3f", -1),
    "l2t_accuracy_true": Measure("L2T accuracy", ".3f", 1),
    "reencoded_true": Measure("re-encoded cosine", ".3f", 1),
    "l2t_ce_predicted": Measure("CE, predicted z", ".3f", -1),
    "l2t_accuracy_predicted": Measure("accuracy, predicted z", ".3f", 1),
    "reencoded_predicted": Measure("cosine, predicted z", ".3f", 1),
    "reencoded_sampled": Measure("cosine, prior's z", ".3f", 1),
    "t2l_mse": Measure("T2L MSE", ".3f", -1),
    "t2l_cosine": Measure("T2L cosine", ".3f", 1),
    "t2l_r1": Measure("R@1", ".3f", 1),
    "t2l_r10": Measure("R@10", ".3f", 1),
}
HEALTH = {
    "hubness": Measure("hubness", ".2f", 0),
    "never": Measure("never found", ".3f", 0),
    "scale": Measure("scale of z_hat", ".2f", 0),
    "drift": Measure("drift of mean", ".2f", 0),
    "effective_rank": Measure("effective rank", ".1f", 0),
    "text_probe_gap": Measure("text probe, nats", ".1f", 0),
    "latent_probe_gap": Measure("latent probe", ".3f", 0),
}
Key = tuple[str, int, int]  # row, pairs, share


class Results:
    """The cells of one corpus, by row, pairs and share of unpaired rows; each a list over seeds.

    Where a row ran with several weight decays, the one counts that did best on validation pairs;
    `decays` has all of them, and `few` the cells that few validation pairs chose.
    """

    def __init__(self, folder: Path) -> None:
        self.cells: dict[Key, list[dict[str, Any]]] = {}
        self.search: list[dict[str, Any]] = []
        about = json.loads((folder / "corpus.json").read_text())
        self.train, self.words = about["train"], np.array(about["test_words"], dtype=float)
        told = folder / "baselines.json"
        self.baselines = json.loads(told.read_text())["each"] if told.exists() else []
        decoded = folder / "decoding.json"
        self.decodings = json.loads(decoded.read_text())["each"] if decoded.exists() else []
        self.decays: dict[Key, dict[float, list[dict[str, Any]]]] = {}
        self.few: dict[tuple[Key, int], list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("*-*.json")):
            result = json.loads(path.read_text())
            cell = result["cell"]
            if cell["seed"] == TUNING_SEED:
                self.search.append(result)
                continue
            key = cell["row"], cell["pairs"], cell["share"]
            if few := cell.get("validation"):
                self.few.setdefault((key, few), []).append(result)
                continue
            decays = self.decays.setdefault(key, {})
            decays.setdefault(cell["weight_decay"], []).append(result)
        several = self.decays.values()
        self.all = [r for decays in several for found in decays.values() for r in found]
        for key, decays in self.decays.items():
            found = min(decays.values(), key=_validation)
            self.cells[key] = sorted(found, key=lambda result: result["cell"]["seed"])
        for result in self.cells.get(("oracle", ALL, 0), ()):  # pairs only, on all, at the cap
            capped = {"measures": result["at_cap_measures"], "each": result["at_cap_each"]}
            self.cells.setdefault(("paired", ALL, 0), []).append({**result, **capped})

    def __contains__(self, key: Key) -> bool:
        return key in self.cells

    def seeds(self, *keys: Key) -> list[int]:
        """The seeds that all of some rows have."""
        found = [{r["cell"]["seed"] for r in self.cells.get(key, [])} for key in keys]
        return sorted(set.intersection(*found)) if found else []

    def of(self, key: Key, seeds: Iterable[int] | None = None) -> list[dict[str, Any]]:
        return [r for r in self.cells[key] if seeds is None or r["cell"]["seed"] in set(seeds)]

    def mean(self, key: Key, measure: str, seeds: Iterable[int] | None = None) -> float:
        return float(np.mean([r["measures"][measure] for r in self.of(key, seeds)]))


def _validation(found: Sequence[Mapping[str, Any]]) -> float:
    """The score of some cells on validation pairs, which chooses their weight decay."""
    chosen_by = ROWS[found[0]["cell"]["row"]].select
    score = {"both": "both", "text": "l2t_ce", "latent": "t2l_mse"}[chosen_by]
    return float(np.mean([min(result["validation"][score]) for result in found]))


class Compared:
    """Values and differences with their bootstrap, for the two measures of the primary test."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self._drawn: dict[int, Resampled] = {}
        self._values: dict[tuple[Key, str, tuple[int, ...]], Estimate] = {}

    def each(self, key: Key, measure: str, seeds: Sequence[int]) -> Values:
        """`[seeds, sentences]`: nats per sentence, or whether its latent is among the nearest."""
        name = {"l2t_ce_true": "ce_true", "l2t_ce_predicted": "ce_predicted"}.get(measure, "rank")
        found = np.array([r["each"][name] for r in self.results.of(key, seeds)])
        if name != "rank":
            return found
        return (found < {"t2l_r1": 1, "t2l_r10": 10}[measure]).astype(float)

    def value(self, key: Key, measure: str, seeds: Sequence[int] | None = None) -> Estimate:
        seeds = self.results.seeds(key) if seeds is None else seeds
        of = key, measure, tuple(seeds)
        if of not in self._values:
            self._values[of] = self._mean(self.each(key, measure, seeds), measure)
        return self._values[of]

    def difference(self, key: Key, other: Key, measure: str) -> Estimate:
        """`key - other`, paired by seed and sentence."""
        seeds = self.results.seeds(key, other)
        values = self.each(key, measure, seeds) - self.each(other, measure, seeds)
        return self._mean(values, measure)

    def equivalents(self, key: Key, measure: str) -> Estimate | None:
        """The number of pairs that "pairs only" needs for the same value."""
        points = sorted(
            (k[1] or self.results.train, k) for k in self.results.cells if k[0] == "paired"
        )  # fmt: skip
        seeds = self.results.seeds(key, *(point for _, point in points))
        if len(points) < 3 or not seeds:
            return None
        pairs = np.array([count for count, _ in points], dtype=float)
        curves = [self.value(point, measure, seeds) for _, point in points]
        own = self.value(key, measure, seeds)
        draws = pair_equivalents(pairs, np.stack([c.draws for c in curves], axis=1), own.draws)
        centre = pair_equivalents(
            pairs, np.array([[c.value for c in curves]]), np.array([own.value])
        )
        low, high = np.quantile(draws, [0.025, 0.975], method="closest_observation")
        return Estimate(float(centre[0]), float(low), float(high), draws)

    def _mean(self, values: Values, measure: str) -> Estimate:
        if len(values) not in self._drawn:
            self._drawn[len(values)] = Resampled.draw(*values.shape)
        return self._drawn[len(values)].mean(
            values, self.results.words if measure.startswith("l2t_ce") else None
        )


def row_key(row: str, pairs: int, share: int) -> Key:
    return row, pairs, share


def key_of(row: str, pairs: int) -> Key:
    return row_key(row, pairs, 0 if ROWS[row].unpaired == "none" else 100)


def keys_of(pairs: int, *rows: str) -> list[Key]:
    return [key_of(row, pairs) for row in rows]


def label_of(key: Key) -> str:
    row, _, share = key
    return ROWS[row].label + (f", {share} % unpaired" if 0 < share < 100 else "")


def title_of(measure: Measure) -> str:
    return measure.label + {1: " ↑", -1: " ↓", 0: ""}[measure.better]
