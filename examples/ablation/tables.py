"""The tables of `docs/evidence.md`: one function each, of the results of one corpus."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from bootstrap import Estimate, estimate, holm
from matrix import ALL, BUDGETS, DECAYS, EXPLORATORY, PRIMARY, REPAIRED, ROWS, SEED_MATRIX
from stored import (
    CONTROL,
    MEASURES,
    Compared,
    Key,
    Measure,
    Results,
    key_of,
    keys_of,
    label_of,
    row_key,
    title_of,
)

CORE_ORDER = ("paired", "unimodal", "pseudo", "half", "both", "straight_through")
NOT_RUN = "*not run*"


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
    head = ["row", "pairs", *(title_of(m) for m in measures.values()), "seeds"]
    rows = [
        [
            label_of(key),
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
        lines.append(f"{label_of(key):<36}{key[1] or results.train:>7}{values}  {seeds} seeds")
    return "\n".join(lines)


def primary(results: Results) -> str:
    """The preregistered test."""
    compared, half, control = Compared(results), *keys_of(PRIMARY, "half", CONTROL)
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
    for key in (*keys_of(PRIMARY, "paired", CONTROL, "pseudo", "half"), whole):
        if key not in results:
            continue
        worth = compared.equivalents(key, "l2t_ce_true") if key[0] != "paired" else None
        rows.append(
            [
                f"{key[1] or results.train:,} {label_of(key)}".replace("pairs only", "pairs"),
                *(f"{results.mean(key, name):{MEASURES[name].form}}" for name in names),
                f"{key[1] or results.train:,}"
                if worth is None
                else count_of(worth.value, results.train),
            ]
        )
    titles = (title_of(MEASURES[name]) for name in names)
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
        rows.append([label_of(key), *cells, f"{mse:+.3f}", str(len(seeds))])
    names = ("l2t_ce_true", "l2t_ce_predicted", "t2l_r10", "t2l_mse")
    return table(
        [f"minus {label_of(base)}", *(title_of(MEASURES[n]) for n in names), "seeds"], rows
    )


def by_pairs(results: Results, measure: str) -> str:
    """One measure at each number of pairs, and the difference of each row from the control."""
    compared, rows = Compared(results), []
    for row in CORE_ORDER:
        if key_of(row, BUDGETS[0]) not in results:
            continue
        cells = []
        for pairs in BUDGETS:
            key, control = key_of(row, pairs), key_of(CONTROL, pairs)
            if key not in results or control not in results:
                cells.append("")
                continue
            text = f"{results.mean(key, measure):{MEASURES[measure].form}}"
            if row != CONTROL:
                text += f" ({interval(compared.difference(key, control, measure))})"
            cells.append(text)
        rows.append([ROWS[row].label, *cells])
    return table([title_of(MEASURES[measure]), *(f"{n:,} pairs" for n in BUDGETS)], rows)


def equivalents(results: Results) -> str:
    """What each row's value is worth in pairs, in both directions."""
    compared, rows = Compared(results), []
    for row in CORE_ORDER[1:]:
        for pairs in BUDGETS:
            if key_of(row, pairs) not in results:
                continue
            cells = []
            for measure in ("l2t_ce_true", "t2l_r1", "t2l_r10"):
                key = key_of(row, pairs)
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
                    label_of(key),
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
            key, base = keys_of(PRIMARY, row, "paired")
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
        ("ridge: " if n.startswith("t2l") else "nearest text: ") + title_of(MEASURES[n])
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


# --- Stronger opponents -------------------------------------------------------------------------


