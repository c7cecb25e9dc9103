"""A perfect denoiser of Gaussian latents: each loss, bound and sample in closed form, anywhere.

Amplitudes and predictions are written out again here, and nothing is computed by the package but
what is tested.
"""

import math
from dataclasses import dataclass

import pytest
import torch

import cyclevae as cv
from cyclevae.diagnostics import latent_probe
from cyclevae.model.denoiser import Denoised

MEAN, STD, WORDS = 0.7, 0.5, 0.3  # of latents; how far a text moves their mean
TEXT = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0)
WIDE = 1e30  # of max_gain


class Curved:
    """A schedule of one's own: neither straight nor variance preserving."""

    def __call__(self, time):
        return (1 - time**2) / 2, 0.01 + time / 5

    def rates(self, time):
        return -time, torch.full_like(time, 0.2)


def shifted(t):
    return 3 * t / (1 + 2 * t)


def karras(t):
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return (low + t * (high - low)) ** 7


# schedule -> (its argument, alpha, sigma, alpha', sigma') by time, written out
ANGLE = math.pi / 2
WORLD = {
    "flow": ("flow", lambda t: (1 - t, t, -1.0, 1.0)),
    "shift": (cv.Flow(shift=3.0), lambda t: (1 - shifted(t), shifted(t), -1.0, 1.0)),
    "edm": ("edm", lambda t: (1.0, karras(t), 0.0, 1.0)),
    "cosine": (
        "continuous_cosine",
        lambda t: (
            torch.cos(ANGLE * t),
            torch.sin(ANGLE * t),
            -ANGLE * torch.sin(ANGLE * t),
            ANGLE * torch.cos(ANGLE * t),
        ),
    ),
    "own": (Curved(), lambda t: ((1 - t**2) / 2, 0.01 + t / 5, -t, 0.2)),
}
PREDICTIONS = ("epsilon", "x0", "v", "velocity")
every_world = pytest.mark.parametrize("world", WORLD)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def process(world, prediction="velocity", **options):
    return cv.LatentProcess(WORLD[world][0], prediction, WIDE, shape=(1,), **options)


def columns(world, time):
    """`alpha, sigma, alpha', sigma'` as columns `[b, 1]`."""
    time = time.double()
    return torch.stack([x + 0 * time for x in WORLD[world][1](time)])[..., None]


def pair(prediction, alpha, sigma, alpha_rate, sigma_rate):
    one = torch.ones_like(alpha)
    return {
        "epsilon": (0 * one, one),
        "x0": (one, 0 * one),
        "v": (-sigma, alpha),
        "velocity": (alpha_rate, sigma_rate),
    }[prediction]


class Perfect:
    """The optimal prediction for latents N(mean, s^2); a clean text says by how much more."""

    predicts_logits = torch.zeros(1, 1, 7, dtype=torch.float64)

    def __init__(self, world, prediction, words=WORDS):
        self.world, self.prediction, self.words = world, prediction, words

    def denoise(self, tokens, latents, *, text_time, latent_time, attention_mask, need="both"):
        told = columns(self.world, latent_time)
        alpha, sigma = told[:2]
        mean = MEAN + self.words * (text_time == 0)[:, None]
        x0 = mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (latents - alpha * mean)
        a, b = pair(self.prediction, *told)
        logits = self.predicts_logits.expand(*tokens.shape, -1)
        return Denoised(logits, a * x0 + b * (latents - alpha * x0) / sigma)


def texts(rows):
    tokens = torch.full((rows, 2), 3)
    return tokens, torch.ones_like(tokens)


# all signs of latent and noise: their second moments are exact
SIGNS = torch.tensor([(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)]).double()


def rows_at(times, mean=MEAN):
    """Four latents and noises at each time."""
    time = times.repeat_interleave(4)
    signs = SIGNS.repeat(len(times), 1)
    return time, mean + STD * signs[:, :1], signs[:, 1:]


