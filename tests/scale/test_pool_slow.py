"""Rows pooled over ranks: value and gradient of a prior are those of the joined batch."""

import time
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cyclevae as cv
from cyclevae.priors.moment import MomentForm, moment_prior
from cyclevae.scale.pool import pool_counts, pool_rows
from distributed import gather, run_ranks

SHARDS = {2: [(3, 5), (0, 4), (4, 0)], 3: [(2, 0, 3)]}
every_world = pytest.mark.parametrize("world_size", SHARDS)


def run(worker, *arguments, world_size=2):
    run_ranks(enter, worker, *arguments, world_size=world_size)


def enter(rank, worker, *arguments):
    worker(rank, *arguments)
    # In torch 2.5 destroying a group holds the interpreter's lock while it joins gloo's threads,
    # and hangs where one of them still waits for that lock to drop a tensor.
    time.sleep(0.2)


def moments(form):
    estimator = "biased" if form == "full_bures" else "unbiased"
    return lambda z: moment_prior(z, form=form, estimator=estimator, mean=0.1)


PRIORS = {form: moments(form) for form in get_args(MomentForm)} | {"mmd": cv.mmd_prior}


def batch(rows, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *shape, generator=generator, dtype=torch.float64)


def shard(whole, sizes, rank):
    return whole.split(sizes)[rank].clone()


