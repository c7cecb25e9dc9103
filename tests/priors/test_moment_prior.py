"""Moment priors: formulas, floors, what is unbiased where, invariances, gradients, refusals."""

import math
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import special

import cyclevae as cv
import oracles_moment as oracle
from cyclevae.priors.moment import MomentForm, moment_prior
from oracles import array, assert_near_mean
from oracles_moment import MULTIVARIATE
from strategies import quick, seeds

FORMS = get_args(MomentForm)
UNIVARIATE = tuple(form for form in FORMS if form not in MULTIVARIATE)
KINDS = [(form, e) for form in FORMS for e in ("unbiased", "biased")]
KINDS.remove(("full_bures", "unbiased"))
DISTANCES = ("diagonal", "bures", "kl", "covariance", "full_kl", "full_bures")  # 0 at the target
AT_ANY_GAUSSIAN = ("diagonal", "bures", "kl", "covariance", "full_kl")
every_form = pytest.mark.parametrize("form", FORMS)
every_kind = pytest.mark.parametrize(("form", "estimator"), KINDS)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def drawn_covariance(d, seed=0):
    """Symmetric, of eigenvalues well away from 0, and of variances unlike 1."""
    a = randn(d, d + 2, seed=seed + 7)
    return a @ a.T / d + 0.3 * torch.eye(d)


def white(n, d, seed=0):
    """A batch whose mean is 0 and whose covariance is the identity, exactly."""
    x = randn(n, d, seed=seed)
    return torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)[0] * math.sqrt(n - 1)


def rotation(d, seed=0):
    return torch.linalg.qr(randn(d, d, seed=seed)).Q


def biased(z, form, **options):
    return moment_prior(z, form=form, estimator="biased", **options)


def sampled(draws, form, **options):
    """The prior of each batch of `[draws, n, d]`."""
    with cv.check_values(False):  # values cannot be looked at inside vmap
        return array(torch.vmap(partial(moment_prior, form=form, **options))(draws))


# --- against the oracles ----------------------------------------------------------------------


@quick
@given(
    st.sampled_from(KINDS),
    st.sampled_from([2, 3, 5, 8]),
    st.sampled_from([(1,), (3,), (2, 2), (6,)]),
    st.sampled_from(["default", "number", "0-d", "per dimension", "covariance"]),
    st.sampled_from([0.3, 1.0, 1.7]),
    seeds,
)
@pytest.mark.parametrize("_", range(8))
def test_against_the_formula(_, kind, n, shape, target, threshold, seed):
    (form, estimator), d, seed = kind, math.prod(shape), seed % 10_000 + _ * 10_000
    assume(form != "full_kl" or n > d)
    assume(kind != ("covariance", "unbiased") or n > 2)
    assume(target != "covariance" or form in MULTIVARIATE)
    options = {"threshold": threshold} if form == "hinge" else {}
    z = randn(n, *shape, seed=seed) * 1.5
    m, v = randn(*shape, seed=seed + 1), randn(*shape, seed=seed + 2).exp()
    match target:
        case "default":
            m, v, given_moments = torch.zeros(shape), torch.ones(shape), {}
        case "number":
            given_moments = {"mean": float(m.flatten()[0]), "variance": float(v.flatten()[0])}
        case "0-d":
            given_moments = {"mean": m.flatten()[0], "variance": v.flatten()[0]}
        case _:
            given_moments = {"mean": m, "variance": v}
    if target in ("number", "0-d"):
        m, v = (moment.flatten()[0].expand(shape) for moment in (m, v))
    covariance = torch.diag(v.flatten())
    if target == "covariance":
        covariance = drawn_covariance(d, seed)
        given_moments = {"mean": m, "covariance": covariance}
    got = moment_prior(z, form=form, estimator=estimator, **given_moments, **options)
    expected = oracle.moment_prior(
        z, form, array(m.flatten()), array(covariance), estimator, **options
    )
    assert float(got) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("form", DISTANCES)
