"""The trainer that stands in for the host's: its own modes untouched, and `cycle_vae`."""

import logging
from collections.abc import ItemsView, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cyclevae._base.reduce import only_present
from cyclevae.adapters.latentdlm.config import LossKeys
from cyclevae.adapters.latentdlm.host import HostDenoiser, this_rank
from cyclevae.adapters.latentdlm.modes import (
    CYCLE,
    check_loss_type,
    check_mode,
    cycles_before,
    phases_of,
    runs_cycles,
)
from cyclevae.adapters.latentdlm.runs import NOTE, note_of
from cyclevae.adapters.latentdlm.watch import Watch, refuse_dead
from cyclevae.adapters.latentdlm.words import host_words
from cyclevae.objective.batch import Batch
from cyclevae.objective.objective import CycleObjective
from cyclevae.objective.output import StepOutput
from cyclevae.objective.statistics import mean_norm
from cyclevae.objective.term import Term, UnpairedTerm, Weight
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.schedules import Turn
from cyclevae.processes.text import TextProcess
from cyclevae.scale.checkpointing import checkpoint_passes

_log = logging.getLogger("cyclevae")
_CONTRACT = ("model", "tokenizer", "text_noise_schedule", "latent_diffusion", "config", "dtype")
_ORDER = (
    "text",
    "latent",
    "unconditional",
    "cycle_text",
    "cycle_latent",
    "prior",
    "sleep",
)  # in the log


def with_cycle(trainer: nn.Module) -> "CycleTrainer":
    """Add `loss_type: cycle_vae` to a constructed trainer of `latentDLM_mmdit`.

    One line of the host's entry point, where the trainer is built or resumed and before it is
    compiled; keys under `loss:` say the rest, see `LossKeys`. The host is not imported: any trainer
    with its attributes will do.

    Args:
        trainer: a `MultimodalDiffusionTrainer_new` of either of the host's files, or of a fork.

    Raises:
        TypeError: another class, or an object without what the adapter reads.
        ValueError: an unknown `loss_type` or key, with the nearest, or values that do not go
            together.

    Reference: https://github.com/Joshua-Zhang-Jiaquan/LGDLM.
    """
    name = type(trainer).__name__
    missing = [part for part in _CONTRACT if not hasattr(trainer, part)]
    if name in ("MultimodalDiffusionTrainer", "CycleTrainer") or missing:
        lacks = {"CycleTrainer": " of an earlier call"}.get(name, ", the host's older class")
        if missing:
            lacks = f", which lacks {', '.join(missing)}"
        raise TypeError(
            "`trainer` must be a constructed MultimodalDiffusionTrainer_new of latentDLM_mmdit, "
            f"got {name}{lacks}"
        )
    return CycleTrainer(trainer)


class Metrics(dict[str, Tensor]):
    """Metrics as 0-d tensors; `items`, by which the host logs, reads all in one copy."""

    def items(self) -> ItemsView[str, float]:  # type: ignore[override]
        """Names and numbers."""
        values = torch.stack([value.float() for value in self.values()]).tolist()
        return dict(zip(self, values, strict=True)).items()


