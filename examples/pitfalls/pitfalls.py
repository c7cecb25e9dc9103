"""Fall into each pitfall of docs/pitfalls.md on purpose, and out of it again; draw both.

Each pitfall is trained twice on a small world, as it goes wrong and as it is cured, and both are
judged by the library's own diagnostics on held-out pairs. Run it with `make pitfalls`.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices; and sums in one order

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from tqdm import tqdm
from world import DIM, TEXT, Trained, World, make_world, train

import cyclevae as cv
from cyclevae.diagnostics import CycleReport, cycle_report

matplotlib.use("Agg")
from matplotlib import pyplot

DOCS = Path(__file__).resolve().parents[2] / "docs"
LATENT = cv.LatentProcess("cosine", prediction="v", shape=(DIM,))
FULL = cv.GradientPolicy(bridge="full")
COLOURS = {"sick": "#d62728", "cured": "#1f77b4"}
matplotlib.rcParams["svg.hashsalt"] = "cyclevae"  # the same picture, the same file


@dataclass(frozen=True)
class Judged:
    """A trained denoiser, its world, and the report on held-out pairs."""

    trained: Trained
    world: World
    report: CycleReport


Reading = Callable[[Judged], float]


@dataclass(frozen=True)
class Pitfall:
    """What goes wrong, what cures it, the loss that does not show it and the readings that do."""

    name: str
    sick: dict[str, Any]  # options of the objective
    cured: dict[str, Any]
    loss: str
    readings: dict[str, Reading]
    verdict: str | None = None  # of the report
    both: dict[str, Any] = field(default_factory=dict)
    world: dict[str, Any] = field(default_factory=dict)
    steps: int = 600
    training: dict[str, Any] = field(default_factory=dict)  # of `train`, sick and cured
    careless: str | None = None  # an option of `train` that is on in the sick run


def in_cycle(judged: Judged) -> float:
    return judged.report.cheat.cycle


def on_pairs(judged: Judged) -> float:
    return judged.report.cheat.pairs


def after_noise(judged: Judged) -> float:
    return next(t.cycle for t in judged.report.cheat.treatments if t.name == "noise 0.1")


def spread(judged: Judged) -> float:
    return judged.report.z_hat.scale


def length(judged: Judged) -> float:
    return judged.report.z_hat.norm / judged.report.z_hat.target_norm


def cycle_error(masks: Callable[[Tensor], Tensor]) -> Reading:
    """The latent cycle's squared error, its pseudo-texts as long as `masks` makes of their own."""

    def reading(judged: Judged) -> float:
        _, mask, latents = judged.world.held_out
        with torch.no_grad():
            return cv.cycle_latent_loss(
                judged.trained.denoiser,
                latents,
                masks(mask),
                text_process=TEXT,
                latent_process=LATENT,
                generator=torch.Generator().manual_seed(0),
            ).item()

    return reading


PITFALLS = {
    "ill-conditioned-bridge": Pitfall(
        "ill-conditioned bridge",
        sick={"latent_process": cv.LatentProcess("cosine", prediction="epsilon", shape=(DIM,))},
        cured={},
        both={"cycle_text_weight": 0.0},
        loss="latent_loss",
        readings={"words right on pairs": on_pairs, "words right in the cycle": in_cycle},
        verdict="ill-conditioned bridge",
    ),
    "feedback-loop": Pitfall(
        "feedback loop",
        sick={"text_policy": FULL, "text_weight": 0.05, "latent_weight": 0.05},
        cured={},
        both={"cycle_text_weight": 4.0},
        loss="cycle_text_loss",
        readings={"words right in the cycle": in_cycle, "words right on pairs": on_pairs},
        verdict="feedback loop",
    ),
    "collapse": Pitfall(
        "collapse",
        sick={},
        cured={},
        both={"cycle_text_weight": 0.0, "text_weight": 0.001},
        world={"pairs": 4096, "noise": 0.3},
        training={"learning_rate": 6e-3},
        steps=1000,
        careless="moving_latents",
        loss="latent_loss",
        readings={"spread of z_hat, 1 = as stored": spread},
        verdict="collapse",
    ),
    "scale-drift": Pitfall(
        "scale drift",
        sick={"latent_distance": "cosine"},
        cured={},
        both={"cycle_text_weight": 0.0},
        loss="latent_loss",
        readings={"length of z_hat, 1 = true": length, "words right in the cycle": in_cycle},
        verdict="scale drift",
    ),
    "hidden-code": Pitfall(
        "hidden code",
        sick={},
        cured={"latent_bridge": cv.LatentBridge(noise=0.5)},
        both={
            "cycle_text_weight": 4.0,
            "text_policy": FULL,
            "cycle_pairs": True,
            "latent_weight": lambda step: 10 ** (step / 470),
            "latent_bridge": cv.LatentBridge(),
        },
        world={"pairs": 4096, "carried": 1, "noise": 0.02},
        steps=1500,
        loss="cycle_text_loss",
        readings={
            "words right in the cycle": in_cycle,
            "after noise of 0.1 sd": after_noise,
            "words right on pairs": on_pairs,
        },
        verdict="hidden code",
    ),
    "hidden-lengths": Pitfall(
        "hidden lengths",
        sick={},
        cured={},
        both={"cycle_text_weight": 0.0, "cycle_latent_weight": 5.0, "latent_weight": 1.0},
        world={"uneven": True},
        careless="true_lengths",
        loss="cycle_latent_loss",
        readings={
            "cycle error, the partner's length": cycle_error(lambda mask: mask),
            "cycle error, a drawn length": cycle_error(lambda mask: mask.roll(1, 0)),
        },
    ),
}


