"""The host's checkpoints: read without running what they hold, and resumed exactly."""

import json
import logging
import pickle
import shutil
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from cyclevae._base.checks import nearest
from cyclevae.adapters.latentdlm.host import this_rank
from cyclevae.adapters.latentdlm.modes import CYCLE
from cyclevae.adapters.latentdlm.runs import check_process, told_by

_log = logging.getLogger("cyclevae")
_STATE = ("latentDLM_mmdit.checkpoints_mmdit", "TrainingState")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a `checkpoint.pt` of the host, by PyTorch's reader that runs no code.

    The host's own dataclass of counters comes as a plain object of its fields.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no checkpoint of the host.
    """
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {file}; give its file or its folder")
    module, name = _STATE
    stand_in = type(name, (), {"__module__": module, "__qualname__": name})
    with torch.serialization.safe_globals([stand_in]):
        found = _read(file)
    if not (isinstance(found, dict) and "model_state_dict" in found):
        raise ValueError(f"{file} holds no `model_state_dict`: is it a checkpoint of the host?")
    return found


def _read(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, IndexError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} cannot be read as weights alone: {error}") from error


def load_into(model: nn.Module, saved: Mapping[str, Tensor], path: Path) -> None:
    """The weights in a checkpoint's `model_state_dict` into the host's model.

    Raises:
        ValueError: those of another model, or some that are not finite.
    """
    weights = {n.removeprefix("model."): w for n, w in saved.items() if n.startswith("model.")}
    _check_finite(path, weights)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} is of another model: {error}") from error


def _check_finite(path: Path, weights: Mapping[str, Tensor]) -> None:
    bad = [n for n, w in weights.items() if w.is_floating_point() and not w.isfinite().all()]
    if bad:
        raise ValueError(
            f"{path} holds a dead model: {len(bad)} of {len(weights)} tensors are not finite, such "
            f"as `{bad[0]}`; take an earlier checkpoint"
        )


def load_weights(path: str | Path, trainer: nn.Module, *, skip: Sequence[str] = ()) -> None:
    """Begin a run at step 0 with the weights of a checkpoint, and nothing else of it.

    The warm start of `cycle_vae`: counters, optimizer and random state are those of a new run, so
    that `cycle_warmup_steps` are steps before the first cycle. Call it where the trainer is ready,
    with `training.resume` left empty.

    Args:
        path: the folder that holds `checkpoint.pt`, or the file.
        trainer: the host's, or that of `with_cycle`.
        skip: shell patterns of parameters that keep their fresh values, such as `latent_head.*`
            where the checkpoint predicts something else.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no checkpoint, one of another model or of a dead one, a pattern
            that fits nothing, or a run of another latent process whose head is not skipped.
    """
    path = Path(path)
    model = cast(nn.Module, trainer.model)
    saved = read_checkpoint(path)["model_state_dict"]
    names = [name for name, _ in model.named_parameters()]
    kept = set()
    for pattern in skip:
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(f"`skip`: {pattern!r} fits no parameter; {nearest(pattern, names)}")
        kept.update(fitting)
    heads = [name for name in names if name.startswith("latent_head.")]
    if not kept.issuperset(heads):
        cure = ', or give skip=["latent_head.*"], which then is trained anew'
        check_process(path, saved, trainer, "`path`", cure)
    fresh = {f"model.{name}": model.state_dict()[name] for name in kept}
    load_into(model, {**saved, **fresh}, path)
    _log.info("cyclevae: weights of %s, at step 0; %d parameters kept", path, len(kept))


def resume(path: str | Path, trainer: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Load a checkpoint of the host into a trainer and its optimizer, and go on.

    The counters it returns replace the host's `state`, before the data is loaded and with
    `training.resume` left empty: `state = resume(path, trainer, optimizer)`. The random state is
    set at the first training step, after the host has shuffled its data and skipped what was seen,
    so that the run equals one that was never stopped, evaluations included: in the first epoch, and
    in any epoch where a `DistributedSampler` shuffles. Without one the host shuffles later epochs
    anew.

    The host empties its log at the start, so the lines so far are kept beside it, as
    `training_log-STEP.jsonl`, or under the next free name like it.

    Args:
        path: the folder that holds `checkpoint.pt` and `rng_state_RANK.pt`, or the file.
        trainer: the host's, or that of `with_cycle`.
        optimizer: made of the trainer's parameters.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no checkpoint, one of another model or of a dead one, or a run of
            another latent process; or one of another mode, whose step would let the cycles begin at
            once.
    """
    path = Path(path)
    found = read_checkpoint(path)
    folder, rank = path if path.is_dir() else path.parent, this_rank()
    random_state = folder / f"rng_state_{rank}.pt"
    drawn = _read(random_state) if random_state.is_file() else None  # before anything is changed
    saved = found["state"]
    cure = ", or begin a new run by load_weights"
    check_process(path, found["model_state_dict"], trainer, "`path`", cure)
    _check_start(folder, found["model_state_dict"], trainer, saved.step)
    _check_finite(path, found["model_state_dict"])
    try:
        trainer.load_state_dict(found["model_state_dict"])
    except RuntimeError as error:
        raise ValueError(f"{path} is of another model: {error}") from error
    optimizer.load_state_dict(found["optimizer_state_dict"])
    state = _host_state(trainer)(**{name: getattr(saved, name) for name in vars(saved)})
    if drawn is not None:
        _set_at_first_step(trainer, drawn)
    logging = getattr(_config_of(trainer), "logging", None)
    every = getattr(logging, "eval_freq", None)
    if hasattr(trainer, "evaluated"):
        setattr(trainer, "evaluated", every is not None and state.step >= every)  # noqa: B010
    if rank == 0:
        _keep_log(logging, folder, state.step)
    return state


