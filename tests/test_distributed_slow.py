"""Ranks: replicas stay equal, and the gradient is that of one process on the joined batch.

Gradients are compared in float64 on a model that is told no noise, so that ranks need not draw the
same: all per-sample terms are then functions of the batch.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import cyclevae as cv
from cyclevae.testing import ToyNetwork, check_denoiser, toy_batch, toy_denoiser
from distributed import gather, run_ranks

pytestmark = pytest.mark.slow
TORCH_2_5 = torch.__version__.startswith("2.5.")
TEXT, LATENT = cv.TextProcess(2, 7, pad_id=0), cv.LatentProcess("continuous_cosine", shape=(4,))
EXACT = cv.CycleObjective(TEXT, LATENT, unconditional_weight=0.0, cycle_text_weight=2.0)


class Noiseless(ToyNetwork):
    """Blind to latents at full noise, where the target of v is then a function of the data."""

    def forward(self, tokens, latents, *, latent_time, **state):
        seen = latents * (1 - latent_time)[:, None]
        return super().forward(tokens, seen, latent_time=latent_time, **state)


def noiseless():
    torch.manual_seed(0)
    return Noiseless(vocab_size=7, latent_dim=4).double()


def shares():
    """One batch of three pairs and what each of two ranks sees of it; rank 1 sees pairs only."""
    whole = toy_batch(seed=3)
    whole = whole._replace(
        latents=whole.latents.double(),
        unpaired_latents=whole.unpaired_latents.double(),
        pseudo_text_mask=torch.arange(4) < torch.tensor([[4], [1], [3]]),
    )
    first = whole._replace(
        tokens=whole.tokens[:1, :4],
        attention_mask=whole.attention_mask[:1, :4],
        latents=whole.latents[:1],
    )
    second = cv.Batch(whole.tokens[1:], whole.attention_mask[1:], whole.latents[1:])
    assert not whole.attention_mask[:1, 4:].any()
    return whole, (first, second)


def joined_gradients(objective=EXACT):
    network = noiseless()
    objective(cv.as_denoiser(network), shares()[0], step=0).loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def global_counts(batch, steps=1, objective=EXACT):
    """Sum the counts over ranks and divide by their number, for the average that DDP takes."""
    counts = objective.counts(batch)
    for count in counts.values():
        dist.all_reduce(count)
    return {name: steps * count / dist.get_world_size() for name, count in counts.items()}


def assert_joined(gradients, objective=EXACT):
    expected = joined_gradients(objective)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def test_the_noiseless_model_is_a_function_of_the_batch():
    """What makes the comparisons below exact, and that they would notice a missing row."""
    assert_joined(joined_gradients())
    network = noiseless()
    for batch in shares()[1]:  # without global counts
        (EXACT(cv.as_denoiser(network), batch, step=0).loss / 2).backward()
    with pytest.raises(AssertionError):
        assert_joined({name: p.grad for name, p in network.named_parameters()})


# DDP around the step


def replicas_worker(rank, find_unused_parameters):
    batch = toy_batch(seed=rank)
    if rank == 1:
        batch = cv.Batch(batch.tokens, batch.attention_mask, batch.latents)
    denoiser, text, latent = toy_denoiser(seed=0)
    objective = cv.CycleObjective(
        text, latent, cycle_text_weight=cv.ramp(1.0, warmup_steps=2), prior_weight=0.1
    )
    module = cv.StepModule(denoiser, objective)
    ddp = DistributedDataParallel(module, find_unused_parameters=find_unused_parameters)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    before = [parameter.clone() for parameter in module.parameters()]
    for step in range(4):
        optimizer.zero_grad()
        output = ddp(batch, step, generator)
        output.loss.backward()
        optimizer.step()
        plans = gather(sorted(output.metrics))
        assert plans[0] == plans[1]
        assert ("cycle_text_loss" in plans[0]) == (step >= 2)
    here, there = gather([parameter.detach() for parameter in module.parameters()])
    for mine, theirs, start in zip(here, there, before, strict=True):
        assert torch.equal(mine, theirs) and not torch.equal(mine, start)


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_replicas_stay_equal_where_a_rank_lacks_unpaired_rows(find_unused_parameters):
    run_ranks(replicas_worker, find_unused_parameters)


def ddp_worker(rank):
    batch = shares()[1][rank]
    module = cv.StepModule(cv.as_denoiser(noiseless()), EXACT)

    def gradients():
        return {name: p.grad for name, p in module.network.named_parameters()}

    for find_unused_parameters in (False, True):
        ddp = DistributedDataParallel(module, find_unused_parameters=find_unused_parameters)
        for _ in range(2):
            module.zero_grad()
            ddp(batch, 0, counts=global_counts(batch)).loss.backward()
            assert_joined(gradients())
        # accumulation: the same rows twice, with counts summed over both
        module.zero_grad()
        with ddp.no_sync():
            ddp(batch, 0, counts=global_counts(batch, steps=2)).loss.backward()
        ddp(batch, 0, counts=global_counts(batch, steps=2)).loss.backward()
        assert_joined(gradients())


def test_ddp_gradients_with_global_counts_are_those_of_the_joined_batch():
    run_ranks(ddp_worker)


def ddp_denoiser_worker(rank):
    """DDP around the network alone, with the objective outside."""
    batch = shares()[1][rank]
    ddp = DistributedDataParallel(noiseless())
    denoiser = cv.as_denoiser(ddp)
    check_denoiser(denoiser, TEXT, LATENT, dtype=torch.float64)
    policy = cv.GradientPolicy(freeze=("text_head.*",))
    objective = replace(EXACT, text_policy=policy)
    for _ in range(2):
        ddp.zero_grad()
        counts = global_counts(batch, objective=objective)
        objective(denoiser, batch, step=0, counts=counts).loss.backward()
        gradients = {name: p.grad for name, p in denoiser.module.named_parameters()}
        assert_joined(gradients, objective)


def test_ddp_around_the_network_with_a_frozen_part():
    run_ranks(ddp_denoiser_worker)


def unused_worker(rank):
    batch = shares()[1][rank]
    denoiser = cv.as_denoiser(DistributedDataParallel(noiseless(), find_unused_parameters=True))
    message = r"find_unused_parameters=True\), and this step runs several passes.*StepModule\("
    with pytest.raises(ValueError, match=message):
        EXACT(denoiser, batch, step=0)
    with torch.no_grad():
        EXACT(denoiser, batch, step=0)
    # What is refused is what PyTorch fails at, and the cures work.
    with pytest.raises(RuntimeError, match=r"ready (twice|only once)"):
        losses(denoiser, batch).backward()
    losses(cv.as_denoiser(DistributedDataParallel(noiseless())), batch).backward()
    # The unconditional pass, the last one, reaches every parameter.
    last = replace(EXACT, unconditional_weight=1.0)
    fresh = cv.as_denoiser(DistributedDataParallel(noiseless(), find_unused_parameters=True))
    for _ in range(2):
        last(fresh, batch, step=0).loss.backward()


def losses(denoiser, batch):
    """Two passes by hand, the encoder first: the last does not reach the latent head."""
    texts = batch.tokens, batch.attention_mask
    processes = {"text_process": TEXT, "latent_process": LATENT}
    options = {"policy": cv.GradientPolicy("full"), "noise": torch.zeros_like(batch.latents)}
    z_hat = cv.encode_text(denoiser, *texts, **options, **processes)
    return z_hat.square().sum() + cv.cycle_text_loss(denoiser, *texts, z_hat=z_hat, **processes)


def test_ddp_around_the_network_that_looks_for_unused_parameters_is_refused():
    run_ranks(unused_worker)


def static_worker(rank, wrapped):
    """A plan that never changes, frozen parts, and accumulation from the second step on."""
    batch, policy = shares()[1][rank], cv.GradientPolicy(freeze=("text_head.*",))
    objective = replace(EXACT, text_policy=policy)
    denoiser = cv.as_denoiser(noiseless())
    if wrapped == "step":
        ddp = run = DistributedDataParallel(cv.StepModule(denoiser, objective), static_graph=True)
    else:
        ddp = DistributedDataParallel(denoiser.module, static_graph=True)

        def run(batch, step, counts):
            return objective(cv.as_denoiser(ddp), batch, step=step, counts=counts)

    for step in range(3):
        counts = global_counts(batch, objective=objective)
        ddp.zero_grad()
        run(batch, step, counts=counts).loss.backward()
        gradients = {name: p.grad for name, p in denoiser.module.named_parameters()}
        assert_joined(gradients, objective)
    counts = global_counts(batch, steps=2, objective=objective)
    ddp.zero_grad()
    with ddp.no_sync():
        run(batch, 3, counts=counts).loss.backward()
    run(batch, 3, counts=counts).loss.backward()
    gradients = {name: p.grad for name, p in denoiser.module.named_parameters()}
    assert_joined(gradients, objective)


@pytest.mark.parametrize("wrapped", ["step", "network"])
def test_ddp_with_a_static_graph_and_a_constant_plan(wrapped):
    run_ranks(static_worker, wrapped)


def static_first_step_worker(rank):
    """PyTorch's own limit, not of `freeze`: it learns the graph from a step that synchronises."""
    module = cv.StepModule(cv.as_denoiser(noiseless()), EXACT)
    ddp = DistributedDataParallel(module, static_graph=True)
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT"), ddp.no_sync():
        ddp(shares()[1][rank], 0).loss.backward()


