"""The tables and plots of `docs/evidence.md`, from the stored results and nothing else."""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bootstrap import Estimate, Resampled, Values, estimate, holm, pair_equivalents
from matrix import ALL, BUDGETS, EXPLORATORY, FEW_SEEDS, PRIMARY, ROWS, SEED_MATRIX, TUNING_SEED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DOCS, README = ROOT / "docs", ROOT / "README.md"
CORE_ORDER = ("paired", "unimodal", "pseudo", "half", "both", "straight_through")
CONTROL = "unimodal"
NOT_RUN = "*not run*"


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

    Where a row ran with several weight decays, the one counts that did best on validation pairs.
    """

    def __init__(self, folder: Path) -> None:
        self.cells: dict[Key, list[dict[str, Any]]] = {}
        self.search: list[dict[str, Any]] = []
        about = json.loads((folder / "corpus.json").read_text())
        self.train, self.words = about["train"], np.array(about["test_words"], dtype=float)
        told = folder / "baselines.json"
        self.baselines = json.loads(told.read_text())["each"] if told.exists() else []
        several: dict[Key, dict[float, list[dict[str, Any]]]] = {}
        for path in sorted(folder.glob("*-*.json")):
            result = json.loads(path.read_text())
            cell = result["cell"]
            if cell["seed"] == TUNING_SEED:
                self.search.append(result)
                continue
            key = cell["row"], cell["pairs"], cell["share"]
            decays = several.setdefault(key, {})
            decays.setdefault(cell["weight_decay"], []).append(result)
        self.all = [r for decays in several.values() for found in decays.values() for r in found]
        for key, decays in several.items():
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


# --- Tables -------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    if not (rows := list(rows)):
        return NOT_RUN
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(found: Estimate, form: str = "+.3f") -> str:
    """A difference with its interval, in bold where that excludes 0."""
    text = f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"
    return f"**{text}**" if found.excludes_zero else text


def count_of(pairs: float, most: int) -> str:
    if pairs == 0:
        return "under 300"
    return f"over {most:,}" if np.isinf(pairs) else f"{round(pairs, -1):,.0f}"


def measured(
    results: Results,
    keys: Sequence[Key],
    measures: Mapping[str, Measure],
    seeds: Iterable[int] | None = None,
) -> str:
    """Rows by measures, means over seeds, or over some of them."""
    head = ["row", "pairs", *(_title(m) for m in measures.values()), "seeds"]
    rows = [
        [
            _label(key),
            f"{key[1] or results.train:,}",
            *(f"{results.mean(key, name, seeds):{m.form}}" for name, m in measures.items()),
            str(len(results.of(key, seeds))),
        ]
        for key in keys
        if key in results
    ]
    return table(head, rows)


def summary(results: Results) -> str:
    """Everything that has run, for the screen."""
    keys = sorted(results.cells, key=lambda key: (key[1] or results.train, key[2], key[0]))
    names = ("l2t_ce_true", "l2t_ce_predicted", "t2l_mse", "t2l_r1", "t2l_r10")
    lines = [f"{'row':<36}{'pairs':>7}" + "".join(f"{MEASURES[n].label:>17}" for n in names)]
    for key in keys:
        values = "".join(f"{results.mean(key, n):>17{MEASURES[n].form}}" for n in names)
        seeds = len(results.of(key))
        lines.append(f"{_label(key):<36}{key[1] or results.train:>7}{values}  {seeds} seeds")
    return "\n".join(lines)


def primary(results: Results) -> str:
    """The preregistered test."""
    compared, half, control = Compared(results), *_keys(PRIMARY, "half", CONTROL)
    names = ("l2t_ce_true", "t2l_r10")
    found = [compared.difference(half, control, name) for name in names]
    rows = [
        [
            MEASURES[name].label,
            f"{results.mean(control, name):{MEASURES[name].form}}",
            f"{results.mean(half, name):{MEASURES[name].form}}",
            interval(difference),
            p_value(adjusted),
            verdict(difference, adjusted, MEASURES[name].better),
        ]
        for name, difference, adjusted in zip(names, found, holm([f.p for f in found]), strict=True)
    ]
    head = ["measure", "control", "half cycle", "difference", "p, Holm", "verdict"]
    return table(head, rows)


def headline(results: Results) -> str:
    """What a reader of the README wants to know."""
    compared, rows = Compared(results), []
    names = ("l2t_ce_true", "l2t_ce_predicted", "t2l_mse", "t2l_r1")
    whole = row_key("paired", ALL, 0)
    for key in (*_keys(PRIMARY, "paired", CONTROL, "pseudo", "half"), whole):
        if key not in results:
            continue
        worth = compared.equivalents(key, "l2t_ce_true") if key[0] != "paired" else None
        rows.append(
            [
                f"{key[1] or results.train:,} {_label(key)}".replace("pairs only", "pairs"),
                *(f"{results.mean(key, name):{MEASURES[name].form}}" for name in names),
                f"{key[1] or results.train:,}"
                if worth is None
                else count_of(worth.value, results.train),
            ]
        )
    titles = (_title(MEASURES[name]) for name in names)
    return table(["trained on", *titles, "decoder worth, pairs"], rows)


def p_value(p: float) -> str:
    """`p` as it is written; below 0.001, 10,000 draws of the bootstrap hardly resolve it."""
    return "< 0.001" if p < 0.001 else f"{p:.4f}"


def verdict(difference: Estimate, p: float, better: int) -> str:
    if p >= 0.05:
        return "nothing is claimed"
    return "cycles help" if difference.value * better > 0 else "cycles hurt"


def beside(results: Results, keys: Sequence[Key], base: Key) -> str:
    """Rows with their differences from another, on the seeds that both have."""
    compared, rows = Compared(results), []
    for key in keys:
        if key not in results or base not in results:
            continue
        cells = [
            interval(compared.difference(key, base, name))
            for name in ("l2t_ce_true", "l2t_ce_predicted", "t2l_r10")
        ]
        seeds = results.seeds(key, base)
        mse = np.mean(
            [
                one["measures"]["t2l_mse"] - other["measures"]["t2l_mse"]
                for one, other in zip(results.of(key, seeds), results.of(base, seeds), strict=True)
            ]
        )
        rows.append([_label(key), *cells, f"{mse:+.3f}", str(len(seeds))])
    names = ("l2t_ce_true", "l2t_ce_predicted", "t2l_r10", "t2l_mse")
    return table([f"minus {_label(base)}", *(_title(MEASURES[n]) for n in names), "seeds"], rows)


def by_pairs(results: Results, measure: str) -> str:
    """One measure at each number of pairs, and the difference of each row from the control."""
    compared, rows = Compared(results), []
    for row in CORE_ORDER:
        if _key(row, BUDGETS[0]) not in results:
            continue
        cells = []
        for pairs in BUDGETS:
            key, control = _key(row, pairs), _key(CONTROL, pairs)
            if key not in results or control not in results:
                cells.append("")
                continue
            text = f"{results.mean(key, measure):{MEASURES[measure].form}}"
            if row != CONTROL:
                text += f" ({interval(compared.difference(key, control, measure))})"
            cells.append(text)
        rows.append([ROWS[row].label, *cells])
    return table([_title(MEASURES[measure]), *(f"{n:,} pairs" for n in BUDGETS)], rows)


def equivalents(results: Results) -> str:
    """What each row's value is worth in pairs, in both directions."""
    compared, rows = Compared(results), []
    for row in CORE_ORDER[1:]:
        for pairs in BUDGETS:
            if _key(row, pairs) not in results:
                continue
            cells = []
            for measure in ("l2t_ce_true", "t2l_r1", "t2l_r10"):
                key = _key(row, pairs)
                found = compared.equivalents(key, measure) if key in results else None
                if found is None:
                    cells.append("")
                    continue
                value, low, high = (
                    count_of(n, results.train) for n in (found.value, found.low, found.high)
                )
                cells.append(f"{value} [{low}, {high}]")
            rows.append([ROWS[row].label, f"{pairs:,}", *cells])
    return table(["row", "pairs", "worth by L2T CE", "worth by R@1", "worth by R@10"], rows)


