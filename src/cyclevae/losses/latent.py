"""The base loss of the encoder direction, and the distance of latents that others share."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.masked import as_latent_mask, only_kept
from cyclevae._base.precision import fp32, fp64, rounded
from cyclevae._base.reduce import reduce_latents
from cyclevae._base.types import (
    Count,
    LatentMaskLike,
    Latents,
    Loss,
    MaskLike,
    Number,
    Prediction,
    Reduction,
    Time,
    Tokens,
)
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.passes import T2L, t2l
from cyclevae.processes.latent import LatentProcess, direction
from cyclevae.processes.text import TextProcess
from cyclevae.processes.times import LatentWeighting, TimePolicy

LatentDistance = Literal["mse", "cosine", "normalized_mse"]
_NOTHING = 1e-3  # the weight below which all times together teach nothing
AnyDistance = LatentDistance | Callable[[Latents, Latents], Latents]


@at_the_door
def latent_loss(
    prediction: Latents,
    target: Latents,
    *,
    distance: AnyDistance = "mse",
    weight: Time | None = None,
    variance: Number | Tensor = 1.0,
    reduction: Reduction = "mean",
    latent_mask: LatentMaskLike | None = None,
    count: Count | None = None,
) -> Loss:
    """Distance of latents, in fp32 or better; directions are compared in float64.

    `mse`: `1/(b d) sum ||prediction - target||^2`. `cosine`: `1 - cos(prediction, target)` over the
    last axis, averaged over vectors. `normalized_mse`: the squared error of the vectors scaled to
    norm 1, averaged over elements, which is `2/d` times `cosine`. The last two train no norm: a
    bridge read off such a model has the right direction and any length (see `LatentBridge.norm`).
    A vector shorter than 1e-8 has no direction, and gets no gradient from them.

    Args:
        prediction: `[b, ...]`; the other distances are of vectors, in `[b, d]` and `[b, n, d]`.
        target: of equal shape; nothing is broadcast.
        distance: `mse`, `cosine`, `normalized_mse`, or a function of prediction and target that
            returns an error per element.
        weight: of each row `[b]`, such as `min_snr_weight`; the denominator stays the same.
        variance: of the Gaussian whose negative log-density `nats` is, a number, `[d]` or in
            the shape of one latent.
        reduction: `mean` over elements (`cosine`: vectors), `sum`, `none` (the shape of the
            latents; `cosine`: without the last axis) or, for `mse`, `nats` (half the squared error
            over `variance`, summed over dimensions, mean over rows).
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`: what is not kept counts nowhere,
            and a function is shown 0 there.
        count: the denominator in place of this batch's own: see `text_loss`.

    Raises:
        ValueError: unequal shapes, an unknown distance or reduction, a distance of vectors between
            latents that hold none, `nats` of another distance than `mse`, a negative weight, a
            variance that is not above 0.

    Reference: `normalized_mse` is the latent loss of LGDLM's trainer, with its 1e-8,
    https://github.com/Joshua-Zhang-Jiaquan/LGDLM.

    Examples:
        >>> import torch
        >>> prediction, target = torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)
        >>> latent_loss(prediction, target)
        tensor(5.)
        >>> latent_loss(prediction, target, reduction="nats")
        tensor(5.)
        >>> latent_loss(prediction, torch.tensor([[3.0, -1.0]]), distance="cosine")
        tensor(1.)
    """
    checks.check_same_shape("prediction", prediction, "target", target)
    check_distance("distance", distance, prediction.shape[1:])
    if latent_mask is not None:
        latent_mask = as_latent_mask("latent_mask", latent_mask, target.shape)
        prediction, target = (only_kept(part, latent_mask) for part in (prediction, target))
    checks.check_variance("variance", variance, prediction.shape[1:])
    if reduction == "nats" and distance != "mse":
        raise ValueError(
            f"reduction='nats' is half a squared error over a variance, which distance="
            f"{distance!r} is not: use distance='mse' or another reduction"
        )
    match distance:
        case "mse":
            error = (fp32(prediction) - fp32(target)).square()
        case "cosine":
            error = rounded(_cosine_distance(prediction, target), prediction)
        case "normalized_mse":
            error = direction(fp64(prediction)) - direction(fp64(target))
            error = rounded(error.square(), prediction)
        case _:
            error = distance(fp32(prediction), fp32(target))
            checks.check_same_shape("distance(...)", error, "prediction", prediction)
    if weight is not None:
        error = error * _as_weight(weight, error)
    return reduce_latents(
        error, reduction=reduction, variance=variance, latent_mask=latent_mask, count=count
    )


def check_distance(name: str, distance: AnyDistance, shape: Sequence[int] = ()) -> None:
    """Refuse an unknown distance, or one of vectors where latents of a shape hold none.

    A function is taken as it is.
    """
    if callable(distance):
        return
    checks.check_choice(name, distance, get_args(LatentDistance))
    if distance != "mse":
        cure = "use 'mse', or a function of one's own"
        checks.check_vectors(name, distance, shape, cure=cure)


def count_errors(
    latents: Latents | None,
    rows: Bool[Tensor, " r"],
    latent_mask: Bool[Tensor, "r n"] | None = None,
    *,
    distance: AnyDistance = "mse",
) -> Count:
    """How many errors a distance gives for some rows of latents: the cosine has one per vector."""
    if latents is None:
        return 0
    if latent_mask is not None:
        rows, latents = latent_mask & rows[:, None], latents[:, 0]
    elements = latents[:1].numel()
    return rows.sum() * (elements // latents.shape[-1] if distance == "cosine" else elements)


@at_the_door
def min_snr_weight(
    latent_process: LatentProcess,
    time: Time,
    *,
    space: Prediction | None = None,
    gamma: Number = 5.0,
) -> Time:
    """Weights `[b]` that count a squared error at most `gamma` times that of the clean latent.

    With the signal-to-noise ratio `S`: `min(S, gamma)` for errors in the space of `x0`, and in
    another `min(S, gamma) g^2` with the `LatentProcess.gain` g of reading `x0` off it: in that of
    `epsilon` `min(S, gamma) / S`, in that of `v` `min(S, gamma) / (S + 1)` where the schedule
    preserves variance. The weighted loss is the same in each space. Where `S` is 0 at full noise
    it weighs it with 0 in the space of `x0` and of `v`: it suits base losses at random times, not
    a bridge that starts there.

    Args:
        latent_process: the latent process.
        time: `[b]`.
        space: of the error; that of the process's prediction if not given.
        gamma: the cap of the signal-to-noise ratio.

    Raises:
        ValueError: a `gamma` that is not above 0, an unknown space, a time outside [0, 1].

    Reference: Hang et al., https://arxiv.org/abs/2303.09556, section 3.4.

    Examples:
        >>> process = LatentProcess("continuous_cosine", prediction="v")
        >>> min_snr_weight(process, torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.5000, 0.0000])
    """
    checks.check_positive("gamma", gamma)
    space = latent_process.prediction if space is None else space
    latent_process.check_space("space", space)
    snr = latent_process.snr(time)
    if space == "epsilon":  # so written that neither 0 nor infinity is divided by itself
        return (gamma / snr).clamp(max=1)
    gain = latent_process.gain(time, source=space)
    return snr.clamp(max=gamma) * gain.square()


@at_the_door
def t2l_loss(
    denoiser: Denoiser,
    tokens: Tokens,
    latents: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    time: Number | Time | TimePolicy | None = 1.0,
    step: int = 0,
    space: Prediction | None = None,
    distance: AnyDistance = "mse",
    min_snr: Number | None = None,
    weighting: LatentWeighting | None = None,
    noise: Latents | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    latent_mask: LatentMaskLike | None = None,
    count: Count | None = None,
) -> Loss:
    """Train the encoder on pairs: distance of its prediction, in its own prediction space.

    A squared error in the space of epsilon is `S` times, and in that of `v` `1 + S` times that in
    the space of `x0`, where `S` is the signal-to-noise ratio and the schedule preserves variance
    (`1 / g^2` times in any, with `LatentProcess.gain`): near full noise an error in epsilon counts
    next to nothing.

    Args:
        denoiser: the model.
        tokens: clean ids `[b, s]`.
        latents: clean latents.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        latent_process: the latent process.
        time: of the latents; a number, `[b]`, a policy that draws them, or None for
            `TimePolicy("uniform")`.
        step: the training step, for a policy whose cap moves.
        space: in which the prediction is compared; the model's own if not given.
        distance: as `latent_loss`.
        min_snr: weigh rows with `min_snr_weight`, with this `gamma` (5 in the paper).
        weighting: weigh rows by a function of their times instead, `LogitNormal(...)` or one's own
            `t -> [b]`, at least 0; it multiplies the error in `space`.
        noise: standard normal noise; drawn with `generator` if not given.
        generator: random state of the draws.
        reduction: as `latent_loss`.
        latent_mask: as `latent_loss`; the model is told.
        count: as `latent_loss`.

    Raises:
        ValueError: wrong shapes or values, a `space` into which the prediction cannot be
            converted at these times: from epsilon near full noise, from `x0` near none; or two
            weights.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> tokens, mask, latents = toy_batch(seed=0)[:3]
        >>> loss = t2l_loss(
        ...     denoiser, tokens, latents, mask,
        ...     text_process=text_process, latent_process=latent_process,
        ...     time=TimePolicy("logit_normal"), space="x0",
        ... )
        >>> loss.shape
        torch.Size([])
    """
    check_distance("distance", distance, latents.shape[1:])
    tokens, attention_mask = text_process.as_text(tokens, attention_mask)
    space = latent_process.prediction if space is None else space
    latent_process.check_space("space", space)
    check_weights(min_snr, weighting)
    if time is None:
        time = TimePolicy("uniform")
    if isinstance(time, TimePolicy):
        for end in (time.lowest(step), time.highest(step)):  # whatever comes between
            latent_process.refuse_ill_conditioned(end, space=space)
        time = time(len(tokens), step=step, device=tokens.device, generator=generator)
    latent_process.refuse_ill_conditioned(time, space=space)
    encoded = t2l(
        denoiser,
        tokens,
        attention_mask,
        text_process=text_process,
        latent_process=latent_process,
        latents=latents,
        time=time,
        noise=noise,
        generator=generator,
        latent_mask=latent_mask,
    )
    return encoded_loss(
        encoded,
        latents,
        latent_process=latent_process,
        space=space,
        distance=distance,
        min_snr=min_snr,
        weighting=weighting,
        reduction=reduction,
        count=count,
    )


def encoded_loss(
    encoded: T2L,
    latents: Latents,
    *,
    latent_process: LatentProcess,
    space: Prediction | None = None,
    distance: AnyDistance = "mse",
    min_snr: Number | None = None,
    weighting: LatentWeighting | None = None,
    reduction: Reduction = "mean",
    count: Count | None = None,
) -> Loss:
    """The loss of a T2L pass that has run: see `t2l_loss`."""
    latents = only_kept(latents, encoded.latent_mask)
    space = latent_process.prediction if space is None else space
    weight = row_weights(
        encoded.time, latent_process, space=space, min_snr=min_snr, weighting=weighting
    )
    return latent_loss(
        latent_process.in_space(encoded.prediction, encoded.z_t, encoded.time, space=space),
        latent_process.target(latents, encoded.noise, encoded.time, space=space),
        distance=distance,
        weight=weight,
        reduction=reduction,
        latent_mask=encoded.latent_mask,
        count=count,
    )


def check_weights(min_snr: Number | None, weighting: LatentWeighting | None) -> None:
    """Refuse two weights for one row, and what is none."""
    check_weighting("weighting", weighting)
    if min_snr is not None:
        checks.check_positive("min_snr", min_snr)
        if weighting is not None:
            raise ValueError("`min_snr` and `weighting` both weigh the rows of a loss: give one")


def check_weighting(name: str, weighting: object) -> None:
    """Refuse what is no function of the times."""
    if weighting is not None and not callable(weighting):
        raise ValueError(
            f"`{name}` must be LogitNormal(...) or a function of times [b] that returns weights "
            f"[b], got {weighting!r}"
        )


def check_some_weight(name: str, told: object, weights: object, times: Time) -> None:
    """Refuse weights of the times of a term that are no weights, or teach nothing."""
    shown = f"{told:g}" if isinstance(told, int | float) else repr(told)
    weighs = f"`{name}` = {shown} weighs times from {times.min():g} to {times.max():g} with"
    if not isinstance(weights, Tensor) or weights.shape != times.shape or weights.min() < 0:
        raise ValueError(f"{weighs} {weights!r:.80}, not with a number of at least 0 for each")
    if not weights.max().item() >= _NOTHING:
        raise ValueError(
            f"{weighs} {weights.max().item():.1e} at most, so that the loss teaches nothing: "
            f"draw other times, as in time=TimePolicy('uniform'), or leave `{name}` out"
        )


def row_weights(
    time: Time,
    latent_process: LatentProcess,
    *,
    space: Prediction,
    min_snr: Number | None = None,
    weighting: LatentWeighting | None = None,
) -> Time | None:
    """The weights `[b]` of squared errors in a space; None where all are 1."""
    if min_snr is not None:
        return min_snr_weight(latent_process, time, space=space, gamma=min_snr)
    return None if weighting is None else weighting(time)


def _cosine_distance(x: Latents, y: Latents) -> Loss:
    """`1 - cos(x, y)`, which would cancel where they are near, as half a squared distance."""
    x, y = direction(fp64(x)), direction(fp64(y))
    missing = torch.stack([1 - part.square().sum(dim=-1) for part in (x, y)])
    missing = torch.where(missing > 1e-6, missing, 0.0).sum(dim=0)  # where one has no direction
    return ((x - y).square().sum(dim=-1) + missing) / 2


def _as_weight(weight: Tensor, error: Tensor) -> Tensor:
    if weight.shape != error.shape[:1] or not weight.is_floating_point():
        raise ValueError(
            f"`weight` must be floats of shape [{len(error)}], one for each row, got "
            f"{weight.dtype} {list(weight.shape)}"
        )
    if checks.reads_values(weight) and not bool((weight >= 0).all()):
        raise ValueError("`weight` must be at least 0 in every row, got negative or NaN values")
    return weight.to(error.dtype).view(-1, *[1] * (error.ndim - 1))
