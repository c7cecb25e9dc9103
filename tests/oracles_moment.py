"""Moment priors in float64, written from their formulas; nothing here imports cyclevae."""

import math
from functools import cache

import numpy as np
from scipy import integrate, linalg, special, stats

import oracles

MULTIVARIATE = ("norm", "covariance", "full_kl", "full_bures")  # forms of a full covariance


def moments(z):
    """Rows, mean, and covariance divided by n - 1, entry by entry."""
    x = oracles.array(z).reshape(len(z), -1)
    n, d = x.shape
    mean = np.array([math.fsum(x[:, j]) / n for j in range(d)])
    covariance = np.empty((d, d))
    for j in range(d):
        for k in range(d):
            products = [(x[i, j] - mean[j]) * (x[i, k] - mean[k]) for i in range(n)]
            covariance[j, k] = math.fsum(products) / (n - 1)
    return x, mean, covariance


def moment_prior(z, form, mean, covariance, estimator="unbiased", threshold=1.0):
    """The target's `mean` is `[D]`, its `covariance` `[D, D]`."""
    x, m, s = moments(z)
    n, d = x.shape
    delta, v, variances = m - mean, np.diag(covariance), np.diag(s)
    unbiased = estimator == "unbiased"
    squared_mean = delta @ delta - (np.trace(s) / n if unbiased else 0)
    match form:
        case "diagonal":
            return oracles.moment_prior(z, mean, v, estimator)
        case "bures":
            total = squared_mean
            for s2, v2 in zip(variances, v, strict=True):
                std = math.sqrt(s2) / (c4(n) if unbiased else 1)
                total += s2 - 2 * std * math.sqrt(v2) + v2
            return total
        case "kl":
            total = 0.0
            for j in range(d):
                square = delta[j] ** 2 - (variances[j] / n if unbiased else 0)
                log = math.log(variances[j] / v[j]) - (log_det_bias(n, 1) if unbiased else 0)
                total += ((variances[j] + square) / v[j] - 1 - log) / 2
            return total
        case "norm":
            total = 0.0
            for row in x - mean:
                total += (row @ np.linalg.solve(covariance, row) / d - 1) ** 2 / n
            return total - (2 / d if unbiased else 0)
        case "hinge":
            total = sum(
                max(0.0, threshold * math.sqrt(b) - math.sqrt(a))
                for a, b in zip(variances, v, strict=True)
            )
            bias = hinge_floor(n, threshold) - max(0.0, threshold - 1)
            return total - (bias * np.sqrt(v).sum() if unbiased else 0)
        case "covariance":
            trace_of_square = np.trace(s @ s)
            if unbiased:
                k = n - 1
                system = [[1 + 1 / k, 1 / k], [2 / k, 1]]
                trace_of_square = np.linalg.solve(system, [np.trace(s @ s), np.trace(s) ** 2])[0]
            cross = np.trace(s @ covariance)
            return squared_mean + trace_of_square - 2 * cross + np.trace(covariance @ covariance)
        case "full_kl":
            inverse = np.linalg.inv(covariance)
            square = delta @ inverse @ delta - (np.trace(inverse @ s) / n if unbiased else 0)
            logs = np.linalg.slogdet(covariance)[1] - np.linalg.slogdet(s)[1]
            logs += log_det_bias(n, d) if unbiased else 0
            return (np.trace(inverse @ s) + square - d + logs) / 2
        case "full_bures":
            assert not unbiased
            root = linalg.sqrtm(covariance)
            ranked = np.linalg.eigvalsh(root @ s @ root)[::-1]
            cross = sum(math.sqrt(value) for value in ranked[: n - 1])  # the others are 0
            return squared_mean + np.trace(s) + np.trace(covariance) - 2 * cross


def population(form, mean, covariance, target_mean, target):
    """The form's value at true moments, in matrices."""
    delta, v, w = mean - target_mean, np.diag(covariance), np.diag(target)
    square = delta @ delta
    match form:
        case "diagonal":
            return square + ((v - w) ** 2).sum()
        case "bures":
            return square + ((np.sqrt(v) - np.sqrt(w)) ** 2).sum()
        case "kl":
            return ((v + delta**2) / w - 1 - np.log(v / w)).sum() / 2
        case "covariance":
            return square + ((covariance - target) ** 2).sum()
        case "full_kl":
            trace = np.trace(np.linalg.solve(target, covariance))
            logs = np.log(np.linalg.det(target) / np.linalg.det(covariance))
            return (trace + delta @ np.linalg.solve(target, delta) - len(delta) + logs) / 2
        case "full_bures":
            cross = linalg.sqrtm(covariance @ target)  # similar to the symmetric root
            return square + v.sum() + w.sum() - 2 * np.trace(cross).real


@cache
def c4(n):
    """`E s` of n standard normals, from the density of chi."""
    mean = integrate.quad(lambda s: s * stats.chi.pdf(s, n - 1), 0, np.inf)[0]
    return mean / math.sqrt(n - 1)


@cache
def hinge_floor(n, threshold):
    """`E max(0, threshold - s)` of n standard normals, by quadrature."""
    k = n - 1
    cut = threshold * math.sqrt(k)
    area = integrate.quad(lambda s: (cut - s) * stats.chi.pdf(s, k), 0, cut, epsabs=1e-13)[0]
    return area / math.sqrt(k)


def log_det_bias(n, d):
    """`E log det S` of n standard normals in d dimensions; below 0."""
    k = n - 1
    logs = (special.digamma((k - i) / 2) for i in range(d))
    return math.fsum(logs) + d * math.log(2 / k)


def kl_floor(n, *, unbiased_variance):
    """Per dimension, LOSS_SPEC section 3."""
    if unbiased_variance:
        return (1 / n + math.log((n - 1) / 2) - special.digamma((n - 1) / 2)) / 2
    return (math.log(n / 2) - special.digamma((n - 1) / 2)) / 2