def opponents(results: Results) -> str:
    """Each row at its best decay, its encoder at each, and what its labels took to make."""
    head = [
        "row", "labels, 10^12 FLOPs", "L2T CE ↓", "CE, predicted z ↓", "CE, own checkpoint ↓",
        "the same, predicted z ↓",
        *(f"T2L MSE, decay {decay:g} ↓" for decay in DECAYS), "MSE, at best ↓", "R@1 ↑", "seeds",
    ]  # fmt: skip
    rows = []
    for key in keys_of(PRIMARY, *REPAIRED):
        if key not in results:
            continue
        found, encoders = results.of(key), results.decays[key]
        took = np.mean([result["training"].get("label_flops", 0.0) for result in found])
        best = min(encoders.values(), key=_best_latent_score)
        rows.append(
            [
                label_of(key),
                f"{took / 1e12:.2f}" if took else "",
                *(f"{results.mean(key, n):.3f}" for n in ("l2t_ce_true", "l2t_ce_predicted")),
                *(
                    f"{_of_direction(found, 'text', name):.3f}"
                    for name in ("l2t_ce_true", "l2t_ce_predicted")
                ),
                *(
                    f"{np.mean([r['measures']['t2l_mse'] for r in encoders[decay]]):.3f}"
                    if decay in encoders
                    else ""
                    for decay in DECAYS
                ),
                f"{_of_direction(best, 'latent', 't2l_mse'):.3f}",
                f"{_of_direction(best, 'latent', 't2l_r1'):.3f}",
                str(len(found)),
            ]
        )
    ridge = [told for told in results.baselines if told["pairs"] == PRIMARY]
    if ridge:
        mse, r1 = (f"{np.mean([told[n] for told in ridge]):.3f}" for n in ("t2l_mse", "t2l_r1"))
        blanks = [""] * (len(head) - 4)
        rows.append(["ridge regression on bags of words", *blanks, mse, r1, str(len(ridge))])
    return table(head, rows)


def few_validation(results: Results) -> str:
    """The same rows where all validation pairs choose the checkpoint, and where few do."""
    names = ("l2t_ce_true", "l2t_ce_predicted", "t2l_mse", "t2l_r1")
    rows = []
    for (key, pairs), few in results.few.items():
        seeds = [result["cell"]["seed"] for result in few]
        whole = [r for r in results.all if r["cell"] | {"validation": pairs} in _cells(few)]
        for labels, found in ((f"{pairs}", few), ("500", whole)):
            means = [f"{np.mean([r['measures'][n] for r in found]):.3f}" for n in names]
            rows.append([label_of(key), f"{key[1]:,} + {labels}", *means, str(len(seeds))])
    titles = (title_of(MEASURES[name]) for name in names)
    return table(["row", "pairs: to train + to choose", *titles, "seeds"], rows)


def _cells(found: Sequence[Mapping]) -> list[Mapping]:
    return [result["cell"] for result in found]


def _best_latent_score(found: Sequence[Mapping]) -> float:
    return float(np.mean([min(result["validation"]["t2l_mse"]) for result in found]))


def _of_direction(found: Sequence[Mapping], direction: str, measure: str) -> float:
    """The mean over checkpoints that one direction chose."""
    return float(np.mean([result["directions"][direction][measure] for result in found]))


def decodings(results: Results) -> str:
    """Every way to decode: what a text costs, and what it is worth, of each row's checkpoints."""
    each = results.decodings
    names, rows = ([*dict.fromkeys(one[of] for one in each)] for of in ("decoding", "row"))
    lines = []
    for name in names:
        found = {
            row: [one for one in each if one["decoding"] == name and one["row"] == row]
            for row in rows
        }
        passes = found[rows[0]][0]
        cells = [
            f"{np.mean([one[measure] for one in found[row]]):{form}}"
            for measure, form in (("cosine", ".3f"), ("words", ".3f"), ("nats", ".2f"))
            for row in rows
        ]
        lines.append([name, f"{passes['l2t']} + {passes['t2l']}", *cells])
    titles = [
        f"{title}, {ROWS[row].label}" for title in ("cosine ↑", "words ↑", "nats ↓") for row in rows
    ]
    return table(["text", "passes, L2T + T2L", *titles], lines)
