import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles_diffusion as oracle
from analytic import Optimal
from cyclevae._base.checks import check_values
from cyclevae.model.denoiser import Denoised, as_denoiser
from cyclevae.model.teacher import Teacher
from cyclevae.priors.learned import learned_prior
from cyclevae.priors.weighting import weighted_times
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess
from cyclevae.testing import ToyNetwork, toy_denoiser
from oracles import Spy, array, assert_near_mean
from strategies import quick, seeds

TEXT = TextProcess(mask_id=2, vocab_size=7, pad_id=0)
COSINE = LatentProcess()
PREDICTIONS = ("epsilon", "x0", "v")
FORMS = ("cross_entropy", "score_difference", "score_distillation")
WEIGHTINGS = ("vdm", "likelihood", "uniform")
every_form = pytest.mark.parametrize("form", FORMS)
every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
FIRST, LAST = 19, 979  # of the default times .02 and .98
WHOLE = {"low": 0.0, "high": 1.0}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def ones(rows):
    return torch.ones(rows, 2, dtype=torch.bool)


def middle(steps):
    """The time of each step, safe from rounding."""
    return ((torch.as_tensor(steps, dtype=torch.float64) + 0.5) / 999).clamp(max=1)


class Affine:
    """`z_t/2 + t - 1/4` in every dimension, whatever it is read as."""

    @staticmethod
    def predict(z_t, time):
        return z_t / 2 + time - 0.25

    def denoise(self, tokens, latents, *, latent_time, **state):
        time = latent_time.view(-1, *[1] * (latents.ndim - 1))
        return Denoised(None, self.predict(latents, time).to(latents.dtype))


def prior(teacher, z, process=COSINE, **options):
    return learned_prior(
        teacher, z, ones(len(z)), text_process=TEXT, latent_process=process, **options
    )


# --- against loops ----------------------------------------------------------------------------


@quick
@given(
    seeds,
    st.sampled_from(FORMS),
    st.sampled_from(WEIGHTINGS),
    st.sampled_from(PREDICTIONS),
    st.sampled_from([0.0, 0.4, 2.0]),
    st.booleans(),
    st.sampled_from([(3,), (2, 2)]),
    st.sampled_from([(FIRST, LAST), (0, 999), (400, 401)]),
)
def test_loop(seed, form, weighting, prediction, std, boundaries, shape, steps):
    if form == "score_difference":
        std = std or 0.1
    boundaries = boundaries and weighting != "uniform"
    first, last = steps
    z, noise = randn(5, *shape, seed=seed % 1000), randn(5, *shape, seed=seed % 1000 + 1)
    drawn = torch.randint(first + 1, last + 1, (5,), generator=torch.Generator().manual_seed(seed))
    z.requires_grad_()
    value = prior(
        Affine(),
        z,
        LatentProcess(prediction=prediction),
        form=form,
        weighting=weighting,
        posterior_std=std,
        boundaries=boundaries,
        low=float(middle(first)) - 1e-4,
        high=float(middle(last)),
        time=middle(drawn),
        noise=noise,
    )
    expected, gradient = oracle.learned_prior(
        array(z),
        array(noise),
        drawn.tolist(),
        Affine.predict,
        prediction,
        form=form,
        weighting=weighting,
        std=std,
        boundaries=boundaries,
        first=first,
        last=last,
    )
    assert value.item() == pytest.approx(expected, rel=1e-8, abs=1e-10)
    if form == "score_distillation" and not boundaries:
        value.backward()
        np.testing.assert_allclose(z.grad, gradient, rtol=1e-7, atol=1e-12)


def test_the_defaults():
    z, teacher = randn(3, 4), Affine()
    seed = partial(torch.Generator().manual_seed, 0)
    said = prior(
        teacher,
        z,
        form="cross_entropy",
        weighting="vdm",
        posterior_std=0.0,
        boundaries=False,
        low=0.02,
        high=0.98,
        samples=1,
        generator=seed(),
    )
    assert torch.equal(prior(teacher, z, generator=seed()), said)


