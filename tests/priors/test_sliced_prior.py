"""SIGReg: against knots in a loop, the pairwise closed form, 1F1, and its law under the target."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import cyclevae as cv
import oracles_mmd as oracles
from cyclevae.priors.mmd import mmd_prior
from cyclevae.priors.sliced import sigreg_prior
from oracles import array, assert_near_mean
from strategies import quick, seeds

ESTIMATORS = ("unbiased", "biased")
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
FOUR = torch.tensor([[0.0], [1.0], [-2.0], [0.5]]).double()
UNCUT = {"bound": 9.0, "knots": 91}  # what is left out is below 1e-14


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def seeded(z, seed=0, **options):
    """The prior with the directions of a seed."""
    return sigreg_prior(z, generator=torch.Generator().manual_seed(seed), **options)


def knots_and_weights(knots=17, bound=3.0):
    t = np.linspace(0, bound, knots)
    weights = np.full(knots, 2 * bound / (knots - 1))
    weights[[0, -1]] /= 2
    return t, weights * np.exp(-(t**2) / 2)


# --- one dimension, where every direction is the axis -----------------------------------------


def test_numbers():
    biased = {"estimator": "biased"}
    assert float(sigreg_prior(FOUR, **UNCUT, **biased)) == pytest.approx(0.5663950544, abs=1e-10)
    assert float(sigreg_prior(FOUR, **biased)) == pytest.approx(0.5635, abs=5e-5)
    assert oracles.epps_pulley_pairs([0, 1, -2, 0.5]) == pytest.approx(0.5663950544, abs=1e-10)


@quick
@given(
    st.integers(2, 6), seeds, st.integers(2, 20), st.floats(0.5, 6.0), st.sampled_from(ESTIMATORS)
)
def test_against_knots_in_a_loop(n, seed, knots, bound, estimator):
    u = randn(n, 1, seed=seed) * 1.5 + 0.3
    got = sigreg_prior(u, knots=knots, bound=bound, estimator=estimator, directions=3)
    expected = oracles.epps_pulley(array(u)[:, 0], knots, bound, estimator)
    assert float(got) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@every_estimator
@quick
@given(st.integers(2, 6), seeds)
def test_untruncated_it_is_mmd(estimator, n, seed):
    """`n sqrt(2 pi)` times the closed pairwise form with bandwidth 1."""
    u = randn(n, 1, seed=seed) * 1.5
    got = sigreg_prior(u, **UNCUT, estimator=estimator)
    mmd2 = mmd_prior(u, scales=(1.0,), estimator=estimator)
    torch.testing.assert_close(got, n * math.sqrt(2 * math.pi) * mmd2, rtol=1e-9, atol=1e-9)
    if estimator == "biased":
        assert float(got) == pytest.approx(oracles.epps_pulley_pairs(array(u)[:, 0]), rel=1e-9)


def test_defaults():
    z = randn(6, 3)
    options = {
        "directions": 256, "knots": 17, "bound": 3.0, "mean": 0.0, "variance": 1.0,
        "estimator": "unbiased",
    }  # fmt: skip
    assert torch.equal(seeded(z), seeded(z, **options))


# --- under a Gaussian -------------------------------------------------------------------------


def each(batches, **options):
    """The prior of every batch of a stack of one-dimensional latents."""
    with cv.check_values(False):
        prior = torch.vmap(
            lambda z: sigreg_prior(z, directions=1, **options), randomness="different"
        )
        return array(prior(batches))


@pytest.mark.parametrize("n", [2, 8, 40])
def test_floor(n):
    """Under the target: 1.0594 untruncated and 1.0525 by default if biased, any n; 0 if not."""
    draws = randn(4000, n, 1, seed=n)
    t, weights = knots_and_weights()
    floor = weights @ (1 - np.exp(-(t**2)))
    assert floor == pytest.approx(1.0525, abs=5e-5)
    assert_near_mean(each(draws, estimator="biased"), floor)
    assert_near_mean(each(draws), 0.0)
    untruncated = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))
    assert untruncated == pytest.approx(1.0594, abs=5e-5)
    assert_near_mean(each(draws, estimator="biased", **UNCUT), untruncated)


@pytest.mark.parametrize(("mu", "v"), [(0.0, 0.3), (0.7, 1.0), (-0.4, 2.5)])
def test_unbiased_at_any_gaussian(mu, v):
    """`n` times the discrepancy of N(mu, v), which subtracting the floor alone would not give."""
    n = 5
    draws = randn(20_000, n, 1) * math.sqrt(v) + mu
    t, weights = knots_and_weights()
    gap = np.abs(np.exp(1j * t * mu - v * t**2 / 2) - np.exp(-(t**2) / 2)) ** 2
    assert_near_mean(each(draws), n * (weights @ gap))
    floor = weights @ (1 - np.exp(-(t**2)))
    less_floor = each(draws, estimator="biased") - floor
    if v != 1:
        assert abs(less_floor.mean() - n * (weights @ gap)) > 0.05


@every_estimator
def test_collapse(estimator):
    """`n int (1 - e^(-t^2/2))^2 e^(-t^2/2) dt`, in any dimension; all of it is discrepancy."""
    t, weights = knots_and_weights()
    expected = 64 * (weights @ (1 - np.exp(-(t**2) / 2)) ** 2)
    got = sigreg_prior(torch.zeros(64, 32), estimator=estimator)
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_duplicates():
    z = randn(5, 3)
    twice = seeded(torch.cat([z, z]), estimator="biased")
    torch.testing.assert_close(twice, 2 * seeded(z, estimator="biased"))


# --- slices -----------------------------------------------------------------------------------


def draws(z, count=100, **options):
    """Values of independent directions."""
    generator = torch.Generator().manual_seed(3)
    with cv.check_values(False):
        return [float(sigreg_prior(z, generator=generator, **options)) for _ in range(count)]


@pytest.mark.parametrize("d", [2, 5, 30])
def test_average_over_all_directions(d):
    """`1F1(1/2; D/2; -r^2/2)` in place of `e^(-r^2/2)`."""
    z = randn(6, d) * 0.7 + 0.5
    values = draws(z, directions=64, estimator="biased", **UNCUT)
    assert_near_mean(values, oracles.sliced_epps_pulley(array(z)))


@pytest.mark.parametrize(("d", "error"), [(20, 0.02), (100, 0.01)])
def test_approximation_of_cramer_wold(d, error):
    x = array(randn(12, d) * 0.7 + 0.2)
    exact = oracles.sliced_epps_pulley(x)
    assert oracles.sliced_epps_pulley(x, oracles.cramer_wold(d)) == pytest.approx(exact, rel=error)
    values = draws(torch.from_numpy(x), 20, directions=512, estimator="biased", **UNCUT)
    assert np.mean(values) == pytest.approx(exact, rel=0.01)


def test_rotation():
    """In the limit of all directions an isotropic target cannot tell a rotation."""
    z = randn(6, 4) * torch.tensor([0.1, 1.0, 2.0, 3.0]).double()
    turned = z @ torch.linalg.qr(randn(4, 4, seed=1)).Q
    limits = [oracles.sliced_epps_pulley(array(x)) for x in (z, turned)]
    assert limits[0] == pytest.approx(limits[1], rel=1e-12)
    values = np.array(draws(turned, directions=64, estimator="biased", **UNCUT))
    assert_near_mean(values, limits[0])
    assert abs(seeded(turned) - seeded(z)) > 1e-6  # with the directions of one call it can


def test_more_directions_are_less_noise():
    z = randn(6, 8) * 0.5
    few, many = (np.std(draws(z, directions=m)) for m in (4, 64))
    assert 2.5 < few / many < 6  # sqrt(16)


def test_directions_come_from_the_generator():
    z = randn(6, 3)
    assert torch.equal(seeded(z), seeded(z))  # on every rank
    assert seeded(z) != seeded(z, seed=1)
    generator = torch.Generator().manual_seed(0)
    assert sigreg_prior(z, generator=generator) != sigreg_prior(z, generator=generator)
    torch.manual_seed(0)
    first = sigreg_prior(z)
    assert first != sigreg_prior(z)
    torch.manual_seed(0)
    assert torch.equal(first, sigreg_prior(z))


def test_ranks_average_to_an_unbiased_value():
    """The mean over ranks, with the same directions, is that of the small batches."""
    z = randn(2000, 2, 6, 1) * 0.6
    t, weights = knots_and_weights()
    gap = (np.exp(-0.36 * t**2 / 2) - np.exp(-(t**2) / 2)) ** 2
    assert_near_mean(each(z.flatten(0, 1)).reshape(2000, 2).mean(1), 6 * (weights @ gap))


# --- invariances ------------------------------------------------------------------------------


@every_estimator
def test_order_of_rows(estimator):
    z = randn(7, 3)
    shuffled = z[torch.randperm(7, generator=torch.Generator().manual_seed(0))]
    values = [seeded(x, estimator=estimator) for x in (shuffled, z)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)


@every_estimator
def test_the_target_standardises(estimator):
    z, mean = randn(6, 3), randn(3, seed=1)
    variance = torch.tensor([0.5, 1.0, 4.0]).double()
    got = seeded(z, mean=mean, variance=variance, estimator=estimator)
    torch.testing.assert_close(got, seeded((z - mean) / variance.sqrt(), estimator=estimator))
    got = seeded(z, mean=2.0, variance=4.0, estimator=estimator)
    torch.testing.assert_close(got, seeded((z - 2) / 2, estimator=estimator))


def test_a_sample_of_several_vectors_is_one_long_vector():
    z, mean, variance = randn(5, 3, 2), randn(3, 2, seed=1), randn(3, 2, seed=2).exp()
    got = seeded(z, mean=mean, variance=variance)
    flat = seeded(z.flatten(1), mean=mean.flatten(), variance=variance.flatten())
    assert torch.equal(got, flat)


# --- gradients, precision, cost ---------------------------------------------------------------


@every_estimator
def test_gradcheck(estimator):
    z, variance = randn(4, 3).requires_grad_(), torch.tensor([0.5, 1.0, 4.0]).double()
    options = {"mean": 0.3, "variance": variance, "estimator": estimator, "directions": 5}
    assert torch.autograd.gradcheck(lambda x: seeded(x, **options), z)


@every_estimator
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-4, 1.0, 1e4, 1e6])
def test_gradient_is_finite(estimator, scale):
    for rows in (randn(4, 3), randn(2, 3).repeat(2, 1), randn(1, 3).expand(4, 3)):
        z = (rows.float() * scale).requires_grad_()
        loss = seeded(z, estimator=estimator)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()


@every_estimator
def test_a_step_down_the_gradient_helps(estimator):
    z = (randn(32, 4) * 0.3 + 1).requires_grad_()
    loss = seeded(z, estimator=estimator)
    (gradient,) = torch.autograd.grad(loss, z)
    step = 0.1 * gradient / gradient.norm()
    assert seeded(z.detach() - step, estimator=estimator) < loss
    # with other directions too: the gradient is not one of theirs alone
    assert seeded(z.detach() - step, seed=1, estimator=estimator) < seeded(
        z.detach(), seed=1, estimator=estimator
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    z = (randn(6, 3) * 0.5).to(dtype)
    got = seeded(z)
    assert got.dtype == torch.float32
    assert torch.equal(got, seeded(z.float()))


@every_estimator
def test_autocast_does_not_round(estimator):
    z = randn(16, 8).float()
    outside = seeded(z, estimator=estimator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(seeded(z, estimator=estimator), outside)


def test_fp32_keeps_the_last_digits_of_large_batches():
    """Directions differ between dtypes; in one dimension they do not matter."""
    z = randn(20_000, 1)
    got = float(sigreg_prior(z.float(), directions=2))
    assert got == pytest.approx(float(sigreg_prior(z, directions=2)), abs=1e-2)


def test_runs_on_meta():
    assert sigreg_prior(torch.empty(4, 3, device="meta")).shape == ()


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_cost_is_linear_in_rows():
    with Largest() as largest:
        sigreg_prior(randn(500, 4), directions=8, knots=5)
    assert largest.elements == 500 * 8 * 5


# --- refusals ---------------------------------------------------------------------------------

Z = torch.zeros(3, 3)
unhooked = pytest.mark.unhooked


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_samples(rows):
    expected = rf"`z` needs at least 2 samples .* got shape \[{rows}, 3\]; raise the batch size"
    with pytest.raises(ValueError, match=expected):
        sigreg_prior(torch.zeros(rows, 3))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"directions": 0}, "`directions` must be a whole number of at least 1, got 0"),
        ({"knots": 1}, "`knots` must be a whole number of at least 2, got 1"),
        ({"bound": 0.0}, "`bound` must be above 0, got 0"),
        ({"bound": -1.0}, "`bound` must be a finite number of at least 0, got -1.0"),
        ({"variance": 0.0}, "`variance` must be above 0, got 0"),
        ({"mean": torch.ones(2)}, r"`mean` must be a number or have the shape of one latent \[3\]"),
    ],
)
def test_options(options, expected):
    with pytest.raises(ValueError, match=expected):
        sigreg_prior(Z, **options)


def test_least_directions_and_knots():
    assert sigreg_prior(Z, directions=1, knots=2).isfinite()


@unhooked
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"directions": 2.5}, "`directions` must be a whole number of at least 1, got 2.5"),
        ({"knots": "17"}, "`knots` must be a whole number of at least 2, got '17'"),
        ({"estimator": "linear"}, "`estimator` is 'linear'; known are 'biased', 'unbiased'"),
    ],
)
def test_option_types(options, expected):
    with pytest.raises(ValueError, match=expected):
        sigreg_prior(Z, **options)


def test_latents_must_be_finite():
    z = torch.zeros(3, 3)
    z[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"`z` must be finite.*1 of 3 rows \(first: row 1\)"):
        sigreg_prior(z)