def expected(world, time, space):
    """The mean squared error of a perfect prediction in a space."""
    told = columns(world, time)
    alpha, sigma = told[:2]
    of_x0 = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
    a, b = pair(space, *told)
    return ((a - b * alpha / sigma) ** 2 * of_x0)[:, 0]  # an error of x0 leaves one of the noise


@every_world
@every_prediction
def test_losses_of_a_perfect_denoiser(world, prediction):
    """A schedule, what is predicted, and in what it is compared: the posterior variance."""
    denoiser, times = Perfect(world, prediction), torch.tensor([0.1, 0.35, 0.6, 0.9]).double()
    both = {"text_process": TEXT, "latent_process": process(world, prediction)}
    time, z, noise = rows_at(times, MEAN + WORDS)
    tokens, mask = texts(len(z))
    snr = (columns(world, times)[0] / columns(world, times)[1]).square()[:, 0]
    own = {"latent_weighting": lambda t: 1 + t}
    for space in PREDICTIONS:
        error, on_x0 = (expected(world, times, name) for name in (space, "x0"))
        # the model's own space is weighed by a function of one's own, the others by min-SNR
        weighed = {"weighting": own["latent_weighting"]} if space == prediction else {"min_snr": 2}
        right = (1 + times) * error if space == prediction else snr.clamp(max=2) * on_x0
        state = {"time": time, "noise": noise, "space": space, "reduction": "none"}
        loss = cv.t2l_loss(denoiser, tokens, z, mask, **both, **state, **weighed)
        torch.testing.assert_close(loss.view(4, 4).mean(1), right, rtol=1e-6, atol=1e-12)
    time, z, noise = rows_at(times)
    state = {"text_time": 1.0, "latent_time": time, "noise": noise}
    found = cv.unconditional_loss(denoiser, tokens, z, mask, **both, **state, **own).latent
    right = ((1 + times) * expected(world, times, prediction)).mean()
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-12)


# --- bounds and information -------------------------------------------------------------------

LOW, HIGH = 0.05, 0.95
PARTS = 400


def steps(world):
    """The signal-to-noise ratios of the two steps between which a bound is taken."""
    first, last = (torch.tensor([(int(t * 999) + 0.5) / 999]).double() for t in (LOW, HIGH))
    ends = [columns(world, t) for t in (first, last)]
    return [float((told[0] / told[1]) ** 2) for told in ends], ends[0]


def spread_times(world):
    """Times spread evenly in `log S`, by bisection."""
    (high_snr, low_snr), _ = steps(world)
    share = (torch.arange(PARTS).double() + 0.5) / PARTS
    wanted = math.log(high_snr) + share * (math.log(low_snr) - math.log(high_snr))
    low, high = torch.full_like(share, LOW), torch.full_like(share, HIGH)
    for _ in range(50):
        middle = (low + high) / 2
        told = columns(world, middle)
        above = 2 * (told[0] / told[1]).log()[:, 0] > wanted
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return middle


@every_world
@every_prediction
def test_a_bound_is_the_entropy(world, prediction):
    """`-E log q(z_t)` of a Gaussian at `low`, but for the prior of a start from noise."""
    _, (alpha, sigma, *_) = steps(world)
    time, z, noise = rows_at(spread_times(world))
    bound = cv.learned_prior(
        Perfect(world, prediction),
        z,
        texts(len(z))[1],
        text_process=TEXT,
        latent_process=process(world, prediction),
        weighting="likelihood",
        boundaries=True,
        low=LOW,
        high=HIGH,
        time=time,
        noise=noise,
    )
    variance = float(alpha**2 * STD**2 + sigma**2)
    entropy = math.log(2 * math.pi * math.e * variance) / 2
    # where it starts from noise the prior is N(0, alpha^2 + sigma^2) and not N(alpha m, variance)
    a, s = (float(x) for x in columns(world, torch.tensor([(int(HIGH * 999) + 0.5) / 999]))[:2])
    start, true = a**2 + s**2, a**2 * STD**2 + s**2
    surplus = ((true + a**2 * MEAN**2) / start - 1 + math.log(start / true)) / 2
    assert bound.item() == pytest.approx(entropy + surplus, abs=3e-3)


