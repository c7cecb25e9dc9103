"""MMD: against loops, grids, sampling, scikit-learn and geomloss; its null law; its refusals."""

import math

import numpy as np
import pytest
import torch
from geomloss import SamplesLoss
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.integrate import quad
from sklearn.gaussian_process.kernels import RationalQuadratic
from sklearn.metrics.pairwise import rbf_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cyclevae as cv
import oracles_mmd as oracles
from cyclevae.priors.kernels import (
    gaussian_kernel,
    imq_kernel,
    own_distances,
    squared_distances,
)
from cyclevae.priors.mmd import mmd_prior
from oracles import array, assert_near_mean
from strategies import latents, quick, seeds

KERNELS = ("gaussian", "imq")
ESTIMATORS = ("unbiased", "biased", "linear")
MAKE = {"gaussian": gaussian_kernel, "imq": imq_kernel}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
TRIANGLE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]).double()
UNEVEN = torch.tensor([0.3, 1.0, 2.5]).double()
WAE_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def rotation(d, seed=0):
    return torch.linalg.qr(randn(d, d, seed=seed)).Q


def spd(d, seed=0):
    """A covariance far from diagonal."""
    turn = rotation(d, seed)
    return turn @ torch.diag(randn(d, seed=seed + 1).exp()) @ turn.T


def f64(number):
    return torch.tensor(number, dtype=torch.float64)


def each(batches, **options):
    """The prior of every batch of a stack, in one go."""
    with cv.check_values(False):
        return array(torch.vmap(lambda z: mmd_prior(z, **options))(batches))


# --- the kernels and their closed forms -------------------------------------------------------


@pytest.mark.parametrize(
    ("tau2", "sigma2", "cross", "own"),
    [
        (1.0, 1.0, [0.5, 0.389400391536, 0.183939720586], 1 / 3),
        (2.25, 2.0, [0.470588235294, 0.418357536660, 0.293945754353], 0.307692307692),
    ],
)
def test_gaussian_table(tau2, sigma2, cross, own):
    kernel, variance = gaussian_kernel((1.0,), f64(sigma2)), f64([tau2, tau2])
    np.testing.assert_allclose(kernel.mean(TRIANGLE, variance), cross, atol=1e-11)
    assert float(kernel.self_mean(variance)) == pytest.approx(own, abs=1e-11)


@pytest.mark.parametrize(
    ("tau2", "sigma2", "biased", "unbiased"),
    [
        (1.0, 1.0, 0.134206801158, -0.107576427557),
        (2.25, 2.0, 0.170916850399, -0.003173702812),
    ],
)
def test_gaussian_statistics_table(tau2, sigma2, biased, unbiased):
    options = {"scales": (sigma2 / (2 * tau2),), "variance": tau2}
    for estimator, expected in (("biased", biased), ("unbiased", unbiased)):
        got = mmd_prior(TRIANGLE, estimator=estimator, **options)
        assert float(got) == pytest.approx(expected, abs=1e-11)


def test_imq_table():
    """D = 2, C = 4: with a total variance of 2, that is the scale 1."""
    kernel, variance = imq_kernel((1.0,), f64(2.0)), f64([1.0, 1.0])
    expected = [0.722657233776, 0.645509844224, 0.477381694202]
    np.testing.assert_allclose(kernel.mean(TRIANGLE, variance), expected, atol=1e-10)
    assert float(kernel.self_mean(variance)) == pytest.approx(0.596347362323, abs=1e-10)
    for estimator, value in (("biased", 0.0869691685), ("unbiased", -0.0525370043)):
        got = mmd_prior(TRIANGLE, kernel="imq", scales=(1.0,), estimator=estimator)
        assert float(got) == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("d", [2, 64])
@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 10.0])
def test_imq_by_the_exponential_integral(d, scale):
    """`E k(z, z') = b e^b E_(D/2)(b)`."""
    tau2 = 1.5
    kernel = imq_kernel((scale,), f64(d * tau2))
    got = float(kernel.self_mean(f64([tau2] * d)))
    assert got == pytest.approx(oracles.imq_self(2 * scale * d * tau2, tau2, d), abs=1e-10)


@pytest.mark.parametrize("d", [1, 64, 1024])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_imq_is_as_exact_far_from_the_target(d, scale):
    """Against 4000 nodes: 1e-9 of the value up to 1e6 C, and 1e-7 up to 1e8 C."""
    u = np.linspace(-60, 4.2, 4000)
    s, constant = np.exp(u), 2 * scale * d
    weights = (u[1] - u[0]) * np.exp(-s) * s
    far = np.array([0.0, 1, 1e2, 1e4, 1e6, 1e8]) * constant
    square = far[:, None] / (constant + 2 * s)
    expected = (weights * np.exp(-d / 2 * np.log1p(2 * s / constant) - s * square)).sum(1)
    x = torch.zeros(len(far), d).double()
    x[:, 0] = torch.from_numpy(far).sqrt()
    got = imq_kernel((scale,), f64(float(d))).mean(x, torch.ones(d).double())
    error = np.abs(array(got) / expected - 1)
    assert error[:5].max() < 1e-9 and error[5] < 1e-7


def test_why_not_gauss_laguerre():
    """32 of its nodes leave 2e-5 at the scale 0.1 and D = 64, and a hundred times that far out."""
    s, w = np.polynomial.laguerre.laggauss(32)
    constant, tau2, d = 12.8, 1.0, 64
    by_nodes = w @ (1 + 4 * s * tau2 / constant) ** (-d / 2)
    assert 1e-5 < abs(by_nodes - oracles.imq_self(constant, tau2, d)) < 3e-5
    x = torch.zeros(1, d).double()
    x[0, 0] = math.sqrt(100 * d)

    def integrand(s):
        return (1 + 2 * s / constant) ** (-d / 2) * np.exp(-s * 100 * d / (constant + 2 * s))

    exact, _ = quad(lambda s: math.exp(-s) * integrand(s), 0, 1, epsabs=1e-14)
    got = float(imq_kernel((0.1,), f64(64.0)).mean(x, torch.ones(d).double()))
    assert got == pytest.approx(exact, abs=1e-10)  # what lies beyond s = 1 is below 1e-200
    assert abs(w @ integrand(s) - exact) > 1e-3


