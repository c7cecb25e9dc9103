"""The keys under `loss:` that the adapter reads, and the objective they mean."""

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from cyclevae._base import checks
from cyclevae._base.types import Number
from cyclevae.adapters.latentdlm.checkpoints import load_into, read_checkpoint
from cyclevae.adapters.latentdlm.host import HostDenoiser, latent_process_of, text_process_of
from cyclevae.adapters.latentdlm.runs import check_process
from cyclevae.adapters.latentdlm.words import host_words
from cyclevae.gradient_policy.presets import LATENT_POLICIES, TEXT_POLICIES
from cyclevae.objective.config import parse
from cyclevae.objective.objective import CycleObjective
from cyclevae.objective.term import Weight
from cyclevae.objective.terms.prior import Prior
from cyclevae.processes.ids import TaughtPadding
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.schedules import Ramp, ramp, take_turns
from cyclevae.processes.times import TimePolicy

_HOSTS_OWN = ("loss_type", "loss_scale", "reduction", "use_cross_entropy", "text_kl_weight")
_IDS = ("argmax", "categorical", "unmask", "rloo")
_PADDING: dict[str, TaughtPadding] = {"host": "all", "first": "first", "exclude": "none"}
_SIGNAL = 0.5  # of a latent's amplitude, above which pure noise does not pass for a noised latent
_OPEN = ("full", "alternating")  # policies whose gradients cross the bridge
_OF_ROWS = ("learned", "ddvi")  # priors that read a teacher


