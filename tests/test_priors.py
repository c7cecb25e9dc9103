import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import cyclevae as cv
import oracles
from cyclevae.kernels import gaussian_gram, gaussian_mean, gaussian_self
from oracles import array, assert_near_mean
from strategies import latents, quick, seeds

ESTIMATORS = ("unbiased", "biased")
PRIORS = (cv.moment_prior, cv.mmd_prior)
every_prior = pytest.mark.parametrize("prior", PRIORS)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
TRIANGLE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]).double()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def batches(count, n, d, seed=0):
    return randn(count, n, d, seed=seed)


def rotation(d, seed=0):
    return torch.linalg.qr(randn(d, d, seed=seed)).Q


# --- against the oracles ----------------------------------------------------------------------


def drawn_moments(seed, shape, kind):
    """A target's mean and variance: numbers, 0-d tensors or one value per dimension."""
    mean, variance = randn(*shape, seed=seed + 1), randn(*shape, seed=seed + 2).exp()
    if kind == "per dimension":
        return mean, variance
    scalars = mean.flatten()[0], variance.flatten()[0]
    return scalars if kind == "0-d" else tuple(float(x) for x in scalars)


targets = st.sampled_from(["number", "0-d", "per dimension"])


def flat(moment, shape):
    """A moment spread over the dimensions, for the oracle."""
    moment = torch.as_tensor(moment, dtype=torch.float64)
    return array(moment.expand(shape).reshape(-1))


@quick
@given(latents(scale=1.5), seeds, targets, st.sampled_from(ESTIMATORS))
def test_moment_prior(z, seed, kind, estimator):
    assume(len(z) >= 2)
    shape = z.shape[1:]
    mean, variance = drawn_moments(seed % 1000, shape, kind)
    got = cv.moment_prior(z, mean=mean, variance=variance, estimator=estimator)
    expected = oracles.moment_prior(z, flat(mean, shape), flat(variance, shape), estimator)
    assert float(got) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@quick
@given(latents(scale=1.5), seeds, targets, st.sampled_from(ESTIMATORS))
def test_mmd_prior(z, seed, kind, estimator):
    assume(len(z) >= 2)
    shape, scales = z.shape[1:], (0.3, 1.0)
    mean, variance = drawn_moments(seed % 1000, shape, kind)
    total = float(flat(variance, shape).sum())
    got = cv.mmd_prior(z, scales=scales, mean=mean, variance=variance, estimator=estimator)
    expected = oracles.mmd_prior(
        z, [s * total for s in scales], flat(mean, shape), flat(variance, shape), estimator
    )
    assert float(got) == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize(
    ("tau2", "sigma2", "biased", "unbiased"),
    [
        (1.0, 1.0, 0.134206801158, -0.107576427557),
        (2.25, 2.0, 0.170916850399, -0.003173702812),
    ],
)
def test_mmd_table(tau2, sigma2, biased, unbiased):
    options = {"scales": (sigma2 / (2 * tau2),), "variance": tau2}
    for estimator, expected in (("biased", biased), ("unbiased", unbiased)):
        got = cv.mmd_prior(TRIANGLE, estimator=estimator, **options)
        assert float(got) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(
    ("tau2", "sigma2", "cross", "own"),
    [
        (1.0, 1.0, [0.5, 0.389400391536, 0.183939720586], 1 / 3),
        (2.25, 2.0, [0.470588235294, 0.418357536660, 0.293945754353], 0.307692307692),
    ],
)
def test_kernel_means_table(tau2, sigma2, cross, own):
    bandwidth2, variance = (
        torch.tensor(sigma2, dtype=torch.float64),
        torch.full((2,), tau2).double(),
    )
    got = gaussian_mean(TRIANGLE, bandwidth2, variance)
    np.testing.assert_allclose(got, cross, atol=1e-11)
    assert float(gaussian_self(bandwidth2, variance)) == pytest.approx(own, abs=1e-11)


