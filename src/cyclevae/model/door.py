"""What every public function asks of an argument by its name, before anything is run."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from cyclevae._base import checks
from cyclevae.gradient_policy.policy import GradientPolicy
from cyclevae.model.direction import check_predicts
from cyclevae.model.unread import UnreadLogits
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess

P = ParamSpec("P")
R = TypeVar("R")


def at_the_door(function: Callable[P, R]) -> Callable[P, R]:
    """A function that refuses arguments of another kind than their names say, with the cure.

    Raises:
        TypeError: an array, a list or a dict in place of a tensor, a bare network in place of a
            denoiser, processes that are swapped, a seed in place of a generator.
        ValueError: a process of another prediction than the denoiser was said to have.
    """
    parameters = inspect.signature(function).parameters
    names = tuple(parameters)
    required = {name for name in names if parameters[name].default is inspect.Parameter.empty}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name, value in given.items():
            if name in _KINDS and name in names and (value is not None or name in required):
                _KINDS[name](name, value)
        process = given.get("latent_process")
        if isinstance(process, LatentProcess):
            for name in ("denoiser", "teacher"):
                check_predicts(name, given.get(name), process)
        return function(*args, **kwargs)

    return checked


def _check_denoiser(name: str, value: object) -> None:
    if hasattr(value, "denoise"):
        return
    cure = "write as_denoiser(network) around a module of the right signature"
    if hasattr(getattr(value, "denoiser", None), "denoise"):  # a Teacher, a StepModule
        cure = "give its `.denoiser`"
    raise TypeError(
        f"`{name}` must be a Denoiser, an object with a `denoise` method, got "
        f"{type(value).__name__}; {cure}"
    )


def _check_logits(name: str, value: object) -> None:
    if not isinstance(value, UnreadLogits):
        checks.check_tensor(name, value)


def _check_text_process(name: str, value: object) -> None:
    _check_class(name, value, TextProcess, "TextProcess(mask_id=..., vocab_size=...)")


def _check_latent_process(name: str, value: object) -> None:
    _check_class(name, value, LatentProcess, "LatentProcess(prediction=...)")


def _check_generator(name: str, value: object) -> None:
    _check_class(name, value, torch.Generator, "torch.Generator(device).manual_seed(seed)")


def _check_policy(name: str, value: object) -> None:
    if isinstance(value, str):
        raise TypeError(
            f"`{name}` must be a GradientPolicy, got {value!r}: names are for "
            "terms; 'stop_gradient' is GradientPolicy(), and 'full' GradientPolicy('full')"
        )
    _check_class(name, value, GradientPolicy, "GradientPolicy('detach')")


def _check_class(name: str, value: object, kind: type, example: str) -> None:
    if not isinstance(value, kind):
        swapped = isinstance(value, TextProcess | LatentProcess)
        raise TypeError(
            f"`{name}` must be a {kind.__name__}, such as {example}, got {type(value).__name__}"
            + ("; are the two processes swapped?" if swapped else "")
        )


_TENSORS = (
    "tokens",
    "attention_mask",
    "lengths",
    "latent_mask",
    "text_latent_mask",
    "latents",
    "log_probs",
    "rewards",
    "noise",
    "z",
    "z_hat",
    "y_hat",
    "z_t",
    "value",
    "prediction",
    "target",
    "null_mask",
    "has_text",
    "has_latent",
    "duplicates",
    "weight",
    "candidates",
    "log_prior",
)
_KINDS: dict[str, Callable[[str, object], None]] = {
    **dict.fromkeys(_TENSORS, checks.check_tensor),
    **dict.fromkeys(("mean", "variance"), checks.check_number),
    **dict.fromkeys(("count", "text_count", "latent_count"), checks.check_number),
    **dict.fromkeys(("denoiser", "teacher", "maker"), _check_denoiser),
    "text_process": _check_text_process,
    "latent_process": _check_latent_process,
    "generator": _check_generator,
    "logits": _check_logits,
    "policy": _check_policy,
}