@every_kernel
@pytest.mark.parametrize(
    ("variance", "scales", "points"),
    [([1.7], (1.0,), 401), ([1.7], (0.4, 3.0), 401), ([0.4, 1.5], (0.4, 3.0), 45)],
)
def test_expectations_on_a_grid(kernel, variance, scales, points):
    x = randn(5, len(variance), seed=3) * 1.5
    made = MAKE[kernel](scales, f64(sum(variance)))
    cross, own = oracles.expectations(array(x), kernel, scales, 0.0, variance, points)
    error = 1e-10 if kernel == "gaussian" or points > 100 else 1e-5
    np.testing.assert_allclose(made.mean(x, f64(variance)), cross, atol=error)
    assert float(made.self_mean(f64(variance))) == pytest.approx(own, abs=error)
    null = oracles.null_variance(kernel, scales, variance, points)
    assert float(made.null_variance(f64(variance))) == pytest.approx(null, abs=error)


@every_kernel
def test_expectations_by_sampling(kernel):
    variance, x = array(UNEVEN), array(randn(1, 3))
    made, total = MAKE[kernel]((0.2, 1.0), UNEVEN.sum()), float(UNEVEN.sum())
    rng = np.random.default_rng(0)
    z, other = rng.normal(size=(2, 300_000, 3)) * np.sqrt(variance)
    for difference, expected in (
        (x - z, made.mean(torch.from_numpy(x), UNEVEN)[0]),
        (other - z, made.self_mean(UNEVEN)),
    ):
        zero = np.zeros((1, 3))
        sampled = oracles.kernel_matrix(difference, zero, kernel, (0.2, 1.0), total)
        assert_near_mean(sampled[:, 0], float(expected))


@every_kernel
def test_kernel_values_are_those_of_scikit_learn(kernel):
    x, total, scales = randn(6, 3), 2.3, (0.5, 2.0)
    got = MAKE[kernel](scales, f64(total)).of(squared_distances(x, x))
    if kernel == "gaussian":
        grams = [rbf_kernel(x, gamma=1 / (2 * s * total)) for s in scales]
    else:
        # (1 + d^2 / (2 alpha l^2))^-alpha
        grams = [RationalQuadratic(math.sqrt(s * total), alpha=1.0)(array(x)) for s in scales]
    np.testing.assert_allclose(got, sum(grams) / 2, rtol=1e-12)


@every_kernel
def test_a_kernel_is_the_mixture_it_says(kernel):
    made, distance2 = MAKE[kernel]((0.5, 1.0, 2.0), f64(3.0)), f64([0.0, 0.1, 2.0, 9.0])
    assert float(made.weights.sum()) == pytest.approx(1.0)
    parts = made.weights * (-distance2[:, None] / (2 * made.bandwidths2)).exp()
    torch.testing.assert_close(parts.sum(dim=1), made.of(distance2), rtol=1e-8, atol=1e-8)


# --- the null variance ------------------------------------------------------------------------


def log_null_variance(d, sigma2, tau2):
    """LOSS_SPEC's bracket, one Gaussian kernel and an isotropic target."""
    a = (sigma2 / (sigma2 + 4 * tau2)) ** (d / 2)
    b = (sigma2**2 / ((sigma2 + tau2) * (sigma2 + 3 * tau2))) ** (d / 2)
    return a - 2 * b + (sigma2 / (sigma2 + 2 * tau2)) ** d


@pytest.mark.parametrize(("d", "sigma2", "tau2"), [(1, 0.3, 1.0), (64, 64, 1.0), (1500, 900, 2.0)])
def test_null_variance_formula(d, sigma2, tau2):
    kernel = gaussian_kernel((0.5,), f64(2.0 * sigma2))
    got = float(kernel.null_variance(f64([tau2] * d)))
    assert got == pytest.approx(log_null_variance(d, sigma2, tau2), rel=1e-9)


def test_collapse_in_standard_deviations():
    """All rows at the mean, D = n = 64: .1558 against a null standard deviation of 1.0e-3."""
    z = torch.zeros(64, 64)
    for estimator in ESTIMATORS:
        got = float(mmd_prior(z, scales=(1.0,), estimator=estimator))
        assert got == pytest.approx(0.1558, abs=5e-5)
    deviation = math.sqrt(2 / (64 * 63) * log_null_variance(64, 64, 1))
    assert deviation == pytest.approx(1.0e-3, abs=5e-5)
    got = float(mmd_prior(z, scales=(1.0,), standardize=True))
    assert got == pytest.approx(float(mmd_prior(z, scales=(1.0,))) / deviation, rel=1e-4)
    linear = mmd_prior(z[:63], scales=(1.0,), standardize=True, estimator="linear")
    deviation = math.sqrt(log_null_variance(64, 64, 1) / 31)
    assert float(linear) == pytest.approx(0.1558 / deviation, rel=1e-3)


@every_kernel
@pytest.mark.parametrize("d", [2, 64, 4096, 100_000])
def test_null_variance_in_fp32(kernel, d):
    """Neither overflow of the narrowest components nor cancellation in wide latents."""
    scales, one = (0.01, 0.1, 2.0), torch.ones(1)
    got = float(MAKE[kernel](scales, torch.tensor(float(d))).null_variance(one, copies=d))
    exact = MAKE[kernel](scales, f64(float(d))).null_variance(one.double(), copies=d)
    assert got == pytest.approx(float(exact), rel=1e-3)
    assert 0 < got < 1


