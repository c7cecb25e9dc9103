"""An objective in three phases: the text cycle, the latent cycle too, gradients through both."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cyclevae._config import dump, load
from cyclevae._types import Count, Number
from cyclevae.batch import Batch
from cyclevae.bridges import AnyTextBridge, TextBridge
from cyclevae.denoiser import Denoiser
from cyclevae.objective import CycleObjective, StepOutput
from cyclevae.policies import all_policies, constant


@dataclass(frozen=True)
class Phases:
    """An objective whose cycles switch on in turn: see `phases`.

    It is called as a `CycleObjective` is, and a `StepModule` takes it in place of one.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> both = CycleObjective(text_process, latent_process, cycle_latent_weight=1.0)
        >>> three = Phases(both, 10, 20)
        >>> "cycle_latent_loss" in three(denoiser, toy_batch(seed=0), step=9).metrics
        False
    """

    objective: CycleObjective
    latent_cycle_from: int
    full_gradient_from: int
    text_bridge: AnyTextBridge = "straight_through"
    _stages: tuple[CycleObjective, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        o, bridge = self.objective, TextBridge.of(self.text_bridge)
        if not 0 <= self.latent_cycle_from <= self.full_gradient_from:
            raise ValueError(
                "`latent_cycle_from` and `full_gradient_from` must be steps in this order, got "
                f"{self.latent_cycle_from!r} and {self.full_gradient_from!r}"
            )
        if o.cycle_latent_weight == 0 and self.latent_cycle_from < self.full_gradient_from:
            raise ValueError(
                "the second phase switches on the latent cycle, and `objective.cycle_latent_weight`"
                " is 0: give it a weight, or both phases the same first step"
            )
        for name in ("text_policy", "latent_policy"):
            bridge_rules = [policy.bridge for policy in all_policies(getattr(o, name))]
            if bridge_rules != ["detach"]:
                raise ValueError(
                    f"`objective.{name}.bridge` must be 'detach', got "
                    f"{', '.join(map(repr, bridge_rules))}: the phases begin with stopped "
                    "gradients and open the bridges themselves"
                )
        if bridge.has_gradient is False:
            raise ValueError(
                f"`text_bridge` is that of the last phase, in which a gradient crosses it, and "
                f"{str(bridge)!r} has none; use 'straight_through'"
            )
        last = replace(
            o,
            text_bridge=self.text_bridge,
            text_policy=replace(constant(o.text_policy), bridge="full"),
            latent_policy=replace(constant(o.latent_policy), bridge="full"),
        )
        # made once: making an objective checks it
        object.__setattr__(self, "_stages", (replace(o, cycle_latent_weight=0.0), o, last))

    def at(self, step: int) -> CycleObjective:
        """The objective of a step."""
        return self._stages[(step >= self.latent_cycle_from) + (step >= self.full_gradient_from)]

    def weights(self, step: int) -> dict[str, Number]:
        """The terms that run at a step and what they weigh."""
        return self.at(step).weights(step)

    def passes(self, step: int) -> int:
        """The forward passes at a step."""
        return self.at(step).passes(step)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The denominator of each per-sample mean on this batch: see `CycleObjective.counts`."""
        return self.objective.counts(batch)

    def __call__(
        self,
        denoiser: Denoiser,
        batch: Batch,
        *,
        step: int,
        generator: torch.Generator | None = None,
        counts: Mapping[str, Count] | None = None,
        teacher: Denoiser | None = None,
    ) -> StepOutput:
        """Run the step of its phase: see `CycleObjective`."""
        return self.at(step)(
            denoiser, batch, step=step, generator=generator, counts=counts, teacher=teacher
        )

    def to_config(self) -> dict[str, Any]:
        """Every option as a plain dict; that of the objective is a dict in it.

        Raises:
            ValueError: an option that is a function of one's own.
        """
        return {**dump(self), "objective": self.objective.to_config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Phases":
        """The phases that `to_config` wrote.

        Raises:
            ValueError: an unknown key, with the nearest name, or a missing one.
        """
        options = dict(config)
        if isinstance(options.get("objective"), Mapping):
            options["objective"] = CycleObjective.from_config(options["objective"])
        return load(cls, options, {"text_bridge": TextBridge})


def phases(
    objective: CycleObjective,
    *,
    latent_cycle_from: int,
    full_gradient_from: int,
    text_bridge: AnyTextBridge = "straight_through",
) -> Phases:
    """Run an objective in three phases.

    1. up to step `latent_cycle_from`: the text cycle alone, its bridge detached;
    2. up to step `full_gradient_from`: the latent cycle too, on pseudo-texts that are data;
    3. from there on: gradients cross both bridges, `z_hat` and `text_bridge`.

    Weights keep their own schedules, so a phase may also ramp its cycle in.

    Args:
        objective: what the second phase runs; its policies detach both bridges.
        latent_cycle_from: the first step of the second phase.
        full_gradient_from: the first step of the third phase.
        text_bridge: of the third phase, one with a gradient.

    Raises:
        ValueError: a second phase whose cycle weighs nothing, steps out of order, a policy that
            does not detach, or a bridge without a gradient.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> three = phases(
        ...     CycleObjective(text_process, latent_process, cycle_latent_weight=1.0),
        ...     latent_cycle_from=1000, full_gradient_from=2000,
        ... )
        >>> [sorted(three.weights(step)) for step in (999, 1000)]
        [['cycle_text', 'latent', ...], ['cycle_latent', 'cycle_text', 'latent', ...]]
        >>> [three.at(step).latent_policy.bridge for step in (1999, 2000)]
        ['detach', 'full']
    """
    return Phases(objective, latent_cycle_from, full_gradient_from, text_bridge)
