"""A trained model as one file: weights, options and what standardises its latents."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cyclevae.model.denoiser import ModuleDenoiser, as_denoiser
from cyclevae.objective.module import StepModule
from cyclevae.objective.objective import CycleObjective
from cyclevae.objective.term import Term

FORMAT, VERSION = "cyclevae", 1
_PARTS = ("network", "objective", "options", "normaliser", "clean_at", "predicts")


class Trained(NamedTuple):
    """What `load` returns.

    Attributes:
        denoiser: the model, in evaluation mode.
        objective: with both processes, `objective.text_process` and `objective.latent_process`.
        normaliser: the module that was given to `load`, else its tensors by name; None if none was
            saved.

    Examples:
        >>> Trained._fields
        ('denoiser', 'objective', 'normaliser')
    """

    denoiser: ModuleDenoiser
    objective: CycleObjective
    normaliser: nn.Module | dict[str, Tensor] | None


def save(
    path: str | os.PathLike[str],
    denoiser: ModuleDenoiser | nn.Module,
    objective: CycleObjective,
    *,
    options: Mapping[str, Any] | None = None,
    normaliser: nn.Module | Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model to one file: weights, objective, and what standardises its latents.

    A file of `torch.save` that holds tensors, numbers, strings, lists and dicts alone, so that
    reading it runs no code. It replaces an older one at once, when all is written. Names of weights
    are those of the plain network, out of DDP, `torch.compile` and other wrappers. One rank writes.
    For resuming a run save the optimizer, the step and random state beside it.

    Args:
        path: of the file.
        denoiser: what `as_denoiser` made, or the network.
        objective: whose configuration is kept, and with it both processes.
        options: the arguments of the network's class, if `load` is to make the network by them;
            numbers, strings, lists and dicts.
        normaliser: a module whose `state_dict` standardises latents, or tensors by name.

    Raises:
        TypeError: no network, no objective, or state that is no tensor.
        ValueError: an objective with an option that only code can express, options that are not
            plain, or weights that are sharded over ranks.

    Examples:
        >>> import tempfile
        >>> from cyclevae.testing import ToyNetwork, toy_denoiser
        >>> denoiser, *processes = toy_denoiser(seed=0)
        >>> file = f"{tempfile.mkdtemp()}/model.pt"
        >>> save(
        ...     file, denoiser, CycleObjective(*processes),
        ...     options={"vocab_size": 7, "latent_dim": 4}, normaliser={"scale": torch.ones(4)},
        ... )
        >>> denoiser, objective, normaliser = load(file, ToyNetwork)
        >>> objective.text_process.vocab_size, normaliser
        (7, {'scale': tensor([1., 1., 1., 1.])})
    """
    if isinstance(denoiser, StepModule):
        raise TypeError("`denoiser` is a StepModule: give the network in it, `module.denoiser`")
    if isinstance(denoiser, nn.Module):
        denoiser = as_denoiser(denoiser)
    if not isinstance(denoiser, ModuleDenoiser):
        raise TypeError(
            f"`denoiser` must be what as_denoiser makes, or a network, got "
            f"{type(denoiser).__name__}; give the network itself"
        )
    if not isinstance(objective, CycleObjective):
        raise TypeError(
            f"`objective` must be a CycleObjective, got {type(objective).__name__}; of phases give "
            "the one that `at(step)` returns"
        )
    state = normaliser.state_dict() if isinstance(normaliser, nn.Module) else normaliser
    written = {
        "format": FORMAT,
        "version": VERSION,
        "network": _tensors("denoiser", denoiser.module.state_dict()),
        "objective": _plain("objective", objective.to_config()),
        "options": None if options is None else _plain("options", options),
        "normaliser": None if state is None else _tensors("normaliser", state),
        "clean_at": denoiser.clean_at,
        "predicts": denoiser.predicts,
    }
    unfinished = Path(f"{os.fspath(path)}.unfinished")
    torch.save(written, unfinished)
    unfinished.replace(path)


