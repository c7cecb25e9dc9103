"""Under `torch.compile`: latent bridges, time policies, latent distances and InfoNCE."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import cyclevae as cv
from cyclevae.bridges.latent import LatentBridge, encode_text
from cyclevae.losses.contrastive import infonce_loss, same_text
from cyclevae.losses.latent import min_snr_weight
from cyclevae.processes.schedules import anneal
from cyclevae.processes.times import TimePolicy
from cyclevae.testing import toy_batch, toy_denoiser

pytestmark = pytest.mark.usefixtures("fresh_compiler")

DENOISER, TEXT, LATENT = toy_denoiser(seed=0)
BATCH = toy_batch()
TOKENS, MASK, LATENTS = BATCH.tokens, BATCH.attention_mask, BATCH.latents
PROCESSES = {"text_process": TEXT, "latent_process": LATENT}
EPSILON = cv.LatentProcess(prediction="epsilon", shape=(4,))


def compiled(function, **options):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def assert_same_as_eager(function):
    """The value and the gradients of the denoiser, with the draws of a seed, in one graph."""
    fast, counter = compiled(function)
    for seed in range(2):
        results = []
        for run in (fast, function):
            torch.manual_seed(seed)
            loss = run()
            parameters = list(DENOISER.module.parameters())
            slopes = (
                torch.autograd.grad(loss, parameters, allow_unused=True)
                if loss.requires_grad
                else ()
            )
            results.append((loss.detach(), slopes))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


CAP = anneal(0.5, 0.9, 10, 20)
POLICIES = {
    "full": TimePolicy("full", high=CAP),
    "uniform": TimePolicy("uniform", high=CAP),
    "independent": TimePolicy("uniform", high=CAP, stratified=False),
    "logit-normal": TimePolicy("logit_normal", high=CAP, mean=0.5),
}


def test_a_capped_epsilon_bridge_compiles():
    def run():
        z_hat = encode_text(
            DENOISER,
            TOKENS,
            MASK,
            text_process=TEXT,
            latent_process=EPSILON,
            time=0.9,
            bridge=LatentBridge(steps=4, threshold=2.81),
            policy=cv.GradientPolicy("last"),
        )
        return infonce_loss(z_hat, LATENTS, duplicates=same_text(TOKENS, MASK))

    assert_same_as_eager(run)


@pytest.mark.parametrize(
    ("distance", "distribution"),
    [("mse", "full"), ("cosine", "uniform"), ("normalized_mse", "logit_normal")],
)
def test_base_losses_compile(distance, distribution):
    policy = TimePolicy(distribution, high=0.9)
    options = {"time": policy, "space": "x0", "distance": distance, "min_snr": 5.0}
    assert_same_as_eager(
        lambda: cv.t2l_loss(DENOISER, TOKENS, LATENTS, MASK, **PROCESSES, **options)
    )


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_moving_cap_does_not_compile_again(policy, dynamic):
    """The second step is where dynamo learns that the step moves; then neither end of the way."""

    def weights(step):
        return min_snr_weight(LATENT, policy(5, step=step))

    fast, counter = compiled(weights, dynamic=dynamic)
    for step in (2, 4, 15, 25, 40):
        results = []
        for run in (fast, weights):
            torch.manual_seed(0)
            results.append(run(step))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2
