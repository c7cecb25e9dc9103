"""Statistics and losses far from 0, at any scale and in any precision, against 80 bits.

Every function gets rounded numbers and is compared with its formula for these very numbers, in
numpy's longdouble, by differences of rows. It must be right to 1e-3 of its value: what is rounded
before is not its fault, what cancels inside is.
"""

import itertools
import math

import numpy as np
import pytest
import torch

import cyclevae as cv
import oracles_moment
from cyclevae.diagnostics.health import latent_health, retrieval
from cyclevae.objective.statistics import mean_norm, moments
from cyclevae.priors.kernels import _FAR

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OFFSETS = (0.0, 1.0, 1e4)
SCALES = (1e-4, 1.0, 1e4)
ROWS, D = 8, 3


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(tensor):
    return tensor.detach().double().numpy().astype(np.longdouble)


def square(x, y):
    """Squared distances of all pairs, by differences."""
    return ((x[:, None] - y[None]) ** 2).sum(-1)


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def log_softmax(scores):
    top = scores.max(-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))


def infonce(x, y, critic):
    x, y = (unit(x), unit(y)) if critic == "cosine" else (x, y)  # 1 - cos is half a square
    scores = -square(x, y) / (2 * 0.1)
    pairs = [np.diagonal(log_softmax(s)) for s in (scores, scores.T)]
    return -np.mean(pairs)


def kernels(distance2, total, kernel):
    constants = [scale * total for scale in (0.5, 1.0, 2.0)]
    if kernel == "gaussian":
        return np.mean([np.exp(-distance2 / (2 * b)) for b in constants], axis=0)
    return np.mean([2 * b / (2 * b + distance2) for b in constants], axis=0)


def expectation(square, variance, added, d, kernel):
    """`E k(x, z)` by `||x||^2`, for a `z` of some variance; what is `added` is of a random `x`.

    The quadrature of `imq` has a test of its own.
    """
    found = 0.0
    for b in (scale * variance * d for scale in (0.5, 1.0, 2.0)):
        for s, w in [(1.0, 1.0)] if kernel == "gaussian" else zip(*_FAR, strict=True):
            wide = b / s + variance + added
            found = found + w * (b / s / wide) ** (d / 2) * np.exp(-square / 2 / wide) / 3
    return found


def mmd(x, mean, variance, kernel, estimator):
    x, n, d = x - mean, len(x), x.shape[1]
    gram = kernels(square(x, x), variance * d, kernel)
    within = gram.mean() if estimator == "biased" else (gram.sum() - n) / (n * (n - 1))
    cross = expectation((x**2).sum(-1), variance, 0.0, d, kernel).mean()
    return within - 2 * cross + expectation(0.0, variance, variance, d, kernel)


def two_sample(x, y, kernel):
    total, (n, m) = y.var(0, ddof=1).sum(), (len(x), len(y))
    parts = [kernels(square(a, a), total, kernel).sum() - len(a) for a in (x, y)]
    cross = kernels(square(x, y), total, kernel).mean()
    return parts[0] / (n * (n - 1)) + parts[1] / (m * (m - 1)) - 2 * cross


def sigreg(x, mean, variance, seed):
    u = randn(x.shape[1], 4, seed=seed).double()
    u = exact(u / torch.linalg.vector_norm(u, dim=0))
    t = np.linspace(0, 3, 17, dtype=np.longdouble)
    angle = (((x - mean) / np.sqrt(variance)) @ u)[..., None] * t
    target, n = np.exp(-(t**2) / 2), len(x)
    real, imaginary = np.cos(angle).mean(0), np.sin(angle).mean(0)
    gap = (real - target) ** 2 + imaginary**2
    gap = (gap - (1 - real**2 - imaginary**2) / (n - 1)) * target
    return 2 * n * (((gap[:, 1:] + gap[:, :-1]) / 2).sum(1) * (t[1] - t[0])).mean()


def moment(x, mean, variance, form, estimator):
    target = np.full(x.shape[1], mean), variance * np.eye(x.shape[1])
    return oracles_moment.moment_prior(torch.from_numpy(x.astype(float)), form, *target, estimator)


FORMS = ("diagonal", "bures", "kl", "norm", "hinge", "covariance", "full_kl", "full_bures")
TO_A_TARGET = {  # name: (ours, the formula), of latents and the target's mean and variance
    **{
        f"moment {form} {estimator}": (
            lambda z, m, v, f=form, e=estimator: cv.moment_prior(
                z, form=f, mean=m, variance=v, estimator=e
            ),
            lambda x, m, v, f=form, e=estimator: moment(x, m, v, f, e),
        )
        for form in FORMS
        for estimator in ("unbiased", "biased")
        if (form, estimator) != ("full_bures", "unbiased")
    },
    **{
        f"mmd {kernel} {estimator}": (
            lambda z, m, v, k=kernel, e=estimator: cv.mmd_prior(
                z, kernel=k, mean=m, variance=v, estimator=e
            ),
            lambda x, m, v, k=kernel, e=estimator: mmd(x, m, v, k, e),
        )
        for kernel in ("gaussian", "imq")
        for estimator in ("unbiased", "biased")
    },
    "sigreg": (
        lambda z, m, v: cv.sigreg_prior(
            z, directions=4, mean=m, variance=v, generator=torch.Generator().manual_seed(5)
        ),
        lambda x, m, v: sigreg(x, m, v, seed=5),
    ),
    "health drift": (
        lambda z, m, v: latent_health(z, mean=m, variance=v).drift,
        lambda x, m, v: np.sqrt(
            max(0, ((x.mean(0) - m) ** 2 - x.var(0, ddof=1) / len(x)).mean() / v)
        ),
    ),
    "health scale": (
        lambda z, m, v: latent_health(z, mean=m, variance=v).scale,
        lambda x, m, v: np.sqrt(x.var(0, ddof=1).mean() / v),
    ),
}