@every_kernel
@pytest.mark.parametrize("d", [1, 256, 600])
def test_copies_are_dimensions(kernel, d):
    variance = f64([0.3, 2.0])
    made = MAKE[kernel]((0.5, 2.0), d * variance.sum())
    torch.testing.assert_close(
        made.null_variance(variance, copies=d), made.null_variance(variance.repeat(d))
    )


TARGETS = {
    "standard": {"variance": f64(1.0)},  # a number would be spread anew in every batch under vmap
    "per dimension": {"variance": UNEVEN, "mean": f64([1.0, -2.0, 0.0])},
    "full": {"covariance": spd(3), "mean": 0.5},
}


def on_target(count, n, d=3, *, mean=0.0, variance=1.0, covariance=None, seed=0):
    root = torch.as_tensor(variance).double().sqrt().expand(d).diag()
    if covariance is not None:
        root = torch.linalg.cholesky(covariance)
    return randn(count, n, d, seed=seed) @ root.T + mean


@every_kernel
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("estimator", ["unbiased", "linear"])
@pytest.mark.slow
def test_standardized_under_the_target(kernel, target, estimator):
    """Mean 0, variance 1; two very different bandwidths, so that their cross terms matter."""
    batches = on_target(5000, 9, **target, seed=5)
    options = {**target, "scales": (0.1, 2.0), "kernel": kernel, "estimator": estimator}
    values = each(batches, standardize=True, **options)
    assert_near_mean(values, 0.0)
    assert_near_mean((values - values.mean()) ** 2, 1.0)
    plain = each(batches[:5], **options)
    ratios = values[:5] / plain
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)


@every_kernel
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.slow
def test_biased_under_the_target(kernel, target):
    """E V = (1 - E k(z, z'))/n."""
    n, scales = 7, (0.3, 1.0)
    values = each(
        on_target(5000, n, **target, seed=6),
        kernel=kernel,
        scales=scales,
        estimator="biased",
        **target,
    )
    if "covariance" in target:
        variance = torch.linalg.eigvalsh(target["covariance"])
    else:
        variance = target["variance"].expand(3)
    c = float(MAKE[kernel](scales, variance.sum()).self_mean(variance))
    assert_near_mean(values, (1 - c) / n)
    assert values.min() >= 0


