"""Whose machine is another: consoles, devices, builds of torch."""

import pytest
import torch

import cyclevae as cv
from cyclevae import __main__ as tour
from cyclevae.diagnostics import cycle_report, gradient_ledger
from cyclevae.testing import toy_batch, toy_denoiser
from recipes import RECIPES, recipe

_, TEXT, LATENT = toy_denoiser(seed=0)
OBJECTIVES = {name: recipe(options) for name, options in RECIPES.items()}
every_recipe = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def step(objective):
    denoiser = toy_denoiser(seed=0)[0]
    teacher = cv.Teacher(denoiser.module).denoiser
    generator = torch.Generator().manual_seed(0)
    output = objective(denoiser, toy_batch(rows=4), step=3, generator=generator, teacher=teacher)
    output.loss.backward()
    return output, [p.grad for p in denoiser.module.parameters()]


@every_recipe
def test_a_default_device_is_not_that_of_the_batch(objective):
    """Who calls `set_default_device`: https://github.com/pytorch/pytorch/issues/61457.

    `meta` stands for another device than that of the batch: what is made there by mistake fails.
    """
    expected, gradients = step(objective)
    batch, network = toy_batch(rows=4), toy_denoiser(seed=0)[0]
    teacher = cv.Teacher(network.module).denoiser
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        output = objective(network, batch, step=3, generator=generator, teacher=teacher)
        output.loss.backward()
        assert all(not count.is_meta for count in objective.counts(batch).values())
    assert torch.equal(output.loss, expected.loss)
    assert all(not value.is_meta for value in output.metrics.values())
    found = [p.grad for p in network.module.parameters()]
    torch.testing.assert_close(found, gradients, rtol=0, atol=0)


def test_objects_are_made_under_any_default_device():
    """What a number says is worked out on the host, for no wait and no crash."""

    def late(t):
        return (1 - t**2).sqrt(), t

    class Late(cv.TextProcess):
        def shares(self, time):
            return cv.Shares(1 - time**2, time**2, torch.zeros_like(time))

    with torch.device("meta"):
        for options in RECIPES.values():
            objective = recipe(options)
            assert cv.CycleObjective.from_config(objective.to_config()) == objective
        cv.LatentProcess(late, prediction="v")
        for schedule in (cv.Flow(3.0), cv.EDM()):
            cv.LatentProcess(schedule, prediction="velocity", max_gain=100.0)
        cv.UniformTextProcess(vocab_size=6)
        cv.HybridTextProcess(mask_id=2, vocab_size=6, p_uniform=0.1)
        assert Late(mask_id=2, vocab_size=6).counted_share(0.5) == 0.25
        assert cv.TimePolicy("logit_normal").average() > 0


@every_recipe
def test_deterministic_algorithms_are_enough(objective):
    """Who sets `use_deterministic_algorithms`: what has no such algorithm raises."""
    torch.use_deterministic_algorithms(True)
    try:
        first, second = step(objective), step(objective)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0].loss, second[0].loss)


def test_a_build_without_distributed(monkeypatch):
    """Whose torch has no `distributed`, as some of macOS and Windows."""
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    terms = [cv.Text(), cv.Latent(), cv.Prior("mmd", pool=True)]
    objective = cv.CycleObjective(TEXT, LATENT, terms, non_finite="skip")
    denoiser, batch = toy_denoiser(seed=0)[0], toy_batch(rows=4)
    output = objective(denoiser, batch, step=0, counts=cv.pool_counts([objective.counts(batch)]))
    output.loss.backward()
    assert not output.skip


def test_what_is_printed_is_ascii():
    """Whose console knows cp1252: https://github.com/drandyhaas/KiCadRoutingTools/issues/152."""
    denoiser = toy_denoiser(seed=0)[0]
    objective = cv.CycleObjective(TEXT, LATENT)
    report = cycle_report(
        denoiser, toy_batch(rows=8), text_process=TEXT, latent_process=LATENT, samples=1
    )
    losses = objective.losses(denoiser, toy_batch(seed=0), step=0)
    ledger = gradient_ledger(losses, {"all": denoiser.module.parameters()})
    printed = [report, report.summary, ledger, objective.describe(), objective, tour.READ_ON]
    for text in map(str, [*printed, tour.__doc__]):
        assert text.isascii(), text
