"""Ranks: replicas stay equal, and the gradient is that of one process on the joined batch."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import cyclevae as cv
from cyclevae.testing import check_denoiser, check_ranks, join_batches, toy_batch, toy_denoiser
from distributed import gather, run_ranks
from rank_cases import (
    FINDS_UNUSED,
    FIRST_STEP,
    FROZEN,
    LATENT,
    ONLY,
    PARTS,
    STATIC,
    TEXT,
    UNIFORM,
    Forgetful,
    Normalised,
    batch,
    fsdp,
    fsdp2,
    makes,
    network,
    shard,
)
from recipes import every_term
from test_own_term import make as make_rhyme

# Together all per-sample terms; test_ranks.py takes them one by one
RELAXED = {
    "text_bridge": "gumbel",
    "latent_policy": cv.GradientPolicy("full"),
    "text_policy": cv.GradientPolicy("full"),
    "sleep_weight": 1.0,
    "text_marginal_weight": 1.0,
    "prior": "learned",
    "prior_weight": 1.0,
}
SAMPLED = {
    "text_bridge": cv.TextBridge("rloo", samples=2),
    "latent_policy": cv.GradientPolicy("full"),
    "base_latent_time": UNIFORM,
    "bridge_time": UNIFORM,
    "prior": "ddvi",
    "prior_weight": 1.0,
}


# Gradients: DDP around the step


@pytest.mark.parametrize(
    ("steps", "wrap"),
    [(1, DistributedDataParallel), (2, FINDS_UNUSED), (3, DistributedDataParallel)],
)
def test_two_ranks_of_which_one_lacks_unpaired_rows(steps, wrap):
    first, second = [*PARTS[0], batch(1, 1, 0, seed=6)], [*PARTS[1], batch(1, 0, 0, seed=7)]
    check_ranks(makes(), [first[:steps], second[:steps]], wrap=wrap)


@pytest.mark.parametrize("options", [{}, RELAXED, SAMPLED], ids=["default", "relaxed", "sampled"])
def test_three_ranks_with_different_numbers_of_steps(options):
    check_ranks(makes(**options), PARTS)


def test_unused_parameters():
    make = makes(latent_weight=0.0, unconditional_weight=0.0, cycle_latent_weight=0.0)
    make = partial(make, cycle_text_weight=0.0)  # the text loss alone
    check_ranks(make, PARTS[:2], wrap=FINDS_UNUSED)
    with pytest.raises(AssertionError, match=r"rank \d failed:(.|\n)*find_unused_parameters=True"):
        check_ranks(make, PARTS[:2])


def test_a_term_of_ones_own():
    check_ranks(make_rhyme, PARTS)


@pytest.mark.parametrize("prior", ["moment", "mmd", "sigreg"])
def test_priors_of_pooled_rows(prior):
    check_ranks(makes(prior=prior, prior_weight=1.0, pool_prior=True), FIRST_STEP)


# Gradients: other wrappers


def ddp_network(module):
    """DDP around the network alone, with the objective outside."""
    denoiser = cv.as_denoiser(DistributedDataParallel(module.network))
    check_denoiser(denoiser, TEXT, LATENT, dtype=torch.float64)
    return cv.StepModule(denoiser, module.objective)


def test_ddp_around_the_network_with_a_frozen_part():
    check_ranks(makes(**FROZEN), PARTS[:2], wrap=ddp_network)


def settled(module):
    """A static graph is learned in a step that synchronises; accumulation may come then."""
    ddp = STATIC(module)
    ddp(batch(2, 1, 1), 0).loss.backward()
    return ddp


def static_network(module):
    denoiser = cv.as_denoiser(STATIC(module.network))
    return cv.StepModule(denoiser, module.objective)


@pytest.mark.parametrize(
    ("parts", "wrap"), [(FIRST_STEP, STATIC), (PARTS, settled), (FIRST_STEP, static_network)]
)
def test_a_static_graph_with_a_constant_plan_and_a_frozen_part(parts, wrap):
    check_ranks(makes(**FROZEN), parts[:2], wrap=wrap)


def test_a_static_graph_must_synchronise_its_first_step():
    """PyTorch's own limit, not of `freeze`: it learns the graph from a step that synchronises."""
    with pytest.raises(AssertionError, match=r"rank \d failed:(.|\n)*INTERNAL ASSERT"):
        check_ranks(makes(), PARTS[:2], wrap=STATIC)