def load(
    path: str | os.PathLike[str],
    network: nn.Module | Callable[..., nn.Module],
    *,
    normaliser: nn.Module | None = None,
    terms: Mapping[str, type[Term]] | None = None,
    processes: Sequence[type] = (),
    device: torch.device | str = "cpu",
) -> Trained:
    """Read a model that `save` wrote; no code in the file is run.

    Args:
        path: of the file.
        network: the network, into which the weights are read; or its class, or a function, which
            is called with the `options` that were saved.
        normaliser: a module into which the state of the saved one is read, and which is returned.
        terms: the classes of one's own terms: see `CycleObjective.from_config`.
        processes: the classes of one's own processes.
        device: where the model is put.

    Raises:
        TypeError: what is or makes no network.
        ValueError: a file that `save` did not write, of a later version, without `options` where a
            class is given, or whose weights are not those of the network.

    Examples:
        >>> import tempfile
        >>> from cyclevae.testing import toy_denoiser
        >>> denoiser, *processes = toy_denoiser(seed=0)
        >>> save(file := f"{tempfile.mkdtemp()}/model.pt", denoiser, CycleObjective(*processes))
        >>> other = toy_denoiser(seed=1)[0].module
        >>> load(file, other).denoiser.module is other
        True
        >>> bool((other.shared.weight == denoiser.module.shared.weight).all())
        True
    """
    found = _read(path, device)
    objective = CycleObjective.from_config(found["objective"], terms=terms, processes=processes)
    if not isinstance(network, nn.Module):
        network = _made(network, found["options"])
    denoiser = as_denoiser(network, clean_at=found["clean_at"] or None, predicts=found["predicts"])
    _fill("network", denoiser.module, found["network"])
    network.to(device).eval()
    state = found["normaliser"]
    if normaliser is not None:
        if state is None:
            raise ValueError(f"`normaliser` was given, and {os.fspath(path)!r} holds none")
        _fill("normaliser", normaliser, state)
        return Trained(denoiser, objective, normaliser.to(device))
    return Trained(denoiser, objective, state)


def _read(path: str | os.PathLike[str], device: torch.device | str) -> dict[str, Any]:
    """The content of a file, which must be one of ours."""
    other = f"{os.fspath(path)!r} is no file that cyclevae.save wrote"
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{other} ({type(error).__name__}: {error})") from error
    if not (isinstance(found, dict) and found.get("format") == FORMAT):
        raise ValueError(f"{other}: read it by torch.load(..., weights_only=True)")
    if found["version"] != VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} is of version {found['version']!r}, and this cyclevae reads "
            f"{VERSION}: update it"
        )
    if missing := [name for name in _PARTS if name not in found]:
        raise ValueError(f"{other}: it lacks {missing[0]!r}")
    return found


def _made(make: Callable[..., nn.Module], options: Mapping[str, Any] | None) -> nn.Module:
    """The network that a class makes of the saved options."""
    if not callable(make):
        raise TypeError(
            f"`network` must be a torch.nn.Module or its class, got {type(make).__name__}"
        )
    if options is None:
        raise ValueError(
            "`network` is no module yet, and no `options` were saved to make it by: give the "
            "module, or save(..., options={...})"
        )
    network = make(**options)
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"`network(...)` must return a torch.nn.Module, got {type(network).__name__}"
        )
    return network


def _fill(name: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Read a state into a module, all of it or nothing."""
    own = module.state_dict()
    if own.keys() != state.keys():
        here, there = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        raise ValueError(
            f"the weights in the file are not those of `{name}`, a {type(module).__name__}: "
            f"missing in the file {here[:3]}, unknown to the module {there[:3]}"
        )
    for key, value in state.items():
        if own[key].shape != value.shape:
            raise ValueError(
                f"{key!r} of `{name}` has shape {list(own[key].shape)}, and that in the file "
                f"{list(value.shape)}: make the module with the options that it was trained with"
            )
    module.load_state_dict(state)


def _tensors(name: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state of plain tensors."""
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"`{name}` has {key!r} of type {type(value).__name__} in its state, and a file "
                "holds tensors alone"
            )
        if hasattr(value, "full_tensor"):
            raise ValueError(
                f"`{name}` has {key!r} sharded over ranks: gather the state by "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "full_state_dict=True, read it into a plain network, and save that one"
            )
    return {str(key): value.detach() for key, value in state.items()}


def _plain(path: str, value: Any) -> Any:
    """What a file without code can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{path}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{path}[{i}]", item) for i, item in enumerate(value)]
    if value is None:
        return value
    for kind in (bool, int, float, str):
        if isinstance(value, kind):  # or a subclass, as of numpy, that takes code to read
            return kind(value)
    raise ValueError(
        f"`{path}` is {value!r}, and a file holds numbers, strings, lists and dicts alone"
    )