def told_by_the_text(world):
    """`1/2 int |eps_y - eps|^2 d gamma` where a text moves the mean by `WORDS`."""
    high_snr, low_snr = steps(world)[0]
    inverse = [1 / (snr * STD**2 + 1) for snr in (low_snr, high_snr)]
    return WORDS**2 / (2 * STD**2) * (inverse[0] - inverse[1])


@every_world
@every_prediction
def test_what_a_text_tells(world, prediction):
    """The wake term of DDVI and the probe's difference, both a KL between two Gaussians."""
    time = spread_times(world)
    z, noise = torch.full((PARTS, 1), MEAN).double(), torch.ones(PARTS, 1).double()
    tokens, mask = texts(PARTS)
    denoiser = Perfect(world, prediction)
    options = {"text_process": TEXT, "latent_process": process(world, prediction)}
    options |= {"low": LOW, "high": HIGH, "time": time, "noise": noise}
    kl = cv.ddvi_wake_kl(denoiser, denoiser, tokens, mask, z, **options)
    probe = latent_probe(denoiser, tokens, z, mask, samples=1, **options)
    for found in (kl.item(), probe.difference):
        assert found == pytest.approx(told_by_the_text(world), rel=2e-3)


# --- samples ----------------------------------------------------------------------------------


def sample(world, prediction, steps, noise):
    tokens, mask = texts(len(noise))
    return cv.encode_text(
        Perfect(world, prediction, words=0.0),
        tokens,
        mask,
        text_process=TEXT,
        latent_process=process(world, prediction),
        bridge=cv.LatentBridge(steps=steps),
        time=0.99,
        noise=noise,
    )


