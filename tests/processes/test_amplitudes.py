"""Schedules of one's own, variance preserving or not, against closed forms and a solved system."""

import math

import numpy as np
import pytest
import torch

import cyclevae as cv
from analytic import Optimal
from cyclevae.diagnostics import text_probe
from cyclevae.model.denoiser import Denoised
from cyclevae.processes.latent import coefficients
from cyclevae.testing import toy_batch, toy_denoiser
from oracles import Spy

PREDICTIONS = ("epsilon", "x0", "v")
SCHEDULES = {
    "preserving": lambda t: (torch.cos(t * 1.5), torch.sin(0.02 + t * 1.5)),
    "straight": lambda t: (1 - t, t),  # flow matching
    "exploding": lambda t: (torch.ones_like(t), 0.1 + 2 * t),
    "edm": lambda t: (torch.ones_like(t), 0.002 * 40000**t),  # sigma from 0.002 to 80
    "shrinking": lambda t: (0.5 * (1 - 0.9 * t), 0.01 + 0.2 * t),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
WIDE = 1e30  # of max_gain: what is ill-conditioned is another file's


def process(name, prediction="v", **options):
    return cv.LatentProcess(SCHEDULES[name], prediction, **options)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- one solve for all conversions ------------------------------------------------------------


@every_schedule
@every_prediction
@pytest.mark.parametrize("space", PREDICTIONS)
def test_a_conversion_solves_the_two_equations(name, prediction, space):
    latent, time = process(name, prediction, max_gain=WIDE), torch.linspace(0.05, 0.95, 7).double()
    z_t, value = randn(7, 3), randn(7, 3, seed=1)
    alpha, sigma = latent.alpha_sigma(time)
    got = latent.in_space(value, z_t, time, space=space)
    for row in range(7):
        pairs = {"epsilon": (0, 1), "x0": (1, 0), "v": (-float(sigma[row]), float(alpha[row]))}
        system = np.array([pairs[prediction], (float(alpha[row]), float(sigma[row]))])
        solved = np.linalg.solve(system, np.stack([value[row].numpy(), z_t[row].numpy()]))
        np.testing.assert_allclose(got[row], np.array(pairs[space]) @ solved, rtol=1e-9, atol=1e-9)
    change = latent.in_space(value + 1, z_t, time, space=space) - got
    expected = latent.gain(time, space=space)[:, None].expand_as(change)
    torch.testing.assert_close(change.abs(), expected, rtol=1e-6, atol=1e-9)


@every_schedule
@every_prediction
def test_a_target_is_what_its_coefficients_say(name, prediction):
    latent, time = process(name, prediction, max_gain=WIDE), torch.linspace(0.05, 0.95, 7).double()
    x0, noise = randn(7, 2, 3), randn(7, 2, 3, seed=1)
    z_t = latent.noised(x0, noise, time)
    a, b = coefficients(prediction, *latent.alpha_sigma(time))
    target = latent.target(x0, noise, time)
    torch.testing.assert_close(target, a[:, None, None] * x0 + b[:, None, None] * noise)
    torch.testing.assert_close(latent.to_x0(target, z_t, time), x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(latent.noise_in(z_t, x0, time), noise, rtol=1e-6, atol=1e-6)
    to = time / 2
    torch.testing.assert_close(latent.ddim(x0, z_t, time, to), latent.noised(x0, noise, to))


def test_a_step_of_the_straight_path_is_eulers():
    """`z_s = z_t + (s - t) (epsilon - x0)`."""
    latent, time, to = process("straight"), torch.tensor([0.9, 0.5]), torch.tensor([0.3, 0.0])
    x0, noise = randn(2, 3), randn(2, 3, seed=1)
    z_t = latent.noised(x0, noise, time)
    euler = z_t + (to - time)[:, None] * (noise - x0)
    torch.testing.assert_close(latent.ddim(x0, z_t, time, to), euler)


# --- losses -----------------------------------------------------------------------------------


class Knows(Optimal):
    """A denoiser that knows the latents, but for an error of x0."""

    def __init__(self, latent_process, x0, error=0.0):
        super().__init__(latent_process)
        self.x0, self.error = x0, error

    def predict(self, z_t, time):
        alpha, sigma = (x.to(z_t)[:, None] for x in self.process.alpha_sigma(time))
        x0 = self.x0 + self.error
        noise = (z_t - alpha * x0) / sigma
        return {"epsilon": noise, "x0": x0, "v": alpha * noise - sigma * x0}[
            self.process.prediction
        ]


def base(latent, error, **options):
    x0 = randn(6, 4)
    tokens, time = torch.full((6, 2), 3), torch.linspace(0.1, 0.9, 6).double()
    options = {"time": time, "noise": randn(6, 4, seed=1), "reduction": "none"} | options
    loss = cv.t2l_loss(
        Knows(latent, x0, error),
        tokens,
        x0,
        torch.ones_like(tokens),
        text_process=toy_denoiser()[1],
        latent_process=latent,
        **options,
    )
    return loss, time


@every_schedule
@every_prediction
@pytest.mark.parametrize("space", PREDICTIONS)
def test_a_loss_in_any_space_is_that_of_the_error(name, prediction, space):
    latent = process(name, prediction, max_gain=WIDE)
    assert base(latent, 0.0, space=space)[0].max() < 1e-12
    loss, time = base(latent, 0.5, space=space)
    slope = latent.gain(time, source=space)  # of x0, so errors of x0 are divided by it
    expected = (0.25 / slope.square())[:, None].expand_as(loss)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_gives_the_same_loss_in_every_space(name, gamma):
    weighed = [
        base(process(name, prediction, max_gain=WIDE), 0.5, space=space, min_snr=gamma)[0]
        for prediction in PREDICTIONS
        for space in PREDICTIONS
    ]
    time = torch.linspace(0.1, 0.9, 6).double()
    expected = 0.25 * process(name).snr(time).clamp(max=gamma)[:, None].expand(6, 4)
    for loss in weighed:
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "prediction"),
    # an epsilon at alpha = 0 says nothing
    [(n, p) for n in SCHEDULES for p in PREDICTIONS if (n, p) != ("straight", "epsilon")],
)
def test_the_shared_pass_at_full_noise_asks_for_what_the_bridge_reads(name, prediction):
    """What is shown no latent and knows it all the same has no loss, and gives it to a bridge."""
    latent = process(name, prediction, shape=(4,), max_gain=WIDE)
    x0 = randn(6, 4)
    tokens = torch.full((6, 2), 3)
    batch, text = cv.Batch(tokens, torch.ones_like(tokens), x0), toy_denoiser()[1]
    objective = cv.CycleObjective(text, latent, [cv.Latent()])
    loss = objective.losses(Knows(latent, x0), batch, step=0)["latent"]
    assert loss < 1e-12 * latent.start_variance(torch.ones(1)).item()
    z_hat = cv.encode_text(
        Knows(latent, x0), *batch[:2], text_process=text, latent_process=latent, noise=randn(6, 4)
    )
    torch.testing.assert_close(z_hat, x0, rtol=1e-4, atol=1e-4)


