"""A network in wrappers is the network: its arguments, its names, its roles, one reference."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import cyclevae as cv
from cyclevae.testing import ToyNetwork, toy_batch, toy_denoiser

_, TEXT, LATENT = toy_denoiser(seed=0)
OBJECTIVE = cv.CycleObjective(TEXT, LATENT, [cv.Text(), cv.CycleText(policy="decoder_isolated")])


class Plain(ToyNetwork):
    """Takes no `need`, and says its roles."""

    roles = cv.Roles(encoder_only=("latent_head.*",), decoder_only=("text_head.*",))

    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
        return super().forward(
            tokens,
            latents,
            text_time=text_time,
            latent_time=latent_time,
            attention_mask=attention_mask,
        )


class Tuner(nn.Module):
    """As PEFT's, which holds the network that it has put adapters into."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Fabric(nn.Module):
    """As Lightning Fabric's, which holds the wrapped module and the original."""

    def __init__(self, model):
        super().__init__()
        self._forward_module, self._original_module = Tuner(model), model

    def forward(self, *args, **kwargs):
        return self._forward_module(*args, **kwargs)


WRAPPERS = {
    "none": lambda network: network,
    "average": AveragedModel,
    "data parallel": nn.DataParallel,
    "adapters": lambda network: Tuner(Tuner(network)),
    "fabric": Fabric,
    "checkpoints": checkpoint_wrapper,
    "nested": lambda network: AveragedModel(nn.DataParallel(Tuner(checkpoint_wrapper(network)))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_innermost_module_counts(wrap):
    torch.manual_seed(0)
    plain = Plain(vocab_size=7, latent_dim=4)
    denoiser = cv.as_denoiser(wrap(copy.deepcopy(plain)))
    assert type(denoiser.module) is Plain and denoiser.roles == Plain.roles
    assert isinstance(cv.Teacher(denoiser.network).network, Plain)
    loss, wanted = (
        OBJECTIVE(d, toy_batch(), step=0, generator=torch.Generator().manual_seed(0)).loss
        for d in (denoiser, cv.as_denoiser(plain))
    )
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    for (name, a), (_, b) in zip(
        denoiser.module.named_parameters(), plain.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_a_module_that_is_no_wrapper_stays_itself():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, *args, **kwargs):
            return None

    own = Own()
    assert cv.as_denoiser(own).module is own


def other():
    torch.manual_seed(1)
    return Plain(vocab_size=7, latent_dim=4)


def assigned(step, network):
    step.network = network


def put(step, network):
    step._modules["network"] = network


@pytest.mark.parametrize("replace", [assigned, put])
@pytest.mark.parametrize("wrap", [lambda d: d, cv.checkpoint_passes], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("around", [lambda n: other(), nn.DataParallel], ids=["other", "in place"])
def test_a_step_trains_the_network_that_it_holds(replace, wrap, around):
    torch.manual_seed(0)
    old = Plain(vocab_size=7, latent_dim=4)
    step = cv.StepModule(wrap(cv.as_denoiser(old)), OBJECTIVE)
    new = around(old)
    replace(step, new)
    step(toy_batch(), 0).loss.backward()
    assert any(p.grad is not None for p in step.parameters())
    assert step.denoiser.network is step.network is new
    if not isinstance(new, nn.DataParallel):
        assert all(p.grad is None for p in old.parameters())


def test_a_denoiser_of_ones_own_that_cannot_follow_is_refused():
    class Own:
        def __init__(self, network):
            self.network = network

        def denoise(self, tokens, latents, *, need="both", **state):
            return cv.Denoised(*self.network(tokens, latents, **state))

    step = cv.StepModule(Own(other()), OBJECTIVE)
    with pytest.raises(
        RuntimeError, match=r"`network` was replaced, and the Own .* new StepModule"
    ):
        step.network = other()


def test_the_network_of_a_denoiser_is_not_replaced():
    with pytest.raises(AttributeError, match="network"):
        cv.as_denoiser(other()).network = other()


def test_a_teacher_reads_the_network_that_it_holds():
    teacher = cv.Teacher(other())
    teacher.network = nn.DataParallel(teacher.network)
    assert teacher.denoiser.network is teacher.network