@every_form
def test_what_the_teacher_sees(form):
    teacher = Spy(Teacher(toy_denoiser()[0].module).denoiser)
    z = randn(2, 4).float()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    time, noise = torch.tensor([0.3, 0.6]), randn(2, 4, seed=1).float()
    learned_prior(
        teacher,
        z,
        mask,
        text_process=TEXT,
        latent_process=LatentProcess(),
        form=form,
        weighting="uniform",
        posterior_std=0.5,
        time=time,
        noise=noise,
    )
    (call,) = teacher.calls
    assert call["tokens"].tolist() == [[2, 2, 2], [2, 0, 0]]
    assert call["text_time"].tolist() == [1, 1] and call["latent_time"] is time
    assert call["attention_mask"].tolist() == mask.bool().tolist() and call["need"] == "latents"
    i = (time * 999).long()
    a, s = oracle.ALPHA[i][:, None], oracle.SIGMA[i][:, None]
    z_t = a * array(z) + np.sqrt(0.25 * a**2 + s**2) * array(noise)
    np.testing.assert_allclose(call["latents"], z_t, rtol=1e-5, atol=1e-6)


# --- numbers ----------------------------------------------------------------------------------


def every_step(first, last, *, z=(-1.0, 1.0), noise=(-1.0, 1.0)):
    """All combinations of step, latent and noise: `z`, `noise`, `time` for `learned_prior`.

    Where the integrand is quadratic in z and noise, signs stand for any variables of unit variance.
    """
    steps, z, noise = torch.meshgrid(
        *(torch.tensor(x).double() for x in (range(first + 1, last + 1), z, noise)), indexing="ij"
    )
    flat = [x.reshape(-1, 1) for x in (z, noise)]
    return flat[0], {"noise": flat[1], "time": middle(steps.reshape(-1))}


@every_prediction
def test_the_bound_of_a_gaussian_on_the_host_grid(prediction):
    """1.728 nats against an entropy of 1.419: the rest is the discretisation of the first steps."""
    process = LatentProcess(prediction=prediction)
    z, draws = every_step(0, 999)
    bound = float(prior(Optimal(process), z, process, boundaries=True, **draws, **WHOLE))
    assert bound == pytest.approx(1.728, abs=5e-4)
    assert oracle.entropy(1) == pytest.approx(1.419, abs=1e-3)
    ratio = oracle.SNR[:-1] / oracle.SNR[1:]
    # per step 1/2 (S_s - S_t) sigma_t^2 where the integral has 1/2 log((1 + S_s) / (1 + S_t))
    gap = (ratio - 1) * oracle.ALPHA[1:] ** 2 - np.diff(-np.log1p(oracle.SNR))
    assert bound - oracle.entropy(1) == pytest.approx(gap.sum() / 2, abs=1e-6)
    assert (gap > 0).all() and gap[:10].sum() > 0.85 * gap.sum()


def evenly(process, *, low=0.02, high=0.98, z=(-1.0, 1.0), noise=(-1.0, 1.0), rows=4000):
    """The same, at evenly spread draws of the likelihood weighting."""
    times, _ = draw("likelihood", rows, process, low=low, high=high)
    draws = times, *(torch.tensor(x).double() for x in (z, noise))
    times, z, noise = (x.reshape(-1) for x in torch.meshgrid(*draws, indexing="ij"))
    limits = {"weighting": "likelihood", "low": low, "high": high}
    return z[:, None], {"noise": noise[:, None], "time": times} | limits


@every_prediction
@pytest.mark.parametrize("schedule", ["cosine", "linear", "continuous_cosine"])
@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (0.7, 0.3)])
def test_the_likelihood_weighting_is_the_limit(schedule, prediction, mean, variance):
    """Cross-entropy = entropy + KL under a teacher of N(0, 1), both at the time `low`."""
    process = LatentProcess(schedule, prediction=prediction)
    std = variance**0.5
    z, draws = evenly(process, low=0.01, z=(mean - std, mean + std), rows=1000)
    bound = float(prior(Optimal(process), z, process, boundaries=True, **draws))
    alpha, sigma = (float(x) for x in process.alpha_sigma(middle([9])))
    seen = alpha**2 * variance + sigma**2
    expected = oracle.entropy(seen) + oracle.normal_kl(alpha * mean, seen)
    assert bound == pytest.approx(expected, abs=1e-3)
    z, draws = every_step(9, LAST, z=(mean - std, mean + std))
    discrete = float(prior(Optimal(process), z, process, boundaries=True, low=0.01, **draws))
    assert bound < discrete < bound + 0.2