def assert_exact(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def curved(rank, sizes):
    whole = batch(sum(sizes), 3)
    z = shard(whole, sizes, rank).requires_grad_()

    def gradient(z, along, pool=pool_rows):
        (g,) = torch.autograd.grad(cv.mmd_prior(pool(z)), z, create_graph=True)
        return torch.autograd.grad((g * along).sum(), z)[0]

    along = batch(sum(sizes), 3, seed=1)
    whole.requires_grad_()
    # each rank adds the whole value, so that the gradient, which is summed, comes once for each
    expected = gradient(whole, along, pool=lambda z: z) * len(sizes)
    assert_exact(gradient(z, shard(along, sizes, rank)), shard(expected, sizes, rank))


def test_second_derivatives_sum_over_ranks():
    run(curved, (3, 5))


def gradients(module):
    return [parameter.grad.clone() for parameter in module.parameters()]


def joined(prior, texts):
    """One process with all the rows."""
    module = network()
    loss = prior(module(texts))
    loss.backward()
    return loss.detach(), gradients(module)


def test_without_ranks_rows_are_returned_as_they_are():
    z = torch.randn(3, 2)
    assert pool_rows(z) is z


def counts_worker(rank, world_size):
    mine = [{"text": torch.tensor(float(rank)), "latent": torch.tensor(2.0)}] * (rank + 1)
    pooled = pool_counts(mine)
    ranks = range(world_size)
    assert_exact(pooled["text"], torch.tensor(sum(r * (r + 1) for r in ranks) / world_size))
    assert_exact(pooled["latent"], torch.tensor(sum(2.0 * (r + 1) for r in ranks) / world_size))
    assert mine[0]["latent"] == 2.0  # not summed in place


@every_world
def test_counts_are_summed_over_uneven_parts_and_averaged_over_ranks(world_size):
    run(counts_worker, world_size, world_size=world_size)


def rows_worker(rank, shards):
    for sizes in shards:
        for shape in ((3,), (2, 3), ()):
            check_rows(rank, sizes, shape)
    with torch.no_grad():
        assert not pool_rows(torch.ones(2, 2, requires_grad=True)).requires_grad
    assert not pool_rows(torch.ones(2, 2)).requires_grad


def check_rows(rank, sizes, shape):
    whole = batch(sum(sizes), *shape)
    z = shard(whole, sizes, rank).requires_grad_()
    pooled = pool_rows(z)
    assert torch.equal(pooled, whole)  # every bit, in the order of ranks
    weight = batch(sum(sizes), *shape, seed=1 + rank)  # another loss on every rank
    pooled.retain_grad()
    (pooled * weight).sum().backward()
    assert torch.equal(pooled.grad, weight)  # of this rank, not yet summed
    total = sum(batch(sum(sizes), *shape, seed=1 + r) for r in range(len(sizes)))
    assert_exact(z.grad, shard(total, sizes, rank))


@every_world
def test_rows_and_the_sum_of_their_gradients(world_size):
    run(rows_worker, SHARDS[world_size], world_size=world_size)


def priors_worker(rank, shards):
    for sizes in shards:
        check_averages(rank, sizes)
        check_ddp(rank, sizes)


def check_averages(rank, sizes):
    texts = batch(sum(sizes), 5)
    for prior in PRIORS.values():
        expected, expected_gradients = joined(prior, texts)
        module = network()
        loss = prior(pool_rows(module(shard(texts, sizes, rank))))
        loss.backward()
        assert_exact(loss.detach(), expected)
        for gradient, wanted in zip(gradients(module), expected_gradients, strict=True):
            dist.all_reduce(gradient)
            assert_exact(gradient / len(sizes), wanted)


def check_ddp(rank, sizes):
    texts = batch(sum(sizes), 5)
    mine = shard(texts, sizes, rank)
    for prior in PRIORS.values():
        expected, expected_gradients = joined(prior, texts)
        # buckets of one parameter: DDP's own collectives go on beside the one of the pool
        ddp = DistributedDataParallel(network(), bucket_cap_mb=1e-5)
        for _ in range(2):
            ddp.zero_grad()
            loss = prior(pool_rows(ddp(mine)))
            loss.backward()
            assert_exact(loss.detach(), expected)
            for gradient, wanted in zip(gradients(ddp), expected_gradients, strict=True):
                assert_exact(gradient, wanted)


@every_world
def test_priors_of_pooled_rows_are_those_of_the_joined_batch(world_size):
    """Every prior, its gradient averaged by hand and by DDP."""
    run(priors_worker, SHARDS[world_size], world_size=world_size)


def check_beside_a_local_loss(rank):
    """A prior beside a term of the rank's own rows, as in a training step."""
    texts, sizes = batch(8, 5), (3, 5)
    module = network()
    z = module(texts)
    (cv.mmd_prior(z) + z.square().sum() / 8).backward()
    ddp = DistributedDataParallel(network())
    z = ddp(shard(texts, sizes, rank))
    (cv.mmd_prior(pool_rows(z)) + z.square().sum() / 8 * 2).backward()
    for gradient, wanted in zip(gradients(ddp), gradients(module), strict=True):
        assert_exact(gradient, wanted)


def check_the_trap(rank):
    """What these tests would notice: statistics whose other ranks' part is detached."""
    texts, sizes = batch(8, 5), (3, 5)
    expected, expected_gradients = joined(lambda z: z.mean(dim=0).square().sum(), texts)
    ddp = DistributedDataParallel(network())
    here = ddp(shard(texts, sizes, rank)).sum(dim=0)
    everywhere = here.detach().clone()
    dist.all_reduce(everywhere)
    loss = ((here + (everywhere - here).detach()) / 8).square().sum()
    loss.backward()
    assert_exact(loss.detach(), expected)
    for gradient, wanted in zip(gradients(ddp), expected_gradients, strict=True):
        assert_exact(gradient, wanted / 2)


def ddp_worker(rank):
    check_beside_a_local_loss(rank)
    check_the_trap(rank)


def test_beside_a_loss_per_row_and_that_a_detached_rest_has_half_the_gradient():
    run(ddp_worker)


def group_worker(rank):
    """Two of three ranks pool; the third keeps its rows; a group of one is no group."""
    pair, alone = dist.new_group([0, 2]), dist.new_group([1])
    sizes = (1, 2, 3)
    whole = batch(6, 2)
    z = shard(whole, sizes, rank).requires_grad_()
    pooled = pool_rows(z, pair)
    if rank == 1:
        assert pooled is z and pool_rows(z, alone) is z
        return
    assert torch.equal(pooled, torch.cat([whole[:1], whole[3:]]))
    pooled.square().sum().backward()
    assert_exact(z.grad, 2 * 2 * z.detach())


def test_a_group_of_ranks():
    run(group_worker, world_size=3)


def half_worker(rank):
    for dtype, half_a_step in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        whole = (batch(8, 3) * 100).to(dtype)
        z = shard(whole, (3, 2, 3), rank).requires_grad_()
        pooled = pool_rows(z)
        assert pooled.dtype == dtype and torch.equal(pooled, whole)
        # whichever two of the three are summed first
        for big in range(3):
            z.grad = None
            weight = 1.0 if rank == big else half_a_step
            (pool_rows(z) * weight).sum().backward()
            assert z.grad.dtype == dtype
            assert torch.equal(z.grad, torch.full_like(z, 1 + 2 * half_a_step))


def test_gradients_of_halves_are_summed_in_fp32():
    run(half_worker, world_size=3)


def width_worker(rank):
    for shape in ((2, 3 + rank), (0,) if rank else (2, 3)):
        with pytest.raises(ValueError) as error:
            pool_rows(torch.zeros(shape))
        texts = gather(str(error.value))
        assert texts[0] == texts[1]
        assert texts[0].startswith("`z` must have rows of one size on all ranks, got [3, ")
        assert texts[0].endswith("a rank without rows pools an empty tensor of the same width")


def test_rows_of_different_sizes():
    run(width_worker)


def compile_worker(rank):
    whole = batch(8, 3)
    z = shard(whole, (3, 5), rank).requires_grad_()
    compiled = torch.compile(lambda z: cv.mmd_prior(pool_rows(2 * z)), backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(z), z)
    whole.requires_grad_()
    (expected,) = torch.autograd.grad(2 * cv.mmd_prior(2 * whole), whole)
    assert_exact(gradient, shard(expected, (3, 5), rank))


def test_compiled_with_a_graph_break():
    run(compile_worker)
