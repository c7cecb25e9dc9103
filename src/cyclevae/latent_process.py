"""The forward process of latents: Gaussian noise, and what the model predicts of it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from cyclevae import _checks
from cyclevae._precision import fp32
from cyclevae._types import Latents, Number, Prediction, Time

LatentSchedule = Literal["cosine", "linear", "sigmoid", "continuous_cosine"]
AlphaSigma = Callable[[Time], tuple[Time, Time]]


def noise_latents(latents: Latents, noise: Latents, alpha: Time, sigma: Time) -> Latents:
    """Noise latents: `z_t = alpha z + sigma epsilon`."""
    alpha, sigma = _rowwise(latents, alpha, sigma)
    return alpha * latents + sigma * noise


def convert(
    value: Latents,
    z_t: Latents,
    alpha: Time,
    sigma: Time,
    *,
    source: Prediction,
    target: Prediction,
) -> Latents:
    """Convert a prediction between `epsilon`, `x0` and `v = alpha epsilon - sigma x0`.

    Computed in fp32 or better: in bf16 at full noise a perfect epsilon decodes to an error of 15.
    At `alpha = 0`, epsilon says nothing of x0, and at `sigma = 0`, x0 nothing of epsilon: these
    conversions divide by zero.

    Reference: Salimans and Ho, https://arxiv.org/abs/2202.00512, appendix D.

    Examples:
        >>> z_t, v = torch.tensor([[1.0]]), torch.tensor([[0.5]])
        >>> alpha, sigma = torch.tensor([0.6]), torch.tensor([0.8])
        >>> convert(v, z_t, alpha, sigma, source="v", target="x0")
        tensor([[0.2000]])
    """
    _checks.check_choice("source", source, get_args(Prediction))
    _checks.check_choice("target", target, get_args(Prediction))
    _checks.check_same_shape("value", value, "z_t", z_t)
    value, z_t = fp32(value), fp32(z_t)
    if source == target:
        return value
    alpha, sigma = _rowwise(value, alpha, sigma)
    match source, target:
        case "epsilon", "x0":
            return (z_t - sigma * value) / alpha
        case "epsilon", "v":
            return (value - sigma * z_t) / alpha
        case "x0", "epsilon":
            return (z_t - alpha * value) / sigma
        case "x0", "v":
            return (alpha * z_t - value) / sigma
        case "v", "x0":
            return alpha * z_t - sigma * value
        case _:
            return sigma * z_t + alpha * value


@dataclass(frozen=True)
class LatentProcess:
    """The variance-preserving latent process: a noise schedule and what the model predicts.

    The discretised schedules have 1000 steps, and time `t` in [0, 1] means step `floor(999 t)`:
    `cosine` (Nichol and Dhariwal, https://arxiv.org/abs/2102.09672, betas clipped to
    [1e-4, 0.9999]), `linear` and `sigmoid` (betas from 1e-4 to 0.02). `continuous_cosine` is
    `alpha = cos(pi t / 2)`, exactly 0 at full noise. A callable `t -> (alpha, sigma)` brings a
    schedule of one's own.

    Attributes:
        schedule: the noise schedule.
        prediction: what the latent head predicts.
        max_gain: refuse to read a clean latent off an epsilon prediction where `sigma / alpha`,
            which multiplies the prediction's error, is above this.
        shape: of one latent, `(d,)` or `(n, d)`; needed only where noise must be drawn and the
            batch holds no latents.

    Raises:
        ValueError: an unknown schedule or prediction, or a bad `max_gain`.

    Examples:
        >>> import torch
        >>> process = LatentProcess("cosine", prediction="epsilon")
        >>> process.gain(torch.tensor([0.5, 0.9, 1.0])).round(decimals=2).tolist()
        [1.00999..., 6.36999..., 641...]
    """

    schedule: LatentSchedule | AlphaSigma = "cosine"
    prediction: Prediction = "v"
    max_gain: Number = 10.0
    shape: tuple[int, ...] | None = None
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str):
            _checks.check_choice("schedule", self.schedule, get_args(LatentSchedule))
        _checks.check_choice("prediction", self.prediction, get_args(Prediction))
        _checks.check_positive("max_gain", self.max_gain)
        if self.shape is not None:
            shape = tuple(self.shape) if isinstance(self.shape, Iterable) else (self.shape,)
            if len(shape) not in (1, 2) or not all(isinstance(n, int) and n > 0 for n in shape):
                raise ValueError(f"`shape` must be (d,) or (n, d), got {self.shape!r}")
            object.__setattr__(self, "shape", shape)
        if callable(self.schedule):
            alpha, sigma = self.schedule(torch.linspace(0, 1, 5))
            if self.prediction == "v" and not torch.allclose(
                alpha**2 + sigma**2, torch.ones(5), atol=1e-3
            ):
                raise ValueError(
                    "a `v` prediction needs a variance preserving `schedule`: alpha^2 + sigma^2 "
                    f"must be 1, got {(alpha**2 + sigma**2).tolist()} at times 0, 1/4, ..., 1; "
                    "predict `x0` or `epsilon`"
                )
        elif self.schedule != "continuous_cosine":
            self.alpha_sigma(torch.zeros(1, device="cpu"))  # so that no table is made while tracing

    def alpha_sigma(self, time: Time) -> tuple[Time, Time]:
        """Signal and noise amplitudes at a time, `[b]` each, fp32 or better.

        Raises:
            ValueError: a time outside [0, 1].
        """
        time = _checks.as_time("time", time, time)
        if callable(self.schedule):
            return self.schedule(time)
        if self.schedule == "continuous_cosine":
            quarter = math.pi / 2
            return torch.sin(quarter * (1 - time)), torch.sin(quarter * time)
        key = time.device, time.dtype
        if key not in self._tables:  # float64 ends on the CPU: some devices have none
            alpha_bar = _discrete_alpha_bar(self.schedule)
            table = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()])
            self._tables[key] = table.to(time.dtype).to(time.device)
        alpha, sigma = self._tables[key][:, (time * 999).long()]
        return alpha, sigma

    def gain(self, time: Time) -> Time:
        """`sigma / alpha` `[b]`, by which x0-from-epsilon multiplies the prediction's error."""
        alpha, sigma = self.alpha_sigma(time)
        return sigma / alpha

    def noised(self, latents: Latents, noise: Latents, time: Time) -> Latents:
        """Latents at a time, in their own dtype."""
        _checks.check_same_shape("noise", noise, "latents", latents)
        return noise_latents(latents, noise, *self.alpha_sigma(time)).to(latents.dtype)

    def target(self, latents: Latents, noise: Latents, time: Time) -> Latents:
        """What the model should predict, fp32 or better."""
        _checks.check_same_shape("noise", noise, "latents", latents)
        match self.prediction:
            case "epsilon":
                return fp32(noise)
            case "x0":
                return fp32(latents)
            case "v":
                alpha, sigma = _rowwise(latents, *self.alpha_sigma(time))
                return alpha * noise - sigma * latents

    def to_x0(self, prediction: Latents, z_t: Latents, time: Time) -> Latents:
        """The clean latents a prediction means, in the dtype of `z_t`.

        Raises:
            ValueError: an epsilon prediction where `gain` is above `max_gain`.

        Examples:
            >>> process, time = LatentProcess(prediction="v"), torch.tensor([0.5])
            >>> z, noise = torch.ones(1, 2), torch.zeros(1, 2)
            >>> v, z_t = process.target(z, noise, time), process.noised(z, noise, time)
            >>> process.to_x0(v, z_t, time).round(decimals=3)
            tensor([[1., 1.]])
        """
        _checks.check_same_shape("prediction", prediction, "z_t", z_t)
        self.refuse_ill_conditioned(time)
        alpha, sigma = self.alpha_sigma(time)
        x0 = convert(prediction, z_t, alpha, sigma, source=self.prediction, target="x0")
        return x0.to(z_t.dtype)

    def refuse_ill_conditioned(self, time: Number | Time) -> None:
        """Refuse times at which an epsilon prediction says nothing of the clean latent.

        A number is always checked, a tensor where values are (see `check_values`).

        Raises:
            ValueError: the gain is above `max_gain`; the message lists the cures.
        """
        if self.prediction != "epsilon" or torch.compiler.is_compiling():
            return
        if not isinstance(time, Tensor):
            time = torch.tensor([time], dtype=torch.float64)
        elif not _checks.reads_values(time):
            return
        gain = float(self.gain(time).max()) if len(time) else 0.0
        if gain > self.max_gain:
            raise ValueError(
                f"an epsilon prediction at time {float(time.max()):g} has a gain of {gain:.4g}, "
                f"above max_gain = {self.max_gain:g}: its error would be multiplied by that much "
                "and the latent would be garbage that losses do not show. Ways out: predict `v` or "
                "`x0` (the only full cure); or start the bridge at a capped time such as 0.9 with "
                "the base T2L trained at random times up to that cap, and take a few DDIM steps "
                "under no_grad, the last one differentiable"
            )


def _discrete_alpha_bar(schedule: str, steps: int = 1000) -> Tensor:
    low, high = 1e-4, 0.02
    match schedule:
        case "cosine":
            grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu")
            alpha_bar = torch.cos((grid + 0.008) / 1.008 * math.pi / 2).square()
            betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(1e-4, 0.9999)
        case "linear":
            betas = torch.linspace(low, high, steps, dtype=torch.float64, device="cpu")
        case _:
            logistic = torch.linspace(-6, 6, steps, dtype=torch.float64, device="cpu").sigmoid()
            betas = logistic * (high - low) + low
    return torch.cumprod(1 - betas, dim=0)


def _rowwise(like: Tensor, *scales: Tensor) -> Iterable[Tensor]:
    shape = (-1,) + (1,) * (like.ndim - 1)
    return (scale.view(shape) for scale in scales)