@every_prediction
@pytest.mark.parametrize("schedule", ["cosine", "continuous_cosine"])
def test_the_score_difference_is_the_divergence(schedule, prediction):
    """KL(N(.7, .3) || N(0, 1)) = .49699, where .3 is the variance."""
    assert oracle.normal_kl(0.7, 0.3) == pytest.approx(0.49699, abs=5e-6)
    process = LatentProcess(schedule, prediction=prediction)
    z, draws = evenly(process, low=0.0, high=0.999, z=(0.7,))
    options = {"form": "score_difference", "posterior_std": 0.3**0.5, "boundaries": True}
    value = prior(Optimal(process), z, process, **options, **draws)
    assert float(value) == pytest.approx(0.49699, abs=2e-4)


@every_prediction
def test_the_divergence_between_any_two_times(prediction):
    """Without its boundary: KL at `low` less KL at `high`, in three dimensions."""
    process = LatentProcess(prediction=prediction)
    mean, std, low, high = torch.tensor([0.7, -1.0, 0.2]).double(), 0.6, 0.1, 0.7
    z, draws = evenly(process, low=low, high=high, z=(0.0,))
    draws["noise"] = draws["noise"].expand(-1, 3)
    teacher = Optimal(process, means=[-0.5], variances=[2.0])
    options = {"form": "score_difference", "posterior_std": std}
    value = prior(teacher, z + mean, process, **options, **draws)

    def divergence(t):
        a, s = oracle.ALPHA[int(999 * t)], oracle.SIGMA[int(999 * t)]
        widths = a**2 * std**2 + s**2, a**2 * 2.0 + s**2
        return sum(oracle.normal_kl(a * m, widths[0], a * -0.5, widths[1]) for m in mean.tolist())

    assert float(value) == pytest.approx(divergence(low) - divergence(high), rel=1e-4)


def test_cross_entropy_less_entropy_is_the_divergence():
    """So `score_difference` and `cross_entropy` differ by what no gradient sees."""
    process, std = LatentProcess(), 0.5
    z, draws = evenly(process, z=(0.4,))
    z.requires_grad_()
    teacher = Optimal(process, means=[0.3], variances=[0.8])
    values = {
        (form, boundaries): prior(
            teacher, z, process, form=form, boundaries=boundaries, posterior_std=std, **draws
        )
        for form in FORMS[:2]
        for boundaries in (False, True)
    }
    gradients = {key: torch.autograd.grad(value, z)[0] for key, value in values.items()}
    for boundaries in (False, True):
        torch.testing.assert_close(*(gradients[form, boundaries] for form in FORMS[:2]))
    entropy = oracle.entropy(oracle.ALPHA[FIRST] ** 2 * std**2 + oracle.SIGMA[FIRST] ** 2)
    left, right = (values[form, True].item() for form in FORMS[:2])
    assert left - right == pytest.approx(entropy, abs=1e-4)


def test_the_noise_of_the_posterior_is_averaged_out():
    """`cross_entropy` is what z + s xi, diffused with eps, costs on average, with less variance."""
    process, std, z = LatentProcess(prediction="v"), 0.7, torch.tensor([[0.4]]).double()
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)  # exact for an affine teacher
    weights = weights / weights.sum()
    step = 500
    a, s = oracle.ALPHA[step], oracle.SIGMA[step]
    expected = got = 0.0
    for x, p in zip(nodes, weights, strict=True):
        got += p * float(
            prior(
                Affine(),
                z,
                process,
                weighting="uniform",
                posterior_std=std,
                time=middle([step]),
                noise=torch.tensor([[x]]).double(),
            )
        )
        for e, q in zip(nodes, weights, strict=True):
            z_t = a * (0.4 + std * x) + s * e
            _, eps = oracle.implied(Affine.predict(z_t, float(middle(step))), z_t, step, "v")
            expected += p * q * (e - eps) ** 2
    assert got == pytest.approx(expected, rel=1e-7)


# --- times and weights ------------------------------------------------------------------------


def draw(weighting, rows, process=COSINE, low=0.02, high=0.98, **options):
    like = torch.zeros(rows, 1, dtype=options.pop("dtype", torch.float64))
    options = {"generator": torch.Generator().manual_seed(0), "time": None} | options
    return weighted_times(weighting, like, process, low=low, high=high, **options)


def test_vdm_visits_every_step_once():
    time, weight = draw("vdm", LAST - FIRST)
    steps = (time * 999).long().sort().values
    assert steps.tolist() == list(range(FIRST + 1, LAST + 1))
    # each weight is N/2 expm1(gamma_t - gamma_s), so the mean of weight * S_t telescopes
    telescoped = float((weight * LatentProcess().snr(time)).mean())
    assert telescoped == pytest.approx((oracle.SNR[FIRST] - oracle.SNR[LAST]) / 2, rel=1e-9)
    time, weight = draw("vdm", 999, **WHOLE)
    assert float(weight[time == 1]) == pytest.approx(999 * 4999.5, rel=1e-5)
    for step, expected in ((1, 0.5), (2, 0.25), (3, 1 / 6)):  # the host's first weights
        found = float(weight[(time * 999).long() == step]) / 999
        assert found == pytest.approx(expected, rel=2e-2)


