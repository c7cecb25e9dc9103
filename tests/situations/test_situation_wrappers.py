"""Whose network is wrapped, normed, lazy or random: what they meet."""

import copy
import random

import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.testing import ToyNetwork, check_denoiser, toy_batch, toy_denoiser

_, TEXT, LATENT = toy_denoiser(seed=0)
OBJECTIVE = cv.CycleObjective(TEXT, LATENT)


def test_the_checkpoint_of_a_compiled_network_has_plain_names():
    """Whose keys begin with `_orig_mod.`: https://github.com/karpathy/nanoGPT/issues/325."""
    network = ToyNetwork(7, 4)
    denoiser = cv.as_denoiser(torch.compile(network, backend="eager"))
    assert denoiser.module.state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_teacher_of_a_weight_normed_network(norm):
    """Whose copy fails after a forward: https://github.com/pytorch/pytorch/issues/102981."""
    torch.manual_seed(0)
    network = ToyNetwork(7, 4)
    network.shared = norm(network.shared)
    denoiser = cv.as_denoiser(network)
    OBJECTIVE(denoiser, toy_batch(seed=0), step=0).loss.backward()
    teacher = cv.Teacher(network)
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    teacher.update(network)
    assert not any(torch.equal(*pair) for pair in zip(before, teacher.parameters(), strict=True))
    prior = cv.CycleObjective(TEXT, LATENT, [cv.Latent(), cv.Prior("learned")])
    prior(denoiser, toy_batch(seed=0), step=0, teacher=teacher.denoiser).loss.backward()


def test_a_copied_step_trains_its_own_network():
    """Who averages by `copy.deepcopy`: https://github.com/lucidrains/byol-pytorch/issues/95."""
    module = cv.StepModule(toy_denoiser(seed=0)[0], OBJECTIVE)
    other = copy.deepcopy(module)
    other(toy_batch(seed=0), 0).loss.backward()
    assert other.denoiser.network is other.network is not module.network
    assert any(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in module.parameters())


class Lazy(ToyNetwork):
    def __init__(self):
        super().__init__(7, 4)
        self.shared = nn.LazyLinear(4)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_pass_the_dry_run():
    """Who lets widths be found: `nn.LazyLinear`, whose parameters have no numbers yet."""
    torch.manual_seed(0)
    denoiser = cv.as_denoiser(Lazy())
    check_denoiser(denoiser, TEXT, LATENT)
    OBJECTIVE(denoiser, toy_batch(seed=0), step=0).loss.backward()


@pytest.mark.unhooked  # the hook draws too
def test_draws_of_python_are_no_leak():
    """Who self-conditions by `random()`, as in
    https://github.com/lucidrains/denoising-diffusion-pytorch/issues/286.
    """
    torch.manual_seed(0)

    class Conditioned(ToyNetwork):
        def forward(self, tokens, latents, **state):
            if random.random() < 0.5:
                with torch.no_grad():
                    first = super().forward(tokens, latents, **state | {"need": "latents"})
                latents = latents + first.latent_prediction
            return super().forward(tokens, latents, **state)

    state = random.getstate()
    check_denoiser(cv.as_denoiser(Conditioned(7, 4)), TEXT, LATENT)
    assert random.getstate() == state


def test_a_batch_of_one_row_keeps_its_axis():
    """Whose last batch has one row: https://github.com/vqdang/hover_net/pull/109."""

    class Squeezed(ToyNetwork):
        def forward(self, tokens, latents, **state):
            logits, prediction = super().forward(tokens, latents, **state)
            return logits, None if prediction is None else prediction[:, None].squeeze()

    with pytest.raises(AssertionError, match=r"latent_prediction.*got \[4\] and \[1, 4\]"):
        check_denoiser(cv.as_denoiser(Squeezed(7, 4)), TEXT, LATENT)


def test_padding_that_is_attended_to_is_found():
    """Whose mask is dropped without packing: https://github.com/axolotl-ai-cloud/axolotl/pull/3735."""

    class Attends(ToyNetwork):
        def forward(self, tokens, latents, *, attention_mask, **state):
            everything = torch.ones_like(attention_mask)
            return super().forward(tokens, latents, attention_mask=everything, **state)

    with pytest.raises(AssertionError, match="the ids at padded positions change the"):
        check_denoiser(cv.as_denoiser(Attends(7, 4)), TEXT, LATENT)
