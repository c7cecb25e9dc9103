"""A prior on the aggregate of the encoder's latents."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.types import Count, LatentMask, Latents, Mask, Number, Scalar, Time, Tokens
from cyclevae.bridges.latent import ONE_SHOT, LatentBridge
from cyclevae.bridges.text import draw_lengths
from cyclevae.model.denoiser import Denoised
from cyclevae.objective.config import BESIDE
from cyclevae.objective.requests import ENCODER, Encode, Own, Request
from cyclevae.objective.rows import Arranged, Share, Texts
from cyclevae.objective.step import Setting, Step, highest
from cyclevae.objective.term import Term
from cyclevae.priors import PRIORS
from cyclevae.processes.times import TimePolicy, check_time
from cyclevae.scale.pool import number_of_ranks, pool_rows

# What the step hands to a prior that asks for it by name; the rest of its keywords are options.
_GIVEN = (
    "teacher",
    "denoiser",
    "tokens",
    "attention_mask",
    "text_process",
    "latent_process",
    "generator",
    "count",
    "latent_mask",
)
_NO_OPTIONS = ("null_mask", "time", "noise")  # tensors of one batch, in priors of rows


@dataclass(frozen=True, init=False, eq=False)
class Prior(Term):
    """A prior on the latents that the encoder makes of texts, such as `Prior("mmd", weight=0.1)`.

    `moment`, `mmd` and `sigreg` are statistics of the batch: `moment_prior`, `mmd_prior` and
    `sigreg_prior`. `learned` and `ddvi` are means over rows, whose count is of texts, and read a
    teacher: `learned_prior` and `ddvi_wake_kl`; only the latter's own encoder pass learns. A
    function of the latents that returns a scalar may stand in the place of a name. Keyword
    arguments beyond those below are options of the prior itself. Metrics: `prior_loss`.

    Attributes:
        prior: one of the names, or a function.
        options: keyword arguments of that prior, such as `{"mean": 0.5, "variance": 2.0}`.
        pool: take it of the joined batch of all ranks: see `pool_rows`.
        bridge: how the encoder makes the latents; its noise is not added.
        time: at which the encoder starts from noise, a number or a `TimePolicy`.
        through: `full` teaches all passes of the bridge, `last` the last one alone.

    Raises:
        ValueError: an unknown prior or option, an option out of range, or options that do not go
            together; with its process, an ill-conditioned bridge.

    Examples:
        >>> Prior("mmd", weight=0.1, standardize=True).options
        {'standardize': True}
    """

    prior: str | Callable[..., Scalar] = "mmd"
    options: Mapping[str, Any] = field(default_factory=dict, metadata={BESIDE: True})
    pool: bool = False
    bridge: LatentBridge = ONE_SHOT
    time: Number | TimePolicy = 1.0
    through: Literal["last", "full"] = "last"
    _asks: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _tried: set[tuple[int, ...]] = field(init=False, repr=False, compare=False)

    renamed: ClassVar[Mapping[str, str]] = {
        "prior_weight": "weight",
        "prior": "prior",
        "prior_options": "options",
        "pool_prior": "pool",
    }

    def __init__(
        self,
        prior: str | Callable[..., Scalar] = "mmd",
        *,
        options: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> None:
        own = {f.name: f for f in fields(self) if f.init and f.name not in ("prior", "options")}
        more = {name: value for name, value in given.items() if name not in own}
        given |= {"prior": prior, "options": {**(options or {}), **more}}
        for name in (*own, "prior", "options"):
            value = given.get(name, own[name].default if name in own else None)
            object.__setattr__(self, name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name(self.prior)
        checks.check_type("pool", self.pool, bool)
        checks.check_type("bridge", self.bridge, LatentBridge)
        check_time("time", self.time)
        checks.check_choice("through", self.through, ("last", "full"))
        # what it wants of the step, by name
        object.__setattr__(self, "_asks", tuple(_parameters(self.prior) or ()))
        object.__setattr__(self, "_tried", set())
        if self.pool and self._of_rows:
            raise ValueError(
                f"`pool` has no effect on prior={self.prior!r}, which is a mean over rows and no "
                "statistic of the batch; leave it out, and give `counts`"
            )
        known = _options_of(self.prior)
        own = [f.name for f in fields(self) if f.init and f.name != "options"]
        for name in self.options:
            if known is not None and name not in known:
                raise ValueError(
                    f"unknown option {name!r} of prior={self.prior!r}; "
                    f"{checks.nearest(name, [*known, *own])}"
                )

    @classmethod
    def options_beside(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The types of the options of the prior itself, as a configuration gives them."""
        prior = options.get("prior", cls.prior)
        _check_name(prior)
        return _options_of(prior) or {}

    @property
    def rows(self) -> Share:
        """All texts."""
        return Share(self.fraction, self.fraction)

    @property
    def _function(self) -> Callable[..., Scalar]:
        return PRIORS[self.prior] if isinstance(self.prior, str) else self.prior

    @property
    def _of_rows(self) -> bool:
        """Whether it is a mean over rows."""
        return "count" in self._asks

    def reads_teacher(self) -> bool:
        """Whether it judges latents by a frozen copy of the network."""
        return "teacher" in self._asks

    def reads_null_text(self) -> bool:
        """That copy judges without a text."""
        return self.reads_teacher()

    @property
    def encodes(self) -> Encode:
        """The pass that makes latents; a prior that trains the encoder otherwise detaches them."""
        through = "detach" if "denoiser" in self._asks else self.through
        return Encode(rows=self.rows, bridge=self.bridge, time=self.time, through=through)

    def passes(self, step: int) -> tuple[Request, ...]:
        """The encoder makes latents; a prior of rows runs passes of its own on them."""
        own: list[Request] = []
        if "denoiser" in self._asks:
            own.append(Own(does="T2L of the text", roles=ENCODER))
        if "teacher" in self._asks:
            own.append(Own(does="teacher judges z_hat", roles=ENCODER, learns=False))
        return self.encodes, *own

    def counted(self) -> tuple[str, ...]:
        """A mean over rows has a count."""
        return self.parts if self._of_rows else ()

    def counts(self, rows: Arranged, setting: Setting) -> dict[str, Count]:
        """Texts, borrowed ones included."""
        if not self._of_rows:
            return {}
        return {"": len(rows.pick(rows.present()[0], self.rows))}

    def depends_on_split(self, *, accumulates: bool) -> str | None:
        """A statistic does; pooled, over accumulation steps alone."""
        if self._of_rows:
            return super().depends_on_split(accumulates=accumulates)
        if accumulates:
            return (
                f"prior={self.prior!r} is a statistic of one call, so that its gradient depends on "
                "the accumulation steps; set its weight to 0 here, and see two_pass"
            )
        if not self.pool:
            return (
                f"prior={self.prior!r} is a statistic of the batch of each rank; set pool=True, "
                "which makes it exact over ranks"
            )
        return None

    def check(self, setting: Setting) -> None:
        """Its options must go together, by a run without data; its bridge be well-conditioned."""
        setting.latent_process.refuse_ill_conditioned(highest(self.time))
        if callable(self.prior):
            return
        shape = setting.latent_process.shape or self._shape()
        rows = 2 * math.prod(shape) + 2  # enough for any estimator
        try:
            self._run_dry(rows, shape, setting, f"prior={self.prior!r}: ")
        except ValueError:
            # moments of a vector, which is what it is of under a mask of latents
            if len(shape) != 2 or "latent_mask" not in self._asks:
                raise
            self._run_dry(rows, shape, setting, f"prior={self.prior!r}: ", masked=True)

    def check_step(self, step: Step) -> None:
        """Texts are needed, as many as the statistic takes, and a teacher where it reads one."""
        texts, mask = step.rows.need_texts(), step.rows.text_latent_mask
        if mask is not None and "latent_mask" not in self._asks:
            raise ValueError(
                f"`{self.name}` of prior={self.prior!r} takes no `latent_mask`, and would count "
                "the padding of latents: use one that does, such as 'moment' or 'sigreg', or let a "
                "function of one's own have an argument of that name, bool [b, n]"
            )
        step.latent_process.refuse_ill_conditioned(highest(self.time, step.number))
        if self.reads_teacher():
            step.need_teacher(f"prior={self.prior!r}")
        of_others = self.pool and number_of_ranks() > 1
        if callable(self.prior) or of_others or torch.compiler.is_compiling():
            return
        shape = step.latent_process.shape
        if shape is None:
            shape = self._shape() if step.rows.latents is None else step.rows.latents.shape[1:]
        rows = len(step.rows.pick(texts.tokens, self.rows))
        key = (rows, *shape, mask is not None)
        if key not in self._tried:
            self._run_dry(
                rows,
                tuple(shape),
                step.setting,
                f"`{self.name}` of {rows} texts: ",
                masked=mask is not None,
            )
            self._tried.add(key)

    def loss(self, step: Step) -> Scalar:
        """The prior of the latents."""
        z_hat, texts = step.z_hat(self.encodes), step.texts(self.encodes)
        generator = step.common_generator(z_hat) if self.pool else step.generator
        mask = step.latent_mask(self.encodes)
        if self.pool:
            mask = None if mask is None else pool_rows(mask.to(z_hat)) > 0
        loss = self._value(
            pool_rows(z_hat) if self.pool else z_hat,
            texts,
            latent_mask=mask,
            denoiser=step.denoiser,
            teacher=step.teacher,
            **step.processes,
            generator=generator,
            count=step.denominator(),
        )
        if callable(self.prior):
            self._check_value(loss, z_hat)
        if step.rows.has_text is not None:
            loss = torch.where(step.rows.has_text.any(), loss, torch.zeros_like(loss))
        return loss

    def _check_value(self, loss: Any, z_hat: Latents) -> None:
        """What a function of one's own has returned."""
        if not isinstance(loss, Tensor) or loss.ndim:
            got = list(loss.shape) if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(
                f"the function of `{self.name}` must return a tensor without dimensions, got {got}:"
                " take the mean over rows, and no .item()"
            )
        if z_hat.requires_grad:
            checks.warn_without_graph(
                self.name, loss, cure="let the function compute with the latents it is given"
            )

    def _value(self, z_hat: Latents, texts: Texts, **given: Any) -> Scalar:
        """The function on latents, with what it asks for by name."""
        asks, mask = self._asks, texts.mask
        if "attention_mask" in asks and "tokens" not in asks:
            # a text's own length would tell something of its latent
            mask = draw_lengths(mask, len(mask), generator=given["generator"])
        given |= {"tokens": texts.tokens, "attention_mask": mask}
        named = {name: given[name] for name in _GIVEN if name in asks}
        if "z_hat" in asks:
            return self._function(**named, z_hat=z_hat, **self.options)
        if "z" in asks:
            return self._function(**named, z=z_hat, **self.options)
        return self._function(z_hat, **named, **self.options)

    def _run_dry(
        self,
        rows: int,
        shape: tuple[int, ...],
        setting: Setting,
        where: str,
        *,
        masked: bool = False,
    ) -> None:
        """Run on no data, on the meta device, for the errors that depend on shapes alone."""
        ids = torch.zeros(rows, 2, dtype=torch.long, device="meta")
        echo = _Echo()
        try:
            self._value(
                torch.empty(rows, *shape, device="meta"),
                Texts(ids, ids.bool()),
                denoiser=echo,
                teacher=echo,
                text_process=setting.text_process,
                latent_process=setting.latent_process,
                generator=None,
                count=None,
                latent_mask=ids.new_ones(rows, *shape[:1]).bool() if masked else None,
            )
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error

    def _shape(self) -> tuple[int, ...]:
        """The shape of a latent, where only the options tell it."""
        for name in ("mean", "variance"):
            value = self.options.get(name)
            if isinstance(value, Tensor) and value.ndim:
                return tuple(value.shape)
        covariance, reference = self.options.get("covariance"), self.options.get("reference")
        if isinstance(covariance, Tensor):
            return tuple(covariance.shape[-1:])
        return tuple(reference.shape[1:]) if isinstance(reference, Tensor) else (2,)