@quick
@given(seeds, st.booleans())
def test_batches_of_known_moments(form, seed, full):
    """Batches that have given moments exactly: `biased` is the distance of two Gaussians."""
    n, d, seed = 7, 3, seed % 10_000
    mean, covariance = randn(d, seed=seed + 1), drawn_covariance(d, seed)
    z = white(n, d, seed) @ torch.linalg.cholesky(covariance).T + mean
    target_mean, target = randn(d, seed=seed + 2), drawn_covariance(d, seed + 3)
    options = {"covariance": target}
    if not full or form not in MULTIVARIATE:
        options = {"variance": target.diagonal()}
        target = torch.diag(target.diagonal())
    got = biased(z, form, mean=target_mean, **options)
    moments = map(array, (mean, covariance, target_mean, target))
    assert float(got) == pytest.approx(oracle.population(form, *moments), rel=1e-9, abs=1e-9)


def test_full_kl_is_that_of_torch():
    d = 3
    covariance, target = drawn_covariance(d), drawn_covariance(d, 5)
    mean, target_mean = randn(d, seed=1), randn(d, seed=2)
    normal = torch.distributions.MultivariateNormal
    expected = torch.distributions.kl_divergence(
        normal(mean, covariance), normal(target_mean, target)
    )
    z = white(9, d) @ torch.linalg.cholesky(covariance).T + mean
    torch.testing.assert_close(biased(z, "full_kl", mean=target_mean, covariance=target), expected)


# --- known values -----------------------------------------------------------------------------


def test_the_default_is_diagonal_and_unbiased():
    z = randn(5, 3)
    assert moment_prior(z) == moment_prior(z, form="diagonal", estimator="unbiased")
    assert moment_prior(z) != biased(z, "diagonal")


def test_hand_computed():
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # variances 2 and 0
    assert biased(z, "diagonal") == (2 - 1) ** 2 + (0 - 1) ** 2
    assert biased(z + 3, "diagonal", mean=1.0) == 2 * 2**2 + 2
    assert float(biased(z, "bures")) == pytest.approx((math.sqrt(2) - 1) ** 2 + 1)
    assert float(biased(z, "norm")) == (1 / 2 - 1) ** 2
    assert float(biased(z, "hinge")) == 1
    assert float(biased(z, "hinge", threshold=2.0)) == pytest.approx(2 - math.sqrt(2) + 2)
    assert float(biased(z, "covariance")) == 2
    assert float(biased(z, "full_bures")) == pytest.approx((math.sqrt(2) - 1) ** 2 + 1)
    correlated = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # S = [[2, 2], [2, 2]]
    assert biased(correlated, "diagonal") == 2
    assert biased(correlated, "covariance") == 2 + 2 * 2**2
    assert float(biased(correlated, "full_bures")) == pytest.approx(4 + 2 - 2 * 2)


@pytest.mark.parametrize("form", DISTANCES)
@quick
@given(st.integers(1, 4), st.integers(1, 6), seeds)
def test_whitened_batches_are_at_the_target(form, d, more, seed):
    z = white(d + more + 1, d, seed)
    assert float(biased(z, form)) == pytest.approx(0, abs=1e-12)
    assert float(biased(z * 2 + 1, form, mean=1.0, variance=4.0)) == pytest.approx(0, abs=1e-11)
    if form in MULTIVARIATE:
        covariance = drawn_covariance(d, seed % 1000)
        z = z @ torch.linalg.cholesky(covariance).T
        assert float(biased(z, form, covariance=covariance)) == pytest.approx(0, abs=1e-11)


@quick
@given(st.integers(1, 5), st.floats(0.1, 4.0), seeds)
def test_norm_and_hinge_of_whitened_batches(d, threshold, seed):
    """D + 1 whitened points are a regular simplex: all of squared norm D^2/(D + 1)."""
    z = white(d + 1, d, seed)
    assert float(biased(z, "norm")) == pytest.approx((d / (d + 1) - 1) ** 2, abs=1e-12)
    expected = d * max(0, threshold - 1)
    assert float(biased(z, "hinge", threshold=threshold)) == pytest.approx(expected, abs=1e-12)


def test_the_hinge_is_one_sided_and_reads_no_mean():
    z = randn(20, 3) * 3 + 5
    assert biased(z, "hinge") == 0
    assert biased(z, "hinge", variance=100.0) > 0
    assert biased(z / 10, "hinge", mean=9.0) == biased(z / 10, "hinge") > 0


