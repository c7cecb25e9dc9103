"""The gradient ledger, against gradients taken one by one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import cyclevae as cv
import oracles_diagnostics as oracle
from cyclevae.diagnostics import GradientLedger, gradient_ledger
from cyclevae.testing import toy_batch, toy_denoiser
from strategies import quick, seeds


def towers(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({name: nn.Linear(3, 3) for name in ("encoder", "decoder", "shared")})


def losses(model, x):
    middle = model["shared"](model["encoder"](x))
    return {
        "a": middle.square().sum(),
        "b": model["decoder"](middle.detach()).sum(),
        "c": model["decoder"](middle).tanh().sum(),
    }


@quick
@given(seeds, st.integers(1, 3))
def test_against_a_loop(seed, terms):
    model = towers(seed)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    chosen = dict(list(losses(model, x).items())[:terms])
    groups = {name: list(model[name].parameters()) for name in model} | {
        "all": list(model.parameters())
    }
    ledger = gradient_ledger(chosen, groups)
    for name, group in groups.items():
        flat = {}
        for term, loss in chosen.items():
            found = torch.autograd.grad(loss, group, retain_graph=True, allow_unused=True)
            zeros = (torch.zeros_like(p) if g is None else g for g, p in zip(found, group))  # noqa: B905
            flat[term] = torch.cat([g.flatten() for g in zeros]).tolist()
        norms, cosines = oracle.ledger(flat)
        assert ledger.norms[name] == pytest.approx(norms, rel=1e-4, abs=1e-12)
        assert ledger.cosines[name] == pytest.approx(cosines, rel=1e-3, abs=1e-4)


def test_who_does_not_learn_has_norm_0_and_no_cosine():
    model = towers()
    groups = {name: model[name].parameters() for name in ("encoder", "decoder")}
    ledger = gradient_ledger(losses(model, torch.ones(2, 3)), groups)
    assert ledger.norms["encoder"]["b"] == 0 == ledger.norms["decoder"]["a"]
    assert set(ledger.cosines["encoder"]) == {("a", "c")}
    assert set(ledger.cosines["decoder"]) == {("b", "c")}
    flat = ledger.as_dict()
    assert flat["norm/encoder/b"] == 0 and "cosine/encoder/a/b" not in flat
    assert flat["cosine/encoder/a/c"] == ledger.cosines["encoder"]["a", "c"]
    assert len(flat) == 6 + 2


def test_graph_and_grad_are_left_alone():
    model = towers()
    terms = losses(model, torch.ones(2, 3))
    model["encoder"].weight.grad = torch.full((3, 3), 7.0)
    first = gradient_ledger(terms, {"all": model.parameters()})
    assert model["encoder"].weight.grad.eq(7).all()
    assert all(p.grad is None for p in model["decoder"].parameters())
    assert gradient_ledger(terms, {"all": model.parameters()}) == first
    sum(terms.values()).backward()
    assert model["decoder"].weight.grad is not None


def test_a_shared_parameter_counts_once_in_a_group_and_in_every_group():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    groups = {"encoder": [weight, weight], "decoder": [weight]}
    ledger = gradient_ledger({"half": weight.square().sum() / 2}, groups)
    assert ledger.norms == {"encoder": {"half": 5.0}, "decoder": {"half": 5.0}}


def test_a_group_without_gradient_is_0():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    weight = nn.Parameter(torch.ones(2))
    ledger = gradient_ledger({"sum": weight.sum()}, {"frozen": [frozen], "free": [weight]})
    assert ledger.norms["frozen"]["sum"] == 0
    assert ledger.norms["free"]["sum"] == pytest.approx(math.sqrt(2))
    assert gradient_ledger({"sum": weight.sum()}, {"frozen": [frozen]}).norms == {
        "frozen": {"sum": 0.0}
    }


def test_of_the_terms_of_a_step():
    denoiser, text_process, latent_process = toy_denoiser()
    tokens, mask, latents = toy_batch()[:3]
    processes = {"text_process": text_process, "latent_process": latent_process}
    module = denoiser.module
    with cv.freeze(module, "text_head.*"):
        cycle = cv.cycle_text_loss(denoiser, tokens, mask, **processes)
    terms = {
        "text": cv.l2t_loss(denoiser, tokens, latents, mask, text_process=text_process),
        "cycle_text": cycle,
    }
    ledger = gradient_ledger(
        terms,
        {"text head": module.text_head.parameters(), "shared": module.shared.parameters()},
    )
    assert ledger.norms["text head"]["cycle_text"] == 0 < ledger.norms["text head"]["text"]
    assert ledger.norms["shared"]["cycle_text"] > 0
    assert -1 <= ledger.cosines["shared"]["text", "cycle_text"] <= 1


def test_the_table_is_aligned():
    text = str(
        GradientLedger(
            {"encoder": {"a": 1.0, "bb": 0.0, "c": 1e-9}, "x": {"a": 12.0, "bb": 3.0, "c": 1.0}},
            {"encoder": {("a", "c"): -0.5}, "x": {("a", "bb"): 1.0, ("bb", "c"): 0.25}},
        )
    )
    assert text.splitlines() == [
        "norm      a  bb      c",
        "encoder   1   0  1e-09",
        "x        12   3      1",
        "",
        "cosine, encoder  bb      c",
        "a                 -  -0.50",
        "bb                       -",
        "",
        "cosine, x     bb      c",
        "a          +1.00      -",
        "bb                +0.25",
    ]


W = nn.Parameter(torch.ones(2))
TERM = W.sum()


class DTensor(torch.Tensor):
    """Stands for torch.distributed.tensor.DTensor, which is told by its name."""


def aliased():
    layer = nn.Linear(2, 2)
    with cv.freeze(layer):
        return list(layer.parameters())


@pytest.mark.parametrize(
    ("terms", "groups", "expected"),
    [
        ({}, {"all": [W]}, "`terms` is empty"),
        ({"a": TERM}, {}, "`groups` is empty"),
        ({"a": TERM}, {"all": []}, r"`groups\['all'\]` holds no parameter"),
        ({"a": W * 2}, {"all": [W]}, r"`terms\['a'\]` must be a scalar, got shape \[2\]; reduce"),
        ({"a": TERM.detach()}, {"all": [W]}, r"`terms\['a'\]` has no graph; .* not the detached"),
        ({"a": TERM}, {"all": ["w"]}, r"`groups\['all'\]` must hold parameters, got str; give mod"),
        ({"a": TERM}, {"all": [nn.Linear(1, 1)]}, "must hold parameters, got Linear"),
        (
            {"a": TERM},
            {"all": [torch.ones(2).as_subclass(DTensor)]},
            r"`groups\['all'\]` holds sharded parameters \(DTensor\).*before fully_shard",
        ),
        ({"a": TERM}, {"all": aliased()}, r"`groups\['all'\]` was taken inside freeze\(\)"),
    ],
)
@pytest.mark.unhooked
def test_refused(terms, groups, expected):
    with pytest.raises((ValueError, TypeError), match=expected):
        gradient_ledger(terms, groups)


def test_reentrant_checkpointing_is_refused():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    loss = checkpoint(layer, x, use_reentrant=True).sum()
    with pytest.raises(RuntimeError, match="reentrant activation checkpointing"):
        gradient_ledger({"a": loss}, {"all": layer.parameters()})