class CycleTrainer(nn.Module):
    """What `with_cycle` returns; called, saved and loaded as the host's trainer is.

    Parameters and `state_dict` are those of the host's trainer, which `host` is; its attributes can
    be read here too, and `loss_type`, `current_step` and `current_epoch` set. In a `cycle_vae` step
    every parameter is trainable, as the host makes it at the start of each step of its own.
    """

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.__dict__["host"] = host  # not a submodule: names in the state_dict stay the host's
        nn.Module.__setattr__(self, "model", host.model)
        nn.Module.__setattr__(self, "text_noise_schedule", host.text_noise_schedule)
        self._objective: CycleObjective | None = None
        self.evaluated = False  # before a checkpoint that was resumed: see `_forget_the_loader`
        self.train(host.training)
        self._random: Tensor | None = None  # the state in which an evaluation begins
        self._begin(check_loss_type(host.config))

    def _begin(self, mode: str) -> None:
        """Read the config for a mode."""
        config = self.host.config
        keys = LossKeys.read(config.loss)
        self._phases = phases_of(config) if mode == "sequential" else []
        if not runs_cycles(mode, self._phases):
            if unread := keys.given():
                _log.info("cyclevae: loss_type %s does not use %s", mode, ", ".join(unread))
            self._objective = None
            return
        if self.host.dtype == torch.float16:
            raise ValueError(
                "`training.dtype` is fp16, in which the host keeps its weights: the eps of its "
                "optimizer is 0 there, and the first step makes NaN of them; take bf16 or fp32"
            )
        if keys.unused():
            _log.info("cyclevae: no effect here: %s", ", ".join(keys.unused()))
        compiles = getattr(getattr(config, "training", None), "compile_model", False)
        if compiles and keys.cycle_non_finite == "zero":
            keys = replace(keys, cycle_non_finite=None)  # it cannot be traced
        if self._phases and keys.cycle_start_step:
            raise ValueError(
                "in `training.sequential_schedule` steps count from where cycle_vae begins: leave "
                "out `loss.cycle_start_step`"
            )
        self._objective = keys.objective(self.host)
        if (name := self.host.latent_diffusion.parameterization) != "x0" and not this_rank():
            _log.warning(
                "cyclevae: the host's T2L samplers take the prediction for the latent, which is "
                "right for latent_parameterization x0 alone; of %s read it by cyclevae.t2l",
                name,
            )
        terms = self._objective.terms or ()
        whole = [_on_all_rows(term) for term in terms]
        self._measure = replace(self._objective, terms=whole, non_finite=None)
        constant = [t.name for t in terms if not callable(t.weight)]
        self._unreported = [f"{n}_weight" for n in constant if not n.startswith("cycle_")]
        self._cycles = [f"{t.name}_weight" for t in terms if t.name.startswith("cycle_")]
        self._plain = HostDenoiser(self.host.model)
        self._denoiser = (
            checkpoint_passes(self._plain) if keys.cycle_checkpoint_passes else self._plain
        )
        self._teacher = keys.teacher(self.host)
        self._announced, self._measured = False, 0
        self._watch = None if compiles else Watch(keys.cycle_dead_steps)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "host" not in self.__dict__:
                raise
            return getattr(self.host, name)

    def __setattr__(self, name: str, value: Any) -> None:
        host = self.__dict__.get("host")
        own = name.startswith("_") or name in (*self.__dict__, "training", "evaluated", "loss_type")
        if host is None or own or not hasattr(host, name):
            super().__setattr__(name, value)
        elif name in ("current_step", "current_epoch"):  # the second is set by the host's loop
            setattr(host, name, value)
        else:
            raise AttributeError(
                f"`trainer.{name}` was read when with_cycle was called: set it before that"
            )

    @property
    def loss_type(self) -> str:
        """The mode; setting it reads the keys under `loss:` anew."""
        mode: str = self.host.loss_type
        return mode

    @loss_type.setter
    def loss_type(self, mode: str) -> None:
        check_mode(mode)
        self._begin(mode)
        self.host.loss_type = mode

    @property
    def denoiser(self) -> HostDenoiser:
        """The model, as `encode`, `decode` and `best_text` take it.

        Raises:
            ValueError: a run without `cycle_vae`; so do both processes.
        """
        self._need_cycles()
        return self._plain

    @property
    def text_process(self) -> TextProcess:
        """That of the host's texts."""
        return self._need_cycles().text_process

    @property
    def latent_process(self) -> LatentProcess:
        """That of its latents, whose shape the model tells."""
        process, width = self._need_cycles().latent_process, getattr(self.model, "latent_dim", None)
        return process if width is None else replace(process, shape=(width,))

    def _need_cycles(self) -> CycleObjective:
        if self._objective is None:
            raise ValueError(
                f"loss_type {self.host.loss_type!r} runs no cycles, and this reads their config: "
                "set `trainer.loss_type = 'cycle_vae'` first"
            )
        return self._objective

    def train(self, mode: bool = True) -> "CycleTrainer":
        """Set the mode here and in the host's trainer."""
        if self.training and not mode:
            self._random = torch.get_rng_state()
        self.host.train(mode)
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's; for a checkpoint, so a model whose weights are not finite has none.

        Raises:
            FloatingPointError: such a model, in a run with steps of `cycle_vae`.
        """
        if self._objective is not None:
            refuse_dead(self.model)
        found = super().state_dict(*args, **kwargs)
        if (metadata := getattr(found, "_metadata", None)) is not None:
            metadata[NOTE] = note_of(self.host, self.loss_type)
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> "CycleTrainer":
        teacher: Any = self.__dict__.get("_teacher")  # no submodule, for names in the state_dict
        if teacher is not None:
            teacher.network._apply(fn, recurse)
        apply: Any = super()._apply
        apply(fn, recurse)
        return self

    def forward(
        self, batch: Mapping[str, Tensor], step: int | None = None
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Loss and metrics of a batch; without a step it is an evaluation.

        Args:
            batch: `input_ids` `[b, s]`, `latent` `[b, d]` or `[b, 1, d]`, and if given
                `attention_mask` `[b, s]`, `has_text` and `has_latent` `[b]`.
            step: the training step.

        Raises:
            ValueError: a batch without latents, or wrong shapes or ids.
            FloatingPointError: no finite term in `loss.cycle_dead_steps` steps in a row.
        """
        apart: Any = torch.compiler.disable  # at the call, because it imports dynamo
        if step is None and self._random is not None:
            apart(self._forget_the_loader)()
        if self._objective is None:
            return self._host_step(batch, step)
        if self._phases:
            mode = self.host.get_training_mode(self.host.current_step if step is None else step)
            if mode != CYCLE:
                return self._host_step(batch, step, mode)
        if step is None:
            measured: tuple[Tensor, Metrics] = apart(self._evaluate)(batch)
            return measured
        self.host.current_step, self._measured = step, 0
        if not self._announced:
            apart(self._announce)(step)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:  # as a step in another mode leaves them
                parameter.requires_grad_(True)
        rows = rows_of(batch)
        options: dict[str, Any] = {"step": self._cycle_step(step), "teacher": self._teacher}
        with nullcontext() if torch.compiler.is_compiling() else host_words():
            output = self._objective(self._denoiser, rows, **options)
        if self._watch is not None:
            self._watch.note(self._dead(output, step))
        return output.loss, self._metrics(output, rows)

    def _host_step(
        self, batch: Mapping[str, Tensor], step: int | None, mode: str | None = None
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """The host's own, bit for bit; of a phase in that mode, if given."""
        whole = self.host.loss_type
        self.host.loss_type = mode or whole
        try:
            loss, metrics = self.host(batch, step=step)
        finally:
            self.host.loss_type = whole
        # the host's own log takes a numpy string for a tensor
        return loss, {k: str(v) if isinstance(v, str) else v for k, v in metrics.items()}

    def _cycle_step(self, step: int) -> int:
        """Steps of `cycle_vae` before this one, from which weights are computed."""
        return cycles_before(step, self._phases) if self._phases else step

    def _forget_the_loader(self) -> None:
        """Undo the draw by which the host's loader starts its workers, in its first evaluation.

        Steps of the host's own modes are left as they are, but in a run that was resumed after an
        evaluation: the run that was never stopped started its workers before.
        """
        if self._random is not None and (self._objective is not None or self.evaluated):
            torch.set_rng_state(self._random)
            self.evaluated = False
        self._random = None

    def _evaluate(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """A step of all cycles, from draws of its own."""
        device = batch["input_ids"].device
        rows = rows_of(batch)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), host_words():
            torch.manual_seed(self._measure.seed + self._measured)
            self._measured += 1
            step = self._cycle_step(self.host.current_step)
            output = self._measure(self._plain, rows, step=step, teacher=self._teacher)
        return output.loss, self._metrics(output, rows)

    def _announce(self, step: int) -> None:
        self._announced = True
        objective = self._objective
        if objective is None or this_rank():
            return
        before = step - self._cycle_step(step)
        weights = objective.weights(step - before)
        terms = sorted(objective.terms or (), key=lambda term: _ORDER.index(term.name))
        now = [f"{t.name} {weights[t.name]:g}" for t in terms if t.name in weights]
        later = [
            f"{term.name} from step {begins + before}"
            for term in terms
            if (begins := getattr(_alone(term.weight), "warmup_steps", 0)) > step - before
        ]
        passes = objective.passes(step - before)
        _log.info("cyclevae: step %d: %s; %d passes", step, ", ".join(now + later), passes)

    def _dead(self, output: StepOutput, step: int) -> Tensor:
        """Whether no term of a step was finite."""
        bad = output.metrics.get("non_finite_terms")
        if bad is None or self._objective is None:
            return ~output.loss.detach().isfinite()
        return bad == len(self._objective.weights(self._cycle_step(step)))

    def _metrics(self, output: StepOutput, rows: Batch) -> Metrics:
        """The metrics by the host's names: a weight is one where it may move."""
        metrics = Metrics(output.metrics)
        for name in self._unreported:
            metrics.pop(name, None)
        for name in self._cycles:  # which rest at 0
            metrics.setdefault(name, torch.zeros_like(metrics["loss"]))
        weights = [metrics[name] for name in self._cycles]
        metrics["cycle_weight"] = sum(weights, torch.zeros_like(metrics["loss"]))
        if "latent_norm" not in metrics:
            kept: Any = rows  # with every part, marked where it is broken
            latents = only_present(kept.latents, kept.has_latent)
            metrics["latent_norm"] = mean_norm(latents, kept.has_latent)
        return metrics


def _on_all_rows(term: Term) -> Term:
    """A term as evaluations run it: at every step, and on all rows."""
    term = replace(term, weight=_alone(term.weight), every=1, fraction=1.0)
    return replace(term, pairs=True) if isinstance(term, UnpairedTerm) else term


def _alone(weight: Weight) -> Weight:
    """A weight that takes no turns."""
    return weight.weight if isinstance(weight, Turn) else weight


def rows_of(batch: Mapping[str, Tensor]) -> Batch:
    """The host's batch; broken and missing parts are marked, which waits for no value.

    A latent that is not finite or all zeros, as the host's loader makes of a file it cannot read,
    is missing, and so is a text without a kept token.

    Raises:
        ValueError: no latents, or latents of another shape.
    """
    tokens, latents = batch["input_ids"], batch.get("latent")
    if latents is None:
        raise ValueError("the batch has no `latent`: mark rows without one by `has_latent`")
    if latents.ndim == 3 and latents.shape[1] == 1:
        latents = latents[:, 0]
    if latents.ndim != 2 or len(latents) != len(tokens):
        raise ValueError(
            f"`latent` must have shape [b, d] or [b, 1, d] with b = {len(tokens)}, got "
            f"{list(latents.shape)}"
        )
    mask = batch.get("attention_mask")
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
    has_text = mask.any(dim=1)
    has_latent = latents.isfinite().all(dim=1) & (latents != 0).any(dim=1)
    if (marked := batch.get("has_text")) is not None:
        has_text = has_text & marked.bool()
    if (marked := batch.get("has_latent")) is not None:
        has_latent = has_latent & marked.bool()
    return Batch(tokens, mask, latents, has_text=has_text, has_latent=has_latent)