def unused_worker(rank):
    mine = PARTS[rank][0]
    objective = makes(unconditional_weight=0.0)().objective
    denoiser = cv.as_denoiser(FINDS_UNUSED(network().float()))
    message = r"find_unused_parameters=True\), and this step runs several passes.*StepModule\("
    with pytest.raises(ValueError, match=message):
        objective(denoiser, mine, step=0)
    with torch.no_grad():
        objective(denoiser, mine, step=0)
    # What is refused is what PyTorch fails at, and the cure works.
    with pytest.raises(RuntimeError, match=r"ready (twice|only once)"):
        two_passes(denoiser, mine).backward()
    two_passes(cv.as_denoiser(DistributedDataParallel(network().float())), mine).backward()


def two_passes(denoiser, mine):
    """By hand, the encoder first: the last pass does not reach the latent head."""
    texts = mine.tokens, mine.attention_mask
    options = {"text_process": TEXT, "latent_process": LATENT}
    z_hat = cv.encode_text(denoiser, *texts, policy=cv.GradientPolicy("full"), **options)
    return z_hat.square().sum() + cv.cycle_text_loss(denoiser, *texts, z_hat=z_hat, **options)


def test_ddp_around_the_network_that_looks_for_unused_parameters_is_refused():
    run_ranks(unused_worker)


@fsdp2
@pytest.mark.parametrize("options", [{}, FROZEN], ids=["all", "frozen"])
def test_fsdp2(options):
    check_ranks(makes(**options), PARTS[:2], wrap=fsdp)


# What the harness finds


def bare(module):
    """A step that nobody averages over ranks."""
    return module


class Lonely(cv.CycleObjective):
    """Waits for the other ranks where it has unpaired rows."""

    def __call__(self, denoiser, batch, **options):
        if dist.is_initialized() and batch.unpaired_tokens is not None:
            dist.barrier()
        return super().__call__(denoiser, batch, **options)


class Picky(cv.CycleObjective):
    def __call__(self, denoiser, batch, **options):
        if dist.is_initialized() and batch.unpaired_tokens is None:
            raise RuntimeError("nothing to cycle")
        return super().__call__(denoiser, batch, **options)


@pytest.mark.parametrize(
    ("make", "wrap", "match"),
    [
        (makes(Forgetful), DistributedDataParallel, r"rank 0: the gradient of network\."),
        (makes(kind=Normalised), DistributedDataParallel, r"rank 0: the gradient of network\."),
        (makes(), bare, r"rank 0: the gradient of network\."),
        (makes(Picky), DistributedDataParallel, r"rank 1 failed:(.|\n)*Error: nothing to cycle"),
        (
            makes(Lonely),
            bare,
            r"ranks? 0.* did not finish within 4 s: does a rank skip a pass, a coll",
        ),
        (makes(Lonely), DistributedDataParallel, r"ranks? .* (died|failed|did not finish)"),
    ],
    ids=["counts withheld", "batch norm", "not averaged", "an error", "a hang", "out of step"],
)
def test_mistakes_are_found(make, wrap, match):
    with pytest.raises(AssertionError, match=match):
        check_ranks(make, FIRST_STEP[:2], wrap=wrap, time_limit=4 if "Lonely" in str(make) else 60)


# Accumulation of a statistic


