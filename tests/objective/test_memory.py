"""The memory of a step, in bytes of live tensors; and its counters can tell."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cyclevae as cv
from counters import PeakBytes, SavedBytes
from deep import deep
from recipes import every_term

WIDTH, ROWS, LENGTH, BLOCKS = 16, 16, 32, 8
PROCESSES = cv.TextProcess(2, 7, pad_id=0), cv.LatentProcess(shape=(WIDTH,))
FULL = cv.GradientPolicy("full")
NOTHING = {
    f"{term}_weight": 0.0
    for term in ("text", "latent", "unconditional", "cycle_text", "cycle_latent")
}
STEPS = {  # the objective, and the share of its memory that is left
    "default": ({}, 0.3),
    "full": ({"text_policy": FULL, "latent_policy": FULL, "text_bridge": "gumbel"}, 0.3),
    "four steps": ({"text_policy": FULL, "latent_bridge": cv.LatentBridge(steps=4)}, 0.2),
}


def pairs():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 7, (ROWS, LENGTH), generator=generator)
    return cv.Batch(tokens, tokens > 0, torch.randn(ROWS, WIDTH, generator=generator))


def memory(wrap, options):
    """Bytes at the peak of a step, and bytes that its forward keeps."""
    denoiser = deep(latent_dim=WIDTH, blocks=BLOCKS)
    objective = every_term(*PROCESSES, **options)
    with SavedBytes(denoiser.module.parameters()) as saved:
        loss = objective(wrap(denoiser), pairs(), step=0).loss
        kept = saved.live
    del loss
    assert saved.live == 0
    with PeakBytes() as held:
        objective(wrap(denoiser), pairs(), step=0).loss.backward()
    return held.peak, kept


@pytest.mark.parametrize(("options", "share"), STEPS.values(), ids=STEPS)
@pytest.mark.slow
def test_a_step_of_checkpointed_passes_has_the_memory_of_one(options, share):
    peak, kept = memory(lambda denoiser: denoiser, options)
    low, kept_low = memory(cv.checkpoint_passes, options)
    one, _ = memory(lambda denoiser: denoiser, {**NOTHING, "unconditional_weight": 1.0})
    assert low < share * peak
    assert one <= low < 1.2 * one
    assert kept_low < 0.05 * kept


# The counters


def test_a_chain_of_known_size():
    x = torch.ones(100, requires_grad=True)
    with PeakBytes() as held:
        y = x.exp().exp().exp()
        assert held.live == held.peak == 1200  # what came out of each is kept
        loss = y.sum()
        del y
        assert held.live == held.peak == 1204
        loss.backward()  # the gradient of the loss, and of the last one beside all three
        assert held.peak == 1204 + 4 + 400
        assert held.live == 400 + 4  # x.grad and the loss
        x.grad = None
        assert held.live == 4
    del loss
    assert held.live == 0


def test_what_is_freed_is_subtracted_and_views_count_once():
    with PeakBytes() as held:
        x = torch.zeros(100)
        views = x[:10], x.view(10, 10), x.detach()
        x.add_(1)
        assert held.live == held.peak == 400
        del x
        assert held.live == 400
        del views
        assert held.live == 0
        for _ in range(10):
            torch.zeros(50)
        assert (held.live, held.peak) == (0, 400)


def test_what_was_made_outside_is_not_counted():
    x = torch.zeros(100)
    with PeakBytes() as held:
        y = x.view(10, 10)
        x.mul_(2)
        torch.add(x, 1, out=x)
        assert held.live == 0
        y = y + 1
        assert held.live == 400
    del x
    assert held.live == 400
    del y
    assert held.live == 0


def test_saved_bytes_are_of_storages_that_are_no_parameters():
    layer = nn.Linear(10, 10)
    x = torch.ones(3, 10, requires_grad=True)
    with SavedBytes(layer.parameters()) as saved, cv.freeze(layer, "bias"):
        y = layer(x)  # keeps x, and a view of the weight
        assert saved.live == 120
        z = y.tanh()  # keeps what comes out
        w = z.view(30) * z.view(30)  # keeps it too
        assert saved.live == 240
    w.sum().backward()
    del y, z, w
    assert saved.live == 120 and x.grad is not None  # x itself is alive
    del x
    assert saved.live == 0


def test_saved_bytes_of_a_checkpointed_region_are_its_inputs():
    def waves(x):
        return x.sin().cos().exp()

    x = torch.ones(100, requires_grad=True)
    with SavedBytes() as saved:
        plain = waves(x)
        assert saved.live == 1200  # x, its sine, and what comes out
    with SavedBytes() as saved:
        checkpointed = checkpoint(waves, x, use_reentrant=False)
        assert saved.live == 400
    assert torch.equal(*[torch.autograd.grad(y.sum(), x)[0] for y in (plain, checkpointed)])
