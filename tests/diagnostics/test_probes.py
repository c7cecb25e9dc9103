"""Conditioning probes, on denoisers whose mutual information is known in closed form."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

import cyclevae as cv
from analytic import Optimal
from cyclevae.diagnostics import Probe, latent_probe, text_probe
from cyclevae.model.denoiser import Denoised
from cyclevae.priors.weighting import weighted_times
from cyclevae.testing import toy_batch, toy_denoiser
from oracles import Spy

TEXT = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0)
PREDICTIONS = ("epsilon", "x0", "v")


class Gaussian:
    """Texts of one word, 3 or 4, that place a latent at `+-sqrt(1 - v)`; of variance `v` around it.

    Latents are N(0, 1) in all, so the empty condition is `Optimal` of it; what counts are second
    moments, of which signs have those of a Gaussian.
    """

    def __init__(self, process, v, stretch=1.0):
        self.process, self.v, self.stretch = process, v, stretch

    def denoise(self, tokens, latents, *, text_time, latent_time, attention_mask, need):
        mean, variance = 0.0, 1.0
        if not bool(text_time.any()):
            mean, variance = self.stretch * place(tokens, self.v), self.v
        optimal = Optimal(self.process, means=[mean], variances=[variance])
        return Denoised(None, optimal.predict(latents, latent_time))


def place(tokens, v):
    return (7 - 2 * tokens[:, :1].double()) * math.sqrt(1 - v)


def every_case(process, v, low, high, rows=1000):
    """All combinations of time, noise, latent, text and shuffled text, once each."""
    like = torch.zeros(rows, 1).double()
    seed = torch.Generator().manual_seed(0)
    drawn = {"low": low, "high": high, "time": None, "generator": seed}
    times, _ = weighted_times("likelihood", like, process, **drawn)
    signs = torch.tensor([-1.0, 1.0]).double()
    words = torch.tensor([3, 3, 4, 4])  # rolled: 4, 3, 3, 4
    times, noise, sign, words = (
        x.reshape(-1, 1) for x in torch.meshgrid(times, signs, signs, words.double(), indexing="ij")
    )
    tokens = words.long()
    latents = place(tokens, v) + math.sqrt(v) * sign
    limits = {"low": low, "high": high, "samples": 1}
    return tokens, latents, tokens > 0, {"time": times[:, 0], "noise": noise} | limits


def gaussian_probe(v, *, prediction="v", low=0.0, high=1.0, stretch=1.0):
    process = cv.LatentProcess(prediction=prediction)
    tokens, latents, mask, options = every_case(process, v, low, high)
    denoiser = Gaussian(process, v, stretch)
    processes = {"text_process": TEXT, "latent_process": process}
    return latent_probe(denoiser, tokens, latents, mask, **processes, **options)


# --- latents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_information_of_a_gaussian_channel(prediction):
    """v = .2: 1/2 log 5 = .8047 nats, of which noise has taken .795 at t = .9."""
    assert -math.log(0.2) / 2 == pytest.approx(0.8047, abs=1e-4)
    probe = gaussian_probe(0.2, prediction=prediction)
    assert probe.information == pytest.approx(0.8047, abs=5e-4)
    capped = gaussian_probe(0.2, prediction=prediction, high=0.9)
    assert capped.information == pytest.approx(0.795, abs=5e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_gap_of_shuffled_texts_is_the_jeffreys_divergence(prediction):
    """rho = .8: I = .511, and rho^2 / (1 - rho^2) = 1.778."""
    probe = gaussian_probe(1 - 0.8**2, prediction=prediction)
    assert -math.log(1 - 0.8**2) / 2 == pytest.approx(0.511, abs=5e-4)
    assert probe.information == pytest.approx(0.5108, abs=5e-4)
    assert probe.gap == pytest.approx(0.64 / 0.36, abs=2e-3)


@pytest.mark.parametrize("v", [0.05, 0.36, 0.9])
def test_an_optimal_denoiser_differs_by_what_it_gains(v):
    probe = gaussian_probe(v)
    assert probe.difference == pytest.approx(probe.information, rel=2e-3)
    assert probe.information == pytest.approx(-math.log(v) / 2, abs=1e-3)


def test_disagreement_is_miscalibration():
    """A denoiser that overstates what the text says moves more, and gains less."""
    honest, loud = gaussian_probe(0.36), gaussian_probe(0.36, stretch=1.5)
    assert loud.difference > honest.difference + 0.1
    assert loud.information < honest.information - 0.1


def test_a_deaf_encoder_has_no_gap():
    process = cv.LatentProcess()
    tokens, latents, mask, options = every_case(process, 0.36, 0.02, 0.98, rows=20)
    processes = {"text_process": TEXT, "latent_process": process}
    probe = latent_probe(Optimal(process), tokens, latents, mask, **processes, **options)
    assert probe.gap == probe.information == probe.difference == probe.gap_error == 0
    assert probe.right > 0


def test_drawn_times_estimate_the_same():
    process = cv.LatentProcess()
    tokens, latents, mask, _ = every_case(process, 0.36, 0.0, 1.0, rows=64)
    processes = {"text_process": TEXT, "latent_process": process}
    options = {"low": 0.0, "high": 0.999, "samples": 4}
    probe = latent_probe(Gaussian(process, 0.36), tokens, latents, mask, **processes, **options)
    assert 0 < probe.gap_error < 0.2
    assert abs(probe.gap - 0.64 / 0.36) < 4 * probe.gap_error
    assert probe.difference == pytest.approx(0.5108, abs=0.02)
    apart = abs(probe.information - 0.5108)
    assert apart < 0.2


def test_latents_of_several_vectors_add_up():
    process = cv.LatentProcess()
    tokens, latents, mask, options = every_case(process, 0.36, 0.02, 0.98, rows=20)
    processes = {"text_process": TEXT, "latent_process": process}
    denoiser = Gaussian(process, 0.36)
    one = latent_probe(denoiser, tokens, latents, mask, **processes, **options)

    class Rows(Gaussian):  # each vector by itself
        def denoise(self, tokens, latents, **state):
            output = super().denoise(tokens, latents[:, 0], **state).latent_prediction
            return Denoised(None, output[:, None].expand_as(latents))

    options["noise"] = options["noise"][:, None].expand(-1, 3, 1)
    tall = latents[:, None].expand(-1, 3, 1)
    three = latent_probe(Rows(process, 0.36), tokens, tall, mask, **processes, **options)
    assert three.right == pytest.approx(3 * one.right)
    assert three.information == pytest.approx(3 * one.information)


# --- texts ------------------------------------------------------------------------------------


class Words:
    """The exact decoder of a word, 3 or 4, from a latent that is N(+-m, 1)."""

    def __init__(self, m):
        self.m = m

    def denoise(self, tokens, latents, *, text_time, latent_time, attention_mask, need):
        assert bool((text_time == 1).all()) and need == "logits"
        logits = torch.full((*tokens.shape, 7), -1e9).double()
        told = (1 - latent_time[:, None]) * self.m * latents
        logits[..., 3], logits[..., 4] = told, -told
        return Denoised(logits, None)


def sent(m, rows=2000):
    """Words and latents at the quantiles of their distribution, in which neighbours vary."""
    tokens = torch.tensor([3, 3, 4, 4]).repeat(rows // 4)[:, None]
    normal = stats.norm.ppf((np.arange(rows // 4) + 0.5) / (rows // 4))
    order = torch.randperm(rows // 4, generator=torch.Generator().manual_seed(0))
    normal = torch.tensor(normal)[order].repeat_interleave(4)
    return tokens, (7 - 2 * tokens) * m + normal[:, None], torch.ones_like(tokens)


@pytest.mark.parametrize("m", [0.3, 1.0])
def test_the_information_of_a_word(m):
    """Exact by quadrature; the gap of shuffled latents, Jeffreys, is m^2."""
    noise = integrate.quad(lambda x: stats.norm.pdf(x) * np.logaddexp(0, -2 * m * (m + x)), -9, 9)[
        0
    ]
    processes = {"text_process": TEXT, "latent_process": cv.LatentProcess()}
    probe = text_probe(Words(m), *sent(m)[:2], sent(m)[2], **processes)
    assert probe.right == pytest.approx(noise, abs=2e-3)
    assert probe.empty == pytest.approx(math.log(2))
    assert probe.information == pytest.approx(math.log(2) - noise, abs=2e-3)
    assert probe.gap == pytest.approx(m**2, abs=0.02)
    assert probe.difference is None


def test_nats_are_per_text_and_padding_never_counts():
    tokens, latents, _ = sent(1.0, rows=40)
    processes = {"text_process": TEXT, "latent_process": cv.LatentProcess()}
    one = text_probe(Words(1.0), tokens, latents, tokens > 0, **processes)
    tripled = torch.cat([tokens, tokens, tokens, 0 * tokens], dim=1)
    three = text_probe(Words(1.0), tripled, latents, tripled > 0, **processes)
    assert three[:4] == pytest.approx([3 * x for x in one[:4]])


def test_gap_error_is_that_of_the_mean_over_rows():
    tokens, latents, mask = sent(1.0, rows=40)
    processes = {"text_process": TEXT, "latent_process": cv.LatentProcess()}
    probe = text_probe(Words(1.0), tokens, latents, mask, **processes)
    sign = (7 - 2 * tokens)[:, 0]
    nats = [
        torch.nn.functional.softplus(-2 * z[:, 0] * sign) for z in (latents, latents.roll(1, 0))
    ]
    gaps = (nats[1] - nats[0]).numpy()
    assert probe.gap == pytest.approx(gaps.mean())
    assert probe.gap_error == pytest.approx(stats.sem(gaps))


# --- what the model sees, and what is left alone ----------------------------------------------


def seen(probe, **options):
    denoiser, text, latent = toy_denoiser()
    spy = Spy(denoiser)
    tokens, mask, latents = toy_batch(rows=4)[:3]
    probe(spy, tokens, latents, mask, text_process=text, latent_process=latent, **options)
    return spy.calls, tokens, mask, latents


def test_the_text_conditions():
    (right, shuffled, empty), _, mask, latents = seen(text_probe)
    assert all(torch.equal(c["tokens"], TEXT.fully_masked(mask)) for c in (right, shuffled, empty))
    assert all(c["text_time"].eq(1).all() for c in (right, shuffled, empty))
    assert [c["latent_time"].unique().item() for c in (right, shuffled, empty)] == [0, 0, 1]
    assert torch.equal(right["latents"], latents)
    assert torch.equal(shuffled["latents"], latents.roll(1, 0))
    noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(empty["latents"], noise)


def test_the_latent_conditions():
    calls, tokens, mask, _ = seen(latent_probe, samples=2)
    assert len(calls) == 6
    for right, shuffled, empty in (calls[:3], calls[3:]):
        for other in (shuffled, empty):  # the same time and noise
            assert torch.equal(right["latents"], other["latents"])
            assert torch.equal(right["latent_time"], other["latent_time"])
        assert torch.equal(right["tokens"], tokens)
        assert torch.equal(shuffled["tokens"], tokens.roll(1, 0))
        assert torch.equal(shuffled["attention_mask"], mask.roll(1, 0))
        assert torch.equal(empty["tokens"], TEXT.fully_masked(mask))
        assert torch.equal(empty["attention_mask"], mask)
        assert [c["text_time"].unique().item() for c in (right, shuffled, empty)] == [0, 0, 1]
    times = torch.cat([calls[0]["latent_time"], calls[3]["latent_time"]])
    assert len(times.unique()) == 8 and times.min() >= 0.02 and times.max() <= 0.98
    assert not torch.equal(calls[0]["latents"], calls[3]["latents"])
    assert len(seen(latent_probe)[0]) == 8 * 3


@pytest.mark.parametrize("probe", [text_probe, latent_probe])
def test_modes_random_state_and_graph_are_left_alone(probe):
    denoiser, text, latent = toy_denoiser()
    module = denoiser.module
    module.shared = nn.Sequential(module.shared, nn.Dropout(0.5), nn.Linear(4, 4).eval())
    module.train()
    module.shared[2].eval()
    modes = [m.training for m in module.modules()]
    tokens, mask, latents = toy_batch(rows=4)[:3]
    before = torch.get_rng_state()
    options = {"text_process": text, "latent_process": latent}
    found = [probe(denoiser, tokens, latents, mask, **options) for _ in range(2)]
    assert found[0] == found[1]  # no dropout, and the same draws
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in module.modules()] == modes
    other = torch.Generator().manual_seed(1)
    assert probe(denoiser, tokens, latents, mask, generator=other, **options) != found[0]
    assert all(isinstance(x, float) or x is None for x in found[0])


@pytest.mark.parametrize("probe", [text_probe, latent_probe])
def test_modes_come_back_after_an_error(probe):
    denoiser, text, latent = toy_denoiser()
    denoiser.module.train()
    tokens, mask, latents = toy_batch(rows=4)[:3]
    with pytest.raises(RuntimeError, match="out of order"):
        probe(
            Broken(denoiser.module), tokens, latents, mask, text_process=text, latent_process=latent
        )
    assert denoiser.module.training


class Broken:
    def __init__(self, module):
        self.module = module

    def denoise(self, *arguments, **state):
        assert not (self.module.training or torch.is_grad_enabled())
        raise RuntimeError("out of order")


def test_half_precision():
    denoiser, text, latent = toy_denoiser()
    denoiser.module.bfloat16()
    tokens, mask, latents = toy_batch(rows=4)[:3]
    options = {"text_process": text, "latent_process": latent}
    for probe in (text_probe, latent_probe):
        found = probe(denoiser, tokens, latents.bfloat16(), mask, **options)
        assert all(math.isfinite(x) for x in found if x is not None)


def test_the_arithmetic_of_a_probe():
    probe = Probe(1.0, 4.0, 2.0, 0.5)
    assert (probe.gap, probe.information) == (3.0, 1.0)


TOKENS, Z = torch.tensor([[3, 4], [5, 0]]), torch.zeros(2, 4)


@pytest.mark.parametrize("probe", [text_probe, latent_probe])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"latents": Z[:1], "tokens": TOKENS[:1]},
            r"`latents` needs at least 2 rows.*larger batch",
        ),
        ({"latents": Z / 0}, "`latents` must be finite"),
        ({"latents": Z[:1]}, "`tokens` and `latents` must have the same number of rows"),
        ({"tokens": TOKENS + 9}, "`tokens` must hold ids"),
        ({"mask": TOKENS[:, :1]}, "`attention_mask` must have the shape of its tokens"),
        ({"noise": Z[:1]}, "`noise` and `latents.* must have equal shapes"),
    ],
)
@pytest.mark.unhooked
def test_refused(probe, changes, expected):
    denoiser, text, latent = toy_denoiser()
    given = {"tokens": TOKENS, "latents": Z, "mask": TOKENS > 0} | changes
    inputs = [given.pop(name) for name in ("tokens", "latents", "mask")]
    with pytest.raises(ValueError, match=expected):
        probe(denoiser, *inputs, text_process=text, latent_process=latent, **given)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"samples": 0}, "`samples` must be at least 1, got 0"),
        ({"low": 0.9, "high": 0.1}, "`low` and `high` must be times"),
    ],
)
@pytest.mark.unhooked
def test_latent_probe_refused(options, expected):
    denoiser, text, latent = toy_denoiser()
    options = options | {"text_process": text, "latent_process": latent}
    with pytest.raises(ValueError, match=expected):
        latent_probe(denoiser, TOKENS, Z, TOKENS > 0, **options)