# --- a start from noise -----------------------------------------------------------------------


def starts(run):
    """What the denoiser saw as a latent where it was shown none, over the noise it was given."""
    denoiser, text, _ = toy_denoiser()
    latent = process("exploding", "v", shape=(4,))  # of sigma(1)^2 + 1 = 5.41
    spy, noise = Spy(denoiser), torch.ones(3, 4)
    run(spy, toy_batch(), noise, {"text_process": text, "latent_process": latent})
    return [call["latents"] for call in spy.calls if bool((call["latent_time"] == 1).any())]


def half(denoiser, batch, noise, processes):
    rows = torch.tensor([True, False, False])
    cv.joint(denoiser, *_texts(batch), **processes, noise=noise, latent_time=0.0, has_latent=rows)


def _texts(batch):
    return batch.tokens, batch.latents, batch.attention_mask


STARTS = {
    "t2l": lambda d, b, n, p: cv.t2l(d, b.tokens, b.attention_mask, start="noise", noise=n, **p),
    "joined": lambda d, b, n, p: cv.l2t_and_t2l(
        d, b.latents, b.attention_mask, b.tokens, b.attention_mask, noise=n, **p
    ),
    "encode_text": lambda d, b, n, p: cv.encode_text(
        d, b.tokens, b.attention_mask, noise=n, bridge=cv.LatentBridge(steps=3), **p
    ),
    "cycle_text_loss": lambda d, b, n, p: cv.cycle_text_loss(
        d, b.tokens, b.attention_mask, noise=n, **p
    ),
    "cycle_latent_loss": lambda d, b, n, p: cv.cycle_latent_loss(
        d, b.latents, b.attention_mask, noise=n, **p
    ),
    "text_marginal_loss": lambda d, b, n, p: cv.text_marginal_loss(
        d, b.tokens, b.attention_mask, noise=n, **p
    ),
    "joint": half,
    "text_probe": lambda d, b, n, p: text_probe(d, *_texts(b), noise=n, **p),
}


@pytest.mark.parametrize("function", STARTS)
def test_every_start_from_noise_has_the_law_of_z_t(function):
    seen = starts(STARTS[function])
    assert seen
    for latents in seen:
        noise = latents[-2:]  # of `joined` and `joint`, the first rows are latents
        torch.testing.assert_close(noise, torch.full_like(noise, math.sqrt(1 + 2.1**2)))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "sigmoid", "continuous_cosine"])
def test_a_start_is_the_noise_itself_where_variance_is_preserved(schedule):
    latent, noise = cv.LatentProcess(schedule), torch.randn(100, 3)
    assert torch.equal(latent.started(noise, torch.linspace(0, 1, 100)), noise)
    assert latent.started(noise.bfloat16(), torch.ones(100)).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "at", "std"), [("straight", 0.7, 0.7616), ("edm", 1.0, 80.0062)])
def test_the_spread_of_a_start(name, at, std):
    variance = process(name).start_variance(torch.tensor([at]))
    assert variance.sqrt().item() == pytest.approx(std, abs=1e-4)


