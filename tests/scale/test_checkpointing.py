"""Passes that run again in the backward, against the same passes run once."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cyclevae as cv
from counters import HostSyncs
from cyclevae.gradient_policy.gate import refuse_reentrant
from cyclevae.scale import checkpointing
from cyclevae.testing import assert_frozen, assert_learns, check_denoiser, toy_batch
from deep import deep
from oldest import needs_torch_2_6
from rank_cases import Normalised
from recipes import FROZEN, LATENT, RECIPES, TEXT, recipe


def batch(dtype=torch.float64):
    parts = toy_batch(rows=4)
    return parts._replace(
        latents=parts.latents.to(dtype), unpaired_latents=parts.unpaired_latents.to(dtype)
    )


def calls(denoiser):
    """Grows by one for each forward: whether it had a graph."""
    found = []
    denoiser.network.register_forward_pre_hook(lambda *_: found.append(torch.is_grad_enabled()))
    return found


def gradients(denoiser):
    return {name: p.grad for name, p in denoiser.module.named_parameters()}


def outcome(wrap, objective, *, dropout=0.3, dtype=torch.float64, autocast=False):
    """The loss, its gradients and the random state that a step leaves, by the same draws."""
    denoiser = deep(dropout=dropout)
    denoiser.module.to(dtype)
    teacher = cv.Teacher(deep().module.to(dtype)).denoiser
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = objective(wrap(denoiser), batch(dtype), step=3, teacher=teacher).loss
    loss.backward()
    return loss.detach(), gradients(denoiser), torch.get_rng_state()


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def plainly(denoiser):
    return denoiser


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
@pytest.mark.slow
def test_a_step_with_dropout_has_the_same_gradients(options):
    objective = recipe(options)
    assert_same(outcome(cv.checkpoint_passes, objective), outcome(plainly, objective))


def test_without_the_random_state_they_would_differ(monkeypatch):
    forgetful = partial(checkpoint, preserve_rng_state=False)
    monkeypatch.setattr(checkpointing, "checkpoint", forgetful)
    for dropout in (0.0, 0.3):
        got, wanted = (
            outcome(wrap, recipe({}), dropout=dropout)[1]["word.weight"]
            for wrap in (cv.checkpoint_passes, plainly)
        )
        assert torch.allclose(got, wanted) == (dropout == 0)


@pytest.mark.parametrize("options", [{}, RECIPES["frozen"], {"cycle_text_weight": 0.0}])
def test_under_autocast(options):
    run = partial(outcome, objective=recipe(options), dtype=torch.float32, autocast=True)
    assert_same(run(cv.checkpoint_passes), run(plainly))


def test_where_terms_that_are_not_finite_are_dropped():
    objective = recipe({"non_finite": "zero", "text_policy": FROZEN})
    assert_same(outcome(cv.checkpoint_passes, objective), outcome(plainly, objective))


def test_terms_one_by_one():
    """The graph is kept, and each term runs again what it needs."""

    def by_term(wrap):
        torch.manual_seed(1)
        denoiser = deep(dropout=0.3)
        denoiser.module.double()
        terms = recipe(RECIPES["isolated"]).losses(wrap(denoiser), batch(), step=3)
        parameters = list(denoiser.module.parameters())
        return [
            torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            for term in terms.values()
        ]

    assert_same(by_term(cv.checkpoint_passes), by_term(plainly))


# Frozen inside, run again outside


def pass_inside(context, denoiser):
    rows = batch()
    with context:
        logits = cv.l2t(denoiser, rows.latents, rows.attention_mask, text_process=TEXT)
    refuse_reentrant([logits])
    return logits.square().sum()


@pytest.mark.parametrize(
    "patterns", [("shared.*",), ("*.bias",), ("shared.0.*", "text_head.weight"), ("encoder_only",)]
)
@pytest.mark.parametrize("where", ["after", "inside", "inside another"])
def test_a_pass_frozen_as_a_whole(patterns, where):
    """As many rows as the square weights are wide, so that no shape tells two of them apart."""
    denoiser, reference = deep(), deep()
    for each in (denoiser, reference):
        each.module.double()
    pass_inside(cv.freeze(reference, *patterns), reference).backward()
    checkpointed = cv.checkpoint_passes(denoiser)
    loss = pass_inside(cv.freeze(checkpointed, *patterns), checkpointed)
    if where == "after":
        loss.backward()
    else:
        with cv.freeze(denoiser, *(patterns if where == "inside" else ())):
            loss.backward()
    assert_same(gradients(denoiser), gradients(reference))


def test_what_is_frozen_gets_nothing_and_the_rest_learns():
    denoiser = deep()
    denoiser.module.double()
    frozen = cv.freeze(denoiser, "shared.*")
    loss = pass_inside(frozen, cv.checkpoint_passes(denoiser))
    frozen.probe(loss)
    assert_frozen(loss, denoiser.module.shared.parameters())
    assert_learns(loss, denoiser.module.text_head.parameters())


class Again(nn.Module):
    def __init__(self, block, use_reentrant):
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant

    def forward(self, hidden):
        return checkpoint(self.block, hidden, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_network_that_checkpoints_its_blocks(use_reentrant):
    denoiser, reference = deep(dropout=0.3), deep(dropout=0.3)
    shared = denoiser.module.shared
    for i, block in enumerate(shared):
        shared[i] = Again(block, use_reentrant)
    objective = recipe({"text_policy": cv.GradientPolicy(freeze=("shared.0.*",))})

    def step(denoiser):
        torch.manual_seed(1)
        objective(denoiser, batch(torch.float32), step=3).loss.backward()
        return [p.grad for p in denoiser.module.parameters()]

    if use_reentrant:
        with pytest.raises(RuntimeError, match="reentrant activation checkpointing"):
            step(cv.checkpoint_passes(denoiser))
    else:
        assert_same(step(cv.checkpoint_passes(denoiser)), step(reference))


# What runs


@pytest.mark.parametrize(
    ("options", "once", "again"),
    [({}, 5, 5), (RECIPES["frozen"], 6, 6), (RECIPES["three steps, last"], 4, 2)],
)
def test_each_pass_with_a_graph_runs_once_more_in_the_backward(options, once, again):
    denoiser = deep()
    found = calls(denoiser)
    output = recipe(options)(cv.checkpoint_passes(denoiser), batch(torch.float32), step=3)
    assert len(found) == once and sum(found) == again
    output.loss.backward()
    assert found[once:] == [True] * again


def test_without_gradients_a_pass_runs_plainly():
    denoiser = deep()
    found = calls(denoiser)
    with torch.no_grad():
        recipe({})(cv.checkpoint_passes(denoiser), batch(torch.float32), step=3)
    assert found == [False] * 5


def test_running_statistics_move_twice():
    network = Normalised(vocab_size=7, latent_dim=4)
    denoiser = cv.checkpoint_passes(cv.as_denoiser(network))
    recipe({})(denoiser, batch(torch.float32), step=3).loss.backward()
    assert network.norm.num_batches_tracked == 5 + 5


@needs_torch_2_6("torch 2.5 checkpoints nothing on `meta`")
@pytest.mark.parametrize("options", [{}, RECIPES["frozen"]], ids=["default", "frozen"])
def test_no_pass_waits_for_the_device(options):
    denoiser = deep(dropout=0.3)
    denoiser.module.to("meta")
    rows = cv.Batch(*[part.to("meta") for part in toy_batch(rows=4)[:6]])
    with HostSyncs() as syncs:
        recipe(options)(cv.checkpoint_passes(denoiser), rows, step=3).loss.backward()
    assert syncs.found == []


# The object


def test_it_is_a_denoiser_with_all_that_the_other_has():
    denoiser = deep()
    checkpointed = cv.checkpoint_passes(denoiser)
    assert isinstance(checkpointed, cv.Denoiser)
    for name in ("network", "module", "roles"):
        assert getattr(checkpointed, name) is getattr(denoiser, name)
    assert not hasattr(checkpointed, "unknown")
    check_denoiser(checkpointed, TEXT, LATENT, relaxed=True)
    module = cv.StepModule(checkpointed, recipe({}))
    assert module.state_dict().keys() == cv.StepModule(denoiser, recipe({})).state_dict().keys()


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_step_of_it_can_be_copied(copied):
    module = cv.StepModule(cv.checkpoint_passes(deep()), recipe({}))
    twin = copied(module)
    assert twin.denoiser.network is twin.network is not module.network
    twin(batch(torch.float32), 0).loss.backward()
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.unhooked
def test_it_refuses_what_is_no_denoiser():
    with pytest.raises(TypeError, match=r"a method `denoise`, got Linear: make one by as_denoiser"):
        cv.checkpoint_passes(nn.Linear(2, 2))


def test_it_refuses_ddp_at_any_depth():
    wrapper = nn.parallel.DistributedDataParallel
    inside = wrapper.__new__(wrapper)
    nn.Module.__init__(inside)  # of its own it would need a process group
    denoiser = deep()
    denoiser.network.inside = inside
    with pytest.raises(ValueError, match=r"fails where its forward is run again in the backward"):
        cv.checkpoint_passes(denoiser)
