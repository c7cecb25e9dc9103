"""What a step does with a term that is not finite, against the step that never had the term."""

from dataclasses import replace

import pytest
import torch

import cyclevae as cv
from cyclevae.testing import ToyNetwork, toy_batch

TEXT, LATENT = cv.TextProcess(2, 7, pad_id=0), cv.LatentProcess(shape=(4,))
TERMS = {
    "text": cv.Text(time=1.0),
    "cycle_latent": cv.CycleLatent(bridge="straight_through", policy="full", pairs=True),
    "text_marginal": cv.TextMarginal(weight=0.1, bridge="straight_through", pairs=True),
    "sleep": cv.Sleep(pairs=True),
    "latent": cv.Latent(),
    "cycle_text": cv.CycleText(bridge=cv.LatentBridge(), policy="full", pairs=True),
    "prior": cv.Prior("mmd", weight=0.1),
    "contrastive": cv.Contrastive(weight=0.1),
    "unconditional": cv.Unconditional(),
}


def everything(**changed):
    """All terms, some of them in another form, or left out where that is None."""
    return cv.CycleObjective(TEXT, LATENT, [x for x in (TERMS | changed).values() if x])


EVERYTHING = everything()
QUICK = (*EVERYTHING.terms[:1], cv.Latent(), cv.Unconditional(), cv.CycleText(), cv.CycleLatent())
# Which pass of the step above belongs to which term alone; 0 and 4 are shared by many.
OWN = {1: "cycle_latent", 2: "text_marginal", 3: "sleep", 5: "cycle_text", 6: "unconditional"}


class Poisoned(ToyNetwork):
    """Activations of a chosen pass are NaN, deep inside, or at the output alone."""

    def __init__(self):
        super().__init__(vocab_size=7, latent_dim=4)
        self.calls, self.bad, self.where = 0, None, "inside"

    def forward(self, tokens, latents, **state):
        call, self.calls = self.calls, self.calls + 1
        if call == self.bad and self.where == "inside":
            latents = latents + torch.nan
        out = super().forward(tokens, latents, **state)
        if call == self.bad and self.where == "output":
            out = cv.Denoised(*(None if part is None else part * torch.nan for part in out))
        return out


def network():
    torch.manual_seed(0)
    return Poisoned().double()


def batch():
    plain = toy_batch(seed=0)
    return plain._replace(
        latents=plain.latents.double(), unpaired_latents=plain.unpaired_latents.double()
    )


def seeded():
    return torch.Generator().manual_seed(0)


def step(objective, model, **options):
    model.calls = 0
    denoiser = cv.as_denoiser(model)
    return objective(denoiser, batch(), step=0, generator=seeded(), **options)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def without(terms, objective=EVERYTHING):
    """The gradients of a healthy step less some of its terms."""
    model = network()
    healthy = objective.losses(cv.as_denoiser(model), batch(), step=0, generator=seeded())
    sum(loss for term, loss in healthy.items() if term not in terms).backward()
    return gradients(model)