@every_world
@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
def test_a_bridge_of_many_steps_draws_from_the_gaussian(world, prediction):
    """Along the flow of a Gaussian, `(z_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2)` stays."""
    noise = torch.tensor([[-2.0], [0.0], [1.0]]).double()
    alpha, sigma = columns(world, torch.tensor([0.99]))[:2]
    start = (alpha**2 + sigma**2).sqrt() * noise
    drawn = MEAN + STD * (start - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()
    found = sample(world, prediction, 60, noise)
    torch.testing.assert_close(found, drawn, rtol=0, atol=0.05)


@pytest.mark.parametrize("world", ["flow", "shift", "edm"])
def test_steps_of_a_bridge_are_eulers(world):
    """`z += (sigma_s - sigma_t) velocity`, whatever the network predicts."""

    class Any:
        def denoise(self, tokens, latents, *, latent_time, **state):
            return Denoised(None, torch.sin(latents) + latent_time[:, None])

    noise = torch.tensor([[-2.0], [0.0], [1.0]]).double()
    z_hat = cv.encode_text(
        Any(),
        *texts(3),
        text_process=TEXT,
        latent_process=process(world),
        bridge=cv.LatentBridge(steps=4),
        time=torch.full((3,), 0.9).double(),
        noise=noise,
    )
    times = torch.tensor([0.9, 0.675, 0.45, 0.225, 0.0]).double()
    alpha, sigma = columns(world, times)[:2, :, 0]
    sigma[-1] = 0.0  # the last prediction is read off to its end
    z = (alpha[0] ** 2 + sigma[0] ** 2).sqrt() * noise
    for k in range(4):
        z = z + (sigma[k + 1] - sigma[k]) * (torch.sin(z) + times[k])
    torch.testing.assert_close(z_hat, z)


# --- rates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["flow", "edm", "continuous_cosine", cv.Flow(3.0), Curved()])
def test_rates_are_the_derivatives_along_the_path(schedule):
    """By time, or by a clock that rises with it: in `sigma`, where nothing else is said."""
    latent, time = cv.LatentProcess(schedule, "velocity"), torch.linspace(0.05, 0.95, 9).double()
    time.requires_grad_()
    alpha, sigma = latent.alpha_sigma(time)
    alpha_by, sigma_by = (
        torch.autograd.grad((x + 0 * time).sum(), time, retain_graph=True)[0]
        for x in (alpha, sigma)
    )
    clock = sigma_by if schedule in ("flow", "edm", cv.Flow(3.0)) else torch.ones_like(time)
    rates = latent.rates(time.detach())
    torch.testing.assert_close(rates[0] * clock, alpha_by)
    torch.testing.assert_close(rates[1] * clock, sigma_by)


# --- what is refused, and what survives a file ------------------------------------------------

TABLE = torch.linspace(1, 0, 1001)


def backwards(time):
    return 1 - time, time


backwards.rates = lambda t: (torch.ones_like(t), -torch.ones_like(t))


def swapped(time):
    return 1 - time, time


swapped.rates = lambda t: torch.stack(Curved().rates(t))


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: cv.LatentProcess("cosine", "velocity"), r"`prediction` is 'velocity'.*'cosine' h"),
        (
            lambda: cv.LatentProcess(
                lambda t: (TABLE[(1000 * t).long()], 1 - TABLE[(1000 * t).long()]), "velocity"
            ),
            r"no derivative: give a function of one's own `rates`",
        ),
        (
            lambda: cv.LatentProcess().target(SIGNS, SIGNS, SIGNS[:, 0], space="velocity"),
            "`space` ",
        ),
        (lambda: cv.LatentProcess(backwards), r"`schedule\.rates` must be the deriv.*clean_at=1"),
        (lambda: cv.LatentProcess(swapped), r"`schedule\.rates` must return two tensors"),
        (lambda: cv.Flow(shift=0.0), "`shift` must be above 0"),
        (lambda: cv.EDM(sigma_min=2.0, sigma_max=1.0), "`sigma_min` must be below `sigma_max`"),
        (lambda: cv.EDM(rho=0.0), "`rho` must be above 0"),
        (
            lambda: of(cv.Latent(space="velocity"), cv.LatentProcess("cosine")),
            "`terms`: latent: `space` is 'velocity'",
        ),
        (
            lambda: cv.convert(
                SIGNS, SIGNS, SIGNS[:, 0], SIGNS[:, 0], source="x0", target="velocity"
            ),
            r"give rates=latent_process\.rates\(time\)",
        ),
    ],
)
@pytest.mark.unhooked
def test_what_cannot_be_right_is_refused(refused, words):
    with pytest.raises(ValueError, match=words):
        refused()


def of(term, latent=None):
    return cv.CycleObjective(TEXT, latent or cv.LatentProcess("flow", "velocity"), [term])


@dataclass(frozen=True)
class Power:
    """A schedule of one's own with an option, handed to `from_config` as a class."""

    power: float = 2.0

    def __call__(self, time):
        return 1 - time**self.power, time**self.power

    def rates(self, time):
        return -torch.ones_like(time), torch.ones_like(time)


@pytest.mark.parametrize(
    "schedule", ["flow", "edm", cv.Flow(3.0), cv.EDM(0.01, 20.0, 5.0), Power(3.0)]
)
def test_a_schedule_survives_a_file(schedule):
    objective = of(cv.Latent(), cv.LatentProcess(schedule, "velocity"))
    again = cv.CycleObjective.from_config(objective.to_config(), processes=[Power])
    assert again == objective and again.to_config() == objective.to_config()
    assert again.latent_process.schedule == schedule


def test_a_schedule_in_a_file_is_no_guess():
    config = of(cv.Latent()).to_config()
    for schedule, words in (
        ({}, "`latent_process.schedule` must be .* got a mapping"),
        ({"shfit": 3.0}, "unknown key `latent_process.schedule.shfit`; did you mean 'shift'"),
        (
            {"kind": "Power"},
            r"`latent_process.schedule.kind` is 'Power', a class that was not hand",
        ),
    ):
        config["latent_process"]["schedule"] = schedule
        with pytest.raises(ValueError, match=words):
            cv.CycleObjective.from_config(config)
