"""Float64 loops for latent distances, DDIM and InfoNCE; nothing here imports cyclevae."""

import math

import numpy as np

from oracles import array


def direction(vector):
    """A vector over its norm, or over 1e-8 where that is longer."""
    norm = math.sqrt(math.fsum(float(x) ** 2 for x in vector))
    return [float(x) / max(norm, 1e-8) for x in vector]


def vectors(latents):
    """The vectors of the last axis."""
    return array(latents).reshape(-1, latents.shape[-1])


def cosine_distance(prediction, target):
    """`1 - cos` of each vector."""
    values = [
        1 - math.fsum(a * b for a, b in zip(direction(p), direction(t), strict=True))
        for p, t in zip(vectors(prediction), vectors(target), strict=True)
    ]
    return np.array(values).reshape(prediction.shape[:-1])


def normalized_square(prediction, target):
    """`(p/|p| - t/|t|)^2` of each element."""
    rows = [
        [(a - b) ** 2 for a, b in zip(direction(p), direction(t), strict=True)]
        for p, t in zip(vectors(prediction), vectors(target), strict=True)
    ]
    return np.array(rows).reshape(prediction.shape)


def threshold(z, c, quantile):
    """Imagen's dynamic thresholding, row by row."""
    out = np.empty(z.shape)
    for i, row in enumerate(array(z)):
        s = max(c, np.quantile(np.abs(row), quantile))
        out[i] = np.clip(row, -s, s) * c / s
    return out


def ddim(predict, z_t, scales, prediction, guard=lambda z: z):
    """`z_s = alpha_s x0 + sigma_s eps` along the `(alpha, sigma)` of each pass; the last x0.

    `predict(k, z_t)` is what the model says in pass `k`. Both x0 and eps are read off it.
    """
    states = []
    for k, (alpha, sigma) in enumerate(scales):
        states.append(z_t)
        said = predict(k, z_t)
        if prediction == "epsilon":
            x0 = (z_t - sigma * said) / alpha
        elif prediction == "x0":
            x0 = said
        else:
            x0 = alpha * z_t - sigma * said
        x0 = guard(x0)
        epsilon = (z_t - alpha * x0) / sigma
        if k + 1 < len(scales):
            alpha, sigma = scales[k + 1]
            z_t = alpha * x0 + sigma * epsilon
    return x0, states


def infonce(x, y, temperature, critic="cosine", duplicates=None):
    """A double loop over pairs, both ways; the positive is in the denominator."""
    x, y = array(x).reshape(len(x), -1), array(y).reshape(len(y), -1)
    n = len(x)
    scores = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            if critic == "cosine":
                a, b = direction(x[i]), direction(y[j])
                scores[i, j] = math.fsum(p * q for p, q in zip(a, b, strict=True)) / temperature
            else:
                scores[i, j] = -math.fsum((x[i] - y[j]) ** 2) / (2 * temperature)
    total = 0.0
    for i in range(n):
        for line, pairs in (
            (scores[i], [(i, j) for j in range(n)]),
            (scores[:, i], [(j, i) for j in range(n)]),
        ):
            kept = [
                s
                for s, (a, b) in zip(line, pairs, strict=True)
                if a == b or duplicates is None or not bool(duplicates[a, b])
            ]
            top = max(kept)
            total += top + math.log(math.fsum(math.exp(s - top) for s in kept)) - scores[i, i]
    return total / (2 * n)