@pytest.mark.parametrize("v", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("estimator", ["unbiased", "linear"])
def test_population_formula(v, estimator):
    """`N(mu, v I)` against `N(0, I)`: unbiased at any batch size."""
    d, n, sigma2 = 3, 6, 2.0
    mu = f64([0.7, -0.2, 0.4])
    square = float(mu.square().sum())
    expected = (sigma2 / (sigma2 + 2 * v)) ** (d / 2) + (sigma2 / (sigma2 + 2)) ** (d / 2)
    expected -= (
        2 * (sigma2 / (sigma2 + v + 1)) ** (d / 2) * math.exp(-square / 2 / (sigma2 + v + 1))
    )
    batches = randn(20_000, n, d) * math.sqrt(v) + mu
    values = each(batches, scales=(sigma2 / d,), estimator=estimator)
    assert_near_mean(values, expected)


# --- one sample against the oracle ------------------------------------------------------------


@quick
@given(
    st.integers(2, 7),
    st.integers(1, 2),
    seeds,
    st.sampled_from(KERNELS),
    st.sampled_from(ESTIMATORS),
    st.sampled_from(["number", "0-d", "per dimension"]),
)
def test_against_the_oracle(n, d, seed, kernel, estimator, kind):
    z = randn(n, d, seed=seed) * 1.5
    mean, variance = randn(d, seed=seed % 1000 + 1), randn(d, seed=seed % 1000 + 2).exp()
    if kind != "per dimension":
        mean, variance = mean[0], variance[0]
    if kind == "number":
        mean, variance = float(mean), float(variance)
    options = {"kernel": kernel, "scales": (0.3, 1.0), "estimator": estimator}
    got = mmd_prior(z, mean=mean, variance=variance, **options)
    flat_mean, flat_variance = (
        array(torch.as_tensor(moment, dtype=torch.float64).expand(d)) for moment in (mean, variance)
    )
    expected = oracles.one_sample(
        array(z),
        mean=flat_mean,
        variance=flat_variance,
        points=241 if d == 1 else 101,
        name=kernel,
        scales=(0.3, 1.0),
        estimator=estimator,
    )
    assert float(got) == pytest.approx(expected, abs=1e-8)


def test_defaults():
    z = randn(7, 3)
    options = {
        "kernel": "gaussian",
        "scales": (0.5, 1.0, 2.0),
        "estimator": "unbiased",
        "mean": 0.0,
        "variance": 1.0,
        "bandwidth": "target",
        "standardize": False,
    }
    assert torch.equal(mmd_prior(z), mmd_prior(z, **options))
    scaled = [mmd_prior(z, scales=(s,)) for s in (0.5, 1.0, 2.0)]
    torch.testing.assert_close(mmd_prior(z), torch.stack(scaled).mean())


@quick
@given(latents(scale=1.0), st.floats(0.1, 3.0), st.sampled_from(KERNELS))
def test_difference_of_biased_and_unbiased(z, scale, kernel):
    assume(len(z) >= 2)
    n = len(z)
    u, v = (
        float(mmd_prior(z, scales=(scale,), kernel=kernel, estimator=e))
        for e in ("unbiased", "biased")
    )
    x, total = array(z.flatten(1)), z[0].numel()
    gram = oracles.kernel_matrix(x, x, kernel, (scale,), total)
    off_diagonal = (gram.sum() - n) / (n * (n - 1))
    assert v - u == pytest.approx((1 - off_diagonal) / n, abs=1e-12)


def test_linear_of_two_rows_is_unbiased_of_two_rows():
    z = randn(2, 3)
    torch.testing.assert_close(mmd_prior(z, estimator="linear"), mmd_prior(z))


def test_linear_averages_blocks_and_drops_an_odd_row():
    z = randn(7, 3)
    blocks = [mmd_prior(z[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(mmd_prior(z, estimator="linear"), torch.stack(blocks).mean())
    moved = torch.cat([z[:6], z[6:] + 5])
    assert torch.equal(mmd_prior(moved, estimator="linear"), mmd_prior(z, estimator="linear"))


# --- hypothesis: batches of known answer ------------------------------------------------------


@quick
@given(st.integers(1, 6), st.integers(2, 20), seeds, st.sampled_from(KERNELS))
def test_whitened_batches_are_near_the_floor(d, extra, seed, kernel):
    x = randn(d + extra, d, seed=seed)
    x = x - x.mean(dim=0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / len(x)).T)
    assert abs(float(mmd_prior(x, kernel=kernel, standardize=True))) < 3


@quick
@given(st.integers(2, 6), st.integers(1, 5), seeds, st.sampled_from(KERNELS))
def test_collapsed_batches(n, d, seed, kernel):
    """`1 - 2 E k(m, z) + E k(z, z')`, whatever the estimator."""
    point = randn(1, d, seed=seed)
    made = MAKE[kernel]((0.7,), f64(float(d)))
    ones = torch.ones(d).double()
    expected = 1 - 2 * float(made.mean(point, ones)) + float(made.self_mean(ones))
    for estimator in ESTIMATORS:
        got = mmd_prior(point.expand(n, d), kernel=kernel, scales=(0.7,), estimator=estimator)
        assert float(got) == pytest.approx(expected, abs=1e-12)


@quick
@given(latents(scale=1.0), st.sampled_from(KERNELS))
def test_duplicated_batches(z, kernel):
    """The empirical distribution is the same; only `unbiased` takes the copies for samples."""
    assume(len(z) >= 2)
    n, twice = len(z), torch.cat([z, z])
    biased = {"kernel": kernel, "estimator": "biased"}
    torch.testing.assert_close(mmd_prior(twice, **biased), mmd_prior(z, **biased))
    gap = mmd_prior(z, **biased) - mmd_prior(z, kernel=kernel)  # (1 - k)/n
    excess = mmd_prior(twice, kernel=kernel) - mmd_prior(z, kernel=kernel)
    torch.testing.assert_close(excess, gap * n / (2 * n - 1))


@quick
@given(st.integers(2, 4), st.integers(4, 40), seeds, st.sampled_from(KERNELS))
def test_fewer_samples_than_dimensions(n, d, seed, kernel):
    """A batch on the target is unremarkable, a shifted or shrunk one is not."""
    z = randn(n, d, seed=seed)
    at, shifted, shrunk = (
        float(mmd_prior(x, kernel=kernel, standardize=True)) for x in (z, z + 2, 0.1 * z)
    )
    assert abs(at) < 8 and shifted > at and shrunk > at


# --- two samples ------------------------------------------------------------------------------


@quick
@given(
    st.integers(2, 6),
    st.integers(2, 7),
    st.integers(1, 3),
    seeds,
    st.sampled_from(KERNELS),
    st.sampled_from(ESTIMATORS),
)
def test_two_samples_against_loops(n, m, d, seed, kernel, estimator):
    x, y = randn(n, d, seed=seed), randn(m, d, seed=seed + 1) * 2 + 1
    options = {"kernel": kernel, "scales": (0.3, 1.0), "estimator": estimator}
    got = mmd_prior(x, reference=y, **options)
    assert float(got) == pytest.approx(
        oracles.two_sample(x, y, kernel, (0.3, 1.0), estimator), abs=1e-11
    )


def test_two_samples_against_geomloss():
    """Its Gaussian loss is half the biased statistic, with a bandwidth of `blur`."""
    x, y = randn(9, 4), randn(14, 4, seed=1) * 1.5 + 0.3
    total = float(y.var(dim=0).sum())
    for scale in (0.3, 1.0):
        blur = math.sqrt(scale * total)
        expected = 2 * SamplesLoss("gaussian", blur=blur)(x.requires_grad_(), y)
        got = mmd_prior(x, reference=y, scales=(scale,), estimator="biased")
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
        gradients = [torch.autograd.grad(value, x)[0] for value in (got, expected)]
        torch.testing.assert_close(*gradients)


def test_two_samples_against_scikit_learn():
    x, y = randn(9, 4), randn(14, 4, seed=1) * 1.5 + 0.3
    gamma = 1 / (2 * 0.7 * float(y.var(dim=0).sum()))
    xx, yy, xy = (rbf_kernel(a, b, gamma=gamma) for a, b in ((x, x), (y, y), (x, y)))
    biased = mmd_prior(x, reference=y, scales=(0.7,), estimator="biased")
    assert float(biased) == pytest.approx(xx.mean() + yy.mean() - 2 * xy.mean(), abs=1e-14)
    unbiased = mmd_prior(x, reference=y, scales=(0.7,))
    within = (xx.sum() - 9) / 72 + (yy.sum() - 14) / 182
    assert float(unbiased) == pytest.approx(within - 2 * xy.mean(), abs=1e-14)


@every_kernel
@every_estimator
@pytest.mark.slow
def test_two_samples_of_one_distribution(kernel, estimator):
    """Mean 0, up to the bandwidth's own dependence on the reference; `biased` above it."""
    x, y = randn(20_000, 5, 2), randn(20_000, 8, 2, seed=1)
    with cv.check_values(False):
        values = array(
            torch.vmap(lambda a, b: mmd_prior(a, reference=b, kernel=kernel, estimator=estimator))(
                x, y
            )
        )
    if estimator == "biased":
        assert values.min() >= 0 and values.mean() > 0.05
    else:
        # exchanging x with rows of the reference changes its variance, hence the bandwidth
        assert abs(values.mean()) < 0.01


@every_kernel
@pytest.mark.slow
def test_closed_form_is_the_limit_of_two_samples(kernel):
    """Their difference falls as `m^-1/2`."""
    x, errors = randn(6, 2) * 1.3 + 0.4, []
    closed = float(mmd_prior(x, kernel=kernel))
    for m, count in ((10, 60), (100, 60), (1000, 15)):
        values = [
            float(mmd_prior(x, reference=randn(m, 2, seed=seed), kernel=kernel))
            for seed in range(count)
        ]
        errors.append(np.sqrt(np.mean(np.square(np.array(values) - closed))))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.02


def test_the_reference_gets_no_gradient():
    z, reference = randn(4, 3).requires_grad_(), randn(6, 3, seed=1).requires_grad_()
    mmd_prior(z, reference=reference).backward()
    assert z.grad.abs().sum() > 0 and reference.grad is None


def test_bandwidths_are_relative_to_the_reference():
    x, y = randn(5, 3), randn(6, 3, seed=1)
    for kernel in KERNELS:
        torch.testing.assert_close(
            mmd_prior(10 * x, reference=10 * y, kernel=kernel),
            mmd_prior(x, reference=y, kernel=kernel),
        )


def test_two_linear_samples_use_the_shorter_side():
    x, y = randn(5, 3), randn(8, 3, seed=1)
    options = {"estimator": "linear", "scales": (1.0,)}
    expected = oracles.two_sample(x, y, "gaussian", (1.0,), "linear")
    assert float(mmd_prior(x, reference=y, **options)) == pytest.approx(expected, rel=1e-12)
    y = torch.cat([y[:4], y[4:].flip(0)])  # same total variance; only four rows are compared
    assert float(mmd_prior(x, reference=y, **options)) == pytest.approx(expected, rel=1e-12)
    expected = oracles.two_sample(y, x, "gaussian", (1.0,), "linear")
    assert float(mmd_prior(y, reference=x, **options)) == pytest.approx(expected, rel=1e-12)


def test_a_reference_of_another_dtype():
    x, y = randn(5, 3).float(), randn(6, 3, seed=1)
    got = mmd_prior(x, reference=y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, mmd_prior(x, reference=y.float()))
    assert mmd_prior(x.double(), reference=y.to(torch.bfloat16)).dtype == torch.float64


# --- a full covariance ------------------------------------------------------------------------


@every_kernel
@every_estimator
def test_a_diagonal_covariance_is_a_variance(kernel, estimator):
    z, options = randn(6, 3), {"kernel": kernel, "estimator": estimator, "mean": 0.3}
    torch.testing.assert_close(
        mmd_prior(z, covariance=torch.diag(UNEVEN), **options),
        mmd_prior(z, variance=UNEVEN, **options),
    )


@every_kernel
@every_estimator
def test_covariance_and_latents_turn_together(kernel, estimator):
    z, turn = randn(6, 3), rotation(3, seed=4)
    options = {"kernel": kernel, "estimator": estimator}
    torch.testing.assert_close(
        mmd_prior(z @ turn, covariance=turn.T @ torch.diag(UNEVEN) @ turn, **options),
        mmd_prior(z, variance=UNEVEN, **options),
    )


def test_full_covariance_by_the_matrix_formula():
    """`|I + S/s|^(-1/2) exp(-1/2 x'(s I + S)^-1 x)` and `|I + 2 S/s|^(-1/2)`, by numpy."""
    covariance, z, mean = spd(3, seed=2), randn(5, 3), randn(3, seed=9)
    sigma, x = array(covariance), array(z - mean)
    s = 0.7 * np.trace(sigma)
    shape = s * np.eye(3) + sigma
    cross = np.linalg.det(np.eye(3) + sigma / s) ** -0.5
    cross *= np.exp(-0.5 * np.einsum("ij,jk,ik->i", x, np.linalg.inv(shape), x)).mean()
    own = np.linalg.det(np.eye(3) + 2 * sigma / s) ** -0.5
    expected = rbf_kernel(x, gamma=1 / (2 * s)).mean() - 2 * cross + own
    got = mmd_prior(z, covariance=covariance, mean=mean, scales=(0.7,), estimator="biased")
    assert float(got) == pytest.approx(expected, rel=1e-11)
    # an fp32 target serves fp64 latents, and the other way round
    rounded = mmd_prior(z, covariance=covariance.float(), mean=mean, scales=(0.7,))
    assert rounded.dtype == torch.float64
    assert mmd_prior(z.float(), covariance=covariance).dtype == torch.float32


def test_the_covariance_is_a_constant():
    z, covariance = randn(4, 3).requires_grad_(), torch.eye(3).double().requires_grad_()
    mmd_prior(z, covariance=covariance).backward()
    assert z.grad.isfinite().all() and covariance.grad is None


# --- bandwidths -------------------------------------------------------------------------------


@every_kernel
def test_median_bandwidth(kernel):
    z = randn(5, 3) * 1.7  # ten pairs: torch takes the lower of the two medians
    distances = sorted(((a - b) ** 2).sum() for i, a in enumerate(array(z)) for b in array(z)[:i])
    total = distances[4] / 2
    got = mmd_prior(z, bandwidth="median", scales=(0.3, 2.0), kernel=kernel)
    factor = total / 3  # of the target's
    expected = mmd_prior(z, scales=(0.3 * factor, 2.0 * factor), kernel=kernel)
    torch.testing.assert_close(got, expected)


def test_median_bandwidth_of_linear_pairs_and_of_two_samples():
    z, y = randn(6, 3), randn(5, 3, seed=1) * 2
    pairs = [float((z[i] - z[i + 1]).square().sum()) for i in (0, 2, 4)]
    got = mmd_prior(z, bandwidth="median", scales=(1.0,), estimator="linear")
    expected = mmd_prior(z, scales=(sorted(pairs)[1] / 6,), estimator="linear")
    torch.testing.assert_close(got, expected)
    pooled = array(torch.cat([z, y]))
    distances = [((a - b) ** 2).sum() for i, a in enumerate(pooled) for b in pooled[:i]]
    factor = np.median(distances) / 2 / float(y.var(dim=0).sum())  # 55 pairs
    got = mmd_prior(z, reference=y, bandwidth="median", scales=(0.5,))
    torch.testing.assert_close(got, mmd_prior(z, reference=y, scales=(0.5 * factor,)))


@every_kernel
@pytest.mark.parametrize("tau2", [0.25, 9.0])
def test_median_agrees_with_the_target_on_the_target(kernel, tau2):
    """`||x - y||^2` of wide Gaussians is near 2 D tau^2."""
    z = randn(40, 600) * math.sqrt(tau2)
    torch.testing.assert_close(
        mmd_prior(z, variance=tau2, bandwidth="median", kernel=kernel),
        mmd_prior(z, variance=tau2, kernel=kernel),
        rtol=0.02,
        atol=1e-5,
    )


def test_the_bandwidth_carries_no_gradient():
    z = (randn(5, 3) * 1.7).requires_grad_()
    (moving,) = torch.autograd.grad(mmd_prior(z, bandwidth="median", scales=(1.0,)), z)
    distances = squared_distances(z, z).detach()[*torch.triu_indices(5, 5, 1)]
    fixed_scale = float(distances.median()) / 6
    (fixed,) = torch.autograd.grad(mmd_prior(z, scales=(fixed_scale,)), z)
    torch.testing.assert_close(moving, fixed)


@every_estimator
@every_kernel
def test_a_median_next_to_zero_keeps_the_target(estimator, kernel):
    options = {"estimator": estimator, "kernel": kernel}
    for z in (torch.zeros(6, 3), torch.full((6, 3), 2.0), 1e-4 * randn(6, 3)):
        got = mmd_prior(z, bandwidth="median", **options)
        assert torch.equal(got, mmd_prior(z, **options))
    # half the median is 1e-6 of the target's total variance at a distance of sqrt(6e-6)
    for squared, kept in ((5.9e-6, True), (6.1e-6, False)):
        z = torch.zeros(2, 3).double()
        z[1, 0] = math.sqrt(squared)
        same = torch.equal(mmd_prior(z, bandwidth="median", **options), mmd_prior(z, **options))
        assert same == kept


def test_median_of_a_batch_full_of_duplicates():
    """More equal pairs than others: the median is 0 though the batch varies."""
    z = torch.cat([torch.zeros(8, 2), torch.ones(2, 2)]).requires_grad_()
    loss = mmd_prior(z, bandwidth="median")
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


# --- invariances ------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_order_of_rows(kernel, estimator):
    z, y = randn(7, 3), randn(5, 3, seed=1)
    shuffled = z[torch.randperm(7, generator=torch.Generator().manual_seed(0))]
    for reference in (None, y):
        values = [
            mmd_prior(x, kernel=kernel, estimator=estimator, reference=reference)
            for x in (shuffled, z)
        ]
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)


def test_linear_depends_on_the_order_of_rows():
    z = randn(6, 3)
    assert mmd_prior(z, estimator="linear") != mmd_prior(z[[0, 2, 1, 3, 4, 5]], estimator="linear")


@every_kernel
@every_estimator
@quick
@given(seeds)
def test_rotation(kernel, estimator, seed):
    """An isotropic target cannot tell a rotation: aggregate priors leave it free."""
    z = randn(6, 4) * f64([0.1, 1.0, 2.0, 3.0])
    options = {"kernel": kernel, "estimator": estimator}
    turned, plain = mmd_prior(z @ rotation(4, seed), **options), mmd_prior(z, **options)
    torch.testing.assert_close(turned, plain, rtol=1e-11, atol=1e-12)


def test_a_rotation_shows_against_an_uneven_target():
    variance = f64([0.05, 1.0, 5.0])
    z = randn(100, 3) * variance.sqrt()
    options = {"variance": variance, "standardize": True}
    assert abs(float(mmd_prior(z, **options))) < 3
    assert mmd_prior(z @ rotation(3), **options) > 8


@every_kernel
@every_estimator
def test_mean_is_a_shift_and_variance_a_unit_of_length(kernel, estimator):
    z, mean, options = randn(6, 3), randn(3, seed=1), {"kernel": kernel, "estimator": estimator}
    torch.testing.assert_close(mmd_prior(z, mean=mean, **options), mmd_prior(z - mean, **options))
    torch.testing.assert_close(mmd_prior(z, mean=2.0, **options), mmd_prior(z - 2, **options))
    scaled = mmd_prior(z / 2, **options)
    for variance in (4.0, f64(4.0), f64([4.0, 4.0, 4.0])):
        torch.testing.assert_close(mmd_prior(z, variance=variance, **options), scaled)


@every_kernel
@every_estimator
def test_a_sample_of_several_vectors_is_one_long_vector(kernel, estimator):
    z, mean, variance = randn(5, 3, 2), randn(3, 2, seed=1), randn(3, 2, seed=2).exp()
    options = {"kernel": kernel, "estimator": estimator}
    flat = z.flatten(1)
    for shaped, flattened in (
        ({}, {}),
        (
            {"mean": mean, "variance": variance},
            {"mean": mean.flatten(), "variance": variance.flatten()},
        ),
        ({"covariance": spd(6)},) * 2,
        ({"reference": 2 * z}, {"reference": 2 * flat}),
    ):
        torch.testing.assert_close(
            mmd_prior(z, **shaped, **options), mmd_prior(flat, **flattened, **options)
        )


# --- gradients and precision ------------------------------------------------------------------

OPTIONS = {
    "default": {},
    "biased": {"estimator": "biased"},
    "linear": {"estimator": "linear"},
    "imq": {"kernel": "imq"},
    "uneven": {"mean": 0.3, "variance": f64([0.5, 1.0, 4.0])},
    "full": {"covariance": spd(3), "kernel": "imq"},
    "two samples": {"reference": randn(5, 3, seed=8)},
    "two biased samples": {"reference": randn(5, 3, seed=8), "estimator": "biased"},
    "two linear samples": {"reference": randn(5, 3, seed=8), "estimator": "linear"},
    "standardized": {"standardize": True},
    "standardized linear": {"standardize": True, "estimator": "linear", "kernel": "imq"},
}
MEDIANS = {
    "median": {"bandwidth": "median"},
    "median imq": {"bandwidth": "median", "kernel": "imq", "standardize": True},
    "median of two": {"bandwidth": "median", "reference": randn(5, 3, seed=8)},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
all_options = {**OPTIONS, **MEDIANS}
every_option_and_median = pytest.mark.parametrize("options", all_options.values(), ids=all_options)


@every_option
def test_gradcheck(options):
    z = randn(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mmd_prior(x, **options), z)


@every_option_and_median
@pytest.mark.parametrize(
    "z",
    [
        torch.zeros(4, 3),
        torch.full((4, 3), 1e6),
        randn(2, 3).float().repeat(2, 1),
        randn(4, 3).float() * 1e-4,
        randn(4, 3).float() * 1e4,
        randn(4, 3).float() * 1e6,
        randn(4, 3).float() * 1e-20,
    ],
    ids=["zero", "one point far away", "duplicates", "1e-4", "1e4", "1e6", "1e-20"],
)
def test_gradient_is_finite(options, z):
    z = z.clone().requires_grad_()
    loss = mmd_prior(z, **options)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_gradient_at_a_collapse_points_at_the_target():
    """Equal rows off the mean: they are drawn to it together."""
    z = torch.full((5, 3), 0.5).requires_grad_()
    mmd_prior(z).backward()
    assert (z.grad > 0).all()
    torch.testing.assert_close(z.grad, z.grad[:1].expand(5, 3))


@every_option
def test_a_step_down_the_gradient_helps(options):
    z = (randn(16, 3) * 0.3 + 1).requires_grad_()
    loss = mmd_prior(z, **options)
    (gradient,) = torch.autograd.grad(loss, z)
    step = 0.1 * gradient / gradient.norm()
    assert mmd_prior(z.detach() - step, **options) < loss


def test_biased_rewards_contraction_and_unbiased_does_not():
    """On average under the target, a common shrinkage lowers V at first order, and leaves U."""
    batches = randn(20_000, 4, 8)
    slopes = {
        estimator: each(batches * 1.01, estimator=estimator)
        - each(batches / 1.01, estimator=estimator)
        for estimator in ("unbiased", "biased")
    }
    assert slopes["biased"].mean() > 10 * slopes["biased"].std() / math.sqrt(20_000)
    assert_near_mean(slopes["unbiased"], 0.0)


@every_option_and_median
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(options, dtype):
    z = (randn(6, 3) * 0.5).to(dtype)
    got = mmd_prior(z, **options)
    assert got.dtype == torch.float32
    assert torch.equal(got, mmd_prior(z.float(), **options))


@every_option_and_median
def test_autocast_does_not_round(options):
    z = randn(16, 3).float()
    outside = mmd_prior(z, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mmd_prior(z, **options), outside)
    expected = mmd_prior(z.double(), **options)
    assert float(outside) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


@every_option_and_median
def test_runs_on_meta(options):
    options = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    assert mmd_prior(torch.empty(4, 3, device="meta"), **options).shape == ()


def test_distances_do_not_cancel_far_from_the_origin():
    z = randn(8, 16)
    far = squared_distances((z + 1000).float(), (z + 1000).float()).double()
    exact = squared_distances((z + 1000).float().double(), (z + 1000).float().double())
    np.testing.assert_allclose(far, exact, atol=1e-4)
    twice = randn(50, 33).float()  # not clamped, some of these would be near -3e-5
    assert (squared_distances(twice, twice) >= 0).all()


def test_own_distances_are_the_distances_with_one_product_less():
    x, g = randn(6, 3).requires_grad_(), randn(6, 6)

    def gradient(distances):
        return torch.autograd.grad((distances(x) * g).sum(), x, create_graph=True)[0]

    found, expected = gradient(own_distances), gradient(lambda x: squared_distances(x, x))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
    )
    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f))):
        rows = x.detach() if transform is torch.func.grad else x.detach()[None]
        once = transform(lambda x: (own_distances(x) * g).sum())(rows)
        torch.testing.assert_close(once.view_as(x), expected)
    products = []
    for distances in (own_distances, lambda x: squared_distances(x, x)):
        with FlopCounterMode(display=False) as count:
            distances(x).sum().backward()
        products.append(count.get_total_flops() / (2 * 6 * 6 * 3))
    assert products == [2, 3]


