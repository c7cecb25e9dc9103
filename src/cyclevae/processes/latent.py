"""The forward process of latents: Gaussian noise, and what the model predicts of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.precision import fp32
from cyclevae._base.types import Latents, Number, Prediction, Time
from cyclevae.processes.amplitudes import check_rates, check_schedule
from cyclevae.processes.conversions import (
    Amplitudes,
    coefficients,
    convert,
    noise_latents,
    rowwise,
    solve,
)
from cyclevae.processes.latent_schedules import EDM, AlphaSigma, Flow, LatentSchedule, named


def direction(latents: Latents) -> Latents:
    """Each vector (the last axis) at norm 1, in fp32 or better.

    A vector shorter than 1e-8 has no direction: it is multiplied by 1e8, without a gradient.
    """
    latents = fp32(latents)
    norm = latents.detach().norm(dim=-1, keepdim=True)
    latents = torch.where(norm > 1e-8, latents, latents.detach())
    return F.normalize(latents, dim=-1, eps=1e-8)


@dataclass(frozen=True)
class LatentProcess:
    """The latent process `z_t = alpha z + sigma epsilon`: a schedule and what the model predicts.

    Four schedules preserve variance, `alpha^2 + sigma^2 = 1`. The discretised ones have
    1000 steps, and time `t` in [0, 1] means step `floor(999 t)`: `cosine` (Nichol and Dhariwal,
    https://arxiv.org/abs/2102.09672, betas clipped to [1e-4, 0.9999]), `linear` and `sigmoid`
    (betas from 1e-4 to 0.02). `continuous_cosine` is `alpha = cos(pi t / 2)`, exactly 0 at full
    noise. `flow` is the straight path of flow matching, `alpha = 1 - t`, and `edm` keeps
    `alpha = 1`: short for `Flow()` and `EDM()`, which have options. A callable
    `t -> (alpha, sigma)` brings a schedule of one's own; its method or attribute `rates`, likewise
    `t -> (alpha', sigma')`, is what a velocity is made of.

    Attributes:
        schedule: the noise schedule.
        prediction: what the latent head predicts.
        max_gain: refuse to read a clean latent off a prediction where `gain`, which multiplies the
            prediction's error, is above this; likewise any other prediction.
        shape: of one latent, such as `(d,)`, `(n, d)` or `(c, h, w)`; needed only where noise must
            be drawn and the batch holds no latents.

    Raises:
        ValueError: an unknown schedule or prediction, a bad `max_gain`, a schedule that does not
            return two tensors, one whose signal-to-noise ratio rises with time, as where time 0
            is full noise, or a velocity of a schedule without rates, such as a table.

    Examples:
        >>> import torch
        >>> process = LatentProcess("cosine", prediction="epsilon")
        >>> process.gain(torch.tensor([0.5, 0.9, 1.0])).round(decimals=2).tolist()
        [1.00999..., 6.36999..., 641...]
    """

    schedule: LatentSchedule | Flow | EDM | AlphaSigma = "cosine"
    prediction: Prediction = "v"
    max_gain: Number = 10.0
    shape: tuple[int, ...] | None = None
    _amplitudes: AlphaSigma = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        amplitudes = self.schedule
        if not callable(amplitudes):
            checks.check_choice("schedule", amplitudes, get_args(LatentSchedule))
            amplitudes = named(amplitudes)
        object.__setattr__(self, "_amplitudes", amplitudes)
        checks.check_positive("max_gain", self.max_gain)
        if self.shape is not None:
            shape = tuple(self.shape) if isinstance(self.shape, Iterable) else (self.shape,)
            if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
                raise ValueError(
                    "`shape` must be that of one latent, such as (d,), (n, d) or (c, h, w), got "
                    f"{self.shape!r}"
                )
            object.__setattr__(self, "shape", shape)
        # also makes the table of a discretised schedule, so that none is made while tracing
        grid = torch.linspace(0, 1, 101, device="cpu")
        try:
            alpha, sigma = self.alpha_sigma(grid)
        except Exception as error:
            raise ValueError(
                "`schedule` must be a name or a function of times [b] that returns two tensors "
                f"(alpha, sigma); {self.schedule!r} failed on times 0, 0.01, ..., 1 "
                f"({type(error).__name__}: {error})"
            ) from error
        check_schedule(grid, alpha, sigma)
        if hasattr(amplitudes, "rates"):
            check_rates(grid, amplitudes)
        self.check_space("prediction", self.prediction)

    def check_space(self, name: str, space: object) -> None:
        """Refuse what is no prediction, and a velocity where the schedule has no derivative.

        Raises:
            ValueError: by the name of the argument, with the cure.
        """
        checks.check_choice(name, space, get_args(Prediction))
        if space == "velocity" and not hasattr(self._amplitudes, "rates"):
            raise ValueError(
                f"`{name}` is 'velocity', (alpha', sigma'), and the schedule {self.schedule!r} has "
                "no derivative: give a function of one's own `rates`, a method or attribute "
                "t -> (alpha', sigma'), as `Flow` has; or take the schedule 'flow', 'edm' or "
                "'continuous_cosine', or another prediction such as 'v'"
            )

    def alpha_sigma(self, time: Time) -> tuple[Time, Time]:
        """Signal and noise amplitudes at a time, `[b]` each, fp32 or better.

        Raises:
            ValueError: a time outside [0, 1].
        """
        time = checks.as_time("time", time, time)
        return self._amplitudes(time)

    def rates(self, time: Time) -> tuple[Time, Time]:
        """How fast the amplitudes move, `(alpha', sigma')`, `[b]` each: a velocity's coefficients.

        By the clock of the schedule: `Flow` and `EDM` count in `sigma`, `continuous_cosine` in
        time.

        Raises:
            ValueError: a schedule without a derivative, or a time outside [0, 1].
        """
        self.check_space("space", "velocity")
        moved: tuple[Time, Time] = self._amplitudes.rates(  # type: ignore[attr-defined]
            checks.as_time("time", time, time)
        )
        return moved

    def _rates(self, time: Time, *predictions: Prediction) -> Amplitudes | None:
        return self.rates(time) if "velocity" in predictions else None

    def gain(
        self, time: Time, *, source: Prediction | None = None, space: Prediction = "x0"
    ) -> Time:
        """`[b]`, by which the error of a prediction is multiplied where another is read off it.

        `|alpha b' - sigma a'| / |alpha b - sigma a|`, with the coefficients `(a, b)` of the source
        and `(a', b')` of what is read. Of the clean latent: `sigma / alpha` off epsilon,
        `sigma / (alpha^2 + sigma^2)` off v, `t` off the velocity of the straight path.

        Args:
            time: `[b]`.
            source: what is predicted; what the model predicts if not given.
            space: what is read off it.
        """
        source = self.prediction if source is None else source
        alpha, sigma = self.alpha_sigma(time)
        if source == space:
            return torch.ones_like(alpha)
        rates = self._rates(time, source, space)
        _, factor, pivot = solve(source, space, alpha, sigma, rates)
        return (factor / pivot).abs()

    def snr(self, time: Time) -> Time:
        """The signal-to-noise ratio `S = alpha^2 / sigma^2` `[b]`; infinite without noise."""
        alpha, sigma = self.alpha_sigma(time)
        return (alpha / sigma).square()

    def start_variance(self, time: Time) -> Time:
        """Of `z_t` `[b]`, for latents of variance 1: `alpha^2 + sigma^2`."""
        alpha, sigma = self.alpha_sigma(time)
        variance = alpha.square() + sigma.square()
        # what preserves variance does so but for rounding, which is to change no noise
        return torch.where((variance - 1).abs() < 1e-5, 1.0, variance)

    def started(self, noise: Latents, time: Time) -> Latents:
        """Where the encoder starts if it is shown no latent: `sqrt(alpha^2 + sigma^2) noise`.

        The law of `z_t` for latents of mean 0 and variance 1, in the dtype of the noise: that of
        the noise itself where the schedule preserves variance.

        Examples:
            >>> process = LatentProcess(lambda t: (torch.ones_like(t), 80 * t), prediction="x0")
            >>> process.started(torch.ones(1, 2), torch.ones(1))
            tensor([[80.0062, 80.0062]])
        """
        (scale,) = rowwise(noise, self.start_variance(time).sqrt())
        return (scale * noise).to(noise.dtype)

    def noise_in(self, z_t: Latents, latents: Latents, time: Time) -> Latents:
        """The noise that is in `z_t` if these are the latents: `(z_t - alpha z) / sigma`."""
        checks.check_same_shape("z_t", z_t, "latents", latents)
        alpha, sigma = rowwise(z_t, *self.alpha_sigma(time))
        return (fp32(z_t) - alpha * latents) / sigma

    def noised(self, latents: Latents, noise: Latents, time: Time) -> Latents:
        """Latents at a time, in their own dtype."""
        checks.check_same_shape("noise", noise, "latents", latents)
        return noise_latents(latents, noise, *self.alpha_sigma(time)).to(latents.dtype)

    def target(
        self, latents: Latents, noise: Latents, time: Time, *, space: Prediction | None = None
    ) -> Latents:
        """What the model should predict, or the same in another `space`; fp32 or better."""
        checks.check_same_shape("noise", noise, "latents", latents)
        space = self.prediction if space is None else space
        self.check_space("space", space)
        match space:
            case "epsilon":
                return fp32(noise)
            case "x0":
                return fp32(latents)
            case _:
                scales, rates = self.alpha_sigma(time), self._rates(time, space)
                a, b = rowwise(latents, *coefficients(space, *scales, rates))
                return a * latents + b * noise

    def to_x0(self, prediction: Latents, z_t: Latents, time: Time) -> Latents:
        """The clean latents a prediction means, in the dtype of `z_t`.

        Raises:
            ValueError: a prediction whose `gain` is above `max_gain`.

        Examples:
            >>> process, time = LatentProcess(prediction="v"), torch.tensor([0.5])
            >>> z, noise = torch.ones(1, 2), torch.zeros(1, 2)
            >>> v, z_t = process.target(z, noise, time), process.noised(z, noise, time)
            >>> process.to_x0(v, z_t, time).round(decimals=3)
            tensor([[1., 1.]])
        """
        return self.in_space(prediction, z_t, time, space="x0").to(z_t.dtype)

    def in_space(
        self, prediction: Latents, z_t: Latents, time: Time, *, space: Prediction
    ) -> Latents:
        """A prediction of the model in another prediction space, fp32 or better.

        Raises:
            ValueError: a conversion that would multiply the prediction's error by more than
                `max_gain`.

        Examples:
            >>> process, time = LatentProcess(prediction="v"), torch.tensor([0.5])
            >>> v, z_t = torch.zeros(1, 2), torch.ones(1, 2)
            >>> process.in_space(v, z_t, time, space="epsilon").round(decimals=2)
            tensor([[0.7100, 0.7100]])
        """
        checks.check_same_shape("prediction", prediction, "z_t", z_t)
        self.refuse_ill_conditioned(time, space=space)
        return self.converted(prediction, z_t, time, space=space)

    def converted(
        self, prediction: Latents, z_t: Latents, time: Time, *, space: Prediction
    ) -> Latents:
        """The same as `in_space`, whatever the gain; of errors, at a `z_t` of 0."""
        source = self.prediction
        return convert(
            prediction,
            z_t,
            *self.alpha_sigma(time),
            source=source,
            target=space,
            rates=self._rates(time, source, space) if source != space else None,
        )

    def ddim(self, x0: Latents, z_t: Latents, time: Time, to: Time) -> Latents:
        """One deterministic step to an earlier time: `alpha' x0 + sigma' epsilon`.

        `epsilon = (z_t - alpha x0) / sigma` is the noise that `x0` leaves in `z_t`.

        Reference: Song et al., https://arxiv.org/abs/2010.02502, eq. 12 without noise.

        Examples:
            >>> process = LatentProcess("continuous_cosine")
            >>> process.ddim(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), torch.zeros(1))
            tensor([[1., 1.]])
        """
        checks.check_same_shape("x0", x0, "z_t", z_t)
        alpha, sigma = rowwise(z_t, *self.alpha_sigma(time))
        next_alpha, next_sigma = rowwise(z_t, *self.alpha_sigma(to))
        kept = next_sigma / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)  # 0, not 0/0, at time 0
        return (next_alpha * x0 + kept * (z_t - alpha * x0)).to(z_t.dtype)

    def refuse_ill_conditioned(self, time: Number | Time, *, space: Prediction = "x0") -> None:
        """Refuse times at which the model's prediction says next to nothing in another space.

        Above all: of the clean latent, near full noise, where the model predicts epsilon. A number
        is always checked, a tensor where values are (see `check_values`).

        Raises:
            ValueError: the gain is above `max_gain`; the message lists the cures.
        """
        if self.prediction == space or torch.compiler.is_compiling():
            return
        if not isinstance(time, Tensor):
            time = checks.as_time("time", time, torch.zeros(1, dtype=torch.float64, device="cpu"))
        elif not checks.reads_values(time):
            return
        if not len(time):
            return
        gains = self.gain(time, space=space)
        row = int(gains.argmax())
        gain = gains[row].item()
        if gain <= self.max_gain:
            return
        article = "a" if self.prediction.startswith("v") else "an"
        problem = (
            f"{article} {self.prediction} prediction at time {time[row].item():g} has a gain of "
            f"{gain:.4g}, above max_gain = {self.max_gain:g}: its error would be multiplied by "
            "that much"
        )
        if self.snr(time[row : row + 1]).item() > 1:
            raise ValueError(
                f"{problem} in the space of {space!r}. Ways out: compute the loss in the space of "
                "the prediction, or at higher times, such as those of TimePolicy('uniform', "
                "low=0.1)"
            )
        raise ValueError(
            f"{problem} and the latent would be garbage that losses do not show. Ways out: predict "
            "`v` or `x0` (the only full cure); or start the bridge at a capped time such as 0.9, "
            "with the base T2L trained at times up to that cap, such as those of "
            "TimePolicy('uniform', high=0.9), and take a few DDIM steps, the last one "
            "differentiable: LatentBridge(steps=4) with GradientPolicy('last')"
        )