def test_kernel_means_by_quadrature_and_by_sampling():
    """Two further routes: the trapezoidal rule, and a million draws."""
    x, bandwidth2 = randn(4, 3), 1.7
    variance = torch.tensor([0.2, 1.0, 3.0]).double()
    means = array(gaussian_mean(x, torch.tensor(bandwidth2, dtype=torch.float64), variance))
    own = float(gaussian_self(torch.tensor(bandwidth2, dtype=torch.float64), variance))
    for row, got in zip(array(x), means, strict=True):
        expected = oracles.kernel_mean(row, bandwidth2, np.zeros(3), array(variance))
        assert got == pytest.approx(expected, rel=1e-12)
    assert own == pytest.approx(oracles.kernel_self(bandwidth2, array(variance)), rel=1e-12)
    rng = np.random.default_rng(0)
    z, other = rng.normal(size=(2, 1_000_000, 3)) * np.sqrt(array(variance))
    for sampled, expected in (
        (np.exp(-((array(x)[0] - z) ** 2).sum(1) / (2 * bandwidth2)), means[0]),
        (np.exp(-((other - z) ** 2).sum(1) / (2 * bandwidth2)), own),
    ):
        assert_near_mean(sampled, expected)


def test_gram():
    x = randn(5, 3)
    gram = array(gaussian_gram(x, torch.tensor(1.3, dtype=torch.float64)))
    for i in range(5):
        for j in range(5):
            expected = oracles.kernel(array(x)[i], array(x)[j], 1.3)
            assert gram[i, j] == pytest.approx(expected, rel=1e-12)


# --- known values -----------------------------------------------------------------------------


def test_moment_prior_of_known_moments():
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert cv.moment_prior(z, estimator="biased") == (2 - 1) ** 2 + (0 - 1) ** 2
    assert cv.moment_prior(z + 3, mean=1.0, estimator="biased") == 2 * 2**2 + 2


@pytest.mark.parametrize("n", [2, 4, 8, 32])
def test_floors_of_the_moment_prior(n):
    """Under the target: 1/n and 2/(n-1) per dimension where biased, 0 where not."""
    d, variance = 5, 1.0
    draws = batches(3000, n, d, seed=n)
    biased = [float(cv.moment_prior(z, variance=variance, estimator="biased")) for z in draws]
    assert_near_mean(biased, d * (1 / n + 2 / (n - 1)))
    assert_near_mean([float(cv.moment_prior(z, variance=variance)) for z in draws], 0.0)


def test_moment_prior_is_unbiased_at_any_gaussian():
    """Not only under the target: its mean is the distance of the true moments."""
    mean, variance = torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.0]).double()
    draws = batches(4000, 5, 2) * variance.sqrt() + mean
    expected = float(mean.square().sum() + (variance - 1).square().sum())
    assert_near_mean([float(cv.moment_prior(z)) for z in draws], expected)


@pytest.mark.parametrize(("n", "d", "scale"), [(2, 3, 1.0), (8, 3, 0.2), (16, 10, 2.0)])
def test_mmd_under_the_target(n, d, scale):
    """E[U] = 0, E[V] = (1 - C)/n with C = E k(z, z')."""
    draws = batches(1500, n, d, seed=n)
    unbiased = [float(cv.mmd_prior(z, scales=(scale,))) for z in draws]
    assert_near_mean(unbiased, 0.0)
    biased = [float(cv.mmd_prior(z, scales=(scale,), estimator="biased")) for z in draws]
    c = oracles.kernel_self(scale * d, np.ones(d))
    assert_near_mean(biased, (1 - c) / n)
    assert min(biased) >= 0
    pairs = n * (n - 1)
    sigma2 = scale * d
    null = (sigma2 / (sigma2 + 4)) ** (d / 2) + c**2
    null -= 2 * (sigma2**2 / ((sigma2 + 1) * (sigma2 + 3))) ** (d / 2)
    assert np.var(unbiased) == pytest.approx(2 / pairs * null, rel=0.35)


@pytest.mark.parametrize("v", [0.25, 1.0, 4.0])
def test_mmd_population_formula(v):
    """`N(mu, v I)` against `N(0, I)`, from the formula and unbiased at any batch size."""
    d, n, sigma2 = 3, 6, 2.0
    mu = torch.tensor([0.7, -0.2, 0.4]).double()
    square = float(mu.square().sum())
    expected = (sigma2 / (sigma2 + 2 * v)) ** (d / 2) + (sigma2 / (sigma2 + 2)) ** (d / 2)
    expected -= (
        2 * (sigma2 / (sigma2 + v + 1)) ** (d / 2) * math.exp(-square / 2 / (sigma2 + v + 1))
    )
    draws = batches(2500, n, d) * math.sqrt(v) + mu
    assert_near_mean([float(cv.mmd_prior(z, scales=(sigma2 / d,))) for z in draws], expected)