class Rounded(TorchFunctionMode):
    """Products of matrices with 10-bit mantissas, as TF32 has them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("matmul", "__matmul__"):
            args = [self.round(a) for a in args]
        return function(*args, **(kwargs or {}))

    @staticmethod
    def round(x):
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


@pytest.mark.parametrize("variance", [1.0, torch.linspace(0.5, 1.5, 1024)])
def test_rounded_matrix_products_do_no_harm(variance):
    z = randn(64, 1024).float()
    exact = mmd_prior(z, variance=variance, standardize=True)
    plain = z @ z.T
    with Rounded():
        assert not torch.equal(z @ z.T, plain)
        rounded = mmd_prior(z, variance=variance, standardize=True)
    assert float(rounded) == pytest.approx(float(exact), abs=0.02)


# --- cost -------------------------------------------------------------------------------------


class Work(TorchDispatchMode):
    """Products of matrices, and the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default:
            self.products.append((*args[0].shape, args[1].shape[1]))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def work(z, **options):
    with Work() as done:
        mmd_prior(z, **options)
    return done


def test_distances_are_computed_once_for_all_scales():
    n, d, scales = 10, 4, WAE_SCALES
    assert work(randn(n, d), scales=scales).products == [(n, d, n), (n, d, len(scales))]
    assert work(randn(n, d), reference=randn(6, d), scales=scales).products == [
        (n, d, n),
        (n, d, 6),
        (6, d, 6),
    ]


