"""The bound of each kind of noise: against exact likelihoods, loops, and GIDD's own code."""

import itertools
import math

import numpy as np
import pytest
import torch

import cyclevae as cv
from cyclevae.losses.text_bound import text_bound
from cyclevae.model.denoiser import Denoised
from cyclevae.processes import shares as shares_file

MASK = 3  # the words are 0, 1 and 2
P = torch.tensor([[0.30, 0.05, 0.10], [0.02, 0.20, 0.03], [0.05, 0.05, 0.20]]).double()
TEXTS = torch.tensor(list(itertools.product(range(3), repeat=2)))
LATENT = cv.LatentProcess(shape=(1,))


class Late(cv.TextProcess):
    def shares(self, time):
        return cv.Shares(1 - time**2, time**2, torch.zeros_like(time))


class Both(cv.TextProcess):
    """At full noise half of the words are masks, and half are random."""

    def shares(self, time):
        return cv.Shares(1 - time, time / 2, time / 2)


def gidd(p, gamma):
    def shares(t):
        c = 2**gamma * p / (1 - p) * (t * (1 - t)) ** (gamma / 2)
        return (1 - t) / (1 + c), t / (1 + c), c / (1 + c)

    return cv.HybridTextProcess(MASK, 4, p_uniform=p, gamma=gamma), shares


