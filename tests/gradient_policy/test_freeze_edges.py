"""Where freezing could fail: hooks of parameters, cached weights, parameters kept elsewhere."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from cyclevae.gradient_policy.contexts import freeze
from cyclevae.gradient_policy.gate import Frozen
from cyclevae.scale.non_finite import Scale, Verdict

pytestmark = [pytest.mark.unhooked, pytest.mark.filterwarnings("ignore:.*(azy|jit)")]
X = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)


def layer():
    torch.manual_seed(0)
    return nn.Linear(4, 4).double()


def of_tensor(parameter, seen):
    parameter.register_hook(lambda gradient: seen.append(1) or gradient.clamp(-0.5, 0.5))


def after_accumulation(parameter, seen):
    def clamp(parameter):
        seen.append(1)
        parameter.grad.clamp_(-1, 1)

    parameter.register_post_accumulate_grad_hook(clamp)


@pytest.mark.parametrize("hook", [of_tensor, after_accumulation])
@pytest.mark.parametrize("live", [False, True])
def test_a_frozen_parameter_with_a_hook(hook, live):
    """The hook sees the gradient of the pass that learns, once, and nothing where none does."""
    model, plain, seen = layer(), layer(), []
    for each in (model, plain):
        hook(each.weight, seen if each is model else [])
    with freeze(model):
        loss = model(X).square().sum()
    if live:
        loss = loss + model(X).sum()
        plain(X).sum().backward()
    loss.backward()
    assert len(seen) == live
    if live:
        assert torch.equal(model.weight.grad, plain.weight.grad)
    else:
        assert model.weight.grad is None


@pytest.mark.parametrize("hook", [of_tensor, after_accumulation])
def test_a_parameter_with_a_hook_that_a_guarded_pass_does_not_read(hook):
    net, seen, verdict = nn.ModuleDict({"a": layer(), "b": layer()}), [], Verdict(Scale())
    hook(net["b"].weight, seen)
    with Frozen(net, (), gate=verdict.gate_all):
        loss = net["a"](X).sum()
    loss.backward()
    assert net["a"].weight.grad.any() and not seen


@pytest.mark.parametrize("frozen_first", [True, False])
def test_weights_that_parametrize_keeps(frozen_first):
    """Of a frozen pass they have no gradient, and of one that learns they have one."""
    model, plain = (parametrizations.weight_norm(layer()) for _ in range(2))
    with parametrize.cached():
        if frozen_first:
            with freeze(model):
                frozen = model(X)
        learns = model(X).square().sum()
        if not frozen_first:
            with freeze(model):
                frozen = model(X)
    assert not parametrize._cache
    plain(X).square().sum().backward()
    (learns + frozen.sum()).backward()
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.LazyLinear(3), "'weight' has no shape yet: run the lazy module once"),
        (lambda: torch.jit.trace(layer(), X), "TorchScript, or DeepSpeed's ZeRO stage 3, keeps"),
    ],
)
def test_parameters_that_cannot_be_lent_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        freeze(make()).__enter__()


def test_beside_a_traced_module_the_rest_can_be_frozen():
    model = nn.ModuleDict({"traced": torch.jit.trace(layer(), X), "plain": layer()})
    with freeze(model, "plain.*"):
        loss = model["traced"](model["plain"](X)).sum()
    loss.backward()
    assert model["plain"].weight.grad is None and model["traced"].weight.grad.any()


def test_a_parameter_tied_to_one_outside_of_the_target_is_found_by_the_probe():
    inside, outside = layer(), layer()
    outside.weight = inside.weight
    with freeze(inside) as frozen:
        loss = outside(X).sum()
    with pytest.raises(RuntimeError, match="would learn from `loss`: 'weight'"):
        frozen.probe(loss)
    both = nn.ModuleDict({"inside": inside, "outside": outside})
    with freeze(both, "inside.*") as frozen:
        loss = both["outside"](X).sum()
    frozen.probe(loss)