def sloped(time):
    """Continuous, with a signal-to-noise ratio above 0 at full noise."""
    return 1 - 0.99 * time, 0.01 + 0.99 * time


@pytest.mark.parametrize("ends", [{}, WHOLE], ids=["inner", "whole"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "sigmoid", sloped])
def test_likelihood_is_the_trapezoidal_rule(schedule, ends):
    process, rows = LatentProcess(schedule, prediction="x0"), 200_000
    first, last = (0, 999) if ends else (FIRST, LAST)
    time, weight = draw("likelihood", rows, process, **ends)
    gamma = -process.snr(middle(range(1000))).log()[first : last + 1]
    width = gamma[-1] - gamma[0]
    assert weight.shape == (rows,) and torch.equal(weight, (width / 2).expand(rows))
    share = torch.bincount((time * 999).long(), minlength=1000)[first : last + 1] / rows
    padded = torch.cat([gamma[:1], gamma, gamma[-1:]])
    expected = (padded[2:] - padded[:-2]) / 2 / width
    torch.testing.assert_close(share.double(), expected, rtol=0, atol=3 / rows)
    assert torch.isin(time, middle(range(1000))).all()
    assert expected[-1] > 0.1 or schedule != "cosine" or not ends  # the last step matters


def test_likelihood_is_uniform_in_gamma_on_a_continuous_schedule():
    process = LatentProcess("continuous_cosine")
    time, weight = draw("likelihood", 1000, process)
    gamma = (-process.snr(time).log()).sort().values
    steps = -process.snr(middle(range(FIRST, LAST + 1))).log()
    width = steps[-1] - steps[0]
    assert float(weight[0]) == pytest.approx(float(width) / 2)
    spread = (gamma - steps[0]) / width
    expected = (torch.arange(1000).double() + 0.5) / 1000
    half = steps.diff().max() / width / 2
    assert float((spread - expected).abs().max()) < half + 1e-3


