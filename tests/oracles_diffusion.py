"""Float64 loops of the learned prior and of DDVI, from the formulas; nothing imports cyclevae."""

import math

import numpy as np

STEPS = 1000


def cosine_table():
    """`(alpha, sigma)` of Nichol and Dhariwal's schedule, eq. 17, betas in [1e-4, .9999]."""
    f = [math.cos((i / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(STEPS + 1)]
    alpha_bar, product = [], 1.0
    for i in range(STEPS):
        product *= 1 - min(max(1 - f[i + 1] / f[i], 1e-4), 0.9999)
        alpha_bar.append(product)
    alpha_bar = np.array(alpha_bar)
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


ALPHA, SIGMA = cosine_table()
SNR = (ALPHA / SIGMA) ** 2


def implied(prediction, z_t, i, kind):
    """What a prediction means: `(x0, eps)`."""
    a, s = ALPHA[i], SIGMA[i]
    if kind == "x0":
        return prediction, (z_t - a * prediction) / s
    eps = prediction if kind == "epsilon" else s * z_t + a * prediction
    return (z_t - s * eps) / a, eps


def weight(weighting, i, first, last):
    """Of the squared error of the noise at step `i`."""
    match weighting:
        case "vdm":
            return (last - first) / 2 * (SNR[i - 1] - SNR[i]) / SNR[i]
        case "likelihood":
            return (math.log(SNR[first]) - math.log(SNR[last])) / 2
        case "uniform":
            return 1.0


def learned_prior(z, noise, steps, predict, kind, *, form, weighting, std, boundaries, first, last):
    """`(value, gradient of score distillation)`, one row and step at a time.

    `predict(z_t, t)` is the network; the posterior is N(z, std^2), seen at z_t = alpha z + rho n.
    """
    total, gradient = 0.0, []
    for row, n, i in zip(z, noise, steps, strict=True):
        a, s = ALPHA[i], SIGMA[i]
        rho = math.sqrt(a**2 * std**2 + s**2)
        z_t = a * row + rho * n
        time = min((i + 0.5) / 999, 1.0)
        x0, eps = implied(predict(z_t, time), z_t, i, kind)
        eps_q = s * (z_t - a * row) / (a**2 * std**2 + s**2)
        w = weight(weighting, i, first, last)
        if std == 0 and weighting == "vdm":  # in the space of clean latents, as the bound is told
            value = (last - first) / 2 * (SNR[i - 1] - SNR[i]) * ((row - x0) ** 2).sum()
        else:
            value = w * ((eps_q - eps) ** 2).sum()
        if form != "score_difference":
            value += w * row.size * a**2 * std**2 / rho**2
        gradient.append(w * a * (eps - eps_q))
        if boundaries:
            value += boundary(row, std, first, last, form == "score_difference")
        total += value
    return total / len(z), np.array(gradient) / len(z)


def boundary(row, std, first, last, kl):
    a, s = ALPHA[last], SIGMA[last]
    if kl:
        return sum(normal_kl(a * x, a**2 * std**2 + s**2) for x in row.ravel())
    # E over q of the KL of N(alpha z', sigma^2) to N(0, 1)
    value = sum(normal_kl(a * x, s**2) + a**2 * std**2 / 2 for x in row.ravel())
    return value + row.size * math.log(2 * math.pi * math.e * SIGMA[first] ** 2) / 2


def normal_kl(mean, variance, other_mean=0.0, other_variance=1.0):
    """KL(N(mean, variance) || N(other_mean, other_variance))."""
    ratio = variance / other_variance
    return (ratio + (mean - other_mean) ** 2 / other_variance - 1 - math.log(ratio)) / 2


def entropy(variance):
    return math.log(2 * math.pi * math.e * variance) / 2
