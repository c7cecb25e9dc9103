"""Second derivatives of every loss: right, or a refusal that cannot be missed.

The reference is gradgradcheck, finite differences of the gradient, and for the transforms of
`torch.func` autograd's own second derivative, itself so checked.
"""

import inspect

import pytest
import torch
from torch.autograd import gradgradcheck

import cyclevae as cv
from cyclevae.losses import cross_entropy
from cyclevae.model.denoiser import Denoised

V, D = 6, 3
TEXT = cv.TextProcess(mask_id=2, vocab_size=V, pad_id=0)
LATENT = cv.LatentProcess("continuous_cosine", prediction="v", shape=(D,))
PROCESSES = {"text_process": TEXT, "latent_process": LATENT}
TOKENS = torch.tensor([[3, 4, 5], [4, 3, 0]])
MASK = TOKENS > 0


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


Z, NOISE, WORDS = randn(2, D, seed=1), randn(2, D, seed=2), randn(V, D, seed=3)
WEIGHT = randn(D, D, seed=4)
MANY = randn(5, D, seed=5)
TIME = torch.tensor([0.4, 0.7], dtype=torch.float64)


class Linear:
    """A denoiser of one weight, which every part of it reads."""

    def __init__(self, weight):
        self.weight = weight

    def denoise(self, tokens, latents, *, text_time, latent_time, attention_mask, need):
        words = tokens @ WORDS if tokens.is_floating_point() else WORDS[tokens]
        kept = attention_mask[..., None].to(words)
        mean = (words * kept).sum(1) / kept.sum(1)
        hidden = torch.tanh((mean + latents) @ self.weight + latent_time[:, None])
        logits = (words + hidden[:, None]) @ self.weight @ WORDS.T
        return Denoised(logits, hidden @ self.weight.T)


def seeded():
    return torch.Generator().manual_seed(0)


TEACHER = Linear(randn(D, D, seed=6))


def text(**options):
    return lambda logits: cv.text_loss(logits, TOKENS, MASK, **options)


def prior(function, **options):
    return lambda z: function(z, **options)


def learned(**options):
    options = {"time": TIME, "noise": NOISE, "weighting": "likelihood", **PROCESSES} | options
    return lambda z: cv.learned_prior(TEACHER, z, MASK, **options)


def latent_cycle(bridge, policy="full"):
    def loss(weight):
        return cv.cycle_latent_loss(
            Linear(weight),
            Z,
            MASK,
            **PROCESSES,
            bridge=bridge,
            noise=NOISE,
            policy=cv.GradientPolicy(policy),
            generator=seeded(),
        )

    return loss


def of_weight(function, *parts, **options):
    return lambda w: function(Linear(w), *parts, **PROCESSES, **options, generator=seeded())


def unconditional(part):
    loss = of_weight(
        cv.unconditional_loss, TOKENS, Z, MASK, noise=NOISE, latent_time=TIME, text_time=TIME
    )
    return lambda weight: getattr(loss(weight), part)