STATISTICS = {
    "moment": lambda z, latents: cv.moment_prior(z),
    "mmd": lambda z, latents: cv.mmd_prior(z),
    "infonce": cv.infonce_loss,
}


def encode(denoiser, part):
    """From noise that is a function of the row, so that it is the same in any split."""
    return cv.encode_text(
        denoiser,
        part.tokens,
        part.attention_mask,
        text_process=TEXT,
        latent_process=LATENT,
        noise=part.latents.cos(),
        policy=cv.GradientPolicy("full"),
    )


def pooled(statistic, latents, z_hat):
    return statistic(cv.pool_rows(z_hat), latents)


def assert_same(module, reference):
    for (name, got), wanted in zip(module.named_parameters(), reference.parameters(), strict=True):
        if wanted.grad is None:
            assert got.grad is None, name
        else:
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-10, atol=1e-12, msg=name)


def two_pass_worker(rank):
    """Three parts on one rank, one on the other; the prior beside the objective."""
    torch.set_default_dtype(torch.float64)
    parts = [
        [cv.Batch(*part[:2], part[2].double()) for part in batches]
        for batches in ([*PARTS[0], batch(1, seed=8)], PARTS[1][:1])
    ]
    joined = join_batches([part for batches in parts for part in batches])
    objective = every_term(TEXT, LATENT, **{**ONLY, "text_weight": 1.0})  # draws nothing

    def made():
        torch.manual_seed(0)
        return network()

    for statistic in STATISTICS.values():
        whole = cv.as_denoiser(made())
        loss = objective(whole, joined, step=0).loss
        (loss + 0.5 * statistic(encode(whole, joined), joined.latents)).backward()
        ddp = DistributedDataParallel(made())
        denoiser = cv.as_denoiser(ddp)
        mine = parts[rank]
        latents = cv.pool_rows(torch.cat([part.latents for part in mine]))
        each = [objective.counts(part) for part in mine]
        counts = {key: sum(count[key] for count in each) for key in each[0]}
        for count in counts.values():
            dist.all_reduce(count)
        counts = {key: count / 2 for key, count in counts.items()}
        losses = cv.two_pass(partial(pooled, statistic, latents), partial(encode, denoiser), mine)
        for left, part in zip(range(len(mine))[::-1], mine, strict=True):
            with ddp.no_sync() if left else nullcontext():
                loss = objective(denoiser, part, step=0, counts=counts).loss
                (loss + 0.5 * next(losses)).backward()
        assert_same(ddp.module, whole.module)


def test_two_pass_over_ranks():
    run_ranks(two_pass_worker)


# Training


def replicas_worker(rank, find_unused_parameters):
    batch = toy_batch(seed=rank)
    if rank == 1:
        batch = cv.Batch(batch.tokens, batch.attention_mask, batch.latents)
    denoiser, text, latent = toy_denoiser(seed=0)
    objective = every_term(
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
    assert_replicas(module.parameters(), before)


def assert_replicas(parameters, before):
    """Equal on both ranks, and moved."""
    here, there = gather([parameter.detach() for parameter in parameters])
    for mine, theirs, start in zip(here, there, before, strict=True):
        assert torch.equal(mine, theirs) and not torch.equal(mine, start)


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_replicas_stay_equal_where_a_rank_lacks_unpaired_rows(find_unused_parameters):
    run_ranks(replicas_worker, find_unused_parameters)


def fsdp_worker(rank):
    denoiser, text, latent = toy_denoiser(seed=0)
    before = [parameter.clone() for parameter in denoiser.module.parameters()]
    shard(denoiser.module)
    optimizer = torch.optim.AdamW(denoiser.module.parameters())
    every_term(text, latent)(denoiser, toy_batch(seed=rank), step=0).loss.backward()
    optimizer.step()
    assert_replicas([p.full_tensor() for p in denoiser.module.parameters()], before)


@fsdp2
def test_replicas_of_fsdp2():
    run_ranks(fsdp_worker)