def test_likelihood_of_a_coarse_table_of_ones_own():
    """Most steps are flat; the jumps get all the mass."""
    levels = torch.linspace(0.9, 0.1, 10).double()

    def coarse(time):
        alpha = levels.to(time)[(time * 999).long() // 100]
        return alpha, (1 - alpha**2).sqrt()

    process = LatentProcess(coarse, prediction="x0")
    time, weight = draw("likelihood", 20_000, process, **WHOLE)
    assert time.isfinite().all() and (weight > 0).all()
    gamma = -(levels**2 / (1 - levels**2)).log()
    share = torch.bincount((time * 999).long() // 100, minlength=10) / 20_000
    padded = torch.cat([gamma[:1], gamma, gamma[-1:]])
    torch.testing.assert_close(
        share.double(), (padded[2:] - padded[:-2]) / 2 / (gamma[-1] - gamma[0]), rtol=0, atol=2e-4
    )


def test_uniform_times():
    time, weight = draw("uniform", 1000, low=0.2, high=0.5)
    assert torch.equal(weight, torch.ones(1000).double())
    expected = 0.2 + 0.3 * (torch.arange(1000) + 1) / 1000
    assert float((time.sort().values - expected).abs().max()) < 0.3 / 1000 + 1e-6
    assert time.min() >= 0.2 and time.max() <= 0.5


@every_weighting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_in_the_precision_of_the_latents(weighting, dtype):
    time, weight = draw(weighting, 64, dtype=dtype)
    assert time.dtype == weight.dtype == dtype
    fine, exact = draw(weighting, 64)
    torch.testing.assert_close(time, fine.to(dtype), rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(weight, exact.to(dtype), rtol=1e-4, atol=0)


@every_weighting
def test_times_may_be_given(weighting):
    time, weight = draw(weighting, 6)
    again, same = draw(weighting, 6, time=time)
    torch.testing.assert_close(again, time)
    torch.testing.assert_close(same, weight)
    single, _ = draw(weighting, 2, time=0.5)
    torch.testing.assert_close(single, torch.tensor([0.5, 0.5]).double(), atol=1e-3, rtol=0)


def test_vdm_takes_given_times_to_their_step():
    time, weight = draw("vdm", 3, time=torch.tensor([0.02, 0.5, 0.98]).double())
    assert (time * 999).long().tolist() == [FIRST + 1, 499, LAST]
    torch.testing.assert_close(time, middle([FIRST + 1, 499, LAST]))
    ratio = oracle.SNR[[FIRST, 498, LAST - 1]] / oracle.SNR[[FIRST + 1, 499, LAST]]
    np.testing.assert_allclose(weight, (LAST - FIRST) / 2 * (ratio - 1), rtol=1e-9)


@every_form
@every_weighting
def test_samples(form, weighting):
    """Rows are repeated, and the mean is over all of them; a count is of rows."""
    z, generator = randn(3, 4), torch.Generator()
    noise = randn(6, 4, seed=1)
    options = {"form": form, "weighting": weighting, "posterior_std": 0.5, "noise": noise}
    twice = prior(Affine(), z, samples=2, generator=generator.manual_seed(0), **options)
    repeated = prior(
        Affine(), z.repeat_interleave(2, 0), generator=generator.manual_seed(0), **options
    )
    torch.testing.assert_close(twice, repeated)
    fixed = prior(Affine(), z, samples=2, generator=generator.manual_seed(0), count=12, **options)
    torch.testing.assert_close(fixed, twice / 4)


def test_samples_lower_the_variance():
    process, teacher, z = LatentProcess(), Optimal(LatentProcess()), randn(2, 4)
    spread = {
        n: np.std([float(prior(teacher, z, process, samples=n)) for _ in range(100)])
        for n in (1, 16)
    }
    assert spread[16] < spread[1] / 3


def test_the_likelihood_weighting_has_the_steadier_value():
    process, z, seed = COSINE, randn(16, 8), torch.Generator().manual_seed(0)
    spread = {
        weighting: np.std(
            [
                float(prior(Optimal(process), z, process, weighting=weighting, generator=seed))
                for _ in range(100)
            ]
        )
        for weighting in ("likelihood", "vdm")
    }
    assert spread["likelihood"] < spread["vdm"] / 1.5


# --- gradients --------------------------------------------------------------------------------


@every_prediction
@every_weighting
@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.slow
def test_gradcheck(form, weighting, prediction):
    torch.manual_seed(0)
    teacher = Teacher(ToyNetwork(7, 4).double()).denoiser
    z = randn(3, 4).requires_grad_()
    options = {
        "form": form,
        "weighting": weighting,
        "posterior_std": 0.3,
        "boundaries": weighting != "uniform",
        "noise": randn(3, 4, seed=1),
        "time": middle([30, 500, 900]),
    }
    process = LatentProcess(prediction=prediction)
    assert torch.autograd.gradcheck(lambda x: prior(teacher, x, process, **options), z)


@every_form
@every_weighting
def test_who_learns(form, weighting):
    denoiser, _, process = toy_denoiser()
    teacher = Teacher(denoiser.module)
    z = randn(3, 4).float().requires_grad_()
    prior(
        teacher.denoiser, z, process, form=form, weighting=weighting, posterior_std=0.5
    ).backward()
    assert z.grad.any(dim=1).all()
    for module in (teacher, denoiser.module):
        assert all(p.grad is None for p in module.parameters())


def test_the_jacobian_of_the_teacher():
    """`cross_entropy` has it, `score_distillation` has not: of a linear teacher both are known."""
    process = LatentProcess(prediction="epsilon")
    z = randn(4, 3).requires_grad_()
    options = {"weighting": "uniform", "time": 0.5, "noise": torch.zeros(4, 3).double()}
    a, s = (float(x) for x in process.alpha_sigma(torch.tensor([0.5]).double()))
    for form, expected in (
        ("cross_entropy", 2 * (s * a) ** 2),  # of ||eps - s z_t||^2
        ("score_distillation", a * s * a),  # alpha (eps_psi - eps)
    ):
        (gradient,) = torch.autograd.grad(
            prior(Optimal(process), z, process, form=form, **options), z
        )
        torch.testing.assert_close(gradient, expected * z.detach() / 4)


@every_prediction
@every_form
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_gradient_is_finite(form, prediction, scale):
    """Over the whole schedule, at its ends too: alpha = 1.6e-5, sigma = .01."""
    z = (randn(1, 3).float().repeat(4, 1) * scale).requires_grad_()
    process = LatentProcess(prediction=prediction)
    teacher = Teacher(ToyNetwork(7, 3)).denoiser
    for weighting in WEIGHTINGS:
        value = prior(
            teacher,
            z,
            process,
            form=form,
            weighting=weighting,
            posterior_std=0.1,
            time=torch.tensor([0.0011, 0.3, 0.9, 1.0]),
            **WHOLE,
        )
        (gradient,) = torch.autograd.grad(value, z)
        assert value.isfinite() and gradient.isfinite().all()


@every_prediction
@every_form
def test_single_precision_at_both_ends(form, prediction):
    process = LatentProcess(prediction=prediction)
    z, noise = randn(4, 3), randn(4, 3, seed=1)
    time = middle([1, 2, 998, 999])
    options = {"form": form, "posterior_std": 0.1, "boundaries": True} | WHOLE
    exact, got = (
        prior(Affine(), z.to(dtype), process, time=time.to(dtype), noise=noise.to(dtype), **options)
        for dtype in (torch.float64, torch.float32)
    )
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(exact), rel=1e-4)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(form, dtype):
    """The teacher sees the latents in their own dtype, all else is fp32."""
    z, noise = randn(6, 3).to(dtype), randn(6, 3, seed=1).to(dtype)
    options = {"form": form, "posterior_std": 0.5, "noise": noise, "time": 0.5}
    got = prior(Affine(), z, **options)
    assert got.dtype == torch.float32
    exact = prior(Affine(), z.double(), **(options | {"noise": noise.double()}))
    assert float(got) == pytest.approx(float(exact), rel=2e-2)
    drawn = prior(
        Affine(), z, generator=torch.Generator().manual_seed(0), form=form, posterior_std=1
    )
    assert drawn.isfinite() and drawn.dtype == torch.float32
    spy = Spy(Affine())
    prior(spy, z, **options)
    assert spy.calls[0]["latents"].dtype == dtype


@every_form
def test_autocast_rounds_only_the_teacher(form):
    z, options = randn(6, 3).float(), {"form": form, "posterior_std": 0.5}
    seed = partial(torch.Generator().manual_seed, 0)
    outside = prior(Optimal(LatentProcess()), z, generator=seed(), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = prior(Optimal(LatentProcess()), z, generator=seed(), **options)
    assert torch.equal(inside, outside)


@every_form
@every_weighting
def test_runs_on_meta(form, weighting):
    network = ToyNetwork(7, 3).to("meta").requires_grad_(False).eval()
    z = torch.empty(4, 3, device="meta", requires_grad=True)
    value = learned_prior(
        as_denoiser(network),
        z,
        torch.empty(4, 2, dtype=torch.bool, device="meta"),
        text_process=TEXT,
        latent_process=LatentProcess(),
        form=form,
        weighting=weighting,
        posterior_std=0.5,
        boundaries=weighting != "uniform",
        samples=2,
    )
    value.backward()
    assert value.shape == () and z.grad.shape == z.shape


@every_form
def test_no_rows(form):
    z = torch.zeros(0, 3, requires_grad=True)
    value = prior(Optimal(LatentProcess()), z, form=form, posterior_std=0.5, boundaries=True)
    assert value == 0 and value.requires_grad


# --- what it does -----------------------------------------------------------------------------


@every_prediction
def test_score_distillation_rests_at_the_mode_only(prediction):
    """At a N(0, I) prior the mean gradient is a positive multiple of z: it rests at z = 0."""
    process = LatentProcess(prediction=prediction)
    steps, noise = np.arange(FIRST + 1, LAST + 1), (-1.0, 1.0)  # linear in the noise
    pull = 0.0
    for point in (0.0, 0.3, -2.0):
        z, draws = every_step(FIRST, LAST, z=(point,), noise=noise)
        z.requires_grad_()
        value = prior(Optimal(process), z, process, form="score_distillation", **draws)
        (gradient,) = torch.autograd.grad(value, z)
        a, s = oracle.ALPHA[steps], oracle.SIGMA[steps]
        weights = [oracle.weight("vdm", i, FIRST, LAST) for i in steps]
        pull = float((np.array(weights) * a**2 * s).mean())
        assert float(gradient.sum()) == pytest.approx(pull * point, rel=1e-6, abs=1e-9)
    assert pull > 0


@every_form
def test_alone_it_collapses_a_batch(form):
    """Every form draws each row to the mode, also with a posterior of fixed width."""
    process, std = LatentProcess(), 0.5
    z = torch.nn.Parameter(randn(16, 4) + 1)
    spread = float(z.detach().std())
    descent, generator = torch.optim.SGD([z], lr=2.0), torch.Generator().manual_seed(0)
    for _ in range(50):
        descent.zero_grad()
        prior(
            Optimal(process),
            z,
            process,
            form=form,
            weighting="likelihood",
            posterior_std=std,
            samples=8,
            generator=generator,
        ).backward()
        descent.step()
    assert float(z.detach().mean().abs()) < 0.1 and float(z.detach().std()) < 0.2 * spread


def test_the_divergence_has_a_floor_and_the_cross_entropy_of_a_point_has_none():
    """KL(N(z, s^2) || N(0, 1)) is lowest at z = 0, and not zero there; its gradient is z."""
    process, std = LatentProcess(), 0.5
    values = {}
    for point in (-1.0, 0.0, 0.5):
        z, draws = evenly(process, low=0.0, high=0.999, z=(point,))
        z.requires_grad_()
        options = {"form": "score_difference", "posterior_std": std, "boundaries": True}
        value = prior(Optimal(process), z, process, **options, **draws)
        (gradient,) = torch.autograd.grad(value, z)
        values[point] = value.item()
        assert float(gradient.sum()) == pytest.approx(point, abs=2e-3)
    assert values[0.0] == pytest.approx(oracle.normal_kl(0.0, std**2), abs=2e-4)
    assert values[0.0] == min(values.values()) > 0.3


def test_a_width_guards_against_narrow_modes():
    """A point prefers the narrow of two modes of equal weight, a posterior of width .5 the wide."""
    process = LatentProcess()
    teacher = Optimal(process, means=[-3.0, 3.0], variances=[0.05**2, 1.0])
    _, draws = evenly(process, low=0.0, high=0.999, z=(0.0,), noise=(0.0,))
    draws["noise"] = randn(4000, 1, seed=3)

    def cost(point, **options):
        z = torch.full((4000, 1), point).double()
        return float(prior(teacher, z, process, boundaries=True, **draws, **options))

    assert cost(-3.0) < cost(3.0) - 1
    wide = {"form": "score_difference", "posterior_std": 0.5}
    assert cost(3.0, **wide) < cost(-3.0, **wide) - 1


def test_the_value_of_score_distillation_is_the_cross_entropy():
    z = randn(4, 3).requires_grad_()
    options = {"posterior_std": 0.3, "noise": randn(4, 3, seed=1), "time": 0.4, "boundaries": True}
    left, right = (prior(Affine(), z, form=f, **options) for f in (FORMS[0], FORMS[2]))
    torch.testing.assert_close(left, right)


# --- refusals ---------------------------------------------------------------------------------


def test_a_teacher_must_be_frozen():
    denoiser, _, process = toy_denoiser()
    with pytest.raises(
        ValueError,
        match=r"`teacher` must be frozen, and its parameter 'word.weight' requires a gradient: "
        r".*use Teacher\(network\).denoiser, or call requires_grad_\(False\) on a copy",
    ):
        prior(denoiser, torch.zeros(2, 4), process)
    last = Teacher(denoiser.module)
    last.network.latent_head.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'latent_head.bias' requires a gradient"):
        prior(last.denoiser, torch.zeros(2, 4), process)


def test_a_teacher_must_be_in_eval_mode():
    network = toy_denoiser()[0].module.requires_grad_(False)
    network.eval().shared.train()
    with pytest.raises(ValueError, match=r"`teacher` must be in eval mode; .* call .eval\(\)"):
        prior(as_denoiser(network), torch.zeros(2, 4))
    network.eval()
    assert prior(as_denoiser(network), torch.zeros(2, 4)).isfinite()


@pytest.mark.unhooked
def test_a_teacher_is_no_denoiser():
    expected = r"`teacher` must be a Denoiser.*got Teacher; give its `.denoiser`"
    with pytest.raises(TypeError, match=expected):
        prior(Teacher(toy_denoiser()[0].module), torch.zeros(2, 4))


@pytest.mark.unhooked
def test_unknown_options():
    for name, value in (("form", "cross_entropi"), ("weighting", "vdn")):
        with pytest.raises(ValueError, match=rf"`{name}` is '{value}'; did you mean"):
            prior(Affine(), torch.zeros(2, 3), **{name: value})


def test_options_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"'score_difference' .* give a `posterior_std` above 0"):
        prior(Affine(), torch.zeros(2, 3), form="score_difference")
    with pytest.raises(ValueError, match="'uniform' is no bound, so it has no `boundaries`"):
        prior(Affine(), torch.zeros(2, 3), weighting="uniform", boundaries=True)
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="`posterior_std` must be a finite number"):
            prior(Affine(), torch.zeros(2, 3), posterior_std=bad)
    with pytest.raises(ValueError, match="`samples` must be at least 1, got 0"):
        prior(Affine(), torch.zeros(2, 3), samples=0)


@every_weighting
@pytest.mark.parametrize(
    ("low", "high"), [(-0.1, 0.5), (0.5, 1.1), (0.5, 0.5), (0.6, 0.5), (0.5, 0.5005)]
)
def test_bad_ranges_of_times(weighting, low, high):
    with pytest.raises(
        ValueError,
        match=rf"`low` and `high` must be times in \[0, 1\], `low` at least 0.001 below `high`, "
        rf"got {low} and {high}",
    ):
        prior(Affine(), torch.zeros(2, 3), weighting=weighting, low=low, high=high)


@every_weighting
def test_a_range_without_a_finite_signal_to_noise_ratio(weighting):
    process = LatentProcess("continuous_cosine")
    with pytest.raises(
        ValueError,
        match=r"the signal-to-noise ratio must fall from `low` = 0 to `high` = 1, finite and above "
        r"0, got [\d.e+]+ and 0; narrow the range",
    ):
        prior(Affine(), torch.zeros(2, 3), process, weighting=weighting, **WHOLE)
    clean = LatentProcess(lambda t: (1 - t, (t - 0.1).clamp(min=0)), prediction="x0")
    with pytest.raises(ValueError, match="got inf and"):
        prior(Affine(), torch.zeros(2, 3), clean, weighting=weighting)


@every_weighting
def test_given_times_must_lie_in_the_range(weighting):
    for bad in (0.01, 0.99):
        with pytest.raises(
            ValueError, match=r"`time` must lie in \[low, high\] = \[0.02, 0.98\], got other values"
        ):
            prior(Affine(), torch.zeros(2, 3), weighting=weighting, time=bad)
    for fine in (0.02, 0.98):
        prior(Affine(), torch.zeros(2, 3), weighting=weighting, time=fine)


def test_values_need_not_be_read():
    """On a device each look at a value would wait for it."""
    continuous = LatentProcess("continuous_cosine")
    with check_values(False):
        prior(Affine(), torch.zeros(2, 3), continuous, low=0.0, high=1.0)
        prior(Affine(), torch.zeros(2, 3), time=1.0)


@pytest.mark.unhooked
def test_shapes():
    with pytest.raises(ValueError, match=r"`z` must be latents of shape \[b, 3\]"):
        prior(Affine(), torch.zeros(2, 4), LatentProcess(shape=(3,)))
    with pytest.raises(ValueError, match=r"`z` must be finite.*has training diverged"):
        prior(Affine(), torch.full((2, 3), math.nan))
    with pytest.raises(ValueError, match="`attention_mask` and `z` must have the same number of"):
        learned_prior(
            Affine(), torch.zeros(2, 3), ones(3), text_process=TEXT, latent_process=LatentProcess()
        )
    with pytest.raises(
        ValueError, match=r"`noise` and `z, repeated `samples` times,` must have equal shapes"
    ):
        prior(Affine(), torch.zeros(2, 3), noise=torch.zeros(2, 3), samples=2)
    with pytest.raises(ValueError, match=r"`time` must be a number or have shape \[4\]"):
        prior(Affine(), torch.zeros(2, 3), time=torch.full((2,), 0.5), samples=2)


def test_draws_follow_the_generator():
    z = randn(3, 4)
    seed = torch.Generator().manual_seed
    first = prior(Affine(), z, generator=seed(0))
    assert torch.equal(prior(Affine(), z, generator=seed(0)), first)
    assert not torch.equal(prior(Affine(), z, generator=seed(1)), first)


@pytest.mark.slow
def test_the_estimate_is_unbiased():
    process, z = LatentProcess(), randn(4, 2)
    teacher = Optimal(process)
    grid, draws = every_step(FIRST, LAST, z=(0.0,))
    expected = sum(
        float(prior(teacher, torch.full_like(grid, x), process, **draws)) for x in z.flatten()
    )
    seed = torch.Generator().manual_seed(0)
    values = [float(prior(teacher, z, process, generator=seed)) for _ in range(800)]
    assert_near_mean(values, expected / 4)
