"""Text bridges in float64 loops written from the formulas; nothing here imports cyclevae."""

import itertools
import math

import numpy as np


def probabilities(logits, forbidden=(), temperature=1.0):
    """`softmax(logits / temperature)` of one position, forbidden ids left out."""
    values = {
        i: float(x) / temperature for i, x in enumerate(logits.tolist()) if i not in set(forbidden)
    }
    top = max(values.values())
    total = math.fsum(math.exp(x - top) for x in values.values())
    return np.array([math.exp(values[i] - top) / total if i in values else 0.0
                     for i in range(len(logits))])  # fmt: skip


def softmax_pullback(soft, cotangent, temperature=1.0):
    """The gradient `dL/dlogits` of one position, given `dL/dsoft`."""
    mean = math.fsum(p * c for p, c in zip(soft, cotangent, strict=True))
    return np.array([p * (c - mean) / temperature for p, c in zip(soft, cotangent, strict=True)])


def texts(words, length):
    """Every text of some length."""
    return list(itertools.product(words, repeat=length))


def cut(text, end_id):
    """A text up to and with its first end."""
    return text[: text.index(end_id) + 1] if end_id in text else text


def gumbel_gradient(logits, values, temperatures):
    """Of the Gumbel straight-through gradient of `<values, y>` over three words.

    By the trapezoidal rule over the two differences of the noise, whose density is
    `2 exp(-x - y) / (1 + exp(-x) + exp(-y))^3`.

    Returns:
        Per temperature the bias of the mean relative to the true gradient, and the variance.
    """
    logits, values, step = np.asarray(logits, float), np.asarray(values, float), 0.08
    grid = np.arange(-16, 24, step)
    x, y = np.meshgrid(grid, grid, indexing="ij")
    top = np.maximum(0, np.maximum(-x, -y))
    density = 2 * np.exp(-x - y - 3 * top) / sum(np.exp(g - top) for g in (0 * x, -x, -y)) ** 3
    weight = density * step**2
    soft = np.exp(logits - logits.max())
    soft /= soft.sum()
    true = softmax_pullback(soft, values)
    biases, variances = [], []
    for temperature in temperatures:
        noisy = (np.stack([0 * x, x, y]) + logits[:, None, None]) / temperature
        s = np.exp(noisy - noisy.max(0))
        s /= s.sum(0)
        gradient = s * (values[:, None, None] - (s * values[:, None, None]).sum(0)) / temperature
        mean = (gradient * weight).sum((1, 2))
        biases.append(np.linalg.norm(mean - true) / np.linalg.norm(true))
        variances.append(((gradient - mean[:, None, None]) ** 2 * weight).sum())
    return biases, variances
