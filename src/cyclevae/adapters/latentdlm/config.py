"""The keys under `loss:` that the adapter reads, and the objective they mean."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

import torch

from cyclevae import _checks
from cyclevae._types import Number
from cyclevae.adapters.latentdlm.host import latent_process_of, text_process_of
from cyclevae.latent_process import LatentProcess
from cyclevae.objective import CycleObjective
from cyclevae.text_process import TaughtPadding

MODES = ("unconditional", "l2t", "t2l", "random", "sequential")  # the host's own
CYCLE = "cycle_vae"
_HOSTS_OWN = ("loss_type", "loss_scale", "reduction", "use_cross_entropy", "text_kl_weight")
_IDS = ("argmax", "categorical", "unmask", "rloo")
_PADDING: dict[str, TaughtPadding] = {"host": "all", "first": "first", "exclude": "none"}
_WITHOUT_A_TEACHER = ("moment", "mmd", "sigreg")
_SIGNAL = 0.5  # of a latent's amplitude, above which pure noise does not pass for a noised latent


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
    cycle_latent_distance: str = "mse"
    cycle_stop_grad_latent: bool = True
    cycle_text_policy: str | None = None
    cycle_latent_policy: str = "stop_gradient"
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
    cycle_non_finite: Literal["zero", "raise"] | None = "zero"
    cycle_seed: int = 0
    prior_weight: Number = 0.0
    prior_warmup_steps: int | None = None
    prior_ramp_steps: int | None = None
    prior_name: Literal["moment", "mmd", "sigreg"] = "mmd"
    prior_options: Mapping[str, Any] = field(default_factory=dict)
    prior_pool: bool = False

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if option.type is bool and not isinstance(value, bool):
                raise ValueError(f"`loss.{option.name}` must be true or false, got {value!r}")
        for name in ("base_loss", "text_loss_padding", "text_t_mode", "latent_t_mode"):
            choices = get_args(type(self).__annotations__[name])
            _checks.check_choice(f"loss.{name}", getattr(self, name), choices)
        _checks.check_choice("loss.prior_name", self.prior_name, _WITHOUT_A_TEACHER)
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

    @classmethod
    def read(cls, loss: Mapping[str, Any]) -> "LossKeys":
        """The keys of the host's config; those that it does not know are left to the host.

        Raises:
            ValueError: a key that looks like one of ours and is none, with the nearest; or a value
                that does not fit.
        """
        known = {f.name for f in fields(cls)}
        given = {}
        for key in loss:
            name = str(key)
            if name in known:
                given[name] = _plain(loss[key])
            elif name not in _HOSTS_OWN and _looks_like(name, known):
                raise ValueError(f"unknown key `loss.{name}`; {_checks.nearest(name, known)}")
        return cls(**given)

    def unused(self) -> list[str]:
        """The keys that a value was given to and that have no effect."""
        names = []
        if self.latent_t_mode == "full":
            names += ["cycle_latent_t_min", "cycle_latent_t_max"]
        if self.cycle_text_policy is not None:
            names += ["cycle_stop_grad_latent"]
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def objective(self, trainer: Any) -> CycleObjective:
        """The objective of a trainer.

        Raises:
            ValueError: options that do not go together, or an epsilon process whose bridge would be
                ill-conditioned: the message names the ways out as values of the config.
        """
        process = latent_process_of(trainer, self.cycle_max_gain)
        bridge_time = self._bridge_time(process)
        random = {"distribution": "uniform"}
        options: dict[str, Any] = {
            "text_process": text_process_of(trainer, _PADDING[self.text_loss_padding]),
            "latent_process": process,
            "text_weight": self.text_loss_weight,
            "unconditional_weight": self.unconditional_loss_weight,
            "cycle_text_weight": self._ramp("cycle_text"),
            "cycle_latent_weight": self._ramp("cycle_latent"),
            "prior_weight": self._ramp("prior"),
            "prior": self.prior_name,
            "prior_options": self.prior_options,
            "pool_prior": self.prior_pool,
            "bridge_time": bridge_time,
            "base_latent_time": 1.0 if self.latent_t_mode == "full" else random,
            "base_text_time": 1.0
            if self.text_t_mode == "full"
            else {**random, "low": 1e-4, "high": 1 - 1e-4},
            "text_bridge": self.cycle_latent_sampling,
            "latent_bridge": {
                "steps": self.cycle_bridge_steps,
                "noise": self.cycle_bridge_noise,
                "norm": self.cycle_bridge_norm,
                "threshold": self.cycle_bridge_threshold,
            },
            "show_latent": self.cycle_show_latent,
            "cycle_latent_distance": self.cycle_latent_distance,
            "text_policy": self.cycle_text_policy
            or ("stop_gradient" if self.cycle_stop_grad_latent else "full"),
            "latent_policy": self.cycle_latent_policy,
            "p_dual": self.cycle_p_dual,
            "cycle_every": self.cycle_every,
            "cycle_fraction": self.cycle_fraction,
            "cycle_pairs": self.cycle_pairs,
            "non_finite": self.cycle_non_finite,
            "seed": self.cycle_seed,
            **self._base_latent(trainer),
        }
        return CycleObjective.from_config(options)

    def _base_latent(self, trainer: Any) -> dict[str, Any]:
        if self.base_loss == "corrected":
            return {"latent_weight": self.latent_loss_weight}
        if is_stable(trainer):
            return {
                "latent_weight": self.latent_loss_weight,
                "latent_distance": "normalized_mse",
                "caps": {"text": 100.0, "latent": 10.0},
            }
        return {"latent_weight": 1.0}  # that file reads no weight

    def _ramp(self, term: str) -> Any:
        warmup, ramp = (getattr(self, f"{term}_{part}_steps") for part in ("warmup", "ramp"))
        warmup = self.cycle_warmup_steps if warmup is None else warmup
        ramp = self.cycle_ramp_steps if ramp is None else ramp
        weight = getattr(self, f"{term}_weight")
        if weight == 0 or not (warmup or ramp):
            return weight
        return {"weight": weight, "warmup_steps": warmup, "ramp_steps": ramp}

    def _bridge_time(self, process: LatentProcess) -> Any:
        high = 1.0 if self.latent_t_mode == "full" else self.cycle_latent_t_max
        low = self.cycle_latent_t_min
        low = high if self.latent_t_mode == "full" or low is None else low
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
        return low if low == high else {"distribution": "uniform", "low": low, "high": high}


_EPSILON = (
    "the host's latent_parameterization is epsilon, and bridges start at time {time:g}, where "
    "reading a latent off it multiplies its error by {gain:.4g}, above loss.cycle_max_gain = "
    "{max_gain:g}: losses would look healthy while the latents carry nothing. Ways out:\n"
    "  latent_parameterization: v_param   at the root of the config, where the host reads it "
    "(recommended; x0 does too; retrain the latent head)\n"
    "  loss.latent_t_mode: random, loss.cycle_latent_t_max: 0.9, loss.cycle_bridge_steps: 4   "
    "keeps epsilon; base T2L must be trained at all times\n"
    "  loss.cycle_text_weight: 0, loss.cycle_latent_weight: 0, loss.prior_weight: 0   the base "
    "losses alone"
)


def check_loss_type(config: Any) -> str:
    """The mode of a run.

    Raises:
        ValueError: a mode that the host would take for `unconditional` in silence, or one that
            `training.loss_type` contradicts.
    """
    mode = str(getattr(config.loss, "loss_type", None))
    known = (*MODES, CYCLE)
    if mode not in known:
        raise ValueError(
            f"`loss.loss_type` is {mode!r}, for which the host trains 'unconditional' without a "
            f"word; {_checks.nearest(mode, known)}"
        )
    other = getattr(getattr(config, "training", None), "loss_type", None)
    if other is not None and other != mode:
        raise ValueError(
            f"`training.loss_type` is {other!r} and `loss.loss_type` is {mode!r}, which is the one "
            "that counts: make them equal, or remove the first"
        )
    return mode


def is_stable(trainer: Any) -> bool:
    """Whether a trainer is that of `improved_trainer_stable.py`, which compares directions."""
    return type(trainer).__module__.endswith("_stable")


def _looks_like(name: str, known: set[str]) -> bool:
    if name.startswith(("cycle_", "prior_")):
        return True
    return bool(difflib.get_close_matches(name, known, n=1, cutoff=0.85))


def _plain(value: Any) -> Any:
    """A value of OmegaConf as plain Python."""
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in value}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