def rloo(rewards, log_probs):
    """Its value means nothing; its gradient, that of the log-probabilities."""
    log_probs = log_probs.float().requires_grad_()
    return torch.autograd.grad(cv.rloo_surrogate(log_probs, rewards).sum(), log_probs)[0]


def nats(x):
    return -log_softmax(x)[:, 0]


IDS, KEPT = torch.zeros(1, ROWS, dtype=torch.long), torch.ones(1, ROWS, dtype=torch.bool)
TEXT = cv.TextProcess(mask_id=1, vocab_size=D + 1, pad_id=0)
OF_PAIRS = {  # of two sets of rows
    "mse": (
        lambda z, y: cv.latent_loss(z, y),
        lambda x, y: ((x - y) ** 2).mean(),
    ),
    "cosine": (
        lambda z, y: cv.latent_loss(z, y, distance="cosine"),
        lambda x, y: ((unit(x) - unit(y)) ** 2).sum(-1).mean() / 2,
    ),
    "normalized_mse": (
        lambda z, y: cv.latent_loss(z, y, distance="normalized_mse"),
        lambda x, y: ((unit(x) - unit(y)) ** 2).mean(),
    ),
    **{
        f"infonce {critic}": (
            lambda z, y, c=critic: cv.infonce_loss(z, y, critic=c),
            lambda x, y, c=critic: infonce(x, y, c),
        )
        for critic in ("cosine", "euclidean")
    },
    **{
        f"mmd to a reference, {kernel}": (
            lambda z, y, k=kernel: cv.mmd_prior(z, reference=y, kernel=k),
            lambda x, y, k=kernel: two_sample(x, y, k),
        )
        for kernel in ("gaussian", "imq")
    },
    "rloo": (
        lambda z, y: rloo(z, y).square().sum(),
        lambda x, y: (((x - x.mean(0)) / (len(x) - 1)) ** 2).sum(),
    ),
    "text_loss": (
        lambda z, y: cv.text_loss(z[None], IDS, KEPT),
        lambda x, y: nats(x).mean(),
    ),
    "variance of a step": (
        lambda z, y: moments(z)["latent_pred_variance"],
        lambda x, y: x.var(0).mean(),
    ),
    "norm of a step": (
        lambda z, y: mean_norm(z),
        lambda x, y: np.sqrt((x**2).sum(-1)).mean(),
    ),
    "recall": (
        lambda z, y: retrieval(z, y).recall,
        lambda x, y: np.mean(square(unit(x), unit(y)).argmin(1) == np.arange(len(x))),
    ),
}


def right(got, expected, error=1e-3):
    return float(got) == pytest.approx(float(expected), rel=error, abs=1e-37)


def latents(dtype, offset, scale, seed=0):
    z = randn(ROWS, D, seed=seed).clamp(-2, 2)
    return (offset + scale * z).to(dtype)


def cases(dtype):
    for offset, scale in itertools.product(OFFSETS, SCALES):
        yield offset, scale, *(latents(dtype, offset, scale, seed=seed) for seed in range(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TO_A_TARGET)
def test_statistics(name, dtype):
    ours, formula = TO_A_TARGET[name]
    for offset, scale, z, _ in cases(dtype):
        collapsed = (z == z[:1]).all(dim=0).any()  # by the rounding of the latents
        if collapsed and ("kl" in name or "scale" in name):
            continue
        target = offset, scale**2
        assert right(ours(z, *target), formula(exact(z), *target)), target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OF_PAIRS)
def test_losses(name, dtype):
    ours, formula = OF_PAIRS[name]
    for offset, scale, z, y in cases(dtype):
        different = len(torch.unique(y, dim=0))  # after their rounding
        if ("mmd" in name and different == 1) or (name == "recall" and different < ROWS):
            continue
        assert right(ours(z, y), formula(exact(z), exact(y))), (offset, scale)


@pytest.mark.parametrize("kernel", ["gaussian", "imq"])
@pytest.mark.parametrize("variance", [1.0, 1e-3])
def test_two_clusters_far_apart(kernel, variance):
    """Whose centre is in the middle of nothing; value and gradient."""
    far = torch.tensor([1e4, -1e4]).repeat(ROWS // 2)[:, None]
    z = (randn(ROWS, D) * math.sqrt(variance) + far).requires_grad_()
    got = cv.mmd_prior(z, variance=variance, kernel=kernel)
    assert right(got.detach(), mmd(exact(z), 0.0, variance, kernel, "unbiased"))
    got.backward()
    x, step = exact(z), 1e-6 * math.sqrt(variance)
    for i, j in ((0, 0), (3, 1), (6, 2)):
        sides = []
        for sign in (1, -1):
            moved = x.copy()
            moved[i, j] += sign * step
            sides.append(mmd(moved, 0.0, variance, kernel, "unbiased"))
        assert right(z.grad[i, j], (sides[0] - sides[1]) / (2 * step))


def test_infonce_has_its_gradient_far_away():
    z, y = (randn(ROWS, D, seed=seed) + 1e4 for seed in (0, 1))
    for critic in ("cosine", "euclidean"):
        x = z.clone().requires_grad_()
        (got,) = torch.autograd.grad(cv.infonce_loss(x, y, critic=critic), x)
        double = z.double().requires_grad_()
        cv.infonce_loss(double, y.double(), critic=critic).backward()
        torch.testing.assert_close(got.double(), double.grad, rtol=1e-3, atol=0)