def _check_name(prior: object) -> None:
    if not callable(prior):
        checks.check_choice("prior", prior, list(PRIORS))


def _options_of(prior: str | Callable[..., Scalar]) -> dict[str, Any] | None:
    """The annotations of the options of a prior by name; None where a function takes any."""
    parameters = _parameters(prior)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    hidden = (*_GIVEN, *(_NO_OPTIONS if "teacher" in parameters else ()))
    latents = next((n for n in ("z", "z_hat") if n in parameters), next(iter(parameters), ""))
    return {
        name: Any if p.annotation is p.empty else p.annotation
        for name, p in parameters.items()
        if name not in hidden and name != latents
    }


def _parameters(prior: str | Callable[..., Scalar]) -> Mapping[str, inspect.Parameter] | None:
    """Those of the function; None of one that does not tell."""
    try:
        return inspect.signature(PRIORS[prior] if isinstance(prior, str) else prior).parameters
    except (TypeError, ValueError):
        return None


class _Echo:
    """A denoiser of no cost, for the run without data."""

    def denoise(
        self,
        tokens: Tokens,
        latents: Latents,
        *,
        text_time: Time,
        latent_time: Time,
        attention_mask: Mask,
        latent_mask: LatentMask | None = None,
        need: str = "both",
    ) -> Denoised:
        """The latents as they came."""
        return Denoised(None, latents)