@pytest.mark.parametrize("d", [1, 4])
def test_collapse(d):
    """All rows at the target's mean: what the spread alone is worth."""
    z = torch.full((d + 3, d), 2.0).double()
    options = {"mean": 2.0, "variance": 4.0}
    for estimator in ("unbiased", "biased"):
        got = {
            form: float(moment_prior(z, form=form, estimator=estimator, **options))
            for form, e in KINDS
            if e == estimator
        }
        floors = {form: 0.0 for form in FORMS}
        if estimator == "unbiased":
            floors |= {
                "kl": -d * oracle.log_det_bias(d + 3, 1) / 2,
                "full_kl": -oracle.log_det_bias(d + 3, d) / 2,
                "norm": 2 / d,
                "hinge": 2 * d * oracle.hinge_floor(d + 3, 1.0),
            }
        expected = {"diagonal": 16 * d, "bures": 4 * d, "norm": 1, "hinge": 2 * d}
        expected |= {"covariance": 16 * d, "full_bures": 4 * d}
        expected |= dict.fromkeys(("kl", "full_kl"), d * math.log(1e3))  # -1/2 log 1e-6
        for form, value in got.items():
            assert value == pytest.approx(expected[form] - floors[form], abs=1e-9), form


@pytest.mark.parametrize("form", ["kl", "full_kl"])
def test_the_logarithm_goes_on_straight_near_collapse(form):
    """`log r` above r = 1e-6 of the target's variance, its tangent below; value and slope meet."""
    target, unit = 4.0, white(5, 2)

    def value_and_slope(r):
        scale = torch.tensor(math.sqrt(r * target), dtype=torch.float64, requires_grad=True)
        value = biased(unit * scale, form, variance=target)
        (slope,) = torch.autograd.grad(value, scale)
        return value.item(), (slope * scale / 2 / r).item()

    def expected(r):
        log, slope = (math.log(r), 1 / r) if r > 1e-6 else (math.log(1e-6) + r * 1e6 - 1, 1e6)
        return r - 1 - log, 1 - slope

    for r in (1.0, 1e-3, 1.001e-6, 0.999e-6, 5e-7, 1e-9):
        assert value_and_slope(r) == pytest.approx(expected(r), rel=1e-7, abs=1e-9)


# --- floors -----------------------------------------------------------------------------------

KL_TABLE = {4: (0.328, 0.309), 8: (0.1416, 0.1373), 32: (0.0322, 0.0319), 128: (0.0079, 0.00785)}


@pytest.mark.parametrize("n", KL_TABLE)
def test_the_kl_floors_of_the_table(n):
    """Per dimension; the tabled ones are to the last digit given, and about 1/n."""
    digits = (0.00051, 0.00051) if n == 4 else (0.000051, 0.000051)
    for unbiased, tabled, digit in zip((False, True), KL_TABLE[n], digits, strict=True):
        exact = oracle.kl_floor(n, unbiased_variance=unbiased)
        assert exact == pytest.approx(tabled, abs=digit)
        assert exact == pytest.approx(1 / n, rel=1.5 / n)
    d = 3
    subtracted = biased(white(n, d), "kl") - moment_prior(white(n, d), form="kl")
    exact = oracle.kl_floor(n, unbiased_variance=True)
    assert float(subtracted) == pytest.approx(d * exact, rel=1e-10)
    draws = randn(4000, n, d, seed=n)
    assert_near_mean(sampled(draws, "kl", estimator="biased") / d, exact)
    # divided by n instead of n - 1: the batch shrunk towards its mean
    mean = draws.mean(dim=1, keepdim=True)
    shrunk = mean + (draws - mean) * math.sqrt((n - 1) / n)
    exact = oracle.kl_floor(n, unbiased_variance=False)
    assert_near_mean(sampled(shrunk, "kl", estimator="biased") / d, exact)


def floor(form, n, d, threshold=1.0):
    """The mean of `biased` under N(0, I)."""
    match form:
        case "diagonal":
            return d * (1 / n + 2 / (n - 1))
        case "bures":
            return d * (1 / n + 2 - 2 * oracle.c4(n))
        case "kl":
            return d * oracle.kl_floor(n, unbiased_variance=True)
        case "norm":
            return 2 / d
        case "hinge":
            return d * oracle.hinge_floor(n, threshold)
        case "covariance":
            return d / n + d * (d + 1) / (n - 1)
        case "full_kl":
            return (d / n - oracle.log_det_bias(n, d)) / 2