def test_the_null_variance_of_wide_latents_is_computed_in_parts():
    z, variance = randn(4, 5000), torch.linspace(0.5, 2.0, 5000).double()
    done = work(z, variance=variance, standardize=True)
    assert done.largest <= max(z.numel(), 3 * 3 * 256)


def test_linear_has_no_matrix_of_pairs():
    n, d = 200, 4
    y = randn(n, d, seed=1)
    for options in ({}, {"reference": y}, {"bandwidth": "median"}):
        assert work(randn(n, d), **options).largest >= n * (n - 1)
        cost = work(randn(n, d), estimator="linear", **options).largest
        assert cost <= 2 * n * d


# --- refusals ---------------------------------------------------------------------------------

unhooked = pytest.mark.unhooked
Z = torch.zeros(3, 3)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_samples(rows):
    expected = rf"`z` needs at least 2 samples .* got shape \[{rows}, 3\]; raise the batch size"
    with pytest.raises(ValueError, match=expected):
        mmd_prior(torch.zeros(rows, 3))
    expected = rf"`reference` needs at least 2 samples, got shape \[{rows}, 3\]"
    with pytest.raises(ValueError, match=expected):
        mmd_prior(Z, reference=torch.zeros(rows, 3))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scales_must_be_positive(scale):
    with pytest.raises(ValueError, match="`scales` must be"):
        mmd_prior(Z, scales=(1.0, scale))