def test_mmd_is_the_limit_of_the_two_sample_statistic():
    x, bandwidth2, m = randn(4, 2), 1.5, 3000
    prior = randn(m, 2, seed=9)
    gram = gaussian_gram(torch.cat([x, prior]), torch.tensor(bandwidth2, dtype=torch.float64))
    xx, zz, xz = gram[:4, :4], gram[4:, 4:], gram[:4, 4:]
    two_sample = (xx.sum() - 4) / 12 + (zz.sum() - m) / (m * (m - 1)) - 2 * xz.mean()
    closed = cv.mmd_prior(x, scales=(bandwidth2 / 2,))
    assert float(two_sample) == pytest.approx(float(closed), abs=4 * 0.6 / math.sqrt(m))


def test_collapse():
    """All rows at the mean, as wide as high: .1558, some 150 null standard deviations."""
    z = torch.zeros(64, 64)
    for estimator in ESTIMATORS:
        got = float(cv.mmd_prior(z, scales=(1.0,), estimator=estimator))
        assert got == pytest.approx(0.1558, abs=5e-5)
    c = 64 * 1.0  # (0 - 1)^2 in every dimension
    assert float(cv.moment_prior(z)) == pytest.approx(c)


@quick
@given(latents(scale=1.0), st.floats(0.1, 3.0))
def test_difference_of_the_two_estimators(z, scale):
    assume(len(z) >= 2)
    n = len(z)
    u, v = (float(cv.mmd_prior(z, scales=(scale,), estimator=e)) for e in ESTIMATORS)
    gram = gaussian_gram(z.flatten(1), torch.tensor(scale * z[0].numel(), dtype=torch.float64))
    off_diagonal = float(gram.sum() - gram.diagonal().sum()) / (n * (n - 1))
    assert v - u == pytest.approx((1 - off_diagonal) / n, abs=1e-12)


def test_scales_are_averaged():
    z = randn(5, 3)
    each = [cv.mmd_prior(z, scales=(s,)) for s in (0.5, 1.0, 2.0)]
    torch.testing.assert_close(cv.mmd_prior(z), torch.stack(each).mean())


# --- invariances ------------------------------------------------------------------------------


