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
FULL = cv.GradientPolicy(bridge="full")


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
    "ignored-latent": Pitfall(
        "ignored latent",
        sick={"base_text_time": 0.15},
        cured={},
        both={"cycle_text_weight": 0.0},
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
        sick={},
        cured={},
        both={"cycle_text_weight": 0.0, "text_weight": 0.001},
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
            "cycle_text_weight": 8.0,
            "text_policy": FULL,
            "cycle_pairs": True,
            "latent_weight": lambda step: 10 ** (step / 270),
            "latent_bridge": cv.LatentBridge(),
        },
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
