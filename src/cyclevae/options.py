"""What a step may be told: the weight of each term, the bridges, the prior, and who learns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

from cyclevae import _checks
from cyclevae._config import Part, dump, load
from cyclevae._prior import Prior, as_tensors, check_prior, reads_teacher
from cyclevae._types import Number, Prediction, Schedule
from cyclevae.base import AnyDistance, check_distance
from cyclevae.bridges import AnyTextBridge, TextBridge
from cyclevae.contrastive import Critic
from cyclevae.gradient_policy import GradientPolicy
from cyclevae.latent_bridges import NOISED, LatentBridge
from cyclevae.latent_process import LatentProcess
from cyclevae.non_finite import NonFinite
from cyclevae.policies import (
    LATENT_POLICIES,
    TEXT_POLICIES,
    AnyPolicy,
    named_policy,
    policy_class,
)
from cyclevae.schedules import Anneal, Ramp
from cyclevae.text_process import TextProcess
from cyclevae.times import UNIFORM, TimePolicy

Weight = Number | Ramp | Schedule
CONFIG_VERSION = 1
Self_ = TypeVar("Self_", bound="Options")
TERMS = (
    "text",
    "latent",
    "unconditional",
    "cycle_text",
    "cycle_latent",
    "prior",
    "sleep",
    "contrastive",
    "text_marginal",
)
READ_A_BRIDGE = ("cycle_text", "cycle_latent", "prior", "contrastive")
_PARTS: dict[str, Part] = {
    "text_process": TextProcess,
    "latent_process": LatentProcess,
    "text_policy": policy_class,
    "latent_policy": policy_class,
    "policies": GradientPolicy,
    "text_bridge": TextBridge,
    "latent_bridge": LatentBridge,
    "bridge_time": TimePolicy,
    "base_text_time": TimePolicy,
    "base_latent_time": TimePolicy,
    "unconditional_latent_time": TimePolicy,
    "high": Anneal,
    **{f"{term}_weight": Ramp for term in TERMS},
}


@dataclass(frozen=True)
class Options:
    """The options of a `CycleObjective`, and their plain form."""

    text_process: TextProcess
    latent_process: LatentProcess
    text_weight: Weight = 1.0
    latent_weight: Weight = 5.0
    unconditional_weight: Weight = 0.0
    cycle_text_weight: Weight = 4.0
    cycle_latent_weight: Weight = 0.0
    prior_weight: Weight = 0.0
    sleep_weight: Weight = 0.0
    contrastive_weight: Weight = 0.0
    text_marginal_weight: Weight = 0.0
    prior: Prior = "mmd"
    prior_options: Mapping[str, Any] = field(default_factory=dict)
    pool_prior: bool = False
    contrastive_options: Mapping[str, Any] = field(default_factory=dict)
    bridge_time: Number | TimePolicy = 1.0
    base_text_time: Number | TimePolicy = UNIFORM
    base_latent_time: Number | TimePolicy | None = 1.0
    unconditional_latent_time: Number | TimePolicy | None = None
    null_text_rate: Number | None = None
    latent_distance: AnyDistance = "mse"
    latent_space: Prediction | None = None
    min_snr: Number | None = None
    cycle_latent_distance: AnyDistance = "mse"
    text_bridge: AnyTextBridge = "categorical"
    latent_bridge: LatentBridge = NOISED
    show_latent: bool = False
    text_policy: AnyPolicy = "stop_gradient"
    latent_policy: AnyPolicy = "stop_gradient"
    p_dual: Number = 1.0
    cycle_every: int = 1
    cycle_fraction: Number = 1.0
    cycle_pairs: bool = False
    join_passes: bool = False
    non_finite: NonFinite | None = None
    caps: Mapping[str, Number] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for term in TERMS:
            weight = getattr(self, f"{term}_weight")
            if not callable(weight):
                _checks.check_nonnegative(f"{term}_weight", weight)
        for name in ("latent_distance", "cycle_latent_distance"):
            check_distance(name, getattr(self, name))
        if self.non_finite is not None:
            _checks.check_choice("non_finite", self.non_finite, get_args(NonFinite))
        if self.latent_space is not None:
            _checks.check_choice("latent_space", self.latent_space, get_args(Prediction))
        if self.min_snr is not None:
            _checks.check_positive("min_snr", self.min_snr)
        for name in ("p_dual", "null_text_rate"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {share!r}")
        if not 0 < self.cycle_fraction <= 1:
            raise ValueError(f"`cycle_fraction` must lie in (0, 1], got {self.cycle_fraction!r}")
        if not (isinstance(self.cycle_every, int) and self.cycle_every >= 1):
            raise ValueError(
                f"`cycle_every` must be an integer of at least 1, got {self.cycle_every!r}"
            )
        if self.join_passes and self.non_finite == "zero":
            raise ValueError(
                "`join_passes` puts two terms into one pass, where non_finite='zero' cannot tell "
                "them apart: use 'skip', or leave the passes apart"
            )
        for term, cap in self.caps.items():
            if term not in TERMS:
                raise ValueError(f"unknown term {term!r} in `caps`; {_checks.nearest(term, TERMS)}")
            _checks.check_positive(f"caps[{term!r}]", cap)
        self._check_times()
        for name, presets in (("text_policy", TEXT_POLICIES), ("latent_policy", LATENT_POLICIES)):
            object.__setattr__(self, name, named_policy(name, getattr(self, name), presets))
        if isinstance(self.latent_policy, GradientPolicy):
            self.bridge.check_policy(self.latent_policy)
        if self.text_marginal_weight != 0 and self.bridge.differentiable is False:
            raise ValueError(
                f"`text_marginal_weight` teaches the decoder through a relaxed text, and the "
                f"{str(self.bridge)!r} bridge makes none; use a bridge such as 'gumbel' with "
                "latent_policy=GradientPolicy('full'), or the `marginal_weight` of 'rloo'"
            )
        check_prior(
            self.prior,
            self.prior_options,
            pool=self.pool_prior,
            text_process=self.text_process,
            latent_process=self.latent_process,
        )
        self._check_contrastive()

    @property
    def bridge(self) -> TextBridge:
        """The text bridge, where `text_bridge` may be a bare name or a function."""
        return TextBridge.of(self.text_bridge)

    @property
    def null_rate(self) -> Number:
        """The share of unconditional pairs whose text is fully masked."""
        if self.null_text_rate is not None:
            return self.null_text_rate
        return 0.1 if self.prior_weight != 0 and reads_teacher(self.prior) else 0.0

    def to_config(self) -> dict[str, Any]:
        """Every option and the version as a plain dict, for YAML or JSON.

        Raises:
            ValueError: an option that is a function of one's own.

        Examples:
            >>> from cyclevae import CycleObjective, ramp
            >>> from cyclevae.testing import toy_batch, toy_denoiser
            >>> _, text_process, latent_process = toy_denoiser(seed=0)
            >>> objective = CycleObjective(text_process, latent_process)
            >>> objective.to_config()["text_bridge"]
            'categorical'
        """
        return {"version": CONFIG_VERSION, **dump(self)}

    @classmethod
    def from_config(cls: type[Self_], config: Mapping[str, Any]) -> Self_:
        """The objective that `to_config` wrote; a ramp, a bridge or times are dicts of arguments.

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
        if isinstance(options.get("prior_options"), Mapping):
            options["prior_options"] = as_tensors(options["prior_options"])
        return load(cls, options, _PARTS)

    def _check_times(self) -> None:
        times = ("bridge_time", "base_text_time", "base_latent_time", "unconditional_latent_time")
        for name in times:
            time = getattr(self, name)
            if isinstance(time, int | float) and not 0 <= time <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {time!r}")
        if any(getattr(self, f"{term}_weight") != 0 for term in READ_A_BRIDGE):
            self.latent_process.refuse_ill_conditioned(highest(self.bridge_time))
        if self.latent_weight != 0 and isinstance(self.base_latent_time, int | float):
            space = self.latent_space or self.latent_process.prediction
            self.latent_process.refuse_ill_conditioned(self.base_latent_time, space=space)

    def _check_contrastive(self) -> None:
        known = ("temperature", "critic")
        for name, value in self.contrastive_options.items():
            if name not in known:
                raise ValueError(
                    f"unknown key {name!r} in `contrastive_options`; {_checks.nearest(name, known)}"
                )
            if name == "critic":
                _checks.check_choice("contrastive_options['critic']", value, get_args(Critic))
            else:
                _checks.check_positive("contrastive_options['temperature']", value)


def highest(time: Number | TimePolicy, step: int = 0) -> Number:
    """The highest time that may come at a step."""
    return time.highest(step) if isinstance(time, TimePolicy) else time
