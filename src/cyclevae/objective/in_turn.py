"""Objectives that follow each other over the steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.table import Shown
from cyclevae._base.types import Count, Number
from cyclevae.model.denoiser import Denoiser
from cyclevae.objective.batch import Batch
from cyclevae.objective.objective import CycleObjective
from cyclevae.objective.output import StepOutput
from cyclevae.objective.term import same


@dataclass(frozen=True, eq=False, repr=False)
class Phases:
    """Objectives of which the one whose start was last runs.

    It is called as a `CycleObjective` is, and a `StepModule` takes it in place of one.

    Attributes:
        objectives: in their order.
        starts: the step at which each begins, in order, the first at 0.

    Raises:
        ValueError: no objective, or starts that do not fit.

    Examples:
        >>> from cyclevae import CycleText, Latent, Text
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, *processes = toy_denoiser(seed=0)
        >>> base = CycleObjective(*processes, [Text(), Latent()])
        >>> two = Phases((base, CycleObjective(*processes)), starts=(0, 10))
        >>> "cycle_text_loss" in two(denoiser, toy_batch(seed=0), step=9).metrics
        False
    """

    objectives: tuple[CycleObjective, ...]
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("objectives", "starts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for objective in self.objectives:
            checks.check_type("objectives", objective, CycleObjective)
        rising = list(self.starts) == sorted(self.starts)
        if len(self.starts) != len(self.objectives) or self.starts[:1] != (0,) or not rising:
            raise ValueError(
                f"`starts` must be one step for each of the {len(self.objectives)} objectives, in "
                f"order from 0, got {self.starts!r}"
            )

    def at(self, step: int) -> CycleObjective:
        """The objective of a step."""
        return self.objectives[sum([step >= start for start in self.starts]) - 1]

    def weights(self, step: int) -> dict[str, Number]:
        """The terms that run at a step and what they weigh."""
        return self.at(step).weights(step)

    def passes(self, step: int) -> int:
        """The forward passes at a step."""
        return self.at(step).passes(step)

    def describe(self, step: int = 0) -> Shown:
        """Who learns from what at a step: see `CycleObjective.describe`."""
        return self.at(step).describe(step)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The denominators of all of them: see `CycleObjective.counts`."""
        return {n: c for objective in self.objectives for n, c in objective.counts(batch).items()}

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
        objective = self.at(step)
        if counts is not None:
            known = objective.known_counts()
            everywhere = {name for each in self.objectives for name in each.known_counts()}
            counts = {n: c for n, c in counts.items() if n in known or n not in everywhere}
        return objective(
            denoiser, batch, step=step, generator=generator, counts=counts, teacher=teacher
        )

    def to_config(self) -> dict[str, Any]:
        """Every option as a plain dict; the objectives are dicts in it.

        Raises:
            ValueError: an option that is a function of one's own.
        """
        return {
            "objectives": [objective.to_config() for objective in self.objectives],
            "starts": list(self.starts),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **classes: Any) -> "Phases":
        """The phases that `to_config` wrote; classes are those of `CycleObjective.from_config`.

        Raises:
            ValueError: an unknown key, with the nearest name, or a missing one.
        """
        for key in config:
            checks.check_choice("key", key, ("objectives", "starts"))
        for key in ("objectives", "starts"):
            if key not in config:
                raise ValueError(f"`{key}` is missing from the configuration of phases")
        objectives = [CycleObjective.from_config(each, **classes) for each in config["objectives"]]
        return cls(tuple(objectives), tuple(config["starts"]))

    def __repr__(self) -> str:
        phases = zip(self.starts, self.objectives, strict=True)
        return "\n\n".join([str(objective.overview(start)) for start, objective in phases])

    def _repr_html_(self) -> str:
        phases = zip(self.starts, self.objectives, strict=True)
        return "".join([objective.overview(start)._repr_html_() for start, objective in phases])

    def __eq__(self, other: object) -> bool:
        return same(self, other)

    def __hash__(self) -> int:
        return hash((type(self), self.starts))
