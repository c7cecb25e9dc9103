"""Steps that are not finite beside a real `torch.amp.GradScaler`, for as long as a scale settles.

What a scaler must see is an overflow of its own making; a term that is not finite must not move it.
"""

import pytest
import torch

import cyclevae as cv
from cyclevae.gradient_policy.gate import Frozen
from cyclevae.scale.non_finite import Scale, Verdict, skip_update
from cyclevae.testing import ToyNetwork, toy_batch

TEXT, LATENT = cv.TextProcess(2, 7, pad_id=0), cv.LatentProcess(shape=(4,))
TERMS = [cv.Text(), cv.Latent(), cv.CycleText()]
BATCH = toy_batch(rows=8)
READS = 3  # the pass of a step that reads the bridge, of the cycle alone


class Fails(ToyNetwork):
    """A network of which one pass is NaN in a chosen step."""

    def __init__(self):
        super().__init__(vocab_size=7, latent_dim=4)
        self.calls, self.bad = 0, False

    def forward(self, tokens, latents, **state):
        self.calls += 1
        out = super().forward(tokens, latents, **state)
        if self.bad and self.calls == READS:
            out = cv.Denoised(*(None if part is None else part * torch.nan for part in out))
        return out


def train(rule, *, unscale=False, bad=(), optimizer=torch.optim.AdamW, steps=8, scale=2.0**20):
    """Train in fp16: the scales, and whether the parameters moved, of each step."""
    torch.manual_seed(0)
    model = Fails()
    made = optimizer(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    objective = cv.CycleObjective(TEXT, LATENT, TERMS, non_finite=rule)
    scales, moves = [], []
    for step in range(steps):
        model.calls, model.bad = 0, step in bad
        with torch.autocast("cpu", dtype=torch.float16):
            output = objective(cv.as_denoiser(model), BATCH, step=step)
        made.zero_grad()
        scaler.scale(output.loss).backward()
        if unscale:
            scaler.unscale_(made)
        if rule == "skip":
            skip_update(made, output.skip)
        before = [parameter.clone() for parameter in model.parameters()]
        scaler.step(made)
        scaler.update()
        after = list(model.parameters())
        assert all(parameter.isfinite().all() for parameter in after)
        moves.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        scales.append(scaler.get_scale())
    return scales, moves


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("rule", ["zero", "skip", "raise"])
@pytest.mark.slow
def test_the_scale_settles_as_without_a_rule(rule, unscale):
    scales, moves = train(rule, unscale=unscale)
    assert (scales, moves) == train(None, unscale=unscale)
    assert not moves[0] and any(moves)  # it began too high
    assert scales[-1] < 2.0**20


@pytest.mark.parametrize("unscale", [False, True])
def test_a_bad_term_moves_neither_scale_nor_step_under_zero(unscale):
    """The others learn in that step, at a scale that does not overflow."""
    scales, moves = train("zero", unscale=unscale, bad=(1, 2), steps=4, scale=2.0)
    assert all(moves) and scales == [2.0, 4.0, 4.0, 8.0]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("unscale", [False, True])
def test_skip_skips_that_step_alone(unscale, optimizer):
    _, moves = train("skip", unscale=unscale, bad=(0, 2), steps=4, scale=2.0, optimizer=optimizer)
    assert moves == [False, True, False, True]


@pytest.mark.parametrize("unscale", [None, False, True])
def test_a_flag_is_for_one_step_though_gradients_are_finite(unscale):
    """None is without a scaler. A term that is infinite may have finite gradients."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=unscale is not None)
    for flags, moves in (([True], False), ([], True), ([True, False], False), ([False], True)):
        before = weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        for flag in flags:
            skip_update(optimizer, torch.tensor(flag))
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weight) != moves
    assert scaler.get_scale() == (1.0 if unscale is None else 2.0**16)
    assert optimizer.state[weight]["step"] == 2


def test_momentum_begins_with_the_first_step_that_is_taken():
    """PyTorch's fused SGD begins with memory that it never filled, if it skips its first step."""
    skipped, plain = (torch.nn.Parameter(torch.ones(999)) for _ in range(2))
    first, second = (
        torch.optim.SGD([w], lr=0.1, momentum=0.9, fused=True) for w in (skipped, plain)
    )
    skipped.grad = torch.full((999,), torch.nan)
    skip_update(first, torch.tensor(True))
    first.step()
    for _ in range(2):
        for weight, optimizer in ((skipped, first), (plain, second)):
            weight.grad = torch.linspace(-1, 1, 999)
            optimizer.step()
    assert torch.equal(skipped, plain)


def test_momentum_with_dampening_is_refused():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, dampening=0.1, fused=True)
    with pytest.raises(ValueError, match=r"SGD with `dampening` cannot skip .* set dampening=0"):
        skip_update(optimizer, torch.tensor(True))


def test_a_gradient_that_is_not_finite_though_its_loss_is():
    """Dropped as ever, but for a loss that was scaled up: there it may be an overflow."""
    root = cv.Prior(lambda z_hat: (z_hat - z_hat.detach()).square().sum().sqrt(), weight=0.1)
    objective = cv.CycleObjective(TEXT, LATENT, [cv.Latent(), root], non_finite="zero")
    for scale, finite in ((0.5, True), (1.0, True), (2.0, False)):
        model = Fails()
        (scale * objective(cv.as_denoiser(model), BATCH, step=0).loss).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients) == finite


def test_sparse_gradients():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    for finite in (True, False):
        verdict = Verdict(Scale())
        with Frozen(embedding, (), gate=verdict.gate_all):
            loss = embedding(torch.tensor([1, 1, 2])).sum()
        verdict.finite = torch.tensor(finite)
        embedding.zero_grad()
        loss.backward()
        rows = embedding.weight.grad.to_dense()[:, 0].tolist()
        assert rows == ([0, 2, 1, 0, 0] if finite else [0] * 5)