def test_scales_must_not_be_empty():
    with pytest.raises(ValueError, match="`scales` must name at least one scale, got none"):
        mmd_prior(Z, scales=())


@unhooked
@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("kernel", "gausian", "did you mean 'gaussian'?"),
        ("kernel", "rbf", "known are 'gaussian', 'imq'"),
        ("estimator", "linaer", "did you mean 'linear'?"),
        ("bandwidth", "mean", "known are 'median', 'target'|did you mean 'median'?"),
    ],
)
def test_unknown_options(name, value, hint):
    with pytest.raises(ValueError, match=rf"`{name}` is '{value}'; ({hint})".replace("?", r"\?")):
        mmd_prior(Z, **{name: value})


@pytest.mark.parametrize(
    "target",
    [{"mean": 0.0}, {"variance": 2.0}, {"variance": torch.ones(3)}, {"covariance": torch.eye(3)}],
)
def test_a_reference_is_the_only_target(target):
    expected = "`reference` is the target itself; give no `mean`, `variance` or `covariance` with"
    with pytest.raises(ValueError, match=expected):
        mmd_prior(Z, reference=torch.eye(3), **target)


@pytest.mark.parametrize("variance", [2.0, torch.ones(3), torch.tensor(1.0)])
def test_variance_or_covariance(variance):
    with pytest.raises(ValueError, match="give `variance` or `covariance`, not both"):
        mmd_prior(Z, covariance=torch.eye(3), variance=variance)


