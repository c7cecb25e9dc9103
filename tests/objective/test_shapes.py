"""Latents of any shape: what is computed of `[b, n, d]` and `[b, c, h, w]` is that of the rows."""

import math

import pytest
import torch

import cyclevae as cv
from cyclevae import diagnostics
from cyclevae.model.denoiser import Denoised
from cyclevae.testing import toy_batch
from cyclevae.testing.toy import ToyNetwork
from oracles import Spy

FLAT, SHAPES = (4,), [(2, 2), (1, 2, 2)]
TEXT = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0)
PAIRS = toy_batch(seed=3, rows=6)
TOKENS, MASK, Z = PAIRS[:3]
BRIDGE = cv.LatentBridge(steps=2, noise=0.1, threshold=0.5)


class Shaped(ToyNetwork):
    """The toy, to which every latent is one vector, whatever its shape."""

    def forward(self, tokens, latents, **state):
        out = super().forward(tokens, latents.flatten(1), **state)
        if out.latent_prediction is None:
            return out
        return Denoised(out.logits, out.latent_prediction.view_as(latents))


def world(shape):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = Shaped(vocab_size=7, latent_dim=4)
    return cv.as_denoiser(network), cv.LatentProcess(shape=shape)


def each(shape, *parts):
    """The parts of one number per dimension in a shape."""
    return [part.reshape(*part.shape[:-1], *shape) for part in parts]


def cycle(z, d, **processes):
    return cv.cycle_latent_loss(
        d, z, MASK, bridge="rloo", policy=cv.GradientPolicy("full"), **processes
    )


def marginal(z, d, **processes):
    return cv.text_marginal_loss(d, TOKENS, MASK, **processes)


def teacher(d):
    return cv.Teacher(d.module).denoiser


def no_process(function):
    return lambda z, d, *, generator, **_: function(z, d)


