"""The pitfalls of docs/pitfalls.md: how each is fallen into, what cures it, and what reveals it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from world import DIM, TEXT, Trained, World

import cyclevae as cv
from cyclevae.diagnostics import CycleReport

LATENT = cv.LatentProcess("cosine", prediction="v", shape=(DIM,))
BASE: list[cv.Term] = [cv.Text(time=1.0), cv.Latent()]


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
    sick: list[cv.Term]
    cured: list[cv.Term]
    loss: str
    readings: dict[str, Reading]
    verdict: str | None = None  # of the report
    sick_process: cv.LatentProcess = LATENT
    bridge: cv.LatentBridge = field(default_factory=cv.LatentBridge)  # in use: of the report
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


def lost_to_another(judged: Judged) -> float:
    probe = judged.report.text
    return probe.gap / probe.shuffled


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


def hidden(noise: float) -> list[cv.Term]:
    """The terms under which a code hides in the latent, but for the noise that drowns it."""
    return [
        cv.Text(time=1.0),
        cv.Latent(weight=lambda step: 10 ** (step / 270)),
        cv.CycleText(weight=8.0, bridge=cv.LatentBridge(noise=noise), policy="full", pairs=True),
    ]


WEAK: list[cv.Term] = [cv.Text(weight=0.001, time=1.0), cv.Latent()]
LATENT_CYCLE: list[cv.Term] = [
    cv.Text(time=1.0),
    cv.CycleLatent(weight=5.0),
    cv.Latent(weight=1.0),
]

PITFALLS = {
    "ill-conditioned-bridge": Pitfall(
        "ill-conditioned bridge",
        sick=BASE,
        cured=BASE,
        sick_process=cv.LatentProcess("cosine", prediction="epsilon", shape=(DIM,)),
        loss="latent_loss",
        readings={"words right on pairs": on_pairs, "words right in the cycle": in_cycle},
        verdict="ill-conditioned bridge",
    ),
    "feedback-loop": Pitfall(
        "feedback loop",
        sick=[
            cv.Text(weight=0.05, time=1.0),
            cv.Latent(weight=0.05),
            cv.CycleText(policy="full"),
        ],
        cured=[*BASE, cv.CycleText()],
        loss="cycle_text_loss",
        readings={"words right in the cycle": in_cycle, "words right on pairs": on_pairs},
        verdict="feedback loop",
    ),
    "ignored-latent": Pitfall(
        "ignored latent",
        sick=[cv.Text(time=0.15), cv.Latent()],
        cured=BASE,
        world={"pairs": 4096, "twice": True, "scale": 0.007},
        steps=800,
        training={"learning_rate": 6e-3},
        loss="text_loss",
        readings={
            "words right on pairs": on_pairs,
            "share of the loss that another's latent makes": lost_to_another,
        },
        verdict="ignored latent",
    ),
    "collapse": Pitfall(
        "collapse",
        sick=WEAK,
        cured=WEAK,
        world={"pairs": 4096, "noise": 0.3},
        training={"learning_rate": 1.2e-2},
        steps=800,
        careless="moving_latents",
        loss="latent_loss",
        readings={"spread of z_hat, 1 = as stored": spread},
        verdict="collapse",
    ),
    "scale-drift": Pitfall(
        "scale drift",
        sick=[cv.Text(time=1.0), cv.Latent(distance="cosine")],
        cured=BASE,
        loss="latent_loss",
        readings={"length of z_hat, 1 = true": length, "words right in the cycle": in_cycle},
        verdict="scale drift",
    ),
    "hidden-code": Pitfall(
        "hidden code",
        sick=hidden(noise=0.0),
        cured=hidden(noise=0.5),
        world={"pairs": 4096, "carried": 1, "noise": 0.02},
        training={"learning_rate": 4e-3},
        steps=1000,
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
        sick=LATENT_CYCLE,
        cured=LATENT_CYCLE,
        world={"uneven": True},
        careless="true_lengths",
        loss="cycle_latent_loss",
        readings={
            "cycle error, the partner's length": cycle_error(lambda mask: mask),
            "cycle error, a drawn length": cycle_error(lambda mask: mask.roll(1, 0)),
        },
    ),
}
