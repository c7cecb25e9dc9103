"""Float64 oracles of MMD and SIGReg: loops, grids and quadrature; nothing here imports cyclevae."""

import math

import numpy as np
from scipy.special import expn, hyp1f1

from oracles import array


def kernel(x, y, name, scale, total):
    """One pair of points. Gaussian: `b = scale total`; IMQ: `C = 2 scale total`."""
    d2 = math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True))
    if name == "gaussian":
        return math.exp(-d2 / (2 * scale * total))
    return 2 * scale * total / (2 * scale * total + d2)


def mixed(x, y, name, scales, total):
    return math.fsum(kernel(x, y, name, s, total) for s in scales) / len(scales)


def grid(variance, points):
    """Points `[g^D, D]` and probabilities of a Gaussian: the trapezoidal rule in every dimension.

    It converges geometrically for analytic functions; the step is in standard deviations.
    """
    axis = np.linspace(-8, 8, points)
    density = np.exp(-(axis**2) / 2)
    density /= density.sum()
    axes = np.meshgrid(*[axis * math.sqrt(v) for v in variance], indexing="ij")
    weights = np.ones(())
    for _ in variance:
        weights = np.multiply.outer(weights, density)
    return np.stack([a.ravel() for a in axes], axis=1), weights.ravel()


def kernel_matrix(x, y, name, scales, total):
    d2 = ((x[:, None] - y[None]) ** 2).sum(-1)
    if name == "gaussian":
        return sum(np.exp(-d2 / (2 * s * total)) for s in scales) / len(scales)
    return sum(2 * s * total / (2 * s * total + d2) for s in scales) / len(scales)


def expectations(x, name, scales, mean, variance, points):
    """`E k(x_i, z)` and `E k(z, z')` on a grid; `z - z'` has twice the variance."""
    total = sum(variance)
    z, p = grid(variance, points)
    cross = kernel_matrix(x - mean, z, name, scales, total) @ p
    difference, p = grid([2 * v for v in variance], points)
    zero = np.zeros((1, len(variance)))
    return cross, float((kernel_matrix(zero, difference, name, scales, total) @ p)[0])


def null_variance(name, scales, variance, points):
    """`E h^2` of the centred kernel `h`, by its definition."""
    z, p = grid(variance, points)
    gram = kernel_matrix(z, z, name, scales, sum(variance))
    means = gram @ p
    return p @ (gram - means[:, None] - means[None] + p @ means) ** 2 @ p


def imq_self(constant, tau2, d):
    """`b e^b E_(D/2)(b)`, `b = C/(4 tau^2)`; even D."""
    b = constant / (4 * tau2)
    return b * math.exp(b) * expn(d // 2, b)


def two_sample(x, y, name, scales, estimator):
    """Loops over pairs; bandwidths relative to the total variance of `y`."""
    x, y = (array(a).reshape(len(a), -1) for a in (x, y))
    total = sum(np.var(y[:, k], ddof=1) for k in range(y.shape[1]))
    n, m = len(x), len(y)

    def k(a, b):
        return mixed(a, b, name, scales, total)

    if estimator == "linear":
        h = []
        for i in range(0, min(n, m) - 1, 2):
            a, b, c, d = x[i], x[i + 1], y[i], y[i + 1]
            h.append(k(a, b) + k(c, d) - k(a, d) - k(b, c))
        return sum(h) / len(h)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    xy = sum(k(a, b) for a in x for b in y) / (n * m)
    if estimator == "biased":
        return (xx + n) / n**2 + (yy + m) / m**2 - 2 * xy
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy


def one_sample(x, name, scales, mean, variance, estimator, points):
    """Loops over pairs of the batch, a grid for the Gaussian."""
    n, total = len(x), sum(variance)
    cross, own = expectations(x, name, scales, mean, variance, points)

    def k(i, j):
        return mixed(x[i], x[j], name, scales, total)

    if estimator == "linear":
        blocks = range(0, n - 1, 2)
        h = [k(i, i + 1) - cross[i] - cross[i + 1] + own for i in blocks]
        return sum(h) / len(h)
    pairs = sum(k(i, j) for i in range(n) for j in range(n) if i != j)
    within = (pairs + n) / n**2 if estimator == "biased" else pairs / (n * (n - 1))
    return within - 2 * cross.mean() + own


# --- SIGReg -----------------------------------------------------------------------------------


def epps_pulley(u, knots, bound, estimator="biased"):
    """The trapezoidal rule on [-bound, bound], knot by knot, for one projection `u`."""
    n, step, result = len(u), bound / (knots - 1), 0.0
    for j in range(-knots + 1, knots):
        t = j * step
        f = sum(complex(math.cos(t * a), math.sin(t * a)) for a in u) / n
        phi = math.exp(-t * t / 2)
        gap = abs(f - phi) ** 2
        if estimator == "unbiased":  # the pairs of a row with itself left out of |f|^2
            pairs = sum(math.cos(t * (a - b)) for a in u for b in u) - n
            gap += pairs / (n * (n - 1)) - abs(f) ** 2
        end = 0.5 if abs(j) == knots - 1 else 1.0
        result += end * step * gap * phi
    return n * result


def epps_pulley_pairs(u):
    """The untruncated integral: a sum over pairs."""
    pairs = sum(math.exp(-((a - b) ** 2) / 2) for a in u for b in u) / len(u) ** 2
    cross = sum(math.exp(-a * a / 4) for a in u) / len(u)
    return len(u) * math.sqrt(2 * math.pi) * (pairs - math.sqrt(2) * cross + 1 / math.sqrt(3))


def sliced_epps_pulley(x, average=None):
    """The mean of `epps_pulley_pairs` over all directions, by 1F1 (or an approximation to it)."""
    n, d = x.shape
    if average is None:

        def average(s):
            return hyp1f1(0.5, d / 2, -s)

    pairs = sum(average(((a - b) ** 2).sum() / 2) for a in x for b in x) / n**2
    cross = sum(average((a**2).sum() / 4) for a in x) / n
    return n * math.sqrt(2 * math.pi) * (pairs - math.sqrt(2) * cross + 1 / math.sqrt(3))


def cramer_wold(d):
    """Cramer-Wold AE's approximation of `s -> 1F1(1/2; D/2; -s)`."""
    return lambda s: (1 + 4 * s / (2 * d - 3)) ** -0.5