@pytest.mark.parametrize("options", [{"estimator": "biased"}, {"reference": torch.eye(3)}])
def test_standardize_needs_a_closed_form(options):
    expected = "`standardize` has no closed form for `reference` or the 'biased' estimator; leave"
    with pytest.raises(ValueError, match=expected):
        mmd_prior(Z, standardize=True, **options)


@pytest.mark.parametrize(
    "covariance",
    [
        torch.diag(torch.tensor([1.0, 1.0, 0.0])),
        torch.diag(torch.tensor([1.0, 1.0, -1.0])),
        torch.tensor([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 1]]),
        torch.eye(3) + torch.tensor([[0, 3e-5, 0], [0, 0, 0], [0, 0, 0]]),
        torch.full((3, 3), math.nan),
    ],
    ids=["singular", "indefinite", "skew", "slightly skew", "nan"],
)
def test_covariance_must_be_positive_definite(covariance):
    expected = "`covariance` must be symmetric positive definite; estimate it from more latents"
    with pytest.raises(ValueError, match=expected):
        mmd_prior(Z, covariance=covariance)


def test_a_covariance_may_be_skew_by_rounding():
    covariance = torch.eye(3) + torch.tensor([[0, 3e-6, 0], [0, 0, 0], [0, 0, 0]])
    assert mmd_prior(Z, covariance=covariance).isfinite()


@unhooked
@pytest.mark.parametrize("shape", [(2, 2), (6, 6), (3, 2), (2, 3), (3,), (3, 3, 3)])
def test_covariance_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"`covariance` must have shape \[3, 3\], got"):
        mmd_prior(Z, covariance=torch.ones(shape))


@unhooked
@pytest.mark.parametrize("shape", [(4, 2), (4, 1, 3), (4,)])
def test_a_reference_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"`reference` must be latents of shape \[b, 3\], got"):
        mmd_prior(Z, reference=torch.ones(shape))


@unhooked
def test_a_reference_of_integers():
    with pytest.raises(TypeError, match="`reference` must be floating point"):
        mmd_prior(Z, reference=torch.ones(4, 3).long())


def test_a_reference_must_vary_and_be_finite():
    with pytest.raises(ValueError, match="`reference` must vary; all of its rows are equal"):
        mmd_prior(Z, reference=torch.ones(4, 3))
    reference = torch.eye(3)
    reference[1, 1] = math.nan
    with pytest.raises(ValueError, match="`reference` must be finite"):
        mmd_prior(Z, reference=reference)