def growth(results: Results) -> str:
    """The half cycle against the control with a quarter and with all of the unpaired rows."""
    compared, rows = Compared(results), []
    for measure in ("l2t_ce_true", "t2l_r10"):
        gains, cells = [], []
        for share in (25, 100):
            half, control = (row_key(row, PRIMARY, share) for row in ("half", CONTROL))
            if half not in results or control not in results:
                return NOT_RUN
            gains.append(compared.difference(half, control, measure))
            cells.append(interval(gains[-1]))
        draws = gains[1].draws - gains[0].draws
        change = estimate(gains[1].value - gains[0].value, draws)
        rows.append([MEASURES[measure].label, *cells, interval(change)])
    return table(["half cycle - control", "25 %", "100 %", "100 % - 25 %"], rows)


def costs(results: Results, keys: Sequence[Key]) -> str:
    """What a row's training takes."""
    head = ["row", "passes a step", "GFLOP a step", "steps", "best step", "saved MiB", "minutes"]
    rows = []
    for key in keys:
        if key in results:
            told = [r["training"] for r in results.of(key)]
            mean = {name: np.mean([t[name] for t in told]) for name in told[0] if name != "stopped"}
            rows.append(
                [
                    _label(key),
                    f"{mean['passes_per_step']:.1f}",
                    f"{mean['flops'] / mean['steps'] / 1e9:.2f}",
                    f"{mean['steps']:.0f}",
                    f"{mean['best_step']:.0f}",
                    f"{mean['saved_mib']:.0f}",
                    f"{mean['seconds'] / 60:.1f}",
                ]
            )
    return table(head, rows)


