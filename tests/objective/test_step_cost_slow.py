"""What a step costs, counted: passes, FLOPs, saved bytes, and how they grow. Never by a clock."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cyclevae as cv
from counters import PeakBytes, SavedBytes
from cyclevae.testing import ToyNetwork
from recipes import every_term

ROOT = Path(__file__).parents[2]
META = torch.device("meta")
WEIGHTS = {"text": 1.0, "latent": 5.0, "cycle_text": 2.0, "cycle_latent": 10.0, "prior": 0.1}


@pytest.fixture(scope="module")
def examples():
    """The network of `examples/sentences` on the real `mmdit`, and the plain step of the bench."""
    folders = [str(ROOT / "examples" / name) for name in ("sentences", "bench")]
    sys.path[:0] = folders
    from mmdit_model import MMDiTDenoiser
    from plain import plain_step

    yield MMDiTDenoiser, plain_step
    del sys.path[: len(folders)]


def objective(v, **options):
    moments = {"prior": "moment", "prior_options": {"estimator": "biased"}}
    weights = {f"{term}_weight": weight for term, weight in WEIGHTS.items()}
    return every_term(
        cv.TextProcess(2, v, pad_id=0),
        cv.LatentProcess("continuous_cosine"),
        **{"unconditional_weight": 0.0, **moments, **weights, **options},
    )


def pairs(rows, length, v, d, device="cpu"):
    tokens = torch.randint(3, v, (rows, length), device=device)
    mask = torch.ones(rows, length, dtype=torch.bool, device=device)
    return cv.Batch(tokens, mask, torch.randn(rows, d, device=device))


def flops(function):
    with FlopCounterMode(display=False) as count:
        function()
    return count.get_total_flops()


# The step; tests/host counts it on the host's own model


@pytest.fixture(scope="module")
def small(examples):
    network = examples[0](1000, 16, length=16, width=32, depth=1)
    return cv.as_denoiser(network), pairs(4, 16, 1000, 16)


HEAD = 2 * 4 * 16 * 32 * 1000  # FLOPs of the text head over all positions of `small`


def bare(denoiser, batch, *needs):
    """FLOPs of bare passes and their backward."""
    tokens, mask, latents = batch[:3]
    times = latents.new_zeros(len(latents))
    state = {"text_time": times, "latent_time": times, "attention_mask": mask}

    def run():
        for need in needs:
            output = denoiser.denoise(tokens, latents, **state, need=need)
            sum(part.sum() for part in output if part is not None).backward()

    return flops(run)


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, ("logits", "logits", "latents", "latents")),
        ({"cycle_text_weight": 0.0}, ("logits", "latents", "latents")),
        ({"cycle_latent_weight": 0.0}, ("logits", "logits", "latents")),
        ({"cycle_text_weight": 0.0, "cycle_latent_weight": 0.0}, ("logits", "latents")),
    ],
    ids=["four passes", "no text cycle", "no latent cycle", "no cycle"],
)
def test_a_step_costs_its_passes(small, options, needs):
    denoiser, batch = small
    o = objective(1000, **options)
    found = flops(lambda: o(denoiser, batch, step=0).loss.backward())
    assert o.passes(0) == len(needs)
    # also where a pass teaches and writes; but for the gradients of its bias, products here
    assert found == pytest.approx(bare(denoiser, batch, *needs), rel=1e-2)


def test_a_joined_pass_costs_the_latent_head_of_all_rows(small):
    denoiser, batch = small
    options = {"cycle_text_weight": 0.0, "cycle_latent_weight": 0.0, "join_passes": True}
    found = flops(lambda: objective(1000, **options)(denoiser, batch, step=0).loss.backward())
    unread = 3 * HEAD  # of the rows that are encoded
    assert found == pytest.approx(bare(denoiser, batch, "both", "both") - unread, rel=1e-2)


# Against the step that one writes without the library


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.70), (torch.float32, 1.0)])
def test_a_step_keeps_less_than_the_plain_one(examples, dtype, share):
    network, plain_step = examples
    v, d = 16_384, 16
    module, batch = network(v, d, length=64, width=64, depth=1), pairs(4, 64, v, d)
    o, denoiser = objective(v), cv.as_denoiser(module)
    kept = []
    for run in (
        lambda: o(denoiser, batch, step=0).loss,
        lambda: plain_step(module, *batch[:3], 2, WEIGHTS)[0],
    ):
        random.seed(0)  # of the stream that a block of mmdit begins with
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        with SavedBytes(module.parameters()) as saved, mixed:
            loss = run()
            kept.append(saved.live)
        del loss
    assert kept[0] / kept[1] <= share + 0.001, kept  # a few numbers per token


# How it grows


def degree(sizes, costs):
    """The slope of costs over sizes on logarithmic axes, without what does not grow."""
    costs = np.array(costs, dtype=float)
    steps = np.diff(costs) / np.diff(sizes)  # the constant part falls out
    middles = (np.array(sizes[:-1]) + np.array(sizes[1:])) / 2
    return 1 + np.polyfit(np.log(middles), np.log(steps), 1)[0]


def peak(function):
    with PeakBytes() as held:
        function()
    return held.peak


SIZES = (16, 32, 64, 128)


@pytest.mark.parametrize("name", ["rows", "length", "v", "d"])
def test_a_step_grows_linearly(name):
    """On the toy: one of transformers grows with the square of the length by itself."""

    def step(**size):
        shape = {"rows": 8, "length": 8, "v": 64, "d": 8, **size}
        with META:
            network = ToyNetwork(shape["v"], shape["d"])
        batch = pairs(**shape, device=META)
        o = objective(shape["v"])
        return lambda: o(cv.as_denoiser(network), batch, step=0).loss.backward()

    most = 2 if name == "d" else 1  # the matrices of the toy are [d, d]
    for cost in (flops, peak):
        if cost is peak or name != "length":
            costs = [cost(step(**{name: size})) for size in SIZES]
            assert degree(SIZES, costs) <= most + 0.15, (cost, costs)


@pytest.mark.parametrize("name", ["rows", "length", "v"])
def test_the_text_loss_grows_linearly(name):
    def loss(**size):
        rows, length, v = {"rows": 32, "length": 32, "v": 64, **size}.values()
        logits = torch.zeros(rows, length, v, requires_grad=True)
        batch = pairs(rows, length, v, 1)
        return lambda: cv.text_loss(logits, *batch[:2]).backward()

    costs = [peak(loss(**{name: size})) for size in SIZES]
    assert degree(SIZES, costs) == pytest.approx(1, abs=0.05)


def mmd(rows, d, scales=1):
    z = torch.randn(rows, d, requires_grad=True)
    return lambda: cv.mmd_prior(z, scales=tuple(range(1, scales + 1))).backward()


def test_mmd_grows_with_the_square_of_rows_and_linearly_with_dimensions():
    assert degree(SIZES, [flops(mmd(n, 64)) for n in SIZES]) == pytest.approx(2, abs=0.1)
    assert degree(SIZES, [flops(mmd(64, n)) for n in SIZES]) == pytest.approx(1, abs=0.1)


def test_scales_share_the_distances():
    one, two, four = (flops(mmd(256, 64, scales=n)) for n in (1, 2, 4))
    assert four - two == 2 * (two - one) < 0.01 * one