@dataclass(frozen=True)
class LossKeys:
    """What stands under `loss:`; `docs/latentdlm.md` says what each key does."""

    text_loss_weight: Number = 1.0
    latent_loss_weight: Number = 0.1
    unconditional_loss_weight: Number = 0.0
    base_loss: Literal["host", "corrected"] = "host"
    text_loss_padding: Literal["host", "first", "exclude"] = "host"
    text_t_mode: Literal["full", "random"] = "full"
    latent_t_mode: Literal["full", "random"] = "full"
    cycle_start_step: int = 0
    cycle_warmup_steps: int = 0
    cycle_ramp_steps: int = 0
    cycle_text_weight: Number = 1.0
    cycle_text_warmup_steps: int | None = None
    cycle_text_ramp_steps: int | None = None
    cycle_latent_weight: Number = 0.1
    cycle_latent_warmup_steps: int | None = None
    cycle_latent_ramp_steps: int | None = None
    cycle_latent_sampling: str = "argmax"
    cycle_latent_t_min: Number | None = None
    cycle_latent_t_max: Number = 1.0
    cycle_latent_distance: Literal["mse", "cosine", "normalized_mse"] = "mse"
    cycle_stop_grad_latent: bool = True
    cycle_text_policy: str | Mapping[str, Any] | None = None
    cycle_latent_policy: str | Mapping[str, Any] = "stop_gradient"
    cycle_show_latent: bool = False
    cycle_bridge_steps: int = 1
    cycle_bridge_noise: Number = 0.0
    cycle_bridge_norm: Number | None = None
    cycle_bridge_threshold: Number | None = None
    cycle_max_gain: Number = 10.0
    cycle_every: int = 1
    cycle_fraction: Number = 1.0
    cycle_pairs: bool = True
    cycle_p_dual: Number = 1.0
    cycle_checkpoint_passes: bool = False
    cycle_non_finite: str | None = "zero"
    cycle_dead_steps: int = 20
    cycle_seed: int = 0
    prior_weight: Number = 0.0
    prior_warmup_steps: int | None = None
    prior_ramp_steps: int | None = None
    prior_name: Literal["moment", "mmd", "sigreg", "learned", "ddvi"] = "mmd"
    prior_options: Mapping[str, Any] = field(default_factory=dict)
    prior_pool: bool = False
    prior_teacher: str | None = None
    prior_sleep_weight: Number = 0.0

    def __post_init__(self) -> None:
        if self.cycle_latent_sampling not in _IDS:
            raise ValueError(
                f"`loss.cycle_latent_sampling` is {self.cycle_latent_sampling!r}; the host's text "
                f"encoder reads ids, so it must be one of {', '.join(map(repr, _IDS))}"
            )
        if self.cycle_non_finite not in ("zero", "raise", None):
            raise ValueError(
                f"`loss.cycle_non_finite` must be zero, raise or null, got "
                f"{self.cycle_non_finite!r}: the host's loop cannot skip a step on all ranks"
            )
        for option in fields(self):
            key, value = f"loss.{option.name}", getattr(self, option.name)
            if key.endswith("_weight"):
                checks.check_nonnegative(key, value)
            elif key.endswith(("_warmup_steps", "_ramp_steps", "start_step")) and value is not None:
                checks.check_count(key, value, least=0)
        checks.check_positive("loss.cycle_max_gain", self.cycle_max_gain)
        checks.check_count("loss.cycle_every", self.cycle_every)
        checks.check_count("loss.cycle_dead_steps", self.cycle_dead_steps)
        checks.check_share("loss.cycle_fraction", self.cycle_fraction, above_zero=True)
        checks.check_share("loss.cycle_p_dual", self.cycle_p_dual)
        object.__setattr__(self, "prior_options", self._parsed_prior_options())
        self._check_policies()
        self._check_teacher()

    def _parsed_prior_options(self) -> dict[str, Any]:
        known, parsed = Prior.options_beside({"prior": self.prior_name}), {}
        for name, value in self.prior_options.items():
            key = f"loss.prior_options.{name}"
            if name not in known:
                raise ValueError(f"unknown key `{key}`; {checks.nearest(name, known)}")
            parsed[name] = parse(key, value, known[name])
        return parsed

    def _check_policies(self) -> None:
        for name, presets in (("text", TEXT_POLICIES), ("latent", LATENT_POLICIES)):
            policy = getattr(self, key := f"cycle_{name}_policy")
            if isinstance(policy, str):
                checks.check_choice(f"loss.{key}", policy, list(presets))
        policy, sampling = self.cycle_latent_policy, self.cycle_latent_sampling
        bridge = policy if isinstance(policy, str) else policy.get("bridge")
        if (bridge in (*_OPEN, "last")) != (sampling == "rloo"):
            raise ValueError(
                f"`loss.cycle_latent_policy` is {policy!r} and `loss.cycle_latent_sampling` "
                f"{sampling!r}: `rloo` is the one sampling with a gradient, and goes with the "
                "policies `full` and `alternating` alone"
            )

    def _check_teacher(self) -> None:
        if self._reads_teacher and self.prior_teacher is None:
            raise ValueError(
                f"`loss.prior_name` is {self.prior_name!r}, which reads a frozen model of latents: "
                "set `loss.prior_teacher` to a checkpoint.pt of a run with `loss_type: "
                "unconditional`"
            )
        if self.prior_pool and self.prior_name in _OF_ROWS and self.prior_weight:
            raise ValueError(
                f"`loss.prior_pool` has no effect on the prior {self.prior_name!r}, a mean over "
                "rows: leave it out"
            )

    @property
    def _reads_teacher(self) -> bool:
        return self.prior_weight > 0 and self.prior_name in _OF_ROWS

    @classmethod
    def read(cls, loss: Mapping[str, Any]) -> "LossKeys":
        """The keys of the host's config; those that it does not know are left to the host.

        Raises:
            ValueError: a key that looks like one of ours and is none, with the nearest; or a value
                that does not fit.
        """
        hints = get_type_hints(cls)
        given = {}
        for name in loss:
            key = f"loss.{name}"
            if name in hints:
                hint, value = hints[name], loss[name]
                if get_origin(hint) is Literal:
                    checks.check_choice(key, value, get_args(hint))
                if hint in (int, int | None) and isinstance(value, float) and value.is_integer():
                    value = int(value)  # 5e3 steps
                given[name] = parse(key, value, hint)
            elif name not in _HOSTS_OWN and _looks_like(str(name), hints):
                raise ValueError(f"unknown key `{key}`; {checks.nearest(str(name), hints)}")
        return cls(**given)

    def unused(self) -> list[str]:
        """The keys that a value was given to and that have no effect."""
        names = []
        if self.latent_t_mode == "full":
            names += ["cycle_latent_t_min", "cycle_latent_t_max"]
        if self.cycle_text_policy is not None:
            names += ["cycle_stop_grad_latent"]
        if self.prior_weight == 0:
            names += ["prior_name", "prior_options", "prior_pool"]
            names += ["prior_warmup_steps", "prior_ramp_steps"] * (not self.prior_sleep_weight)
        if not self._reads_teacher:
            names += ["prior_teacher"]
        given = self.given()
        return [name for name in names if name in given]

    def given(self) -> list[str]:
        """The keys of ours whose value is not the default."""
        default = LossKeys()
        names = [
            f.name for f in fields(self) if f.name not in ("text_loss_weight", "latent_loss_weight")
        ]
        return [name for name in names if getattr(self, name) != getattr(default, name)]

    def teacher(self, trainer: Any) -> HostDenoiser | None:
        """The frozen model that a learned prior reads, by the weights of another run.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: one of another model, or of another latent process.
        """
        if not self._reads_teacher or self.prior_teacher is None:
            return None
        path = Path(self.prior_teacher)
        model = copy.deepcopy(trainer.model)
        saved = read_checkpoint(path)["model_state_dict"]
        check_process(path, saved, trainer, "`loss.prior_teacher`", ", or take another teacher")
        load_into(model, saved, path)
        return HostDenoiser(model.requires_grad_(False).eval())

    def objective(self, trainer: Any) -> CycleObjective:
        """The objective of a trainer.

        Raises:
            ValueError: options that do not go together, or an epsilon process whose bridge would be
                ill-conditioned: the message names the ways out as values of the config.
        """
        process = latent_process_of(trainer, self.cycle_max_gain)
        terms = self._terms(trainer, self._bridge_time(process))
        terms = {name: term for name, term in terms.items() if term["weight"] != 0}
        if not terms:
            raise ValueError("every weight under `loss` is 0, so there is nothing to train on")
        config = {
            "text_process": text_process_of(trainer, _PADDING[self.text_loss_padding]),
            "latent_process": process,
            "terms": terms,
            "non_finite": self.cycle_non_finite,
            "seed": self.cycle_seed,
        }
        with host_words():
            return CycleObjective.from_config(config)

    def _terms(self, trainer: Any, time: Number | TimePolicy) -> dict[str, dict[str, Any]]:
        """The options of each term, in the order of their draws."""
        corrected, stable = self.base_loss == "corrected", is_stable(trainer)
        clamps = stable and not corrected
        text_policy = self.cycle_text_policy
        if text_policy is None:
            text_policy = "stop_gradient" if self.cycle_stop_grad_latent else "full"
        opens = text_policy if isinstance(text_policy, str) else text_policy.get("bridge")
        text_weight, latent_weight = self._cycle_weights()
        guards = {
            "steps": self.cycle_bridge_steps,
            "norm": self.cycle_bridge_norm,
            "threshold": self.cycle_bridge_threshold,
        }
        without_time = {
            "every": self.cycle_every,
            "fraction": self.cycle_fraction,
            "pairs": self.cycle_pairs,
        }
        cycle = {"time": time, **without_time}
        return {
            "text": {
                "weight": self.text_loss_weight,
                "time": _base_time(self.text_t_mode, margin=1e-4),
                "cap": 100.0 if clamps else None,
            },
            "cycle_latent": {
                "weight": latent_weight,
                "bridge": {"name": self.cycle_latent_sampling},
                "show_latent": self.cycle_show_latent,
                "distance": self.cycle_latent_distance,
                "policy": self.cycle_latent_policy,
                **cycle,
            },
            "latent": {
                # the other file reads no weight
                "weight": self.latent_loss_weight if corrected or stable else 1.0,
                "time": _base_time(self.latent_t_mode),
                "distance": "normalized_mse" if clamps else "mse",
                "cap": 10.0 if clamps else None,
            },
            "cycle_text": {
                "weight": text_weight,
                "bridge": {"noise": self.cycle_bridge_noise, **guards},
                "policy": text_policy,
                **cycle,
            },
            "prior": {
                "weight": self._ramp("prior"),
                "prior": self.prior_name,
                "pool": self.prior_pool,
                "bridge": guards,
                "time": time,
                # through all passes only where the text cycle pays for that anyway
                **({"through": "full"} if opens in _OPEN and self.prior_name != "ddvi" else {}),
                **self.prior_options,
            },
            "sleep": {"weight": self._ramp("prior_sleep", "prior"), **without_time},
            "unconditional": {"weight": self.unconditional_loss_weight},
        }

    def _cycle_weights(self) -> Sequence[Weight]:
        """The weights of the text and of the latent cycle, which ramp and may take turns."""
        weights = self._ramp("cycle_text"), self._ramp("cycle_latent")
        if self.cycle_p_dual == 1:
            return weights
        if 0 in weights:
            raise ValueError(
                f"`loss.cycle_p_dual` = {self.cycle_p_dual!r} lets the cycles take turns, and one "
                "of them weighs 0: give both a weight, or leave it out"
            )
        return take_turns(
            *weights, together=self.cycle_p_dual, every=self.cycle_every, seed=self.cycle_seed
        )

    def _ramp(self, term: str, like: str | None = None) -> Number | Ramp:
        weight: Number = getattr(self, f"{term}_weight")
        steps = []
        for part in ("warmup_steps", "ramp_steps"):
            own = getattr(self, f"{like or term}_{part}")
            steps.append(getattr(self, f"cycle_{part}") if own is None else own)
        steps[0] += self.cycle_start_step
        return ramp(weight, *steps) if weight and any(steps) else weight

    def _bridge_time(self, process: LatentProcess) -> Number | TimePolicy:
        full = self.latent_t_mode == "full"
        high = 1.0 if full else self.cycle_latent_t_max
        low = high if full or self.cycle_latent_t_min is None else self.cycle_latent_t_min
        if not 0 <= low <= high <= 1:
            raise ValueError(
                "`loss.cycle_latent_t_min` and `loss.cycle_latent_t_max` must be times with 0 <= "
                f"min <= max <= 1, got {low!r} and {high!r}"
            )
        alpha = process.alpha_sigma(torch.tensor([float(low)]))[0].item()
        from_noise = self.cycle_text_weight or self.prior_weight or not self.cycle_show_latent
        if alpha > _SIGNAL and from_noise:
            raise ValueError(
                f"`loss.cycle_latent_t_min` = {low:g}: bridges start from pure noise, which the "
                f"model would take there for a latent with {alpha:.0%} of its amplitude left; set "
                f"`loss.cycle_latent_t_min` near `loss.cycle_latent_t_max`, or leave it out"
            )
        weights = (self.cycle_text_weight, self.cycle_latent_weight, self.prior_weight)
        if process.prediction == "epsilon" and any(weights):
            gain = process.gain(torch.tensor([float(high)])).item()
            if gain > process.max_gain:
                raise ValueError(_EPSILON.format(time=high, gain=gain, max_gain=process.max_gain))
        return low if low == high else TimePolicy("uniform", low=low, high=high)