def gap_closed(results: Results) -> str:
    """(row - pairs only) / (oracle - pairs only), where the oracle is surely better."""
    compared, rows = Compared(results), []
    oracle = row_key("oracle", ALL, 0)
    if oracle not in results:
        return NOT_RUN
    for row in CORE_ORDER[1:]:
        cells = []
        for measure in ("l2t_ce_true", "t2l_r10"):
            key, base = _keys(PRIMARY, row, "paired")
            whole = compared.difference(oracle, base, measure)
            if not whole.excludes_zero or key not in results:
                cells.append("not defined")
                continue
            part = compared.difference(key, base, measure)
            with np.errstate(divide="ignore", invalid="ignore"):  # a draw may have no gap
                share = estimate(part.value / whole.value, part.draws / whole.draws)
            cells.append(f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]")
        rows.append([ROWS[row].label, *cells])
    return table(["gap closed at 1,000 pairs", "L2T CE", "R@10"], rows)


def baselines_table(results: Results) -> str:
    """Ridge and nearest text at each number of pairs."""
    names = ("t2l_mse", "t2l_cosine", "t2l_r1", "t2l_r10", "l2t_accuracy_true", "reencoded_true")
    rows = []
    for pairs in dict.fromkeys(told["pairs"] for told in results.baselines):
        found = [told for told in results.baselines if told["pairs"] == pairs]
        means = [np.mean([told[name] for told in found]) for name in names]
        rows.append([f"{pairs or results.train:,}", *(f"{mean:.3f}" for mean in means)])
    head = [
        ("ridge: " if n.startswith("t2l") else "nearest text: ") + _title(MEASURES[n])
        for n in names
    ]
    return table(["pairs", *head], rows)


def search_table(results: Results) -> str:
    """The best joint validation score at each point of the search."""
    names = ("row", "learning_rate", "weight_decay")
    scores = {tuple(r["cell"][name] for name in names): r["best"] for r in results.search}
    points = sorted({key[1:] for key in scores})
    rows = []
    for row in dict.fromkeys(key[0] for key in scores):
        found = [scores.get((row, *point), float("nan")) for point in points]
        best = min(found)
        cells = [f"**{v:.2f}**" if v == best else f"{v:.2f}" for v in found]
        rows.append([ROWS[row].label, *cells])
    return table(["nats per pair", *(f"rate {a:g}, decay {b:g}" for a, b in points)], rows)


def decays(results: Results) -> str:
    """The weight decay that validation pairs chose, of each row at each number of pairs."""
    chosen = {}
    for (row, pairs, share), found in results.cells.items():
        if share in (0, 100) and row in (*CORE_ORDER, "oracle"):
            chosen[row, pairs] = f"{found[0]['cell']['weight_decay']:g}"
    budgets = sorted({pairs for _, pairs in chosen}, key=lambda n: n or results.train)
    rows = [
        [ROWS[row].label, *(chosen.get((row, pairs), "") for pairs in budgets)]
        for row in dict.fromkeys(row for row, _ in chosen)
    ]
    return table(["weight decay", *(f"{n or results.train:,} pairs" for n in budgets)], rows)


def hours(docstrings: Results, glosses: Results | None) -> str:
    """What each tier took: cells, and hours of one core."""
    explored = {*EXPLORATORY, *SEED_MATRIX}
    cells = docstrings.all
    tiers = {
        "search": docstrings.search,
        "core": [r for r in cells if r["cell"]["row"] not in explored],
        "exploratory": [r for r in cells if r["cell"]["row"] in explored],
        "second corpus": glosses.all if glosses else [],
    }
    rows = []
    for name, found in tiers.items():
        runs = {r["key"]: r["training"]["seconds_with_measuring"] for r in found}
        rows.append([name, str(len(runs)), f"{sum(runs.values()) / 3600:.1f}"])
    return table(["tier", "cells", "hours of one core"], rows)


def row_key(row: str, pairs: int, share: int) -> Key:
    return row, pairs, share


def _key(row: str, pairs: int) -> Key:
    return row_key(row, pairs, 0 if ROWS[row].unpaired == "none" else 100)


def _keys(pairs: int, *rows: str) -> list[Key]:
    return [_key(row, pairs) for row in rows]


def _label(key: Key) -> str:
    row, _, share = key
    return ROWS[row].label + (f", {share} % unpaired" if 0 < share < 100 else "")


