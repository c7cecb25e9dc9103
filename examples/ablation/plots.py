"""The pictures of `docs/evidence.md`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from landscape import DECODER, ENCODER, TITLES, ridge, value
from matrix import ALL, BUDGETS, MAP, MAPPED, PRIMARY, ROWS
from stored import MEASURES, Compared, Key, Results, row_key
from tables import CORE_ORDER

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

COLOURS = {
    "paired": "#7f7f7f",
    "unimodal": "#1f77b4",
    "pseudo": "#9467bd",
    "half": "#d62728",
    "both": "#2ca02c",
    "straight_through": "#ff7f0e",
    "pseudo_ridge": "#9467bd",
    "channel": "#17becf",
    "both_best": "#8c564b",
}
matplotlib.rcParams["svg.hashsalt"] = "cyclevae"  # the same picture, the same file


def against_pairs(results: Results, path: Path) -> None:
    """Cross-entropy and R@1 against the number of pairs, with bands, and what cycles are worth."""
    figure, axes = pyplot.subplots(2, 1, figsize=(7, 8), layout="constrained")
    compared = Compared(results)
    for axis, measure in zip(axes, ("l2t_ce_true", "t2l_r1"), strict=True):
        for row in CORE_ORDER:
            share = 0 if ROWS[row].unpaired == "none" else 100
            budgets = (*BUDGETS, 6000, ALL) if row == "paired" else BUDGETS
            keys = [k for n in budgets if (k := row_key(row, n, share)) in results]
            if keys:
                pairs = [key[1] or results.train for key in keys]
                found = [compared.value(key, measure) for key in keys]
                axis.plot(pairs, [f.value for f in found], "o-", ms=4, color=COLOURS[row],
                          label=ROWS[row].label)  # fmt: skip
                axis.fill_between(pairs, [f.low for f in found], [f.high for f in found],
                                  color=COLOURS[row], alpha=0.12, lw=0)  # fmt: skip
        _arrow(axis, compared, row_key("half", PRIMARY, 100), measure)
        axis.set_xscale("log")
        axis.set_xticks([*BUDGETS, 6000, results.train])
        axis.set_xticklabels(["300", "1,000", "3,000", "6,000", "all"])
        axis.minorticks_off()
        good = "low" if MEASURES[measure].better < 0 else "high"
        axis.set_title(f"{MEASURES[measure].label} on test pairs ({good} is good)", fontsize=10)
        axis.set_xlabel("pairs")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    _save(figure, path)


def _arrow(axis: Axes, compared: Compared, key: Key, measure: str) -> None:
    """From the cycles' point to where the curve of pairs alone has the same value."""
    if key not in compared.results:
        return
    worth = compared.equivalents(key, measure)
    if worth is None or not 0 < worth.value < np.inf:
        return
    value = compared.value(key, measure).value
    colour = COLOURS["half"]
    arrow = {"arrowstyle": "->", "ls": "--", "color": colour}
    axis.annotate("", (worth.value, value), (key[1], value), arrowprops=arrow)
    middle = (worth.value * key[1]) ** 0.5
    axis.annotate(
        f"worth {round(worth.value, -1):,.0f} pairs", (middle, value), (0, 9),
        textcoords="offset points", ha="center", fontsize=8, color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip


def curves(results: Results, path: Path) -> None:
    """Validation scores against compute, at the number of pairs of the primary test."""
    figure, axes = pyplot.subplots(2, 1, figsize=(7, 8), layout="constrained")
    for axis, name, label in zip(
        axes, ("l2t_ce", "t2l_mse"), ("L2T cross-entropy", "T2L mean squared error"), strict=True
    ):
        for row in CORE_ORDER:
            key = row_key(row, PRIMARY, 0 if ROWS[row].unpaired == "none" else 100)
            for i, result in enumerate(results.of(key) if key in results else ()):
                seen = result["validation"]
                axis.plot(np.array(seen["flops"]) / 1e12, seen[name], color=COLOURS[row], lw=1,
                          alpha=0.8, label=ROWS[row].label if i == 0 else None)  # fmt: skip
        axis.set_xlabel("TFLOP spent")
        axis.set_title(f"{label} on validation pairs, a line a seed", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    _save(figure, path)


def against_compute(results: Results, rows: Sequence[str], path: Path) -> None:
    """What cycles on fewer steps or rows gain, against the compute that a step takes."""
    figure, axes = pyplot.subplots(2, 1, figsize=(7, 8), layout="constrained")
    compared, drawn = Compared(results), False
    for axis, measure in zip(axes, ("l2t_ce_true", "t2l_r10"), strict=True):
        for row in rows:
            key, control = (row_key(r, PRIMARY, 100) for r in (row, "unimodal"))
            if key not in results or control not in results:
                continue
            drawn = True
            gain = compared.difference(key, control, measure)
            told = [r["training"] for r in results.of(key)]
            flops = np.mean([t["flops"] / t["steps"] for t in told]) / 1e9
            error = [[gain.value - gain.low], [gain.high - gain.value]]
            axis.errorbar(flops, gain.value, error, fmt="o", capsize=3, label=ROWS[row].label)
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xlabel("GFLOP a step")
        axis.set_title(f"{MEASURES[measure].label}: row - control at equal compute", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    if drawn:
        _save(figure, path)
    pyplot.close(figure)


def decodings(results: Results, path: Path) -> None:
    """What a text is worth against the decoder passes that it takes."""
    if not results.decodings:
        return
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for row in dict.fromkeys(one["row"] for one in results.decodings):
        own = [one for one in results.decodings if one["row"] == row and one["l2t"]]
        for chosen, marks in (("encoder", "o-"), ("decoder", "x")):
            found = {}
            for one in own:
                if f"the {chosen}'s choice" in one["decoding"] or one["decoding"] == "one sample":
                    found.setdefault(one["l2t"], []).append(one["cosine"])
            passes = sorted(found) if chosen == "encoder" else sorted(found)[-1:]
            axis.plot(passes, [np.mean(found[n]) for n in passes], marks, ms=5, color=COLOURS[row],
                      label=f"{ROWS[row].label}, the {chosen}'s choice")  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xlabel("decoder passes a text, 7 a sample; and one of the encoder for each sample")
    axis.set_title("cosine of the latent and that of its text, encoded again", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    _save(figure, path)


def landscape(found: Mapping[str, Results], path: Path) -> None:
    """What each row is worth against the number of pairs, for each kind of latent."""
    if not found:
        return
    directions = (DECODER, ENCODER)
    figure, axes = pyplot.subplots(
        len(found), 2, figsize=(8, 2.6 * len(found)), layout="constrained", squeeze=False
    )
    for line, (corpus, results) in zip(axes, found.items(), strict=True):
        for axis, direction in zip(line, directions, strict=True):
            for row in MAPPED:
                each = [(n, v) for n in MAP[corpus] if (v := value(results, row, n, direction))]
                axis.plot(*zip(*each, strict=True), "o-", ms=4, color=COLOURS[row],
                          label=ROWS[row].label)  # fmt: skip
            axis.set_xscale("log")
            axis.set_xticks(MAP[corpus])
            axis.set_xticklabels([f"{n:,}" for n in MAP[corpus]])
            axis.minorticks_off()
            axis.set_title(f"{TITLES[corpus]}: {direction.title} (low is good)", fontsize=10)
            axis.grid(alpha=0.3)
        errors = [(n, e) for n in MAP[corpus] if (e := ridge(results, n))]
        line[1].plot(*zip(*errors, strict=True), "k:", label="ridge regression")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  fontsize=8)  # fmt: skip
    axes[-1, 0].set_xlabel("pairs")
    axes[-1, 1].set_xlabel("pairs")
    _save(figure, path)


def _save(figure: "pyplot.Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
