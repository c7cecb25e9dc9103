"""Objective and network as one module."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cyclevae._base.types import Count
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.teacher import Teacher
from cyclevae.objective.batch import Batch
from cyclevae.objective.output import StepOutput


class StepModule(nn.Module):
    """Objective and network as one module: what one wraps in DDP or compiles.

    `forward(batch, step)` runs every pass of a step inside one forward, so that DDP sees a single
    forward and backward however many passes the plan has. Its `network` may be replaced or wrapped
    in place, as in `step.network = torch.compile(step.network)`: it is the one that trains.

    Args:
        denoiser: the model, made by `as_denoiser`.
        objective: a `CycleObjective`, or the `phases` of one.
        teacher: a `Teacher`, for the priors `learned` and `ddvi`; it is part of the `state_dict`.
            Call `teacher.update(network)` after each optimizer step.

    Raises:
        TypeError: a denoiser without a registered network, or a teacher that is no `Teacher`.
        RuntimeError: a replaced network of a denoiser of one's own without `with_network`.

    Examples:
        >>> from cyclevae import CycleObjective
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> module = StepModule(denoiser, CycleObjective(text_process, latent_process))
        >>> module(toy_batch(seed=0), step=0).loss.ndim
        0
    """

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Callable[..., StepOutput],
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        network = getattr(denoiser, "network", None)
        if not isinstance(network, nn.Module):
            raise TypeError(
                "StepModule needs a denoiser whose `network` is its torch.nn.Module, so that its "
                f"parameters are registered; got {type(denoiser).__name__}: make it by as_denoiser"
            )
        if teacher is not None and not isinstance(teacher, Teacher):
            raise TypeError(
                f"`teacher` must be a Teacher, got {type(teacher).__name__}; "
                "make it by Teacher(network)"
            )
        self.network = network
        self.denoiser = denoiser
        self.objective = objective
        self.teacher = teacher

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "network" and hasattr(self, "denoiser"):
            self._follow()

    def _follow(self) -> None:
        """Let the denoiser call the registered network, whoever has replaced that."""
        denoiser: Any = self.denoiser
        if denoiser.network is self.network:
            return
        if not hasattr(denoiser, "with_network"):
            raise RuntimeError(
                f"`network` was replaced, and the {type(denoiser).__name__} around the old one has "
                "no `with_network(network)` to follow: make a new StepModule, or give it one"
            )
        self.denoiser = denoiser.with_network(self.network)

    if TYPE_CHECKING:  # torch says of the call that it returns Any

        def __call__(
            self,
            batch: Batch,
            step: int,
            generator: torch.Generator | None = None,
            counts: Mapping[str, Count] | None = None,
        ) -> StepOutput:
            """See `forward`."""

    def forward(
        self,
        batch: Batch,
        step: int,
        generator: torch.Generator | None = None,
        counts: Mapping[str, Count] | None = None,
    ) -> StepOutput:
        """One step of the objective."""
        if not torch.compiler.is_compiling():
            self._follow()  # as what sets `_modules` calls no __setattr__
        teacher = None if self.teacher is None else self.teacher.denoiser
        return self.objective(
            self.denoiser,
            batch,
            step=step,
            generator=generator,
            counts=counts,
            teacher=teacher,
        )