def _title(measure: Measure) -> str:
    return measure.label + {1: " ↑", -1: " ↓", 0: ""}[measure.better]


# --- The page -----------------------------------------------------------------------------------

FEWER = ("half", "half_every_2", "half_every_4", "half_fraction")
PRIORS = ("moment", "mmd", "learned", "ddvi")
CONTROLS = EXPLORATORY[: EXPLORATORY.index("half_full_mask")]
PARTS = tuple(row for row in EXPLORATORY if row not in (*CONTROLS, *PRIORS))


def blocks(docstrings: Results, glosses: Results | None) -> dict[str, str]:
    """Every generated part of the page, by the name between its marks."""
    core = [*_keys(PRIMARY, *CORE_ORDER), row_key("paired", ALL, 0), row_key("oracle", ALL, 0)]
    explored = _keys(PRIMARY, *EXPLORATORY)
    seeds, whole = ([row_key(row, pairs, 0) for row in SEED_MATRIX] for pairs in (PRIMARY, ALL))
    cycles = ("text_cycle", "latent_cycle", "both_cycles")
    recipe, control = _keys(PRIMARY, "half", CONTROL)
    others = [key for key in _keys(PRIMARY, *CORE_ORDER) if key != recipe]
    found = {
        "primary": primary(docstrings),
        "headline": headline(docstrings),
        "secondary": beside(docstrings, others, recipe),
        "robustness": beside(docstrings, _keys(ALL, *cycles), row_key("paired", ALL, 0)),
        "joint-cycles": beside(docstrings, _keys(PRIMARY, *cycles), _key("paired_joint", PRIMARY)),
        "core": measured(docstrings, core, MEASURES),
        "health": measured(docstrings, core, HEALTH),
        "pairs-ce": by_pairs(docstrings, "l2t_ce_true"),
        "pairs-predicted": by_pairs(docstrings, "l2t_ce_predicted"),
        "pairs-r10": by_pairs(docstrings, "t2l_r10"),
        "pairs-r1": by_pairs(docstrings, "t2l_r1"),
        "equivalents": equivalents(docstrings),
        "gap": gap_closed(docstrings),
        "growth": growth(docstrings),
        "costs": costs(docstrings, [key for key in core if key[:2] != ("paired", ALL)]),
        "search": search_table(docstrings),
        "decays": decays(docstrings),
        "exploratory": measured(
            docstrings, [*_keys(PRIMARY, *CORE_ORDER), *explored], MEASURES, FEW_SEEDS
        ),
        "controls": beside(docstrings, _keys(PRIMARY, *CONTROLS), control),
        "encoded": beside(docstrings, [_key("encoded_cycle", PRIMARY)], _key("encoded", PRIMARY)),
        "parts": beside(docstrings, _keys(PRIMARY, *PARTS), recipe),
        "priors": beside(docstrings, _keys(PRIMARY, *PRIORS), recipe),
        "baselines": baselines_table(docstrings),
        "seed-matrix": measured(docstrings, seeds, MEASURES),
        "seed-matrix-all": measured(docstrings, whole, MEASURES),
        "compute": costs(docstrings, _keys(PRIMARY, CONTROL, *FEWER)),
        "hours": hours(docstrings, glosses),
    }
    if glosses is None:
        names = ("glosses", "glosses-primary", "glosses-secondary", "glosses-equivalents")
        return found | dict.fromkeys(names, NOT_RUN)
    return found | {
        "glosses": measured(glosses, core, MEASURES),
        "glosses-primary": primary(glosses),
        "glosses-secondary": beside(glosses, others, recipe),
        "glosses-equivalents": equivalents(glosses),
    }


def fill(page: str, parts: Mapping[str, str]) -> str:
    """A page with the text between each pair of marks replaced."""
    for name, text in parts.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(\n?<!-- /{name} -->)", re.DOTALL)
        page = mark.sub(lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}", page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=DOCS / "evidence.md")
    options = parser.parse_args()
    import plots

    docstrings = Results(options.results / "docstrings")
    other = options.results / "glosses"
    glosses = Results(other) if other.exists() else None
    template, parts = (DOCS / "evidence.md").read_text(), blocks(docstrings, glosses)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(fill(template, parts))
    if options.page == DOCS / "evidence.md":
        README.write_text(fill(README.read_text(), parts))
    images = options.page.parent / "images"
    plots.against_pairs(docstrings, images / "evidence-pairs.svg")
    plots.curves(docstrings, images / "evidence-curves.svg")
    plots.against_compute(docstrings, FEWER, images / "evidence-compute.svg")
    print(f"wrote {options.page} and its pictures")


if __name__ == "__main__":
    main()