_EPSILON = (
    "the host's latent_parameterization is epsilon, and bridges start at time {time:g}, where "
    "reading a latent off it multiplies its error by {gain:.4g}, above loss.cycle_max_gain = "
    "{max_gain:g}: losses would look healthy while the latents carry nothing. Ways out:\n"
    "  latent_parameterization: x0   at the root of the config, where the host reads it "
    "(recommended: the host's samplers take the prediction for the latent; v_param trains as well, "
    "and its latents come out negated there. Retrain the latent head)\n"
    "  loss.latent_t_mode: random, loss.cycle_latent_t_max: 0.9, loss.cycle_bridge_steps: 4   "
    "keeps epsilon; base T2L must be trained at all times\n"
    "  loss.cycle_text_weight: 0, loss.cycle_latent_weight: 0, loss.prior_weight: 0   the base "
    "losses alone"
)


def is_stable(trainer: Any) -> bool:
    """Whether a trainer is that of `improved_trainer_stable.py`, which compares directions."""
    return type(trainer).__module__.endswith("_stable")


def _looks_like(name: str, known: Iterable[str]) -> bool:
    if name.startswith(("cycle_", "prior_")):
        return True
    return bool(difflib.get_close_matches(name, known, n=1, cutoff=0.85))


def _base_time(mode: str, margin: Number = 0.0) -> Number | TimePolicy:
    """The times of a base loss."""
    return 1.0 if mode == "full" else TimePolicy("uniform", low=margin, high=1 - margin)