def _config_of(trainer: nn.Module) -> Any:
    return getattr(trainer, "config", None)


def _check_start(folder: Path, saved: Mapping[str, Any], trainer: nn.Module, step: int) -> None:
    """Refuse a warm-up whose steps a run in another mode has spent already."""
    loss = getattr(_config_of(trainer), "loss", None)
    if getattr(trainer, "loss_type", None) != CYCLE or getattr(loss, "cycle_start_step", 0):
        return
    parts = ("cycle", "cycle_text", "cycle_latent", "prior")
    waits = any(getattr(loss, f"{part}_warmup_steps", None) for part in parts)
    note = told_by(saved)
    mode = note["loss_type"] if note else _mode_in_log(folder.parent / "training_log.jsonl", step)
    if waits and step and mode not in (CYCLE, None):
        raise ValueError(
            f"the checkpoint stands at step {step} of a run with {mode}, and the warm-up of "
            "cycle_vae counts from step 0, so the cycles would begin too soon: set "
            f"`loss.cycle_start_step: {step}`, or begin a new run by load_weights"
        )


def _mode_in_log(log: Path, step: int) -> str | None:
    """Whether the rows before a step are of `cycle_vae`; None where there are none."""
    if not log.is_file():
        return None
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    before = [row for row in rows if row.get("step", step) < step]
    if not before:
        return None
    return CYCLE if "cycle_weight" in before[-1] else "another loss_type"


def _keep_log(logging: Any, folder: Path, step: int) -> None:
    """Copy the log that the host is about to empty, over no other copy."""
    places = [getattr(logging, name, None) for name in ("save_dir", "run_name")]
    run = folder.parent if None in places else Path(*map(str, places))
    log = run / "training_log.jsonl"
    if not (log.is_file() and log.stat().st_size):
        return
    kept, others = log.with_name(f"training_log-{step}.jsonl"), count(2)
    while kept.exists():
        kept = log.with_name(f"training_log-{step}-{next(others)}.jsonl")
    shutil.copyfile(log, kept)


def _host_state(trainer: nn.Module) -> Any:
    """The host's class of counters, which it saves; it is loaded where the host runs."""
    host = getattr(trainer, "host", trainer)
    package = type(host).__module__.partition(".")[0]
    module = sys.modules.get(f"{package}.checkpoints_mmdit")
    return getattr(module, "TrainingState", SimpleNamespace)


def _set_at_first_step(trainer: nn.Module, state: dict[str, Any]) -> None:
    def set_once(module: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
        step = options.get("step", inputs[1] if len(inputs) > 1 else None)
        if step is None:  # an evaluation
            return
        hook.remove()
        torch.set_rng_state(state["torch"])
        if state.get("cuda") is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    apart: Any = torch.compiler.disable  # at the call, because it imports dynamo
    hook = trainer.register_forward_pre_hook(apart(set_once), with_kwargs=True)