KINDS = {
    "mask": (cv.TextProcess(MASK, 4), lambda t: (1 - t, t, 0 * t)),
    "late": (Late(MASK, 4), lambda t: (1 - t**2, t**2, 0 * t)),
    "uniform": (cv.UniformTextProcess(vocab_size=3), lambda t: (1 - t, 0 * t, t)),
    "hybrid": gidd(0.3, 1.0),
    "hybrid, gamma 2": gidd(0.5, 2.0),
    "both": (Both(MASK, 4), lambda t: (1 - t, t / 2, t / 2)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def chances(shares, t, ids):
    """`q_t(z | x)` of a word, `[b, 3, ids]`."""
    kept, masked, random = (share[:, None, None] for share in shares(t))
    q = kept * torch.eye(3, ids).double() + random / 3
    q[..., MASK:] = masked
    return q


class Perfect:
    """The chances of a word given the *other* one as it was read: what a bound asks for."""

    def __init__(self, kind):
        self.process, self.shares = KINDS[kind]

    def logits(self, tokens, time):
        seen = chances(self.shares, time.double(), self.process.vocab_size)
        seen = seen.gather(2, tokens[:, None].expand(-1, 3, -1))  # [b, x, position]
        first, second = seen[..., 1] @ P.T, seen[..., 0] @ P
        logits = torch.full((*tokens.shape, self.process.vocab_size), -1e3).double()
        logits[..., :3] = torch.stack([first, second], dim=1).clamp(min=1e-300).log()
        return logits

    def denoise(self, tokens, latents, *, text_time, **state):
        prediction = torch.zeros_like(latents)
        return Denoised(self.logits(tokens, text_time), prediction)


def counted(process, z):
    return torch.ones_like(z, dtype=torch.bool) if process.replaces else z == MASK


def integral(kind, texts):
    """The bound of a perfect model, enumerated over all noised texts and integrated over time."""
    process, shares = KINDS[kind]
    u, dt = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(60))
    t, dt = (1 + u) / 2, dt / 2
    for _ in range(2):  # many times near both ends
        t, dt = 3 * t**2 - 2 * t**3, 6 * t * (1 - t) * dt
    seen = torch.tensor(list(itertools.product(range(process.vocab_size), repeat=2)))
    time, z = t.repeat_interleave(len(seen)), seen.repeat(len(t), 1)
    logits, q = Perfect(kind).logits(z, time), chances(shares, time, process.vocab_size)
    noised, found = cv.Noised(z, counted(process, z)), []
    for x in texts:
        bound = text_bound(logits, x.expand_as(z), noised, time, text_process=process).sum(dim=1)
        p_z = q[:, x[0]].gather(1, z[:, :1]) * q[:, x[1]].gather(1, z[:, 1:])
        found.append((dt.repeat_interleave(len(seen)) * p_z[:, 0] * bound).sum())
    return torch.stack(found)


@every_kind
def test_of_a_perfect_model_the_bound_is_the_likelihood(kind, monkeypatch):
    monkeypatch.setattr(shares_file, "_END", 1e-12)
    exact = -P[tuple(TEXTS.T)].log()
    cap = 0 if KINDS[kind][0].replaces else 3e-3  # of the weight of masks
    torch.testing.assert_close(integral(kind, TEXTS), exact, rtol=0, atol=5e-5 + cap)
    monkeypatch.undo()
    ends = 0.25 if "hybrid" in kind else 3e-3  # what is left out at times below 1e-4
    torch.testing.assert_close(integral(kind, TEXTS), exact, rtol=0, atol=ends)


@every_kind
@pytest.mark.parametrize("loss", ["marginal", "unconditional", "l2t"])
def test_the_losses_estimate_it_without_bias(loss, kind):
    process, rows = KINDS[kind][0], 20_000
    model, zeros = Perfect(kind), torch.zeros(rows, 1)
    tokens, mask = torch.tensor([[0, 2]]).expand(rows, 2), torch.ones(rows, 2, dtype=torch.bool)
    options = {"text_process": process, "generator": torch.Generator().manual_seed(0)}
    processes = options | {"latent_process": LATENT}
    each = cv.text_marginal_loss(model, tokens, mask, reduction="none", **processes).sum(dim=1)
    if loss == "marginal":
        mean = each.mean()
    elif loss == "unconditional":
        mean = cv.unconditional_loss(model, tokens, zeros, mask, reduction="nats", **processes).text
    else:
        options |= {"text_time": cv.TimePolicy("uniform"), "weighting": "bound"}
        mean = cv.l2t_loss(model, tokens, zeros, mask, reduction="nats", **options)
    error = each.std().item() / rows**0.5
    expected = integral(kind, torch.tensor([[0, 2]])).item()
    assert mean.item() == pytest.approx(expected, abs=4 * error) and error < 0.25


def loop(logits, x, z, t, p_uniform, gamma, mask_id):
    """Theorem 3.1 of GIDD at one position, with the derivatives of its shares by hand."""
    v = len(logits)
    words = [i for i in range(v) if i != mask_id]
    n, e = len(words), np.exp(logits)
    p = np.array([e[y] if y in words else 0.0 for y in range(v)]) / sum(e[y] for y in words)
    if mask_id is None:  # uniform alone
        kept, noise, flow = 1 - t, np.full(v, t / n), np.full(v, 1 / n + t / n / (1 - t))
    else:
        B = 2**gamma * p_uniform / (1 - p_uniform)
        c = B * (t * (1 - t)) ** (gamma / 2)
        dc = c * gamma / 2 * (1 - 2 * t) / (t * (1 - t))
        C = 1 + c
        kept, dkept = (1 - t) / C, -1 / C - (1 - t) * dc / C**2
        noise = np.array([t / C if y == mask_id else c / C / n for y in range(v)])
        slope = [1 / C - t * dc / C**2, (dc / C - c * dc / C**2) / n]
        flow = np.array([slope[y != mask_id] - dkept / kept * noise[y] for y in range(v)])
    q = kept * np.eye(v)[x] + noise
    q_hat = kept * p + noise
    ratio = q[z] / q_hat[z]
    kl = (q * np.log(q / q_hat)).sum()
    return flow[z] / q[z] * (kl + ratio - np.log(ratio) - 1)


@pytest.mark.parametrize(("p_uniform", "gamma"), [(0.1, 1.0), (0.4, 1.7), (None, None)])
def test_loop(p_uniform, gamma):
    generator = torch.Generator().manual_seed(0)
    mask_id = None if p_uniform is None else 3
    process = cv.UniformTextProcess(vocab_size=6)
    if mask_id is not None:
        process = cv.HybridTextProcess(mask_id, 6, p_uniform=p_uniform, gamma=gamma)
    logits = 3 * torch.randn(40, 4, 6, generator=generator).double()
    time = torch.rand(40, generator=generator).double() * 0.98 + 0.01
    x = torch.randint(3, (40, 4), generator=generator)
    mask = torch.ones(40, 4, dtype=torch.bool)
    noised = process.noised(x, mask, time, generator=generator)
    found = text_bound(logits, x, noised, time, text_process=process)
    for i, l in itertools.product(range(40), range(4)):  # noqa: E741
        z, t = noised.tokens[i, l].item(), time[i].item()
        expected = loop(logits[i, l].numpy(), x[i, l].item(), z, t, p_uniform, gamma, mask_id)
        assert found[i, l].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_numbers_of_gidd():
    """Its own code (github.com/dvruette/gidd at f67acc9), in float64 but for its constants."""
    process = cv.HybridTextProcess(3, 5, p_uniform=0.2)
    logits = (1.7 * torch.arange(30.0).double()).sin().mul(2).view(2, 3, 5)
    tokens, z = torch.tensor([[0, 1, 4], [2, 4, 1]]), torch.tensor([[0, 3, 2], [3, 4, 0]])
    time, everywhere = torch.tensor([0.2, 0.85]).double(), torch.ones_like(z, dtype=torch.bool)
    elbo = [[0.986273765, 9.505423049, 10.792693077], [1.167136939, 0.578972331, 0.439302982]]
    noised = cv.Noised(z, everywhere)
    found = text_bound(logits, tokens, noised, time, text_process=process)
    torch.testing.assert_close(found, torch.tensor(elbo).double(), rtol=1e-7, atol=0)
    kept, masked, random = process.shares(time)
    beta = [[0.166666669, 0.041666667], [0.721234007, 0.037872357]]
    found = torch.stack([masked, random / 4], dim=1)
    torch.testing.assert_close(found, torch.tensor(beta).double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(
        kept, torch.tensor([0.666666664, 0.127276566]).double(), rtol=1e-7, atol=0
    )


@every_kind
def test_of_a_relaxed_text_it_is_the_average_over_its_words(kind):
    process, generator = KINDS[kind][0], torch.Generator().manual_seed(0)
    v, time = process.vocab_size, torch.tensor([0.3, 0.9]).double()
    logits = torch.randn(2, 2, v, generator=generator).double().requires_grad_()
    relaxed = torch.rand(2, 2, v, generator=generator).double()
    relaxed[..., MASK:] = 0
    relaxed = (relaxed / relaxed.sum(dim=-1, keepdim=True)).requires_grad_()
    z = torch.tensor([[0, 2], [min(MASK, v - 1), 1]])
    noised = cv.Noised(z, counted(process, z))
    found = text_bound(logits, relaxed, noised, time, text_process=process)
    each = [
        text_bound(logits, torch.full_like(z, word), noised, time, text_process=process)
        for word in range(3)
    ]
    words = torch.stack(each, dim=-1)
    torch.testing.assert_close(found, (relaxed[..., :3] * words).sum(dim=-1))
    (gradient,) = torch.autograd.grad(found.sum(), relaxed, retain_graph=True)
    places = noised.counted[..., None].expand_as(words)
    torch.testing.assert_close(
        (gradient[..., 0] - gradient[..., 1])[noised.counted],
        torch.where(places, words[..., 0:1] - words[..., 1:2], 0)[..., 0][noised.counted],
    )
    torch.autograd.gradcheck(
        lambda x: text_bound(x, relaxed.detach(), noised, time, text_process=process), logits
    )


@pytest.mark.parametrize("kind", ["uniform", "hybrid", "both"])
def test_extremes_are_finite_and_what_does_not_count_has_no_gradient(kind):
    process = KINDS[kind][0]
    time = torch.tensor([0.0, 1e-7, 0.5, 1 - 1e-7, 1.0])
    x = torch.tensor([[0, 1, 2]]).expand(5, 3)
    z = torch.tensor([[0, 2, min(MASK, process.vocab_size - 1)]]).expand(5, 3)
    for scale in (0.0, 1.0, 1e4):
        logits = scale * torch.arange(3.0 * process.vocab_size).sin().view(1, 3, -1).repeat(5, 1, 1)
        logits[:, 2] = math.nan
        logits.requires_grad_()
        noised = cv.Noised(z, torch.tensor([[True, True, False]]).expand(5, 3))
        bound = text_bound(logits, x, noised, time, text_process=process)
        (gradient,) = torch.autograd.grad(bound.sum(), logits)
        assert bound.isfinite().all() and bound.min() >= -1e-5 and not bound[:, 2].any()
        assert gradient.isfinite().all() and not gradient[:, 2].any()


def test_a_large_vocabulary_in_fp32_loses_nothing_near_the_ends_of_time():
    process = cv.UniformTextProcess(vocab_size=50_000)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 1, 50_000, generator=generator)
    tokens, z = torch.tensor([[5], [5], [7], [7]]), torch.tensor([[5], [6], [7], [8]])
    noised = cv.Noised(z, torch.ones_like(z, dtype=torch.bool))
    time = torch.tensor([1e-3, 1e-3, 0.999, 0.9999])
    found = text_bound(logits, tokens, noised, time, text_process=process)
    exact = text_bound(logits.double(), tokens, noised, time.double(), text_process=process)
    torch.testing.assert_close(found.double(), exact, rtol=2e-4, atol=1e-6)
