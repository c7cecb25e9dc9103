"""What `freeze` costs, in counts; and that what it remembers of a model is never out of date."""

import copy
import gc
import sys
import weakref

import pytest
import torch
from torch import nn

from cyclevae.gradient_policy import roles, selection
from cyclevae.gradient_policy.contexts import freeze
from cyclevae.gradient_policy.gate import Frozen, drop_gradients
from cyclevae.testing import assert_frozen, assert_learns
from test_gradient_policy import data, toy


def layers(count=24, width=2):
    """300 parameters in 24 layers, as in a transformer, and a few around them."""

    def layer():
        parts = [nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)]
        return nn.Sequential(*parts, *copy.deepcopy(parts))

    around = [nn.LayerNorm(width) for _ in range(6)]
    return nn.Sequential(nn.ModuleList([layer() for _ in range(count)]), *around)


@pytest.fixture
def matched(monkeypatch):
    """The names that patterns are compared with."""
    names = []

    def fnmatchcase(name, pattern):
        names.append(name)
        return compare(name, pattern)

    compare = roles.fnmatchcase
    monkeypatch.setattr(roles, "fnmatchcase", fnmatchcase)
    return names


def calls(function):
    """How many Python functions run."""
    count = 0

    def tracer(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(tracer)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.unhooked  # the hook calls functions of its own
@pytest.mark.parametrize("patterns", [(), ("0.*",), ("*.bias", "1.*")])
def test_the_second_entry_resolves_no_name_and_calls_little(matched, patterns):
    model = layers()
    assert len(list(model.parameters())) == 300
    gates = []

    def gate(parameters):
        gates.append(len(parameters))
        return drop_gradients(parameters)

    def enter():
        with Frozen(model, patterns, gate):
            pass

    first = calls(enter)
    assert len(matched) == 300 * len(patterns)
    matched.clear(), gates.clear()
    second = calls(enter)
    assert matched == []
    assert len(gates) <= sum(gates) / 12 + 1  # autograd nodes: about one for a layer
    assert second < first - 200
    assert second <= 30 + 48 * len(gates)  # none per module or parameter, but autograd's own


def rename(model):
    model.other = model.blocks
    del model.blocks


def tie(model):
    model.to_latent.weight = model.blocks[0].mix.weight


def replace(model):
    model.blocks[0].mix.weight = nn.Parameter(torch.zeros(4, 4).double())


CHANGES = {
    "parameter replaced": (replace, "blocks.*"),
    "parameter removed": (lambda m: setattr(m.blocks[0].mix, "bias", None), "blocks.*"),
    "parameter added": (
        lambda m: m.blocks.register_parameter("scale", nn.Parameter(torch.ones(1))),
        "blocks.*",
    ),
    "module replaced": (
        lambda m: setattr(m.blocks[1], "mix", nn.Linear(4, 4).double()),
        "blocks.*",
    ),
    "module added": (lambda m: m.blocks.append(nn.Linear(4, 4)), "blocks.*"),
    "module removed": (lambda m: m.blocks.pop(0), "blocks.*"),
    "modules swapped": (
        lambda m: m._modules.update(to_latent=m.from_latent, from_latent=m.to_latent),
        "to_latent.*",
    ),
    "a child and none swapped": (
        lambda m: (m.register_module("empty", m.to_latent), m.register_module("to_latent", None)),
        "to_latent.*",
    ),
    "tied": (tie, "to_latent.*"),
    "untied": (lambda m: setattr(m.head, "weight", nn.Parameter(torch.ones(7, 4))), "head.*"),
    "renamed": (rename, "blocks.*"),
    "renamed in its place": (
        lambda m: setattr(m, "_modules", {n.replace("bl", "r"): c for n, c in m._modules.items()}),
        "blocks.*",
    ),
    "moved": (lambda m: m.float(), "blocks.*"),
    "loaded": (lambda m: m.load_state_dict(toy(1).state_dict(), assign=True), "blocks.*"),
}


@pytest.mark.parametrize(("change", "pattern"), CHANGES.values(), ids=CHANGES)
def test_names_mean_what_the_model_holds_now(change, pattern):
    """After any change, the answer is that of a model that was never asked before."""
    model = toy()
    model.register_module("empty", None)
    with freeze(model, pattern):
        pass
    change(model)
    fresh = copy.deepcopy(model)

    def lent(model):
        try:
            with freeze(model, pattern):
                return {
                    name
                    for name, module in model.named_modules(remove_duplicate=False)
                    for key, p in module._parameters.items()
                    if not isinstance(p, (nn.Parameter, type(None)))
                }
        except ValueError as error:
            return str(error)

    assert lent(model) == lent(fresh)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_a_submodule_outside_of_the_target_is_looked_at_again():
    """A pattern may be a module of its own that holds parts of the target."""
    model = toy()
    chosen = nn.ModuleList([model.to_latent])
    with freeze(model, chosen):
        pass
    chosen.append(model.blocks)
    with freeze(model, chosen):
        z = model(data()[0], "t2l")
    assert_frozen(z.sum(), [*model.to_latent.parameters(), *model.blocks.parameters()])
    assert_learns(z.square().sum(), [model.table.weight])


@pytest.mark.slow
def test_what_is_known_of_a_model_keeps_nothing_alive():
    model = toy()
    model.blocks[0].parent = [model]  # a way back to the root
    part, whole = model.to_latent, weakref.ref(model)
    with freeze(model, "blocks.*"), freeze(model, part), freeze(model, model):
        pass
    weight = weakref.ref(model.to_latent.weight)
    model.to_latent, part = nn.Linear(4, 4), None
    gc.collect()
    assert weight() is None
    del model
    gc.collect()
    assert whole() is None


def test_ever_new_questions_are_forgotten():
    model = toy()
    for i in range(100):
        with freeze(model, "blocks.*", *["head.*"] * i):
            pass
    assert len(selection._known[model]) <= 32