@every_prior
@every_estimator
def test_order_of_rows(prior, estimator):
    z = randn(7, 3)
    shuffled = z[torch.randperm(7, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(
        prior(shuffled, estimator=estimator), prior(z, estimator=estimator), rtol=1e-12, atol=1e-12
    )


@every_estimator
@quick
@given(seeds)
def test_rotation(estimator, seed):
    """An isotropic target cannot tell a rotation: MMD is exactly invariant."""
    z = randn(6, 4) * torch.tensor([0.1, 1.0, 2.0, 3.0]).double()
    turned = z @ rotation(4, seed)
    torch.testing.assert_close(
        cv.mmd_prior(turned, estimator=estimator),
        cv.mmd_prior(z, estimator=estimator),
        rtol=1e-11,
        atol=1e-12,
    )


def test_per_dimension_moments_do_not_survive_a_rotation():
    z = randn(50, 2) * torch.tensor([0.1, 2.0]).double()
    assert abs(cv.moment_prior(z @ rotation(2)) - cv.moment_prior(z)) > 0.1


@every_prior
@every_estimator
def test_a_given_mean_is_a_shift(prior, estimator):
    z, mean = randn(6, 3), randn(3, seed=1)
    options = {"variance": torch.tensor([0.5, 1.0, 4.0]).double(), "estimator": estimator}
    torch.testing.assert_close(prior(z, mean=mean, **options), prior(z - mean, **options))
    torch.testing.assert_close(prior(z, mean=2.0, **options), prior(z - 2, **options))


@every_estimator
def test_a_given_variance_is_a_unit_of_length(estimator):
    z = randn(6, 3)
    options = {"estimator": estimator}
    scaled = cv.mmd_prior(z, variance=4.0, **options)
    torch.testing.assert_close(scaled, cv.mmd_prior(z / 2, **options))
    torch.testing.assert_close(scaled, cv.mmd_prior(z, variance=torch.tensor(4.0), **options))
    each = torch.full((3,), 4.0).double()
    torch.testing.assert_close(scaled, cv.mmd_prior(z, variance=each, **options))
    moment = cv.moment_prior(z, variance=4.0, **options)
    torch.testing.assert_close(moment, cv.moment_prior(z, variance=each, **options))


@every_prior
@every_estimator
def test_a_sample_of_several_vectors_is_one_long_vector(prior, estimator):
    z, mean, variance = randn(5, 3, 2), randn(3, 2, seed=1), randn(3, 2, seed=2).exp()
    options = {"estimator": estimator}
    torch.testing.assert_close(prior(z, **options), prior(z.flatten(1), **options))
    torch.testing.assert_close(
        prior(z, mean=mean, variance=variance, **options),
        prior(z.flatten(1), mean=mean.flatten(), variance=variance.flatten(), **options),
    )


# --- gradients and precision ------------------------------------------------------------------


@every_prior
@every_estimator
def test_gradcheck(prior, estimator):
    z = randn(4, 3).requires_grad_()
    variance = torch.tensor([0.5, 1.0, 4.0]).double()
    assert torch.autograd.gradcheck(
        lambda x: prior(x, mean=0.3, variance=variance, estimator=estimator), z
    )


@every_prior
@every_estimator
@pytest.mark.parametrize(
    "z",
    [torch.zeros(4, 3), torch.full((4, 3), 1e6), randn(4, 3).float() * 1e6, torch.ones(2, 1)],
    ids=["zero", "one point far away", "far apart", "two"],
)
def test_gradient_is_finite(prior, estimator, z):
    z = z.clone().requires_grad_()
    loss = prior(z, estimator=estimator)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@every_prior
def test_a_step_down_the_gradient_helps(prior):
    z = (randn(32, 4) * 0.3 + 1).requires_grad_()
    loss = prior(z)
    (gradient,) = torch.autograd.grad(loss, z)
    assert prior(z.detach() - 0.1 * gradient) < loss


@every_prior
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(prior, dtype):
    z = (randn(6, 3) * 0.5).to(dtype)
    got = prior(z)
    assert got.dtype == torch.float32
    assert torch.equal(got, prior(z.float()))


@every_prior
@every_estimator
def test_autocast_does_not_round(prior, estimator):
    z = randn(16, 8).float()
    outside = prior(z, estimator=estimator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prior(z, estimator=estimator), outside)
    expected = prior(z.double(), estimator=estimator)
    assert float(outside) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


@every_prior
def test_runs_on_meta(prior):
    assert prior(torch.empty(4, 3, device="meta")).shape == ()


# --- refusals ---------------------------------------------------------------------------------


@every_prior
@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_samples(prior, rows):
    expected = rf"`z` needs at least 2 samples .* got shape \[{rows}, 3\]; raise the batch size"
    with pytest.raises(ValueError, match=expected):
        prior(torch.zeros(rows, 3))


@every_prior
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, torch.tensor([1.0, 0.0, 1.0])])
def test_variance_must_be_positive(prior, bad):
    with pytest.raises(
        ValueError, match=r"`variance` must be .*above 0|`variance` must be a finite number"
    ):
        prior(torch.zeros(3, 3), variance=bad)


@every_prior
def test_moments_of_another_shape(prior):
    for name in ("mean", "variance"):
        expected = rf"`{name}` must be a number or have the shape of one latent \[3\], got \[2\]"
        with pytest.raises(ValueError, match=expected):
            prior(torch.zeros(3, 3), **{name: torch.ones(2)})


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scales_must_be_positive(scale):
    with pytest.raises(ValueError, match="`scales` must be"):
        cv.mmd_prior(torch.zeros(3, 3), scales=(1.0, scale))


def test_scales_must_not_be_empty():
    with pytest.raises(ValueError, match="`scales` must name at least one scale, got none"):
        cv.mmd_prior(torch.zeros(3, 3), scales=())


@every_prior
def test_latents_must_be_finite(prior):
    z = torch.zeros(3, 3)
    z[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"`z` must be finite.*1 of 3 rows \(first: row 1\)"):
        prior(z)