def assert_same(actual, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_terms_add_up_to_the_loss():
    model = network()
    denoiser = cv.as_denoiser(model)
    terms = EVERYTHING.losses(denoiser, batch(), step=0, generator=seeded())
    torch.testing.assert_close(sum(terms.values()), step(EVERYTHING, model).loss)
    assert list(terms) == list(EVERYTHING.weights(0))


@pytest.mark.parametrize("rule", ["raise", "skip", "zero"])
def test_a_finite_step_is_as_ever(rule):
    model, plain = network(), network()
    output = step(replace(EVERYTHING, non_finite=rule), model)
    expected = step(EVERYTHING, plain)
    output.loss.backward()
    expected.loss.backward()
    assert torch.equal(output.loss, expected.loss)
    assert_same(gradients(model), gradients(plain))
    assert output.metrics["non_finite_terms"] == 0
    assert expected.skip is None and "non_finite_terms" not in expected.metrics
    assert (output.skip is not None) == (rule == "skip") and not output.skip


@pytest.mark.parametrize("where", ["inside", "output"])
@pytest.mark.parametrize("bad", OWN)
def test_zero_drops_exactly_the_bad_term(bad, where):
    model = network()
    model.bad, model.where = bad, where
    output = step(replace(EVERYTHING, non_finite="zero"), model)
    assert output.loss.isfinite() and output.metrics["non_finite_terms"] == 1
    assert not all(value.isfinite() for value in output.metrics.values())  # it is still reported
    output.loss.backward()
    assert_same(gradients(model), without({OWN[bad]}))


@pytest.mark.parametrize("where", ["inside", "output"])
@pytest.mark.parametrize(
    ("bad", "terms"),
    [
        (0, {"text", "cycle_latent", "text_marginal"}),
        (3, {"latent", "cycle_text", "prior", "contrastive"}),
    ],
)
def test_zero_drops_all_that_read_a_bad_pass(bad, terms, where):
    """Without the sleep term, whose text is drawn from bad logits and is as finite as any ids."""
    objective = everything(sleep=None)
    model = network()
    model.bad, model.where = bad, where
    output = step(replace(objective, non_finite="zero"), model)
    output.loss.backward()
    assert output.metrics["non_finite_terms"] == len(terms)
    assert_same(gradients(model), without(terms, objective))


def test_a_bad_reader_does_not_spoil_a_shared_pass():
    """The prior is not finite, the pass that it reads is: base T2L keeps its gradient there."""
    prior = cv.Prior(lambda z_hat: (z_hat.sum() - z_hat.sum().detach()).log(), weight=0.1)
    objective = everything(prior=prior)
    model = network()
    output = step(replace(objective, non_finite="zero"), model)
    assert output.metrics["prior_loss"] == -torch.inf
    output.loss.backward()
    assert_same(gradients(model), without({"prior"}))


def test_a_finite_term_with_a_gradient_that_is_not():
    """The root of 0: its value is finite, its gradient is not."""
    prior = cv.Prior(lambda z_hat: (z_hat - z_hat.detach()).square().sum().sqrt(), weight=0.1)
    root = everything(prior=prior)
    model, plain = network(), network()
    output = step(replace(root, non_finite="zero"), model)
    output.loss.backward()
    assert output.metrics["prior_loss"] == 0 and output.metrics["non_finite_terms"] == 0
    assert_same(gradients(model), without({"prior"}))
    step(root, plain).loss.backward()
    assert not all(g.isfinite().all() for g in gradients(plain).values())


def test_nothing_but_bad_terms_is_zero_with_a_graph():
    model = network()
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    output = step(replace(EVERYTHING, non_finite="zero"), model)
    assert output.loss == 0
    output.loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None and not gradient.any(), name


def test_zero_under_frozen_parts():
    policy = cv.GradientPolicy("full", freeze=("shared",), freeze_bridge=("word.*",))
    cycle = cv.CycleText(bridge=cv.LatentBridge(), policy=policy, pairs=True)
    objective = replace(everything(cycle_text=cycle), non_finite="zero")
    model, plain = network(), network()
    step(objective, model).loss.backward()
    step(replace(objective, non_finite=None), plain).loss.backward()
    assert_same(gradients(model), gradients(plain))
    assert all(isinstance(p, torch.nn.Parameter) for p in model._parameters.values())


def test_skip_is_a_flag_that_a_fused_optimizer_honours():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before = [parameter.clone() for parameter in model.parameters()]
    for bad, moves in ((1, False), (None, True), (5, False)):
        model.bad = bad
        optimizer.zero_grad()
        output = step(replace(EVERYTHING, non_finite="skip"), model)
        output.loss.backward()
        cv.skip_update(optimizer, output.skip)
        optimizer.step()
        now = [parameter.clone() for parameter in model.parameters()]
        assert output.skip.dtype == torch.bool and bool(output.skip) != moves
        assert any(not torch.equal(a, b) for a, b in zip(before, now, strict=True)) == moves
        before = now
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_an_optimizer_that_cannot_skip_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"`optimizer` must be fused .* got a SGD .* fused=True"):
        cv.skip_update(optimizer, torch.tensor(True))


def test_raise_names_the_term():
    model = network()
    model.bad = 5
    with pytest.raises(
        FloatingPointError, match=r"not finite on some rank: cycle_text \(here nan\)"
    ):
        step(replace(EVERYTHING, non_finite="raise"), model)
    assert not model._forward_hooks and isinstance(model.word.weight, torch.nn.Parameter)


@pytest.mark.parametrize("where", ["inside", "output"])
def test_a_latent_that_is_not_finite_is_left_to_the_rule(where):
    """Not to the value checks of those that read it, which know no rule."""
    model = network()
    model.bad, model.where = 4, where
    assert step(replace(EVERYTHING, non_finite="skip"), model).skip
    with pytest.raises(FloatingPointError, match=r"not finite on some rank: .*prior \(here nan\)"):
        step(replace(EVERYTHING, non_finite="raise"), model)
    with pytest.raises(ValueError, match="`z_hat` must be finite"):
        step(EVERYTHING, model)  # and here they are on again


@pytest.mark.unhooked
def test_an_unknown_rule():
    with pytest.raises(ValueError, match="`non_finite` is 'ignore'; known are 'raise', 'skip'"):
        replace(EVERYTHING, non_finite="ignore")


def test_no_rule_waits_for_a_device_but_raise():
    from cyclevae.testing import toy_denoiser

    denoiser, text, latent = toy_denoiser()
    denoiser.module.to("meta")
    plain = toy_batch()
    lengths = torch.ones(3, 5, dtype=torch.bool)
    meta = cv.Batch(*(part.to("meta") for part in plain[:6]), lengths.to("meta"))
    for rule in ("skip", "zero", "raise"):
        output = cv.CycleObjective(text, latent, QUICK, non_finite=rule)(denoiser, meta, step=0)
        output.loss.backward()
