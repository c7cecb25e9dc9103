"""Unread logits where others wrap the network: ranks, sharding, compilers."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import cyclevae as cv
from cyclevae.testing import check_ranks, toy_batch
from distributed import run_ranks
from rank_cases import (
    FINDS_UNUSED,
    FROZEN,
    LATENT,
    PARTS,
    TEXT,
    batch,
    fsdp2,
    makes,
    network,
    shard,
)
from unread import UnreadToy


@pytest.mark.parametrize(
    ("wrap", "options"), [(DistributedDataParallel, {}), (FINDS_UNUSED, FROZEN)]
)
def test_ddp_of_a_step(wrap, options):
    check_ranks(makes(kind=UnreadToy, **options), PARTS[:2], wrap=wrap)


def sharded_step(module):
    """The head in the root unit, that of the step."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(module.network.shared, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def sharded_network(module):
    """The head in the unit of the network, which is the root."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(module.network.shared, mesh=mesh)
    fully_shard(module.network, mesh=mesh)
    return module


def sharded_head(module):
    """The head in a unit of its own, whose logits are computed at its call."""
    shard(module.network)
    return module


@fsdp2
@pytest.mark.parametrize(
    ("wrap", "options"), [(sharded_step, {}), (sharded_network, {}), (sharded_head, FROZEN)]
)
def test_fsdp2(wrap, options):
    check_ranks(makes(kind=UnreadToy, **options), PARTS[:2], wrap=wrap)


def sharded_twice(rank):
    """The head in a unit that is not the root: it is sharded again before logits are read."""
    step = cv.StepModule(
        cv.as_denoiser(network(UnreadToy)), cv.CycleObjective(TEXT, LATENT, [cv.Text()])
    )
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(step.network, mesh=mesh)
    fully_shard(step, mesh=mesh)
    with pytest.raises(RuntimeError, match="sharded again before its logits were read"):
        step(batch(3, 0, 0, seed=3), step=0)


@fsdp2
def test_a_weight_that_was_given_back_is_refused():
    run_ranks(sharded_twice)


def of_one_network(rank):
    """DDP around the network alone looks for what one pass leaves unused: not the text head."""
    torch.manual_seed(0)
    module = network(UnreadToy)
    denoiser = cv.as_denoiser(FINDS_UNUSED(module))
    tokens, mask, latents = toy_batch(seed=rank)[:3]
    logits = cv.l2t(denoiser, latents, mask, text_process=TEXT)
    cv.text_loss(logits, tokens, mask).backward()
    grads = [torch.empty_like(module.text_head.weight) for _ in range(2)]
    dist.all_gather(grads, module.text_head.weight.grad)
    assert grads[0].any()
    torch.testing.assert_close(*grads)


def test_ddp_of_the_network_alone():
    run_ranks(of_one_network)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("part", ["step", "network"])
def test_a_step_compiles_to_one_graph(part):
    found = []
    for wrap in (lambda x: x, lambda x: torch.compile(x, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        module = network(UnreadToy)
        denoiser = cv.as_denoiser(wrap(module) if part == "network" else module)
        step = cv.StepModule(denoiser, cv.CycleObjective(TEXT, LATENT))
        step = wrap(step) if part == "step" else step
        torch.manual_seed(0)
        loss = step(toy_batch(0), step=3).loss
        found.append((loss, *torch.autograd.grad(loss, module.parameters())))
    torch.testing.assert_close(*found)