@every_schedule
@pytest.mark.parametrize("steps", [1, 4])
def test_a_bridge_of_an_encoder_that_knows_gives_its_latent(name, steps):
    latent, x0 = process(name, "v", shape=(4,), max_gain=WIDE), randn(6, 4)
    tokens = torch.full((6, 2), 3)
    z_hat = cv.encode_text(
        Knows(latent, x0),
        tokens,
        torch.ones_like(tokens),
        text_process=toy_denoiser()[1],
        latent_process=latent,
        bridge=cv.LatentBridge(steps=steps),
        noise=randn(6, 4, seed=2),
    )
    torch.testing.assert_close(z_hat, x0, rtol=1e-5, atol=1e-5)


# --- bounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["preserving", "straight", "exploding", "shrinking"])
@every_prediction
@pytest.mark.parametrize("form", ["cross_entropy", "score_difference"])
def test_the_bound_of_a_gaussian_is_its_entropy(name, prediction, form):
    """Latents N(0, 1): the optimal teacher's bound is tight, at the law of `z_t` at `low`."""
    latent = process(name, prediction, max_gain=WIDE)
    low, high, parts = 0.05, 0.95, 400
    # signs of latent and noise in every combination: exact second moments
    signs = torch.tensor([(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)]).double()
    std = 0.0 if form == "cross_entropy" else 0.3
    z, noise = (signs[:, i : i + 1].repeat(parts, 1) for i in range(2))
    z = z * math.sqrt(1 - std**2)
    grid = torch.linspace(low, high, 100_001).double()
    gamma = -latent.snr(grid).log()
    ends = gamma[[0, -1]]
    middles = ends[0] + (ends[1] - ends[0]) * (torch.arange(parts) + 0.5).double() / parts
    time = grid[torch.searchsorted(gamma, middles)].repeat_interleave(4)
    bound = cv.learned_prior(
        Teacherlike(latent),
        z,
        torch.ones(len(z), 2, dtype=torch.bool),
        text_process=toy_denoiser()[1],
        latent_process=latent,
        form=form,
        weighting="likelihood",
        boundaries=True,
        posterior_std=std,
        low=low,
        high=high,
        time=time,
        noise=noise,
    )
    alpha, sigma = (x.item() for x in latent.alpha_sigma(torch.tensor([low]).double()))
    total = alpha**2 + sigma**2
    entropy = 0.5 * math.log(2 * math.pi * math.e * total)
    if form == "score_difference":  # the mean over z of KL(N(alpha z, alpha^2 s^2 + sigma^2) || p)
        entropy = 0.5 * math.log(total / (alpha**2 * std**2 + sigma**2))
    # the ends of the range are those of two of the 1000 steps
    assert bound.item() == pytest.approx(entropy, abs=0.01)


class Teacherlike(Optimal):
    def denoise(self, tokens, latents, *, latent_time, **state):
        return Denoised(None, self.predict(latents, latent_time))


# --- what is no schedule ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "error", "words"),
    [
        (lambda t: (t, 1 - t), ValueError, r"falls with time.*lambda t: schedule\(1 - t\)"),
        (lambda t: (torch.sin(1.5 * t), torch.cos(1.5 * t)), ValueError, "falls with time"),
        (lambda t: (0.1 + t, torch.ones_like(t)), ValueError, "falls with time"),
        (lambda t: (torch.ones_like(t), 2 - t), ValueError, "falls with time"),
        (lambda t: (torch.ones_like(t), torch.ones_like(t)), ValueError, "falls with time"),
        (lambda t: (1 - t, 1 - t), ValueError, "falls with time"),
        (lambda t: (1 - t, (t - 0.5).abs()), ValueError, r"at time 0 and.*at 0\.01"),
        (lambda t: (1 - 2 * t, t), ValueError, "amplitudes of at least 0, got as alpha -1 to 1"),
        (lambda t: (1 / (1 - t) - 1, t), ValueError, "finite amplitudes"),
        (lambda t: (1.0, 80 * t), ValueError, r"got as alpha a float: write torch\.ones_like\(t\)"),
        (lambda t: 1 - t, ValueError, "be a name or a function of times"),
        (lambda t: {} + t, ValueError, "be a name or a function of times.*TypeError"),
        (lambda t: (1 - t, torch.ones(())), ValueError, r"got as sigma a Tensor of shape \[\]"),
    ],
)
@every_prediction
@pytest.mark.unhooked
def test_what_is_no_schedule_is_refused_at_construction(schedule, error, words, prediction):
    with pytest.raises(error, match="`schedule` must.*" + words):
        cv.LatentProcess(schedule, prediction)


def test_a_table_of_few_steps_is_a_schedule():
    table = torch.linspace(0.95, 0.05, 20)
    latent = cv.LatentProcess(lambda t: (table[(t * 19).long()], 1 - table[(t * 19).long()]))
    assert latent.snr(torch.ones(1)).item() == pytest.approx((0.05 / 0.95) ** 2)
