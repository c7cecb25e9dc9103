"""The adapter as the host's loop wraps it: DDP on two ranks, compiled, clipped and scaled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cyclevae.adapters.latentdlm import with_cycle
from distributed import gather, run_ranks
from latentdlm_host import make_batch, make_host

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def train_on_a_rank(rank):
    trainer = with_cycle(make_host(loss_type="cycle_vae", prior_weight=0.1, quick=True))
    wrapped = nn.parallel.DistributedDataParallel(trainer, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=1e-2)
    for step in range(4):
        torch.manual_seed(10 * step + rank)
        batch = make_batch(seed=2 * step + rank)
        if rank == 1 and step == 2:  # a rank whose rows are all broken
            batch = {**batch, "latent": torch.full_like(batch["latent"], torch.nan)}
            batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
        loss, metrics = wrapped(batch, step=step)
        assert loss.isfinite() and all(abs(value) < 1e4 for _, value in metrics.items())
        (8.0 * loss).backward()
        nn.utils.clip_grad_norm_(trainer.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in trainer.parameters()])
    ours, theirs = gather(weights)
    assert weights.isfinite().all() and torch.equal(ours, theirs)


def test_two_ranks_stay_equal_though_one_has_nothing():
    run_ranks(train_on_a_rank)


def test_it_compiles():
    """Without the blocks of mmdit, which take dynamo a minute each pass."""
    options = {"loss_type": "cycle_vae", "training": {"compile_model": True}, "quick": True}
    losses = []
    for wrap in (lambda trainer: trainer, lambda t: torch.compile(t, backend="eager")):
        trainer = wrap(with_cycle(make_host(**options)))
        torch.manual_seed(0)
        for step in range(2):
            loss, _ = trainer(make_batch(seed=step), step=step)
            loss.backward()
            losses.append(loss.detach())
        with torch.no_grad():
            losses.append(trainer(make_batch())[0])
    torch.testing.assert_close(losses[:3], losses[3:], rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "cycle_text_weight": st.sampled_from([0.0, 1.0]),
            "cycle_latent_weight": st.sampled_from([0.0, 0.3]),
            "cycle_latent_sampling": st.sampled_from(["argmax", "categorical"]),
            "cycle_fraction": st.sampled_from([0.3, 1.0]),
            "cycle_every": st.integers(1, 3),
            "text_loss_padding": st.sampled_from(["host", "first", "exclude"]),
            "base_loss": st.sampled_from(["host", "corrected"]),
            "latent_t_mode": st.sampled_from(["full", "random"]),
            "cycle_checkpoint_passes": st.booleans(),
        }
    ),
    st.sampled_from(["x0", "v_param"]),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_any_step_is_finite_and_runs_the_passes_it_announces(keys, prediction, rows, step):
    host = make_host(loss_type="cycle_vae", parameterization=prediction, quick=True, **keys)
    trainer = with_cycle(host)
    calls = []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, metrics = trainer(make_batch(rows), step=step)
    assert len(calls) == trainer._objective.passes(step)
    loss.backward()
    assert loss.isfinite() and all(value.isfinite() for value in metrics.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.parameters())