@pytest.mark.parametrize("form", [form for form in FORMS if form != "full_bures"])
@pytest.mark.parametrize(("n", "d"), [(3, 1), (4, 3), (8, 3), (32, 3), (4, 6)])
@pytest.mark.slow
def test_floors_under_the_target(form, n, d):
    """Where biased, in closed form; where unbiased, 0."""
    if form == "full_kl" and n <= d:
        pytest.skip("infinite")
    draws = randn(4000, n, d, seed=n)
    assert_near_mean(sampled(draws, form, estimator="biased"), floor(form, n, d))
    assert_near_mean(sampled(draws, form), 0.0)
    wide = draws * 1.5 - 1
    assert_near_mean(sampled(wide, form, mean=-1.0, variance=2.25), 0.0)
    if form in MULTIVARIATE:
        covariance = drawn_covariance(d)
        spread = draws @ torch.linalg.cholesky(covariance).T
        assert_near_mean(sampled(spread, form, covariance=covariance), 0.0)


@pytest.mark.parametrize("n", [2, 3, 30, 3000])
@pytest.mark.parametrize("threshold", [0.5, 1.0, 1.3])
@pytest.mark.slow
def test_the_floor_of_the_hinge(n, threshold):
    z, d = white(n, 1), 1
    subtracted = biased(z, "hinge", threshold=threshold)
    subtracted = subtracted - moment_prior(z, form="hinge", threshold=threshold)
    own = max(0.0, threshold - 1)  # the form's value at the target itself
    expected = d * (oracle.hinge_floor(n, threshold) - own)
    assert float(subtracted) == pytest.approx(expected, rel=1e-7, abs=1e-11)
    if expected > 1e-3:
        draws = randn(4000, n, 2, seed=n)
        assert_near_mean(sampled(draws, "hinge", threshold=threshold), 2 * own)


def test_the_moments_of_the_moments():
    """LOSS_SPEC: E m^2 = 1/n, E s_b^2 = (n-1)/n, E (s^2-1)^2 = 2/(n-1), E ||S - I||^2."""
    n, d = 6, 3
    draws = randn(6000, n, d)
    mean, variance = draws.mean(dim=1), draws.var(dim=1)
    assert_near_mean(mean.square().mean(dim=1), 1 / n)
    assert_near_mean(variance.mean(dim=1) * (n - 1) / n, (n - 1) / n)
    assert_near_mean((variance - 1).square().mean(dim=1), 2 / (n - 1))
    distance = sampled(draws, "covariance", estimator="biased") - array(mean.square().sum(dim=1))
    assert_near_mean(distance, d * (d + 1) / (n - 1))


@pytest.mark.parametrize("d", [1, 2, 8, 64, 1024])
def test_the_mean_norm_of_a_standard_normal(d):
    """E ||z|| in D dimensions, about sqrt D (1 - 1/4D), is what corrects s of D + 1 samples."""
    exact = math.sqrt(2) * math.exp(special.gammaln((d + 1) / 2) - special.gammaln(d / 2))
    assert exact == pytest.approx(math.sqrt(d) * (1 - 1 / (4 * d)), rel=0.065 / d**2)
    z = white(d + 1, 1)  # s = 1: the difference is 1/n + 2 (1/c4 - 1)
    difference = float(biased(z, "bures") - moment_prior(z, form="bures"))
    c4 = 1 / ((difference - 1 / (d + 1)) / 2 + 1)
    assert c4 * math.sqrt(d) == pytest.approx(exact, rel=1e-10)


# --- unbiased elsewhere -----------------------------------------------------------------------


@pytest.mark.parametrize("form", AT_ANY_GAUSSIAN)
@pytest.mark.parametrize(("n", "d"), [(4, 2), (5, 3), (3, 4)])
@pytest.mark.slow
def test_unbiased_at_any_gaussian(form, n, d):
    """Means, variances and correlations that are not the target's."""
    if form == "full_kl" and n <= d:
        pytest.skip("infinite")
    mean, covariance = randn(d, seed=1) / 2, drawn_covariance(d)
    draws = randn(20_000, n, d, seed=n) @ torch.linalg.cholesky(covariance).T + mean
    target_mean, variance = randn(d, seed=2) / 2, randn(d, seed=3).exp()
    target, options = torch.diag(variance), {"variance": variance}
    expected = oracle.population(form, *map(array, (mean, covariance, target_mean, target)))
    got = sampled(draws, form, mean=target_mean, **options)
    assert_near_mean(got, expected)
    assert abs(
        sampled(draws, form, mean=target_mean, estimator="biased", **options).mean()
    ) > 1.05 * (expected)
    if form in MULTIVARIATE:
        target = drawn_covariance(d, seed=9)
        expected = oracle.population(form, *map(array, (mean, covariance, target_mean, target)))
        assert_near_mean(sampled(draws, form, mean=target_mean, covariance=target), expected)