LOGITS = randn(2, 3, V, seed=7)
RELAXED = randn(2, 3, V, seed=8).softmax(-1)
COVARIANCE = torch.eye(D, dtype=torch.float64) + 0.3
RIGHT = {  # name: (loss, where)
    "text_loss": (text(), LOGITS),
    "text_loss nats": (text(reduction="nats"), LOGITS),
    "text_loss none": (text(reduction="none"), LOGITS),
    "text_loss of few": (lambda x: cv.text_loss(x, TOKENS, TOKENS == 5), LOGITS),
    "text_loss of all": (lambda x: cv.text_loss(x, TOKENS, TOKENS >= 0), LOGITS),
    "l2t_loss": (
        lambda w: cv.l2t_loss(Linear(w), TOKENS, Z, MASK, text_process=TEXT),
        WEIGHT,
    ),
    "t2l_loss": (of_weight(cv.t2l_loss, TOKENS, Z, MASK, time=TIME, noise=NOISE), WEIGHT),
    "t2l_loss min_snr": (
        of_weight(cv.t2l_loss, TOKENS, Z, MASK, time=TIME, noise=NOISE, min_snr=1.0, space="x0"),
        WEIGHT,
    ),
    "unconditional text": (unconditional("text"), WEIGHT),
    "unconditional latent": (unconditional("latent"), WEIGHT),
    "cycle_text detach": (of_weight(cv.cycle_text_loss, TOKENS, MASK, z_hat=Z), WEIGHT),
    "cycle_text full": (
        of_weight(
            cv.cycle_text_loss,
            TOKENS,
            MASK,
            noise=NOISE,
            bridge=cv.LatentBridge(steps=2, norm=1.5),
            policy=cv.GradientPolicy("full"),
        ),
        WEIGHT,
    ),
    "cycle_latent detach": (latent_cycle("argmax", "detach"), WEIGHT),
    "cycle_latent soft": (latent_cycle("soft"), WEIGHT),
    "text_marginal ids": (
        of_weight(cv.text_marginal_loss, TOKENS, MASK, noise=NOISE, text_time=TIME),
        WEIGHT,
    ),
    "text_marginal relaxed": (
        lambda y: cv.text_marginal_loss(
            TEACHER, y.square(), MASK, **PROCESSES, noise=NOISE, text_time=TIME, generator=seeded()
        ),
        RELAXED,
    ),
    "text_log_prob": (
        lambda x: cv.bridges.rloo.text_log_prob(x, TOKENS, MASK, text_process=TEXT),
        LOGITS,
    ),
    "ddvi_wake_kl": (
        lambda w: cv.ddvi_wake_kl(
            Linear(w), TEACHER, TOKENS, MASK, Z, **PROCESSES, time=TIME, noise=NOISE
        ),
        WEIGHT,
    ),
    "ddvi_sleep_loss": (of_weight(cv.ddvi_sleep_loss, Z, MASK, time=TIME, noise=NOISE), WEIGHT),
    "sigreg": (lambda z: cv.sigreg_prior(z, directions=3, generator=seeded()), MANY),
    "mmd covariance": (prior(cv.mmd_prior, covariance=COVARIANCE), MANY),
    "mmd reference": (prior(cv.mmd_prior, reference=randn(4, D, seed=9)), MANY),
    "full_bures": (prior(cv.moment_prior, form="full_bures", estimator="biased"), MANY),
    **{
        f"latent_loss {distance}": (lambda z, d=distance: cv.latent_loss(z, NOISE, distance=d), Z)
        for distance in ("mse", "cosine", "normalized_mse")
    },
    **{
        f"infonce {critic}": (lambda z, c=critic: cv.infonce_loss(z, MANY.roll(1), critic=c), MANY)
        for critic in ("cosine", "euclidean")
    },
    **{
        f"moment {form} {estimator}": (
            prior(cv.moment_prior, form=form, estimator=estimator, threshold=1.0),
            MANY,
        )
        for form in ("diagonal", "bures", "kl", "norm", "hinge", "covariance", "full_kl")
        for estimator in ("unbiased", "biased")
    },
    **{
        f"mmd {kernel} {estimator}": (
            prior(cv.mmd_prior, kernel=kernel, estimator=estimator, standardize=standardize),
            MANY,
        )
        for kernel in ("gaussian", "imq")
        for estimator, standardize in (("unbiased", True), ("biased", False), ("linear", True))
    },
    **{
        f"learned {form}": (learned(form=form, posterior_std=0.5, boundaries=True), Z)
        for form in ("cross_entropy", "score_difference")
    },
}
REFUSED = {
    "straight_through": (latent_cycle("straight_through"), WEIGHT),
    "sampled_straight_through": (latent_cycle("sampled_straight_through"), WEIGHT),
    "gumbel": (latent_cycle("gumbel"), WEIGHT),
    "rloo": (latent_cycle("rloo"), WEIGHT),
    "rloo_surrogate": (lambda x: cv.rloo_surrogate(x, NOISE), Z),
    "score_distillation": (learned(form="score_distillation"), Z),
}


def jacobian(function):
    """By reverse mode, with the draws of one call in all rows, which torch asks for by name."""
    return lambda x: torch.func.vmap(torch.func.vjp(function, x)[1], randomness="same")(
        torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    )[0].view(*x.shape, *x.shape)


def hessian(function):
    """Forward over reverse, as `torch.func.hessian` has it."""
    return torch.func.jacfwd(torch.func.grad(function), randomness="same")


