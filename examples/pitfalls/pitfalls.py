"""Fall into each pitfall of docs/pitfalls.md on purpose, and out of it again; draw both.

Each pitfall is trained twice on a small world, as it goes wrong and as it is cured, and both are
judged by the library's own diagnostics on held-out pairs. Run it with `make pitfalls`.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices; and sums in one order

from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from catalogue import LATENT, PITFALLS, Judged, Pitfall
from tqdm import tqdm
from world import EVERY, TEXT, make_world, train

import cyclevae as cv
from cyclevae.diagnostics import cycle_report

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import LogFormatter

ROOT = Path(__file__).resolve().parents[2]
DOCS, RUNS = ROOT / "docs", ROOT / "runs" / "pitfalls"
COLOURS = {"sick": "#d62728", "cured": "#1f77b4"}
matplotlib.rcParams["svg.hashsalt"] = "cyclevae"  # the same picture, the same file


def judge(pitfall: Pitfall, kind: str, *, seed: int, watch: Callable[[], object]) -> Judged:
    """Train one of the two runs of a pitfall, and measure it."""
    world = make_world(seed=seed, **pitfall.world)
    process = pitfall.sick_process if kind == "sick" else LATENT
    objective = cv.CycleObjective(TEXT, process, getattr(pitfall, kind))
    careless = {pitfall.careless: True} if pitfall.careless and kind == "sick" else {}
    how = {"steps": pitfall.steps, "seed": seed + 1, **pitfall.training, **careless}
    trained = train(objective, world, watch=watch, **how)
    tokens, mask, stored = world.held_out
    with torch.no_grad():
        latents = trained.embed(stored)
    report = cycle_report(
        trained.denoiser,
        cv.Batch(tokens, mask, latents),
        text_process=TEXT,
        latent_process=process,
        mean=stored.mean(dim=0),
        variance=stored.var(dim=0),
        bridge=pitfall.bridge,
    )
    return Judged(trained, world, report)


class Plain(LogFormatter):
    """Labels where a log scale has few of them, without exponents."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return super().__call__(x, pos) and f"{x:g}"


def plot(pitfall: Pitfall, runs: dict[str, Judged], path: Path) -> None:
    """The loss that looks well, above the readings that tell; as wide as a telephone shows."""
    count = len(pitfall.readings)
    figure, (losses, readings) = pyplot.subplots(
        2, 1, figsize=(5, 3.1 + 0.6 * count), height_ratios=(3, count), layout="constrained"
    )
    for shift, (kind, judged) in zip((-0.15, 0.15), runs.items(), strict=True):
        curve = [row[pitfall.loss] for row in judged.trained.history]
        losses.plot(range(EVERY, pitfall.steps + 1, EVERY), curve, color=COLOURS[kind], label=kind)
        values = [read(judged) for read in pitfall.readings.values()]
        places = [place + shift for place in range(count)]
        bars = readings.barh(places, values, 0.3, color=COLOURS[kind])
        readings.bar_label(bars, fmt="%.2f", padding=3)
    losses.set_yscale("log")
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter(Plain())
    losses.set(xlabel="step", title=f"{pitfall.loss} in training")
    losses.legend()
    losses.grid(alpha=0.3)
    for place, name in enumerate(pitfall.readings):
        readings.annotate(name, (0, place - 0.32), (3, 0), textcoords="offset points", va="bottom")
    readings.set(yticks=[], ylim=(count - 0.6, -0.75), title="measured on held-out pairs")
    readings.margins(x=0.12)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def row(pitfall: Pitfall, runs: dict[str, Judged]) -> str:
    """A line of the page's table."""

    def sides(value: Callable[[Judged], str]) -> str:
        return " / ".join(value(judged) for judged in runs.values())

    readings = "; ".join(
        f"{name}: {sides(lambda judged, read=read: f'{read(judged):.2f}')}"
        for name, read in pitfall.readings.items()
    )
    loss = sides(lambda judged: f"{judged.trained.history[-1][pitfall.loss]:.3f}")
    verdicts = "-" if pitfall.verdict is None else sides(lambda judged: said(pitfall, judged))
    return f"| {pitfall.name} | `{pitfall.loss}` {loss} | {readings} | {verdicts} |"


def said(pitfall: Pitfall, judged: Judged) -> str:
    """What the report says of the pitfall."""
    found = {verdict.name: verdict.ok for verdict in judged.report.verdicts}
    return {True: "ok", False: "FAIL", None: "?"}[found[pitfall.verdict]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PITFALLS, nargs="+", help="and leave the page as it is")
    parser.add_argument("--seed", type=int, default=0, help="another one leaves the page as it is")
    parser.add_argument("--out", type=Path, help="folder of the pictures; with seed 0 docs/images")
    options = parser.parse_args(arguments)
    out = options.out or (RUNS if options.seed else DOCS / "images")
    out.mkdir(parents=True, exist_ok=True)
    chosen = {name: PITFALLS[name] for name in options.only or PITFALLS}
    lines = [
        "| pitfall | loss, sick / cured | readings, sick / cured | verdict |",
        "| --- | --- | --- | --- |",
    ]
    with tqdm(total=2 * sum(pitfall.steps for pitfall in chosen.values()), unit="step") as bar:
        for name, pitfall in chosen.items():
            bar.set_description(pitfall.name)
            runs = {
                kind: judge(pitfall, kind, seed=options.seed, watch=bar.update) for kind in COLOURS
            }
            plot(pitfall, runs, out / f"pitfall-{name}.svg")
            lines.append(row(pitfall, runs))
    table = "\n".join(lines)
    print(table)
    if not options.only and options.seed == 0:
        page = DOCS / "pitfalls.md"
        before, _, rest = page.read_text().partition("<!-- table -->")
        after = rest.partition("<!-- /table -->")[2]
        page.write_text(f"{before}<!-- table -->\n\n{table}\n\n<!-- /table -->{after}")


if __name__ == "__main__":
    main()