def judge(pitfall: Pitfall, kind: str, watch: Callable[[], object]) -> Judged:
    """Train one of the two runs of a pitfall, and measure it."""
    world = make_world(**pitfall.world)
    options = {"latent_process": LATENT, "base_text_time": 1.0, **pitfall.both}
    objective = cv.CycleObjective(TEXT, **options | getattr(pitfall, kind))
    careless = {pitfall.careless: True} if pitfall.careless and kind == "sick" else {}
    trained = train(
        objective, world, steps=pitfall.steps, watch=watch, **pitfall.training, **careless
    )
    tokens, mask, stored = world.held_out
    with torch.no_grad():
        latents = trained.embed(stored)
    report = cycle_report(
        trained.denoiser,
        cv.Batch(tokens, mask, latents),
        text_process=TEXT,
        latent_process=objective.latent_process,
        mean=stored.mean(dim=0),
        variance=stored.var(dim=0),
    )
    return Judged(trained, world, report)


def plot(pitfall: Pitfall, runs: dict[str, Judged], path: Path) -> None:
    """The loss that looks well, and the readings that tell."""
    figure, (losses, readings) = pyplot.subplots(1, 2, figsize=(6.6, 2.8), layout="constrained")
    for shift, (kind, judged) in zip((-0.2, 0.2), runs.items(), strict=True):
        curve = [row[pitfall.loss] for row in judged.trained.history]
        losses.plot(range(0, pitfall.steps, 10), curve, color=COLOURS[kind], label=kind)
        values = [read(judged) for read in pitfall.readings.values()]
        bars = readings.barh(
            [place + shift for place in range(len(values))], values, 0.38, color=COLOURS[kind]
        )
        readings.bar_label(bars, fmt="%.2f", padding=3)
    losses.set(yscale="log", xlabel="step", title=f"{pitfall.loss} in training")
    losses.legend()
    losses.grid(alpha=0.3)
    readings.set_yticks(range(len(pitfall.readings)), pitfall.readings)
    readings.invert_yaxis()
    readings.margins(x=0.18)
    readings.set_title("measured on held-out pairs")
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
    parser.add_argument("--out", type=Path, default=DOCS / "images", help="of the pictures")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = {name: PITFALLS[name] for name in options.only or PITFALLS}
    lines = [
        "| pitfall | loss, sick / cured | readings, sick / cured | verdict |",
        "| --- | --- | --- | --- |",
    ]
    with tqdm(total=2 * sum(pitfall.steps for pitfall in chosen.values()), unit="step") as bar:
        for name, pitfall in chosen.items():
            bar.set_description(pitfall.name)
            runs = {kind: judge(pitfall, kind, bar.update) for kind in COLOURS}
            plot(pitfall, runs, options.out / f"pitfall-{name}.svg")
            lines.append(row(pitfall, runs))
    table = "\n".join(lines)
    print(table)
    if not options.only:
        page = DOCS / "pitfalls.md"
        before, _, rest = page.read_text().partition("<!-- table -->")
        after = rest.partition("<!-- /table -->")[2]
        page.write_text(f"{before}<!-- table -->\n\n{table}\n\n<!-- /table -->{after}")


if __name__ == "__main__":
    main()