def test_a_static_graph_must_synchronise_its_first_step():
    run_ranks(static_first_step_worker)


# FSDP2


def fsdp_worker(rank):
    from torch.distributed.fsdp import fully_shard

    batch, mesh = shares()[1][rank], init_device_mesh("cpu", (2,))
    network = noiseless()
    for block in (network.shared, network.text_head):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    denoiser = cv.as_denoiser(network)
    check_denoiser(denoiser, TEXT, LATENT, dtype=torch.float64)
    optimizer = torch.optim.AdamW(network.parameters())
    for objective in (EXACT, replace(EXACT, text_policy=cv.GradientPolicy(freeze=("shared.*",)))):
        for run in (objective, cv.StepModule(denoiser, objective)):
            network.zero_grad()
            counts = global_counts(batch, objective=objective)
            if run is objective:
                loss = objective(denoiser, batch, step=0, counts=counts).loss
            else:
                loss = run(batch, 0, counts=counts).loss
            loss.backward()
            gradients = {n: p.grad.full_tensor() for n, p in network.named_parameters()}
            assert_joined(gradients, objective)
    optimizer.step()
    here, there = gather([p.full_tensor().detach() for p in network.parameters()])
    for mine, theirs, start in zip(here, there, noiseless().parameters(), strict=True):
        assert torch.equal(mine, theirs) and not torch.equal(mine, start)


@pytest.mark.skipif(TORCH_2_5, reason="FSDP2 of torch 2.5 needs CUDA")
def test_fsdp2_gradients_with_global_counts_are_those_of_the_joined_batch():
    run_ranks(fsdp_worker)
