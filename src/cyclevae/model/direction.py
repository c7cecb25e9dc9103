"""Which way a network counts the times of latents, and what it predicts: said once, noted on it."""

from typing import Any, Literal, get_args

from torch import nn

from cyclevae._base.types import Prediction
from cyclevae.processes.latent import LatentProcess

CleanAt = Literal[0, 1]
_KNOWN = {"clean_at": get_args(CleanAt), "predicts": get_args(Prediction)}


def direction_of(
    module: nn.Module, clean_at: CleanAt | None, predicts: Prediction | None
) -> tuple[CleanAt, Prediction | None]:
    """As told, or as a plain module says; what is told is noted on it, where copies find it."""
    clean_at, predicts = _said(module, "clean_at", clean_at), _said(module, "predicts", predicts)
    if clean_at == 1 and predicts is None:
        predicts = "velocity"
    return clean_at or 0, predicts


def _said(module: nn.Module, name: str, told: Any) -> Any:
    noted = getattr(module, name, None)
    value = noted if told is None else told
    if value is not None and value not in _KNOWN[name]:
        known = ", ".join(map(repr, _KNOWN[name]))
        raise ValueError(f"`{name}` must be one of {known}, got {value!r}")
    if noted is not None and value != noted:
        raise ValueError(
            f"`{name}` is {value!r}, and of {type(module).__name__} it is already {noted!r}: "
            "say it once"
        )
    if told is not None:
        setattr(module, name, told)
    return value


def direction_of_two(encoder: nn.Module, decoder: nn.Module) -> tuple[CleanAt, Prediction | None]:
    """That of two networks which are given the same times."""
    (clean_at, predicts), (other, _) = (direction_of(m, None, None) for m in (encoder, decoder))
    if clean_at != other:
        raise ValueError(
            f"`encoder.clean_at` is {clean_at} and `decoder.clean_at` {other}, and both are given "
            "the same times: set the attribute clean_at = 1 on both, or turn the times of one "
            "round in a module of your own"
        )
    return clean_at, predicts


def check_predicts(name: str, denoiser: object, latent_process: LatentProcess) -> None:
    """Refuse a process whose prediction is not what the network was said to predict."""
    predicts = getattr(denoiser, "predicts", None)
    if predicts is not None and predicts != latent_process.prediction:
        raise ValueError(
            f"`latent_process.prediction` is {latent_process.prediction!r}, and `{name}` predicts "
            f"{predicts!r} (of a network with clean_at=1 the velocity, unless it says another): "
            f"write as_denoiser(network, ..., predicts={latent_process.prediction!r}), or "
            f"LatentProcess(prediction={predicts!r})"
        )
