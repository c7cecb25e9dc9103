"""Float64 loops for ledgers, health and retrieval; nothing here imports cyclevae."""

import math

import numpy as np


def ledger(gradients):
    """Norms and pairwise cosines of `{term: flat list of numbers}`."""
    names = list(gradients)
    norms = {a: math.sqrt(math.fsum(float(x) ** 2 for x in gradients[a])) for a in names}
    cosines = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            dot = math.fsum(
                float(x) * float(y) for x, y in zip(gradients[a], gradients[b], strict=True)
            )
            if norms[a] and norms[b]:
                cosines[a, b] = dot / (norms[a] * norms[b])
    return norms, cosines


def health(z, mean, variance, active=0.01):
    """Moments, rank and drift of `[n, D]` against per-dimension targets."""
    n, dims = z.shape
    m = [math.fsum(z[:, d]) / n for d in range(dims)]
    s2 = [math.fsum((x - m[d]) ** 2 for x in z[:, d]) / (n - 1) for d in range(dims)]
    shares = np.linalg.eigvalsh(np.atleast_2d(np.cov(z.T)))
    shares = shares / shares.sum()
    entropy = -math.fsum(p * math.log(p) for p in shares if p > 1e-12)
    off = math.fsum(((m[d] - mean[d]) ** 2 - s2[d] / n) / variance[d] for d in range(dims)) / dims
    return {
        "norm": math.fsum(math.sqrt(math.fsum(x * x for x in row)) for row in z) / n,
        "target_norm": math.sqrt(math.fsum(v + u * u for u, v in zip(mean, variance, strict=True))),
        "mean": tuple(m),
        "variance": tuple(s2),
        "scale": math.sqrt(math.fsum(s2[d] / variance[d] for d in range(dims)) / dims),
        "drift": math.sqrt(max(0.0, off)),
        "effective_rank": math.exp(entropy),
        "active": sum(s2[d] > active * variance[d] for d in range(dims)),
    }


def retrieval(z_hat, z, k):
    """Recall at 1, the share never found, and how often each latent is among the k nearest.

    For each text that has it.
    """
    pool = sorted({tuple(row) for row in z})
    counts, hits = [0] * len(pool), 0
    for query, own in zip(z_hat, z, strict=True):
        cosines = [
            float(np.dot(query, row) / (np.linalg.norm(query) * np.linalg.norm(row)))
            for row in pool
        ]
        best = sorted(range(len(pool)), key=lambda j: -cosines[j])
        hits += pool[best[0]] == tuple(own)
        for j in best[:k]:
            counts[j] += 1 / sum(pool[j] == tuple(row) for row in z)
    return {"recall": hits / len(z), "never": counts.count(0) / len(pool)}, counts
