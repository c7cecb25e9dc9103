"""Float64 loops written from the formulas, and two helpers; nothing here imports cyclevae."""

import math

import numpy as np


def array(tensor):
    """A tensor as float64 numpy."""
    return tensor.detach().double().numpy()


# --- reductions and base losses ---------------------------------------------------------------


def token_nll(logits, tokens, mask):
    """`-log softmax(logits)[y]` per kept token, 0 at padding."""
    logits, out = array(logits), np.zeros(tokens.shape)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            if bool(mask[i, j]):
                top = max(logits[i, j])
                total = math.fsum(math.exp(x - top) for x in logits[i, j])
                out[i, j] = top + math.log(total) - logits[i, j, int(tokens[i, j])]
    return out


def text_loss(logits, tokens, mask, reduction="mean", count=None):
    nll = token_nll(logits, tokens, mask)
    match reduction:
        case "none":
            return nll
        case "sum":
            return nll.sum()
        case "mean":
            return nll.sum() / (count or max(int(mask.sum()), 1))
        case "nats":
            return nll.sum() / (count or max(len(nll), 1))


def latent_loss(prediction, target, reduction="mean", variance=1.0, count=None):
    rows = []
    for p, t in zip(array(prediction), array(target), strict=True):
        rows.append((p - t) ** 2)
    square = np.array(rows)
    match reduction:
        case "none":
            return square
        case "sum":
            return square.sum()
        case "mean":
            return square.sum() / (count or square.size)
        case "nats":
            nats = sum((row / (2 * np.asarray(variance, dtype=float))).sum() for row in square)
            return nats / (count or len(square))


def masked_bound(logits, tokens, masked, rate, kept):
    """`1/N sum_i 1/r_i sum_masked -log p`: one draw of the masked-diffusion bound per token."""
    nll = token_nll(logits, tokens, masked)
    return sum(row.sum() / float(r) for row, r in zip(nll, rate, strict=True)) / int(kept.sum())


# --- the latent process -----------------------------------------------------------------------


def host_alpha_bar(schedule, steps=1000):
    """The host's table, in plain fp32 numpy as the host has it."""
    f = np.float32
    if schedule == "cosine":  # Nichol and Dhariwal, eq. 17
        x = np.linspace(0, steps, steps + 1, dtype=f)
        alpha_bar = np.cos((x / f(steps) + f(0.008)) / f(1.008) * f(math.pi) * f(0.5)) ** 2
        alpha_bar = alpha_bar / alpha_bar[0]
        betas = np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], f(1e-4), f(0.9999))
    elif schedule == "linear":
        betas = np.linspace(1e-4, 0.02, steps, dtype=f)
    else:
        x = np.linspace(-6, 6, steps, dtype=f)
        betas = 1 / (1 + np.exp(-x)) * f(0.02 - 1e-4) + f(1e-4)
    return np.cumprod(1 - betas, dtype=f)


def host_index(time):
    """`floor(999 t)` in fp32."""
    return np.floor(np.float32(999) * np.asarray(time, dtype=np.float32)).astype(int)


def convert(value, z_t, alpha, sigma, source, target):
    """Solve for x0 and epsilon row by row, then read off the target."""
    value, z_t, out = array(value), array(z_t), np.zeros(value.shape)
    for i, (a, s) in enumerate(zip(array(alpha), array(sigma), strict=True)):
        reads = {"x0": (1.0, 0.0), "epsilon": (0.0, 1.0), "v": (-s, a)}
        system = np.array([(a, s), reads[source]])
        known = np.stack([z_t[i].ravel(), value[i].ravel()])
        out[i] = (np.array(reads[target]) @ np.linalg.solve(system, known)).reshape(out[i].shape)
    return out


# --- priors -----------------------------------------------------------------------------------


def moment_prior(z, mean=0.0, variance=1.0, estimator="unbiased"):
    x = array(z).reshape(len(z), -1)
    n, d = x.shape
    mean, variance = (np.broadcast_to(np.ravel(m), d) for m in (mean, variance))
    total = 0.0
    for k in range(d):
        m = math.fsum(x[:, k]) / n
        s2 = math.fsum((x[i, k] - m) ** 2 for i in range(n)) / (n - 1)
        if estimator == "biased":
            total += (m - mean[k]) ** 2 + (s2 - variance[k]) ** 2
        else:
            total += (m - mean[k]) ** 2 - s2 / n
            total += (n - 1) / (n + 1) * s2**2 - 2 * s2 * variance[k] + variance[k] ** 2
    return total


def kernel(x, y, bandwidth2):
    return math.exp(-sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (2 * bandwidth2))


def kernel_mean(x, bandwidth2, mean, variance):
    """`E k(x, z)` by the trapezoidal rule, a dimension at a time (the kernel is a product)."""
    result = 1.0
    for a, m, v in zip(x, mean, variance, strict=True):
        z, density = _gaussian_grid(m, v)
        result *= (np.exp(-((a - z) ** 2) / (2 * bandwidth2)) * density).sum()
    return result


def kernel_self(bandwidth2, variance):
    """`E k(z, z')` by the trapezoidal rule over the plane, a dimension at a time."""
    result = 1.0
    for v in variance:
        z, density = _gaussian_grid(0.0, v)
        values = np.exp(-((z[:, None] - z[None, :]) ** 2) / (2 * bandwidth2))
        result *= density @ values @ density
    return result


def mmd_prior(z, bandwidths2, mean=0.0, variance=1.0, estimator="unbiased"):
    """Double loop over pairs; the Gaussian's side by quadrature; mean over bandwidths."""
    x = array(z).reshape(len(z), -1)
    n, d = x.shape
    mean, variance = (np.broadcast_to(np.ravel(m), d) for m in (mean, variance))
    results = []
    for b2 in bandwidths2:
        pairs = same = cross = 0.0
        for i in range(n):
            cross += kernel_mean(x[i], b2, mean, variance) / n
            for j in range(n):
                pairs += kernel(x[i], x[j], b2)
                same += (i == j) * kernel(x[i], x[j], b2)
        pairs = pairs / n**2 if estimator == "biased" else (pairs - same) / (n * (n - 1))
        results.append(pairs - 2 * cross + kernel_self(b2, variance))
    return sum(results) / len(results)


def _gaussian_grid(mean, variance, points=601):
    z = np.linspace(-9, 9, points)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    return mean + math.sqrt(variance) * z, density


# --- helpers ----------------------------------------------------------------------------------


class Spy:
    """A denoiser that records what it was called with, and passes it on."""

    def __init__(self, denoiser):
        self.denoiser, self.calls = denoiser, []

    @property
    def module(self):
        return self.denoiser.module

    def denoise(self, tokens, latents, **state):
        self.calls.append({"tokens": tokens.clone(), "latents": latents.detach().clone(), **state})
        return self.denoiser.denoise(tokens, latents, **state)


def assert_near_mean(values, expected, errors=4.0):
    """The mean of independent values is `expected` within some standard errors."""
    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - expected) < errors * error, (values.mean(), expected, error)
