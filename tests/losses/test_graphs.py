"""A loss on something without a graph says that nobody learns, where somebody might."""

import warnings

import pytest
import torch

import cyclevae as cv
from cyclevae.testing import toy_batch, toy_denoiser

DENOISER, TEXT, LATENT = toy_denoiser()
PROCESSES = {"text_process": TEXT, "latent_process": LATENT}
TEACHER = cv.Teacher(DENOISER.module).denoiser
TOKENS, MASK, Z = toy_batch()[:3]
FULL = cv.GradientPolicy("full")
RELAXED = torch.nn.functional.one_hot(TOKENS, 7).float()
LOGITS = torch.zeros(3, 5, 7)
LOSSES = {  # name: (the loss, what it is of)
    "moment": (cv.moment_prior, Z),
    "mmd": (cv.mmd_prior, Z),
    "sigreg": (cv.sigreg_prior, Z),
    "learned": (lambda z: cv.learned_prior(TEACHER, z, MASK, **PROCESSES), Z),
    "infonce": (lambda z: cv.infonce_loss(z, Z), Z),
    "cycle_text": (
        lambda z: cv.cycle_text_loss(DENOISER, TOKENS, MASK, z_hat=z, policy=FULL, **PROCESSES),
        Z,
    ),
    "cycle_latent, y_hat": (
        lambda y: cv.cycle_latent_loss(
            DENOISER, Z, MASK, y_hat=y, bridge="soft", policy=FULL, **PROCESSES
        ),
        RELAXED,
    ),
    "cycle_latent, logits": (
        lambda x: cv.cycle_latent_loss(
            DENOISER, Z, MASK, logits=x, bridge="soft", policy=FULL, **PROCESSES
        ),
        LOGITS,
    ),
    "text_marginal": (
        lambda y: cv.text_marginal_loss(DENOISER, y, MASK, **PROCESSES),
        RELAXED,
    ),
    "rloo": (lambda x: cv.rloo_surrogate(x, Z), Z),
}


@pytest.mark.parametrize("name", LOSSES)
def test_nobody_learns(name):
    loss, of = LOSSES[name]
    with pytest.warns(UserWarning, match="has no graph, so that nobody learns from it"):
        loss(of)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            loss(of)
        loss(of.clone().requires_grad_())
        torch.func.grad(lambda x: loss(x).sum())(of)


@pytest.mark.unhooked
@pytest.mark.unhooked  # the hook calls functions of its own
def test_the_default_of_encode_text_is_named():
    z_hat = cv.encode_text(DENOISER, TOKENS, MASK, **PROCESSES)
    with pytest.warns(UserWarning, match="GradientPolicy") as caught:
        cv.mmd_prior(z_hat)
    assert caught[0].filename == __file__  # the place that is to be mended
    z_hat = cv.encode_text(DENOISER, TOKENS, MASK, policy=FULL, **PROCESSES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cv.mmd_prior(z_hat).requires_grad


@pytest.mark.parametrize("prior", ["moment", "mmd", "sigreg"])
def test_a_step_of_an_objective_is_quiet(prior):
    objective = cv.CycleObjective(TEXT, LATENT, [cv.Text(), cv.Prior(prior, weight=0.1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(DENOISER, toy_batch(), step=0)
