"""Which prior a name means: its options, checked before a step runs, and its value."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cyclevae import _checks
from cyclevae._types import Count, Latents, Mask, Scalar, Time, Tokens
from cyclevae.bridges import draw_lengths
from cyclevae.denoiser import Denoised, Denoiser
from cyclevae.latent_process import LatentProcess
from cyclevae.pool import pool_rows
from cyclevae.priors import ddvi_wake_kl, learned_prior, mmd_prior, moment_prior, sigreg_prior
from cyclevae.text_process import TextProcess

PriorName = Literal["moment", "mmd", "sigreg", "learned", "ddvi"]
Prior = PriorName | Callable[..., Scalar]

_STATISTICS: dict[str, Callable[..., Scalar]] = {
    "moment": moment_prior,
    "mmd": mmd_prior,
    "sigreg": sigreg_prior,
}
_OF_ROWS: dict[str, Callable[..., Scalar]] = {"learned": learned_prior, "ddvi": ddvi_wake_kl}
_GIVEN_BY_THE_STEP = ("text_process", "latent_process", "generator", "count", "null_mask", "time")
_MOMENTS = ("mean", "variance", "covariance", "reference")


def reads_teacher(prior: Prior) -> bool:
    """Whether a prior judges latents by a frozen copy of the network."""
    return prior in _OF_ROWS


def teaches_z_hat(prior: Prior) -> bool:
    """Whether the gradient of a prior reaches the latents it reads."""
    return prior != "ddvi"


def prior_passes(prior: Prior) -> int:
    """The passes of the denoiser and its teacher that a prior runs on the latents it reads."""
    return {"learned": 1, "ddvi": 2}.get(prior, 0) if isinstance(prior, str) else 0


def needs_two_rows(prior: Prior, pool: bool) -> bool:
    """Whether one text on this rank is too few."""
    return prior in _STATISTICS and not pool


def check_prior(
    prior: Prior,
    options: Mapping[str, Any],
    *,
    pool: bool,
    text_process: TextProcess,
    latent_process: LatentProcess,
) -> None:
    """Refuse options that the prior does not take, by a run without data on the meta device.

    Raises:
        ValueError: an unknown prior or option, a value out of range, or options that do not go
            together.
    """
    if callable(prior):
        return
    _checks.check_choice("prior", prior, get_args(PriorName))
    if pool and reads_teacher(prior):
        raise ValueError(
            f"`pool_prior` has no effect on prior={prior!r}, which is a mean over rows and no "
            "statistic of the batch; leave it out, and give `counts`"
        )
    function = {**_STATISTICS, **_OF_ROWS}[prior]
    known = {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in _GIVEN_BY_THE_STEP
    } - ({"noise"} if reads_teacher(prior) else set())
    for name in options:
        if name not in known:
            raise ValueError(
                f"unknown key {name!r} in `prior_options` of prior={prior!r}; "
                f"{_checks.nearest(name, known)}"
            )
    shape = latent_process.shape or _shape_of(options)
    rows = 2 * math.prod(shape) + 2  # enough for any estimator
    z_hat = torch.empty(rows, *shape, device="meta")
    ids = torch.zeros(rows, 2, dtype=torch.long, device="meta")
    try:
        prior_loss(
            prior,
            options,
            z_hat,
            denoiser=_Echo(),
            teacher=_Echo(),
            tokens=ids,
            mask=ids.bool(),
            text_process=text_process,
            latent_process=latent_process,
        )
    except ValueError as error:
        raise ValueError(f"`prior_options` of prior={prior!r}: {error}") from error


def prior_loss(
    prior: Prior,
    options: Mapping[str, Any],
    z_hat: Latents,
    *,
    denoiser: Denoiser,
    teacher: Denoiser | None,
    tokens: Tokens,
    mask: Mask,
    text_process: TextProcess,
    latent_process: LatentProcess,
    pool: bool = False,
    generator: torch.Generator | None = None,
    count: Count | None = None,
) -> Scalar:
    """The value of a prior on the latents of some texts."""
    if not reads_teacher(prior):
        function = prior if callable(prior) else _STATISTICS[prior]
        if prior == "sigreg":
            options = {**options, "generator": generator}
        return function(pool_rows(z_hat) if pool else z_hat, **options)
    if teacher is None:
        raise ValueError(
            f"prior={prior!r} reads a frozen copy of the network, and none was given: make one by "
            "`teacher = Teacher(network)`, give it to StepModule, or its `.denoiser` to the "
            "objective, and call teacher.update(network) after each optimizer step"
        )
    given: dict[str, Any] = {
        "text_process": text_process,
        "latent_process": latent_process,
        "generator": generator,
        "count": count,
    }
    if prior == "ddvi":
        return ddvi_wake_kl(denoiser, teacher, tokens, mask, z_hat, **options, **given)
    # a text's own length would tell something of its latent
    mask = draw_lengths(mask, len(mask), generator=generator)
    return learned_prior(teacher, z_hat, mask, **options, **given)


def as_tensors(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a prior as `to_config` wrote them: moments that were lists are tensors."""
    return {
        name: torch.tensor(value) if name in _MOMENTS and isinstance(value, list) else value
        for name, value in options.items()
    }


def _shape_of(options: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a latent, where only the options tell it."""
    for name in ("mean", "variance"):
        value = options.get(name)
        if isinstance(value, Tensor) and value.ndim:
            return tuple(value.shape)
    covariance, reference = options.get("covariance"), options.get("reference")
    if isinstance(covariance, Tensor):
        return tuple(covariance.shape[-1:])
    return tuple(reference.shape[1:]) if isinstance(reference, Tensor) else (2,)


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
        need: str = "both",
    ) -> Denoised:
        """The latents as they came."""
        return Denoised(None, latents)