def test_the_norm_is_unbiased_for_any_latents():
    """It is an average over rows: uniform latents on [-1, 1], two of them."""
    draws = torch.rand(20_000, 2, 2, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    second, fourth, d = 1 / 3, 1 / 5, 2
    expected = (fourth / d + (d - 1) / d * second**2) - 2 * second + 1 - 2 / d
    assert_near_mean(sampled(draws, "norm"), expected)


# --- equivalences -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full", "each"), [("covariance", "diagonal"), ("full_kl", "kl"), ("full_bures", "bures")]
)
def test_full_forms_and_their_diagonal_ones(full, each):
    """Equal in one dimension, and where the batch has no correlations."""
    z, options = randn(6, 1), {"mean": 0.3, "variance": 2.0}
    for form, estimator in KINDS:
        if form == full:
            got = moment_prior(z, form=full, estimator=estimator, **options)
            expected = moment_prior(z, form=each, estimator=estimator, **options)
            torch.testing.assert_close(got, expected)
    z = white(8, 3) * torch.tensor([0.5, 1.0, 3.0]).double() + 1
    options = {"variance": torch.tensor([2.0, 0.7, 1.0]).double()}
    torch.testing.assert_close(biased(z, full, **options), biased(z, each, **options))
    mixed = z @ rotation(3)
    assert abs(biased(mixed, full, **options) - biased(mixed, each, **options)) > 0.1


@pytest.mark.parametrize("form", MULTIVARIATE)
@pytest.mark.parametrize("n", [3, 8])
def test_a_diagonal_covariance_is_a_variance(form, n):
    if form == "full_kl" and n == 3:
        pytest.skip("infinite")
    z, variance = randn(n, 4), torch.tensor([0.5, 1.0, 2.0, 3.0]).double()
    got = biased(z, form, covariance=torch.diag(variance))
    torch.testing.assert_close(got, biased(z, form, variance=variance))


# --- invariances ------------------------------------------------------------------------------


@every_kind
def test_order_of_rows(form, estimator):
    z = randn(7, 3)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    got = moment_prior(z[order], form=form, estimator=estimator)
    torch.testing.assert_close(got, moment_prior(z, form=form, estimator=estimator))


@pytest.mark.parametrize("form", MULTIVARIATE)
@quick
@given(seeds)
def test_an_isotropic_target_cannot_tell_a_rotation(form, seed):
    z = (randn(7, 4, seed=seed % 1000) + 1) * torch.tensor([0.1, 1.0, 2.0, 3.0]).double()
    for estimator in ("biased",) if form == "full_bures" else ("biased", "unbiased"):
        torch.testing.assert_close(
            moment_prior(z @ rotation(4, seed), form=form, estimator=estimator, variance=2.0),
            moment_prior(z, form=form, estimator=estimator, variance=2.0),
            rtol=1e-10,
            atol=1e-10,
        )


@pytest.mark.parametrize("form", UNIVARIATE)
def test_per_dimension_forms_can_tell_a_rotation(form):
    z = randn(50, 2) * torch.tensor([0.1, 2.0]).double()
    turned = z @ rotation(2)
    assert abs(moment_prior(turned, form=form) - moment_prior(z, form=form)) > 0.1


@pytest.mark.parametrize("form", ["norm", "full_kl"])
def test_units_do_not_matter(form):
    """Any invertible map of latents and target together."""
    z, mean, covariance, a = randn(7, 3), randn(3, seed=1), drawn_covariance(3), randn(3, 3, seed=2)
    got = moment_prior(z @ a, form=form, mean=mean @ a, covariance=a.T @ covariance @ a)
    torch.testing.assert_close(got, moment_prior(z, form=form, mean=mean, covariance=covariance))


@pytest.mark.parametrize(("form", "power"), [("bures", 2), ("full_bures", 2), ("hinge", 1)])
def test_units_of_length(form, power):
    z = randn(7, 3)
    got = biased(3 * z, form, mean=3.0, variance=9.0)
    torch.testing.assert_close(got, 3**power * biased(z, form, mean=1.0))


