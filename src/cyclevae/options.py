"""What a step may be told: the weight of each term, the bridges, and who learns."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch

from cyclevae import _checks
from cyclevae._config import dump, load
from cyclevae._types import Number, Schedule
from cyclevae.bridges import Bridge
from cyclevae.cycles import STOP_GRADIENT
from cyclevae.gradient_policy import GradientPolicy
from cyclevae.latent_process import LatentProcess
from cyclevae.priors._samples import Moment
from cyclevae.schedules import Ramp
from cyclevae.text_process import TextProcess

Weight = Number | Ramp | Schedule
Prior = Literal["moment", "mmd"]
CONFIG_VERSION = 1
Self_ = TypeVar("Self_", bound="Options")
TERMS = ("text", "latent", "unconditional", "cycle_text", "cycle_latent", "prior")
_PARTS = {
    "text_process": TextProcess,
    "latent_process": LatentProcess,
    "text_policy": GradientPolicy,
    "latent_policy": GradientPolicy,
    **{f"{term}_weight": Ramp for term in TERMS},
}


@dataclass(frozen=True)
class Options:
    """The options of a `CycleObjective`, which pass they need, and their plain form."""

    text_process: TextProcess
    latent_process: LatentProcess
    text_weight: Weight = 1.0
    latent_weight: Weight = 5.0
    unconditional_weight: Weight = 1.0
    cycle_text_weight: Weight = 2.0
    cycle_latent_weight: Weight = 10.0
    prior_weight: Weight = 0.0
    prior: Prior = "mmd"
    prior_mean: Moment | None = None
    prior_variance: Moment = 1.0
    bridge_time: Number = 1.0
    base_latent_time: Number | None = 1.0
    bridge: Bridge = "argmax"
    temperature: Number = 1.0
    show_latent: bool = False
    text_policy: GradientPolicy = STOP_GRADIENT
    latent_policy: GradientPolicy = STOP_GRADIENT

    def __post_init__(self) -> None:
        for term in TERMS:
            weight = getattr(self, f"{term}_weight")
            if not callable(weight):
                _checks.check_nonnegative(f"{term}_weight", weight)
        _checks.check_choice("prior", self.prior, get_args(Prior))
        _checks.check_choice("bridge", self.bridge, get_args(Bridge))
        _checks.check_positive("temperature", self.temperature)
        for name in ("prior_mean", "prior_variance"):
            moment = getattr(self, name)
            if isinstance(moment, int | float) and not math.isfinite(moment):
                raise ValueError(f"`{name}` must be finite, got {moment!r}")
        if isinstance(self.prior_variance, int | float):
            _checks.check_positive("prior_variance", self.prior_variance)
        for name in ("bridge_time", "base_latent_time"):
            time = getattr(self, name)
            if time is not None and not 0 <= time <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {time!r}")
        if self.latent_policy.bridge != "detach":
            raise ValueError(
                f"`latent_policy.bridge` must be 'detach', got {self.latent_policy.bridge!r}: the "
                f"{self.bridge!r} bridge is a choice of ids and has no gradient"
            )
        if any(
            getattr(self, f"{term}_weight") != 0 for term in ("cycle_text", "cycle_latent", "prior")
        ):
            self.latent_process.refuse_ill_conditioned(self.bridge_time)

    def weights(self, step: int) -> dict[str, Number]:
        """The terms that run at a step and what they weigh; the same on every rank.

        Examples:
            >>> from cyclevae import CycleObjective, ramp
            >>> from cyclevae.testing import toy_batch, toy_denoiser
            >>> _, text_process, latent_process = toy_denoiser(seed=0)
            >>> objective = CycleObjective(
            ...     text_process, latent_process, cycle_text_weight=ramp(2.0, warmup_steps=10)
            ... )
            >>> "cycle_text" in objective.weights(9), "cycle_text" in objective.weights(10)
            (False, True)
        """
        weights = {}
        for term in TERMS:
            weight = getattr(self, f"{term}_weight")
            if callable(weight):
                weight = weight(step)
                if not torch.compiler.is_compiling():  # there it is symbolic, as the step is
                    _checks.check_nonnegative(f"{term}_weight({step})", weight)
            if weight > 0:
                weights[term] = weight
        return weights

    def passes(self, step: int) -> int:
        """The forward passes of the denoiser at a step.

        Examples:
            >>> from cyclevae import CycleObjective, ramp
            >>> from cyclevae.testing import toy_batch, toy_denoiser
            >>> _, text_process, latent_process = toy_denoiser(seed=0)
            >>> objective = CycleObjective(text_process, latent_process)
            >>> objective.passes(step=0)  # base and cycles share four, the unconditional has one
            5
        """
        terms = self.weights(step).keys()
        bridges = bool(terms & {"cycle_text", "prior"})
        own_base = "latent" in terms and not (bridges and self.shares_encoder_pass(terms))
        own_prior = {"cycle_text", "prior"} <= terms and bool(self.text_policy.freeze_bridge)
        decodes = bool(terms & {"text", "cycle_latent"})
        alone = len(terms & {"unconditional", "cycle_text", "cycle_latent"})
        return bridges + own_base + own_prior + decodes + alone

    def to_config(self) -> dict[str, Any]:
        """Every option and the version as a plain dict, for YAML or JSON.

        Raises:
            ValueError: an option that is a function of one's own.

        Examples:
            >>> from cyclevae import CycleObjective, ramp
            >>> from cyclevae.testing import toy_batch, toy_denoiser
            >>> _, text_process, latent_process = toy_denoiser(seed=0)
            >>> objective = CycleObjective(text_process, latent_process)
            >>> objective.to_config()["bridge"]
            'argmax'
        """
        return {"version": CONFIG_VERSION, **dump(self)}

    @classmethod
    def from_config(cls: type[Self_], config: Mapping[str, Any]) -> Self_:
        """The objective that `to_config` wrote; a ramp is a dict of its arguments.

        Raises:
            ValueError: an unknown key, with the nearest name, or another version.

        Examples:
            >>> from cyclevae import CycleObjective, ramp
            >>> from cyclevae.testing import toy_batch, toy_denoiser
            >>> _, text_process, latent_process = toy_denoiser(seed=0)
            >>> objective = CycleObjective(text_process, latent_process)
            >>> CycleObjective.from_config(objective.to_config()) == objective
            True
        """
        options = dict(config)
        version = options.pop("version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise ValueError(f"`version` must be {CONFIG_VERSION}, got {version!r}")
        parts: dict[str, Any] = {}
        for name, part in _PARTS.items():
            if isinstance(options.get(name), Mapping):
                parts[name] = load(part, options[name])
        for name in ("prior_mean", "prior_variance"):
            if isinstance(options.get(name), list):
                parts[name] = torch.tensor(options[name])
        return load(cls, options, **parts)

    def shares_encoder_pass(self, terms: Collection[str]) -> bool:
        """Whether the base encoder loss reads the pass that makes the bridge."""
        # Below full noise the base pass has seen the true latent and must not become a bridge.
        full_noise = self.base_latent_time == self.bridge_time == 1.0
        return full_noise and not ("cycle_text" in terms and self.text_policy.freeze_bridge)
