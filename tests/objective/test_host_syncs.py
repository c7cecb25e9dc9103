"""A step reads no value on the host, and its counter can tell."""

import pytest
import torch

import cyclevae as cv
from counters import HostSyncs
from cyclevae.testing import toy_batch, toy_denoiser
from recipes import HYBRID, RECIPES, recipe
from running import LATENT, MADE, TEXT, of
from test_own_term import BESIDE, RHYME

META = torch.device("meta")


OBJECTIVES = {name: recipe(options) for name, options in RECIPES.items()} | {
    "recommended": cv.CycleObjective(TEXT, LATENT),
    "hybrid text": cv.CycleObjective(
        HYBRID,
        LATENT,
        [
            cv.Text(weighting="bound"),
            cv.Latent(),
            cv.CycleLatent(bridge=cv.TextBridge("best", steps=2)),
        ],
    ),
    "a term of one's own": of(*BESIDE, RHYME),
    "made by others": of(*MADE),
    "channel labels": of(cv.Latent(), cv.Distill(top=5, variance=1.0)),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_step_and_its_backward_wait_for_no_value(objective):
    network = toy_denoiser(seed=0)[0].module.to(META)
    teacher = cv.Teacher(network).denoiser
    batch = cv.Batch(*[part.to(META) for part in toy_batch(rows=4)[:6]])
    with HostSyncs() as syncs:
        output = objective(cv.as_denoiser(network), batch, step=3, teacher=teacher)
        output.loss.backward()
        counts = objective.counts(batch)
    assert syncs.found == []
    assert all(value.is_meta for value in [*output.metrics.values(), *counts.values()])
    assert any(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("schedule", ["flow", "edm"])
def test_flow_matching_waits_for_no_value(schedule):
    latent = cv.LatentProcess(schedule, "velocity", max_gain=100.0)
    times = cv.TimePolicy("uniform", low=0.1)
    terms = [
        cv.Latent(time=times, space="x0", weighting=cv.LogitNormal()),
        cv.Unconditional(latent_weighting=cv.LogitNormal()),
        cv.CycleText(bridge=cv.LatentBridge(steps=2)),
        cv.Prior("learned"),
    ]
    objective = cv.CycleObjective(TEXT, latent, terms)
    network = toy_denoiser(seed=0)[0].module.to(META)
    denoiser, teacher = cv.as_denoiser(network, clean_at=1), cv.Teacher(network).denoiser
    batch = cv.Batch(*[part.to(META) for part in toy_batch(rows=4)[:6]])
    with HostSyncs() as syncs:
        objective(denoiser, batch, step=3, teacher=teacher).loss.backward()
    assert syncs.found == []


MASK = torch.zeros(3, dtype=torch.bool)
SYNCS = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "if": (lambda x: 1 if (x > 0).any() else 0, "_local_scalar_dense"),
    "f-string": (lambda x: f"{x.sum():.2f}", "_local_scalar_dense"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "where": (lambda x: torch.where(x > 0), "nonzero"),
    "equal": (lambda x: torch.equal(x, x + 1), "equal"),
    "allclose": (lambda x: torch.allclose(x, x), "allclose"),
    "masked_select": (lambda x: x.masked_select(MASK), "masked_select"),
    "boolean index": (lambda x: x[MASK], "index"),
    "boolean assignment": (lambda x: x.clone().index_put_((MASK,), torch.ones(())), "index_put_"),
    "repeats": (lambda x: x.repeat_interleave(torch.tensor([1, 2, 0])), "repeat_interleave"),
    "unique": (lambda x: x.unique(), "_unique2"),
}


@pytest.mark.parametrize(("function", "name"), SYNCS.values(), ids=SYNCS)
def test_the_counter_finds_a_synchronisation(function, name):
    with HostSyncs("cpu") as syncs:
        function(torch.ones(3))
    with HostSyncs() as elsewhere:
        function(torch.ones(3))
    assert elsewhere.found == []
    assert any(found.startswith(f"aten.{name}.") for found in syncs.found), syncs.found


@pytest.mark.parametrize("read", [torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item])
def test_reads_that_are_no_operators_fail_on_meta(read):
    with pytest.raises((NotImplementedError, RuntimeError, TypeError)):
        read(torch.ones((), device=META))


def test_the_counter_leaves_other_work_alone():
    with HostSyncs("cpu") as syncs:
        x = torch.ones(3)
        x[torch.tensor([0, 1])] + x.where(MASK, 0)[:2] + x[None, 1:].repeat(2, 1).sum()
        x.repeat_interleave(2)
    assert syncs.found == []