@every_kind
def test_a_given_mean_is_a_shift(form, estimator):
    z, mean = randn(6, 3), randn(3, seed=1)
    prior = partial(moment_prior, form=form, estimator=estimator, variance=2.0)
    torch.testing.assert_close(prior(z, mean=mean), prior(z - mean))
    torch.testing.assert_close(prior(z, mean=2.0), prior(z - 2))


@every_kind
def test_a_sample_of_several_vectors_is_one_long_vector(form, estimator):
    z, mean, variance = randn(8, 3, 2), randn(3, 2, seed=1), randn(3, 2, seed=2).exp()
    prior = partial(moment_prior, form=form, estimator=estimator)
    torch.testing.assert_close(prior(z), prior(z.flatten(1)))
    torch.testing.assert_close(
        prior(z, mean=mean, variance=variance),
        prior(z.flatten(1), mean=mean.flatten(), variance=variance.flatten()),
    )
    if form in MULTIVARIATE:
        target = {"covariance": drawn_covariance(6)}
        torch.testing.assert_close(prior(z, **target), prior(z.flatten(1), **target))


# --- gradients --------------------------------------------------------------------------------


@every_kind
def test_gradcheck(form, estimator):
    prior = partial(moment_prior, form=form, mean=0.3, estimator=estimator)
    variance = torch.tensor([0.5, 1.0, 4.0]).double()
    z = randn(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(partial(prior, variance=variance), z)
    if form in MULTIVARIATE:
        assert torch.autograd.gradcheck(partial(prior, covariance=drawn_covariance(3)), z)
    if form not in ("full_kl", "hinge"):  # more dimensions than rows
        assert torch.autograd.gradcheck(prior, randn(3, 4).requires_grad_())


@pytest.mark.parametrize("form", ["full_kl", "full_bures"])
def test_gradient_where_spreads_are_equal(form):
    """Of a scaled white batch, where singular vectors are any: that of the diagonal form."""
    z = (2 * white(6, 3) + 1).requires_grad_()
    (got,) = torch.autograd.grad(biased(z, form), z)
    (expected,) = torch.autograd.grad(biased(z, form.removeprefix("full_")), z)
    torch.testing.assert_close(got, expected)


EXTREMES = {
    "zero": torch.zeros(6, 3),
    "one point far away": torch.full((6, 3), 1e6),
    "far apart": randn(6, 3).float() * 1e6,
    "1e4": randn(6, 3).float() * 1e4,
    "1e-4": randn(6, 3).float() * 1e-4,
    "1e-20": randn(6, 3).float() * 1e-20,
    "duplicates": randn(2, 3).float().repeat(3, 1),
    "one dimension flat": randn(6, 3).float() * torch.tensor([1.0, 0.0, 1.0]),
    "equal spreads": white(6, 3).float(),
    "equal dimensions": randn(6, 1).float().expand(6, 3),
    "more dimensions than rows": randn(4, 9).float(),
    "as many dimensions as rows": randn(4, 4).float(),
    "many": randn(3, 50).float(),
    "bfloat16": randn(6, 3).bfloat16() * 1e4,
    "float16": randn(6, 3).half(),
    "float16 zero": torch.zeros(6, 3).half(),
}


@every_kind
@pytest.mark.parametrize("z", EXTREMES.values(), ids=EXTREMES)
def test_gradient_is_finite(form, estimator, z):
    if form == "full_kl" and len(z) <= z.shape[1]:
        pytest.skip("infinite")
    z = z.clone().requires_grad_()
    loss = moment_prior(z, form=form, estimator=estimator)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("form", ["bures", "hinge", "full_bures", "diagonal", "covariance"])
def test_no_direction_is_preferred_at_a_point(form):
    z = torch.zeros(6, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(biased(z, form), z)
    assert not gradient.any()


def test_full_bures_has_no_gradient_along_axes_without_spread():
    """Three pairs of duplicates in a plane: the third axis, and the difference within a pair."""
    z = torch.cat([randn(3, 2).float(), torch.zeros(3, 1)], dim=1).repeat(2, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(biased(z, "full_bures"), z)
    assert gradient[:, 2].abs().max() < 1e-5 < gradient[:, :2].abs().max()
    torch.testing.assert_close(gradient[:3], gradient[3:])


@pytest.mark.parametrize("form", [form for form in FORMS if form != "norm"])
@pytest.mark.parametrize("scale", [0.3, 1e-2, 1e-4])
def test_the_gradient_spreads_narrow_latents(form, scale):
    z = (white(6, 3) * scale).requires_grad_()
    (gradient,) = torch.autograd.grad(biased(z, form), z)
    assert (gradient * z).sum() < 0
    assert gradient.norm() < 1e3 * math.sqrt(3)  # of kl, at 1e-3 of the target's spread


@pytest.mark.parametrize("form", [form for form in FORMS if form != "full_bures"])
def test_a_step_down_the_gradient_helps(form):
    z = (randn(32, 4) * 0.3 + 1).requires_grad_()
    loss = moment_prior(z, form=form)
    (gradient,) = torch.autograd.grad(loss, z)
    assert moment_prior(z.detach() - 0.1 * gradient, form=form) < loss


@every_kind
def test_a_batch_that_stands_still_has_no_gradient(form, estimator):
    """A whitened batch: no gradient of the biased distances; unbiased ones still widen it."""
    if form not in DISTANCES:
        pytest.skip("0 elsewhere")
    z = white(6, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(moment_prior(z, form=form, estimator=estimator), z)
    if estimator == "biased":
        assert gradient.abs().max() < 1e-12
    else:
        assert (gradient * z).sum() < 0


# --- precision --------------------------------------------------------------------------------


def test_an_offset_does_not_hide_the_spread():
    """In fp32 at 1e6, where numbers are 1/16 apart: as exact as the batch itself."""
    z = randn(64, 5).float() + 1e6
    options = {"form": "hinge", "threshold": 3.0, "estimator": "biased"}
    got = moment_prior(z, **options)
    assert float(got) == pytest.approx(float(moment_prior(z.double(), **options)), rel=1e-6)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "hinge"])
def test_offset_and_mean_cancel_before_anything_else(form):
    z = randn(64, 5).float() + 1e6
    options = {"form": form, "mean": 1e6, "estimator": "biased"}
    got = moment_prior(z, **options)
    expected = float(moment_prior(z.double(), **options))
    assert float(got) == pytest.approx(expected, rel=1e-4)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(form, estimator, dtype):
    z = (randn(6, 3) * 0.5).to(dtype)
    got = moment_prior(z, form=form, estimator=estimator)
    assert got.dtype == torch.float32
    assert torch.equal(got, moment_prior(z.float(), form=form, estimator=estimator))
    assert moment_prior(z.double(), form=form, estimator=estimator).dtype == torch.float64


@every_kind
def test_autocast_does_not_round(form, estimator):
    z = randn(16, 8).float()
    prior = partial(moment_prior, form=form, estimator=estimator)
    prior = (
        partial(prior, covariance=drawn_covariance(8).float()) if form in MULTIVARIATE else prior
    )
    outside = prior(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prior(z), outside)
    assert float(outside) == pytest.approx(float(prior(z.double())), rel=1e-4, abs=1e-5)


@every_kind
def test_runs_on_meta(form, estimator):
    z = torch.empty(8, 3, 2, device="meta")
    assert moment_prior(z, form=form, estimator=estimator).shape == ()
    if form in MULTIVARIATE:
        covariance = torch.empty(6, 6, device="meta")
        got = moment_prior(z, form=form, estimator=estimator, covariance=covariance)
        assert got.is_meta and got.dtype == torch.float32


@every_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_latents_that_are_not_finite_give_no_finite_value(form, estimator, bad):
    """Where values are not checked; and they raise nothing, so that a step may skip the term."""
    z = randn(6, 3)
    z[1, 2] = bad
    with cv.check_values(False):
        assert not moment_prior(z, form=form, estimator=estimator).isfinite()


def test_covariance_needs_no_square_of_many_dimensions():
    d = 20_000  # [d, d] would be 1.6 GB
    assert float(biased(torch.zeros(4, d), "covariance")) == d


# --- refusals ---------------------------------------------------------------------------------

Z = torch.zeros(4, 2)
EYE = torch.eye(2)
REFUSALS = {
    "form": ({"form": "frobenius"}, r"`form` is 'frobenius'; known are 'bures', 'covariance', "),
    "form misspelt": ({"form": "diagnal"}, r"`form` is 'diagnal'; did you mean 'diagonal'\?"),
    "covariance for a form without": (
        {"form": "kl", "covariance": EYE},
        "`covariance` is for the forms 'norm', 'covariance', 'full_kl', 'full_bures', "
        "got form 'kl'; give `variance` instead",
    ),
    "covariance and a number": (
        {"form": "norm", "covariance": EYE, "variance": 2.0},
        "give `variance` or `covariance`, not both",
    ),
    "covariance and a tensor": (
        {"form": "norm", "covariance": EYE, "variance": torch.tensor(1.0)},
        "give `variance` or `covariance`, not both",
    ),
    "shape": (
        {"form": "norm", "covariance": torch.eye(3)},
        r"`covariance` must have shape \[2, 2\], got \[3, 3\]",
    ),
    "skew": (
        {"form": "norm", "covariance": torch.tensor([[1.0, 0.1], [0.0, 1.0]])},
        "`covariance` must be symmetric positive definite; estimate it from more latents than",
    ),
    "indefinite": (
        {"form": "norm", "covariance": torch.tensor([[1.0, 2.0], [2.0, 1.0]])},
        "`covariance` must be symmetric positive definite; .* or add to its diagonal",
    ),
    "singular": (
        {"form": "norm", "covariance": torch.ones(2, 2)},
        "`covariance` must be symmetric positive definite",
    ),
    "not finite": (
        {"form": "norm", "covariance": torch.tensor([[1.0, math.nan], [math.nan, 1.0]])},
        "`covariance` must be symmetric positive definite",
    ),
    "threshold of another form": (
        {"form": "bures", "threshold": 0.5},
        "`threshold` is of the form 'hinge' only, got form 'bures'",
    ),
    "threshold": ({"form": "hinge", "threshold": 0.0}, "`threshold` must be above 0, got 0"),
    "threshold not finite": (
        {"form": "hinge", "threshold": math.inf},
        "`threshold` must be a finite number of at least 0, got inf",
    ),
    "full_bures": (
        {"form": "full_bures"},
        "form 'full_bures' has no unbiased estimator; say estimator='biased'",
    ),
}


@pytest.mark.unhooked
@pytest.mark.parametrize(("options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        moment_prior(Z, **options)


def test_a_covariance_may_be_skew_by_rounding():
    covariance = torch.tensor([[100.0, 1.0], [1.0005, 1.0]])
    assert moment_prior(Z, form="norm", covariance=covariance).isfinite()
    assert moment_prior(Z, form="norm", covariance=EYE, variance=1).isfinite()
    assert moment_prior(Z, form="kl", threshold=1).isfinite()


def test_values_of_a_covariance_are_read_only_where_values_are_checked():
    with cv.check_values(False):
        moment_prior(Z, form="norm", covariance=torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


@pytest.mark.parametrize(
    ("form", "estimator", "needed"),
    [("covariance", "unbiased", 3), ("full_kl", "unbiased", 5), ("full_kl", "biased", 5)],
)
def test_some_forms_need_more_samples(form, estimator, needed):
    z = randn(needed, 4)
    assert moment_prior(z, form=form, estimator=estimator).isfinite()
    expected = (
        f"^`z` needs at least {needed} samples of 4 dimensions for form '{form}', "
        f"got {needed - 1}; raise the batch size, pool the rows of all ranks or take another form"
    )
    with pytest.raises(ValueError, match=expected):
        moment_prior(z[1:], form=form, estimator=estimator)


@every_kind
def test_two_samples_are_enough_for_the_others_and_one_never(form, estimator):
    if (form, estimator) != ("covariance", "unbiased"):
        assert moment_prior(randn(2, 1), form=form, estimator=estimator).isfinite()
    with pytest.raises(ValueError, match=r"`z` needs at least 2 samples .* got shape \[1, 1\]"):
        moment_prior(randn(1, 1), form=form, estimator=estimator)


def test_a_covariance_keeps_its_own_precision():
    """Positive definite in float64, though not in the fp32 of the latents."""
    covariance = torch.tensor([[1.0, 1 - 1e-9], [1 - 1e-9, 1.0]]).double()
    covariance[0, 1] = covariance[1, 0] = 1 - 1e-9
    assert moment_prior(Z, form="norm", covariance=covariance).isfinite()
    half = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    got = moment_prior(Z + 1, form="norm", covariance=half.bfloat16())
    assert torch.equal(got, moment_prior(Z + 1, form="norm", covariance=half))


def test_numpy_agrees_that_samples_are_divided_by_one_less():
    z = randn(9, 3)
    expected = ((np.cov(array(z).T) - np.eye(3)) ** 2).sum() + (array(z).mean(0) ** 2).sum()
    assert float(biased(z, "covariance")) == pytest.approx(expected)
