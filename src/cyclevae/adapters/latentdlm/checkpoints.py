"""The host's checkpoints: read without running what they hold, and resumed exactly."""

import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from cyclevae.adapters.latentdlm.host import this_rank

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


def resume(path: str | Path, trainer: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Load a checkpoint of the host into a trainer and its optimizer, and go on.

    The counters it returns replace the host's `state`, before the data is loaded and with
    `training.resume` left empty: `state = resume(path, trainer, optimizer)`. The random state is
    set at the first training step, after the host has shuffled its data and skipped what was seen,
    so that the run equals one that was never stopped: in the first epoch, and in any epoch where
    a `DistributedSampler` shuffles. Without one the host shuffles later epochs anew.

    The host empties its log at the start, so the lines so far are kept beside it, as
    `training_log-STEP.jsonl`.

    Args:
        path: the folder that holds `checkpoint.pt` and `rng_state_RANK.pt`, or the file.
        trainer: the host's, or that of `with_cycle`.
        optimizer: made of the trainer's parameters.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no checkpoint, or one of another model.
    """
    path = Path(path)
    found = read_checkpoint(path)
    folder, rank = path if path.is_dir() else path.parent, this_rank()
    random_state = folder / f"rng_state_{rank}.pt"
    drawn = _read(random_state) if random_state.is_file() else None  # before anything is changed
    try:
        trainer.load_state_dict(found["model_state_dict"])
    except RuntimeError as error:
        raise ValueError(f"{path} is of another model: {error}") from error
    optimizer.load_state_dict(found["optimizer_state_dict"])
    saved = found["state"]
    state = _host_state(trainer)(**{name: getattr(saved, name) for name in vars(saved)})
    if drawn is not None:
        _set_at_first_step(trainer, drawn)
    log = folder.parent / "training_log.jsonl"
    if rank == 0 and log.is_file() and log.stat().st_size:
        shutil.copyfile(log, log.with_name(f"training_log-{state.step}.jsonl"))
    return state


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
