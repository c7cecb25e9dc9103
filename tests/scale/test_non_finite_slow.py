"""A term that is not finite on one rank: every rank raises, skips or drops it alike."""

from dataclasses import replace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import cyclevae as cv
from cyclevae.testing import toy_batch
from distributed import gather, run_ranks
from test_non_finite import (
    EVERYTHING,
    OWN,
    QUICK,
    assert_same,
    batch,
    gradients,
    network,
    seeded,
    without,
)


def ddp_of(rank, bad, rule):
    model = network()
    model.bad = bad if rank == 0 else None
    module = cv.StepModule(cv.as_denoiser(model), replace(EVERYTHING, non_finite=rule))
    return model, DistributedDataParallel(module)


def zero_worker(rank):
    for bad, term in OWN.items():
        model, ddp = ddp_of(rank, bad, "zero")
        for _ in range(2):  # DDP notices in the second step what it missed in the first
            ddp.zero_grad()
            model.calls = 0
            output = ddp(batch(), 0, seeded())
            output.loss.backward()
            assert output.metrics["non_finite_terms"] == 1
            assert output.metrics["loss"].isfinite()
            assert_same(gradients(model), without({term}))  # of all ranks, as their batch is one


def test_zero_drops_the_term_on_every_rank():
    run_ranks(zero_worker)


def skip_worker(rank):
    model, ddp = ddp_of(rank, 5, "skip")
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.1, fused=True)
    before = [parameter.detach().clone() for parameter in ddp.parameters()]
    for bad in (5, None):
        model.bad, model.calls = bad if rank == 0 else None, 0
        optimizer.zero_grad()
        output = ddp(batch(), 0, seeded())
        output.loss.backward()
        assert bool(output.skip) == (bad == 5)
        cv.skip_update(optimizer, output.skip)
        optimizer.step()
        here, there = gather([parameter.detach() for parameter in ddp.parameters()])
        for mine, theirs, start in zip(here, there, before, strict=True):
            assert torch.equal(mine, theirs)
            if bad == 5:
                assert torch.equal(mine, start)
    assert any(not torch.equal(a, b) for a, b in zip(here, before, strict=True))


def test_skip_is_agreed_on():
    run_ranks(skip_worker)


def raise_worker(rank):
    _, ddp = ddp_of(rank, 5, "raise")
    here = "nan" if rank == 0 else r"[\d.e+-]+"
    with pytest.raises(FloatingPointError, match=rf"some rank: cycle_text \(here {here}\)"):
        ddp(batch(), 0, seeded())


def test_every_rank_raises():
    run_ranks(raise_worker)


def test_skip_compiles_and_the_others_say_that_they_do_not():
    torch._dynamo.reset()
    model = network().float()
    for rule, expected in (
        ("skip", None),
        ("zero", "does not compile"),
        ("raise", "does not compile: use 'skip'"),
    ):
        objective = replace(EVERYTHING, terms=QUICK, non_finite=rule)
        module = cv.StepModule(cv.as_denoiser(model), objective)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        if expected is None:
            assert not compiled(toy_batch(), 0).skip
        else:
            with pytest.raises(Exception, match=expected):
                compiled(toy_batch(), 0)
    torch._dynamo.reset()
