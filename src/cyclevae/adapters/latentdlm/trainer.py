"""The trainer that stands in for the host's: its own modes untouched, and `cycle_vae`."""

import logging
from collections.abc import ItemsView, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from cyclevae.adapters.latentdlm.config import CYCLE, LossKeys, check_loss_type
from cyclevae.adapters.latentdlm.host import HostDenoiser, this_rank
from cyclevae.objective.batch import Batch
from cyclevae.objective.output import StepOutput
from cyclevae.objective.term import Term, UnpairedTerm, Weight
from cyclevae.processes.schedules import Turn
from cyclevae.scale.checkpointing import checkpoint_passes

_log = logging.getLogger("cyclevae")
_CONTRACT = ("model", "tokenizer", "text_noise_schedule", "latent_diffusion", "config", "dtype")
_ORDER = ("text", "latent", "unconditional", "cycle_text", "cycle_latent", "prior")  # in the log


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
    be read here too. In a `cycle_vae` step every parameter is trainable, as the host makes it at
    the start of each step of its own.
    """

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.__dict__["host"] = host  # not a submodule: names in the state_dict stay the host's
        self.model = host.model
        self.text_noise_schedule = host.text_noise_schedule
        self.train(host.training)
        mode = check_loss_type(host.config)
        keys = LossKeys.read(host.config.loss)
        self._objective = None
        if mode != CYCLE:
            ours = [f.name for f in fields(LossKeys) if f.name in host.config.loss]
            ours = [n for n in ours if n.startswith(("cycle_", "prior_"))]
            if ours:
                _log.info("cyclevae: loss_type %s does not use %s", mode, ", ".join(ours))
            return
        if keys.unused():
            _log.info("cyclevae: no effect here: %s", ", ".join(keys.unused()))
        compiles = getattr(getattr(host.config, "training", None), "compile_model", False)
        if compiles and keys.cycle_non_finite == "zero":
            keys = replace(keys, cycle_non_finite=None)  # it cannot be traced
        self._objective = keys.objective(host)
        terms = self._objective.terms or ()
        whole = [_on_all_rows(term) for term in terms]
        self._measure = replace(self._objective, terms=whole, non_finite=None)
        constant = [t.name for t in terms if not callable(t.weight)]
        self._unreported = [f"{n}_weight" for n in constant if not n.startswith("cycle_")]
        self._plain = HostDenoiser(host.model)
        self._denoiser = (
            checkpoint_passes(self._plain) if keys.cycle_checkpoint_passes else self._plain
        )
        self._announced, self._measured = False, 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "host" not in self.__dict__:
                raise
            return getattr(self.host, name)

    @property
    def current_epoch(self) -> int:
        """The host's loop sets it, for the mode `sequential`."""
        epoch: int = self.host.current_epoch
        return epoch

    @current_epoch.setter
    def current_epoch(self, epoch: int) -> None:
        self.host.current_epoch = epoch

    def train(self, mode: bool = True) -> "CycleTrainer":
        """Set the mode here and in the host's trainer."""
        self.host.train(mode)
        return super().train(mode)

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
        """
        apart: Any = torch.compiler.disable  # at the call, because it imports dynamo
        if self._objective is None:
            loss, metrics = self.host(batch, step=step)  # bit for bit
            # the host's own log takes a numpy string for a tensor
            return loss, {k: str(v) if isinstance(v, str) else v for k, v in metrics.items()}
        if step is None:
            measured: tuple[Tensor, Metrics] = apart(self._evaluate)(batch)
            return measured
        self.host.current_step, self._measured = step, 0
        if not self._announced:
            apart(self._announce)(step)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:  # as a step in another mode leaves them
                parameter.requires_grad_(True)
        output = self._objective(self._denoiser, rows_of(batch), step=step)
        return output.loss, self._metrics(output)

    def _evaluate(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """A step of all cycles, from draws of its own."""
        device = batch["input_ids"].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._measure.seed + self._measured)
            self._measured += 1
            step = self.host.current_step
            output = self._measure(self._plain, rows_of(batch), step=step)
        return output.loss, self._metrics(output)

    def _announce(self, step: int) -> None:
        self._announced = True
        objective = self._objective
        if objective is None or this_rank():
            return
        weights = objective.weights(step)
        terms = sorted(objective.terms or (), key=lambda term: _ORDER.index(term.name))
        now = [f"{t.name} {weights[t.name]:g}" for t in terms if t.name in weights]
        later = [
            f"{term.name} from step {begins}"
            for term in terms
            if (begins := getattr(_alone(term.weight), "warmup_steps", 0)) > step
        ]
        passes = objective.passes(step)
        _log.info("cyclevae: step %d: %s; %d passes", step, ", ".join(now + later), passes)

    def _metrics(self, output: StepOutput) -> Metrics:
        """The metrics by the host's names: a weight is one where it may move."""
        metrics = Metrics(output.metrics)
        for name in self._unreported:
            metrics.pop(name, None)
        cycles = [metrics[n] for n in ("cycle_text_weight", "cycle_latent_weight") if n in metrics]
        if cycles:
            metrics["cycle_weight"] = torch.stack(cycles).sum()
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