V = torch.tensor([0.5, 1.0, 1.5, 2.0])
PUBLIC = {
    "t2l": lambda z, d, **p: cv.t2l(d, TOKENS, MASK, latents=z, time=0.5, **p).z_hat(
        p["latent_process"]
    ),
    "encode_text": lambda z, d, **p: cv.encode_text(d, TOKENS, MASK, bridge=BRIDGE, **p),
    "l2t_loss": lambda z, d, text_process, **_: cv.l2t_loss(
        d, TOKENS, z, MASK, text_process=text_process
    ),
    "unmask_text": lambda z, d, text_process, **_: cv.unmask_text(
        d, z, MASK, text_process=text_process, steps=2
    ),
    "best_text": lambda z, d, **p: cv.best_text(d, z, MASK, samples=3, steps=2, **p).scores,
    "t2l_loss": lambda z, d, **p: cv.t2l_loss(
        d, TOKENS, z, MASK, time=None, space="x0", min_snr=5.0, **p
    ),
    "cycle_text_loss": lambda z, d, **p: cv.cycle_text_loss(d, TOKENS, MASK, bridge=BRIDGE, **p),
    "cycle_latent_loss": cycle,
    "unconditional_loss": lambda z, d, **p: torch.stack(
        cv.unconditional_loss(d, TOKENS, z, MASK, has_latent=TOKENS[:, 0] > 3, **p)
    ),
    "text_marginal_loss": marginal,
    "learned_prior": lambda z, d, **p: cv.learned_prior(
        teacher(d), z, MASK, boundaries=True, samples=2, posterior_std=0.1, **p
    ),
    "ddvi_wake_kl": lambda z, d, **p: cv.ddvi_wake_kl(d, teacher(d), TOKENS, MASK, z, **p),
    "ddvi_sleep_loss": lambda z, d, **p: cv.ddvi_sleep_loss(d, z, MASK, **p),
    "text_probe": lambda z, d, **p: torch.tensor(
        diagnostics.text_probe(d, TOKENS, z, MASK, **p)[:4]
    ),
    "latent_probe": lambda z, d, **p: torch.tensor(
        diagnostics.latent_probe(d, TOKENS, z, MASK, samples=2, **p)
    ),
    "cheat_test": lambda z, d, **p: torch.tensor(
        diagnostics.cheat_test(d, TOKENS, z, MASK, **p)[:4]
    ),
    "infonce_loss": no_process(lambda z, d: cv.infonce_loss(z.roll(1, 0) + z, z, critic="cosine")),
    "retrieval": no_process(lambda z, d: torch.tensor(diagnostics.retrieval(z + z.roll(1, 0), z))),
    "latent_health": no_process(
        lambda z, d: torch.tensor(
            diagnostics.latent_health(z, variance=V.view(z.shape[1:])).variance
        )
    ),
    "mmd": no_process(
        lambda z, d: cv.mmd_prior(z, mean=V.view(z.shape[1:]), standardize=True, kernel="imq")
    ),
    "mmd of samples": no_process(lambda z, d: cv.mmd_prior(z, reference=z.roll(1, 0) * 2)),
    "moment": no_process(lambda z, d: cv.moment_prior(z, form="kl", variance=V.view(z.shape[1:]))),
    "full moment": no_process(
        lambda z, d: cv.moment_prior(z, form="full_kl", covariance=torch.eye(4) * 2)
    ),
    "nats": no_process(
        lambda z, d: cv.latent_loss(z, 2 * z, reduction="nats", variance=V.view(z.shape[1:]))
    ),
    "own distance": no_process(
        lambda z, d: cv.latent_loss(z, 2 * z, distance=lambda x, y: (x - y).abs())
    ),
    "sigreg": lambda z, d, generator, **_: cv.sigreg_prior(z, generator=generator),
    "threshold": no_process(lambda z, d: BRIDGE.thresholded(z)),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_latent_of_any_shape_is_one_vector_to_what_knows_no_axes(name):
    found = []
    for shape in [FLAT, *SHAPES]:
        denoiser, latent_process = world(shape)
        z = Z.view(-1, *shape).clone().requires_grad_()
        seed = torch.Generator().manual_seed(1)
        value = PUBLIC[name](
            z, denoiser, text_process=TEXT, latent_process=latent_process, generator=seed
        )
        learning = [z, *denoiser.module.parameters()]
        gradients = [None] * len(learning)
        if value.requires_grad:
            gradients = torch.autograd.grad(value.double().sum(), learning, allow_unused=True)
        flat = [torch.zeros(4) if g is None else g.flatten() for g in gradients]
        found.append(torch.cat([value.detach().double().flatten(), *flat]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def terms():
    everything = [
        cv.Text(), cv.Latent(), cv.Unconditional(), cv.CycleText(bridge=BRIDGE, pairs=True),
        cv.CycleLatent(bridge="gumbel", policy="full"), cv.TextMarginal(), cv.Sleep(),
        cv.Contrastive(), cv.Prior("mmd"), cv.Prior("learned", name="learned"), cv.Distill(),
    ]  # fmt: skip
    return [*everything, cv.Prior("moment", name="moment"), cv.Prior("sigreg", name="sigreg")]


def step(shape, report=False):
    denoiser, latent_process = world(shape)
    batch = PAIRS._replace(
        latents=PAIRS.latents.view(-1, *shape),
        unpaired_latents=PAIRS.unpaired_latents.view(-1, *shape),
    )
    if report:
        return str(diagnostics.cycle_report(
            denoiser, batch, text_process=TEXT, latent_process=latent_process
        ))  # fmt: skip
    objective = cv.CycleObjective.from_config(
        cv.CycleObjective(TEXT, latent_process, terms()).to_config()
    )
    seed = torch.Generator().manual_seed(0)
    counts = objective.counts(batch)
    output = objective(
        denoiser, batch, step=0, generator=seed, counts=counts, teacher=teacher(denoiser)
    )
    output.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in denoiser.module.parameters()])
    return torch.stack([*output.metrics.values(), *counts.values()]), gradient


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_a_whole_objective_is_that_of_the_rows(shape):
    torch.testing.assert_close(step(shape), step(FLAT), rtol=1e-5, atol=1e-6)


def test_a_report_is_that_of_the_rows():
    assert step((1, 2, 2), report=True) == step(FLAT, report=True)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("term", "words"),
    [
        (cv.Latent(distance="cosine"), "`distance` = 'cosine' acts on vectors"),
        (cv.CycleLatent(distance="normalized_mse"), "of [b, 1, 2, 2] that is none: use 'mse'"),
        (cv.CycleText(bridge=cv.LatentBridge(norm=2.0)), "`norm` = 2.0 acts on vectors"),
        (cv.Prior("mmd", bridge=cv.LatentBridge(norm=2.0)), "hold their size by `threshold`"),
    ],
)
def test_what_acts_on_vectors_is_refused_before_a_pass(term, words):
    batch = PAIRS._replace(
        latents=PAIRS.latents.view(-1, 1, 2, 2),
        unpaired_latents=PAIRS.unpaired_latents.view(-1, 1, 2, 2),
    )
    spy = Spy(None)
    for process in (cv.LatentProcess(), cv.LatentProcess(shape=(1, 2, 2))):
        with pytest.raises(ValueError) as error:
            cv.CycleObjective(TEXT, process, [term])(spy, batch, step=0)
        assert words in str(error.value)
    assert not spy.calls


@pytest.mark.unhooked
def test_a_latent_has_an_axis_and_a_variance_its_shape():
    z = torch.zeros(2, 2, 3, 3)
    for variance in (torch.ones(3), torch.ones(3, 3)):
        with pytest.raises(ValueError, match=r"shape of one latent \[2, 3, 3\]"):
            cv.latent_loss(z, z, reduction="nats", variance=variance)
    with pytest.raises(ValueError, match=r"\[b, d\], \[b, n, d\] or \[b, c, h, w\], got float32"):
        cv.moment_prior(torch.zeros(2))
    assert cv.LatentProcess(shape=[3, 8, 8]).shape == (3, 8, 8)
    assert math.prod(cv.LatentProcess(shape=5).shape) == 5