@pytest.mark.parametrize("name", RIGHT)
def test_second_derivatives(name):
    loss, at = RIGHT[name]
    assert gradgradcheck(loss, (at.clone().requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("name", [name for name in RIGHT if name.startswith("text_loss")])
def test_second_derivatives_of_chunks(monkeypatch, name):
    monkeypatch.setattr(cross_entropy, "chunk_of", lambda logits: 2)
    test_second_derivatives(name)


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.slow
def test_transforms(name):
    loss, at = RIGHT[name]

    def scalar(x):
        return loss(x).sum()

    expected = torch.autograd.functional.hessian(scalar, at)
    torch.testing.assert_close(hessian(scalar)(at), expected)
    torch.testing.assert_close(jacobian(torch.func.grad(scalar))(at), expected)
    several = torch.stack([at, at + 0.1, at - 0.1])
    each = torch.stack([torch.func.grad(scalar)(x) for x in several])
    batched = torch.func.vmap(torch.func.grad(scalar), randomness="same")(several)
    torch.testing.assert_close(batched, each)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, in place
@pytest.mark.parametrize("name", REFUSED)
def test_a_surrogate_has_one_backward_pass(name):
    loss, at = REFUSED[name]

    def scalar(x):
        return loss(x).sum()

    x = at.clone().requires_grad_()
    (once,) = torch.autograd.grad(scalar(x), x)
    (gradient,) = torch.autograd.grad(scalar(x), x, create_graph=True)
    assert torch.equal(gradient, once)
    torch.testing.assert_close(torch.func.grad(scalar)(at), once)
    batched = torch.func.vmap(torch.func.grad(scalar), randomness="same")(at[None])
    torch.testing.assert_close(batched[0], once)
    for second in (
        lambda: torch.autograd.grad(gradient.sum(), x),  # whose incoming gradient is constant
        lambda: hessian(scalar)(at),
        lambda: jacobian(torch.func.grad(scalar))(at),
        lambda: torch.func.jvp(scalar, (at,), (at,)),
    ):
        with pytest.raises(RuntimeError, match="is a surrogate with a gradient of its own"):
            second()


def test_a_gate_drops_tangents_too():
    module = torch.nn.Linear(2, 2).double()

    def loss(parameters, x):
        return torch.func.functional_call(module, cv.gate_params(parameters), x).square().sum()

    at, x = dict(module.named_parameters()), randn(3, 2)
    tangents = {name: torch.ones_like(p) for name, p in at.items()}
    _, tangent = torch.func.jvp(lambda p: loss(p, x), (at,), (tangents,))
    assert tangent == 0
    assert torch.func.hessian(lambda x: loss(at, x).sum())(x).any()


def test_every_public_loss_is_in_the_table():
    losses = {n for n in dir(cv) if n.endswith(("_loss", "_prior", "_surrogate"))}
    losses = {n for n in losses if inspect.isfunction(getattr(cv, n))}
    source = inspect.getsource(inspect.getmodule(Linear))
    assert {n for n in losses if n + "(" not in source and f"cv.{n}" not in source} == set()


def test_few_words_that_do_not_count_are_computed_along_and_may_be_nan(monkeypatch):
    """One of twelve, beside `F.cross_entropy` of the others."""
    monkeypatch.setattr(cross_entropy, "chunk_of", lambda logits: 5)
    logits, v = randn(1, 12, V, seed=9), randn(1, 12, V, seed=10)
    tokens, mask = torch.arange(12)[None] % V, torch.arange(12)[None] != 3
    logits[0, 3] = torch.nan
    logits.requires_grad_()

    def twice(loss):
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        kept = (gradient * v)[mask].sum()
        return gradient.detach(), torch.autograd.grad(kept, logits)[0]

    gradient, second = twice(cv.text_loss(logits, tokens, mask, reduction="sum"))
    kept = torch.nn.functional.cross_entropy(logits[mask], tokens[mask], reduction="sum")
    wanted, wanted_second = twice(kept)
    torch.testing.assert_close(gradient[mask], wanted[mask])
    torch.testing.assert_close(second[mask], wanted_second[mask])
    assert not gradient[~mask].any() and not second[~mask].any()
