"""Checkpointed passes on ranks and under `torch.compile`."""

from functools import partial

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import cyclevae as cv
from cyclevae.scale.checkpointing import Checkpointed
from cyclevae.testing import check_ranks, toy_batch
from deep import Deep, deep
from distributed import run_ranks
from rank_cases import (
    FINDS_UNUSED,
    FIRST_STEP,
    FROZEN,
    LATENT,
    PARTS,
    STATIC,
    TEXT,
    fsdp,
    fsdp2,
    makes,
    network,
)
from recipes import RECIPES, every_term, recipe

pytestmark = pytest.mark.usefixtures("fresh_compiler")


# Ranks


def checkpointed(module):
    return cv.StepModule(cv.checkpoint_passes(module.denoiser), module.objective)


def ddp(module, wrap=DistributedDataParallel):
    return wrap(checkpointed(module))


@pytest.mark.parametrize(
    ("parts", "wrap"),
    [
        (PARTS, ddp),
        (PARTS, partial(ddp, wrap=FINDS_UNUSED)),
        (FIRST_STEP, partial(ddp, wrap=STATIC)),
    ],
    ids=["plain", "finds unused", "static graph"],
)
def test_ddp_around_the_step(parts, wrap):
    check_ranks(makes(kind=Deep, **FROZEN), parts[:2], wrap=wrap)


def fsdp_step(module):
    return checkpointed(fsdp(module))


@fsdp2
def test_fsdp2():
    check_ranks(makes(**FROZEN), PARTS[:2], wrap=fsdp_step)


def ddp_network_worker(rank):
    denoiser = cv.as_denoiser(DistributedDataParallel(network()))
    with pytest.raises(ValueError, match=r"run again .*Parallel\(StepModule\(checkpoint_passes\("):
        cv.checkpoint_passes(denoiser)
    # What is refused is what PyTorch fails at.
    objective = every_term(TEXT, LATENT)
    with pytest.raises(RuntimeError):
        for step in range(2):
            objective(Checkpointed(denoiser), toy_batch(), step=step).loss.backward()


def test_ddp_around_the_network_is_refused():
    run_ranks(ddp_network_worker, world_size=1)


# torch.compile


def compiled_step(denoiser, objective, compiler):
    return compiler(cv.StepModule(cv.checkpoint_passes(denoiser), objective))


def compiled_network(denoiser, objective, compiler):
    inside = cv.as_denoiser(compiler(denoiser.module))
    return cv.StepModule(cv.checkpoint_passes(inside), objective)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("default", compiled_step),
        ("default", compiled_network),
        ("frozen", compiled_step),
        ("gumbel bridge", compiled_step),
        ("three steps, last", compiled_network),
    ],
)
def test_a_compiled_step_and_a_compiled_network(name, compiled):
    denoiser, objective = deep(), recipe(RECIPES[name])
    parameters = list(denoiser.module.parameters())

    def outcome(module):
        torch.manual_seed(1)
        loss = module(toy_batch(rows=4), 3).loss
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    compiler = partial(torch.compile, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        outcome(compiled(denoiser, objective, compiler)),
        outcome(cv.StepModule(denoiser, objective)),
    )
