import copy
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cyclevae.gradient_policy.contexts import freeze
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.teacher import Teacher
from cyclevae.testing import ToyNetwork, toy_batch, toy_denoiser
from strategies import quick, seeds


class Network(ToyNetwork):
    """With dropout, a buffer that moves and one that holds integers."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, tokens, latents, **state):
        return super().forward(tokens, self.dropout(latents) * self.scale, **state)


def network(seed=0):
    torch.manual_seed(seed)
    return Network(7, 4)


def move(module, seed):
    """A step of training: every parameter and buffer changes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        module.scale.add_(1)
        module.steps.add_(1)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@quick
@given(seeds, st.integers(0, 5), st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]))
def test_the_average(seed, steps, decay):
    """`w_k = decay w_{k-1} + (1 - decay) v_k`, started at the weights themselves."""
    student = network(seed % 100)
    teacher = Teacher(student, decay)
    expected = {name: p.double() for name, p in weights(student).items()}
    for step in range(steps):
        move(student, seed + step)
        teacher.update(student)
        for name, p in weights(student).items():
            expected[name] = decay * expected[name] + (1 - decay) * p.double()
    for name, p in weights(teacher.network).items():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_the_default_decay():
    student = network()
    teacher = Teacher(student)
    before = weights(student)
    with torch.no_grad():
        student.shared.weight.add_(1000.0)
    teacher.update(student)
    moved = teacher.network.shared.weight - before["shared.weight"]
    torch.testing.assert_close(moved, torch.ones(4, 4), rtol=1e-3, atol=0)


def test_starts_as_an_exact_copy_of_its_own():
    student = network()
    move(student, 1)
    teacher = Teacher(student)
    for name, value in student.state_dict().items():
        assert torch.equal(value, teacher.network.state_dict()[name])
    move(student, 2)
    assert not torch.equal(student.shared.weight, teacher.network.shared.weight)
    assert teacher.network.steps == 1


def test_buffers_are_copied():
    student = network()
    teacher = Teacher(student, decay=0.9)
    move(student, 1)
    teacher.update(student)
    assert torch.equal(teacher.network.scale, torch.full((4,), 2.0))
    assert teacher.network.steps == 1 and teacher.network.steps is not student.steps


def test_the_student_is_left_alone():
    student = network().train()
    teacher = Teacher(student)
    before = weights(student)
    teacher.update(student)
    assert student.training and all(p.requires_grad for p in student.parameters())
    for name, p in weights(student).items():
        assert torch.equal(p, before[name])


def test_frozen_and_in_eval_mode():
    assert not any(m.training for m in Teacher(network().train()).modules())
    parent = nn.ModuleDict({"student": network(), "teacher": Teacher(network().train())})
    for mode in (True, False, True):
        parent.train(mode)
        assert parent["student"].training is mode
        assert not any(m.training for m in parent["teacher"].modules())
    assert parent["teacher"].train(True) is parent["teacher"]
    assert not any(p.requires_grad for p in parent["teacher"].parameters())
    parent["teacher"].update(parent["student"])
    assert not any(p.requires_grad for p in parent["teacher"].parameters())
    assert not any(m.training for m in parent["teacher"].modules())


def outputs(denoiser, seed=0):
    batch = toy_batch(seed)
    return denoiser.denoise(
        batch.tokens,
        batch.latents,
        text_time=torch.zeros(3),
        latent_time=torch.full((3,), 0.5),
        attention_mask=batch.attention_mask,
    )


def test_the_denoiser():
    student = network().eval()
    teacher = Teacher(student, decay=0.5)
    assert isinstance(teacher.denoiser, Denoiser) and teacher.denoiser.module is teacher.network
    torch.testing.assert_close(outputs(teacher.denoiser), outputs(teacher.denoiser))  # no dropout
    before = outputs(teacher.denoiser).logits
    move(student, 1)
    teacher.update(student)
    assert not torch.equal(outputs(teacher.denoiser).logits, before)


def test_the_gradient_passes_through():
    teacher = Teacher(network())
    latents = torch.randn(3, 4, requires_grad=True)
    batch = toy_batch()
    out = teacher.denoiser.denoise(
        batch.tokens,
        latents,
        text_time=torch.ones(3),
        latent_time=torch.ones(3),
        attention_mask=batch.attention_mask,
    )
    out.latent_prediction.sum().backward()
    assert latents.grad.any() and all(p.grad is None for p in teacher.parameters())


def test_resuming_is_exact():
    student = network()
    teacher, resumed = Teacher(student, decay=0.9), Teacher(network(5), decay=0.9)
    for step in range(6):
        if step == 3:
            state = pickle.loads(pickle.dumps(teacher.state_dict()))
            resumed.load_state_dict(state)
        move(student, step)
        teacher.update(student)
        if step >= 3:
            resumed.update(student)
    assert teacher.state_dict().keys() == {f"network.{name}" for name in student.state_dict()}
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not any(p.requires_grad for p in resumed.parameters())


def test_copies_and_pickles():
    student = network()
    teacher = Teacher(student, decay=0.5)
    for other in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert other.denoiser.module is other.network and other.decay == 0.5
        move(student, 1)
        other.update(student)
        assert not torch.equal(other.network.scale, teacher.network.scale)


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_networks(one_rank):
    student = network()
    ddp, compiled = DistributedDataParallel(student), torch.compile(student, backend="eager")
    for wrapped in (ddp, compiled, torch.compile(ddp, backend="eager")):
        teacher = Teacher(wrapped, decay=0.0)
        assert type(teacher.network) is Network
        assert teacher.state_dict().keys() == {f"network.{name}" for name in student.state_dict()}
        move(student, 1)
        for source in (wrapped, student):
            teacher.update(source)
            assert torch.equal(teacher.network.shared.weight, student.shared.weight)


def test_a_frozen_student_may_be_averaged():
    student = network()
    teacher = Teacher(student, decay=0.0)
    move(student, 1)
    with freeze(student):
        teacher.update(student)
    assert torch.equal(teacher.network.shared.weight, student.shared.weight)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_tied_parameters_move_once():
    student = network()
    student.text_head.weight = student.word.weight
    teacher = Teacher(student, decay=0.5)
    assert teacher.network.text_head.weight is teacher.network.word.weight
    start = teacher.network.word.weight.clone()
    with torch.no_grad():
        student.word.weight.add_(1)
    teacher.update(student)
    torch.testing.assert_close(teacher.network.word.weight, start + 0.5)


def test_mixed_dtypes():
    student = network()
    student.shared.double()
    teacher = Teacher(student, decay=0.5)
    start = weights(student)
    move(student, 1)
    teacher.update(student)
    for name, p in weights(teacher.network).items():
        torch.testing.assert_close(p, (start[name] + weights(student)[name]) / 2)


def test_runs_on_meta_without_reading_a_value():
    """No host synchronisation: `meta` tensors have no value to read."""
    student = network().to("meta")
    teacher = Teacher(student)
    for _ in range(2):
        teacher.update(student)
    assert teacher.network.shared.weight.is_meta


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decay_must_be_a_share(decay):
    expected = re.escape(f"`decay` must lie in [0 (copy), 1 (never move)], got {decay!r}")
    with pytest.raises(ValueError, match=expected):
        Teacher(network(), decay)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_too_coarse(dtype):
    """1 + .001 is 1 in bfloat16: such an average would never move."""
    student = network()
    student.shared.to(dtype)
    expected = rf"`network` holds 'shared.weight' in {dtype}, too coarse .* decay 0.999: .*autocast"
    with pytest.raises(ValueError, match=expected):
        Teacher(student)
    for exact in (0, 1):
        teacher = Teacher(student, exact)
        move(student, 1)
        teacher.update(student)
        same = torch.equal(teacher.network.shared.weight, student.shared.weight)
        assert same is (exact == 0)


@pytest.mark.unhooked
def test_a_denoiser_is_no_network():
    with pytest.raises(TypeError, match=r"`network` must be a torch.nn.Module, got ModuleDenoiser"):
        Teacher(toy_denoiser()[0])


def test_another_network():
    teacher = Teacher(network())
    wider, longer, buffered = Network(8, 4), network(), network()
    longer.extra = nn.Linear(1, 1)
    buffered.register_buffer("extra", torch.ones(4))
    for wrong, count in ((wider, 11), (longer, 13), (buffered, 12)):
        expected = rf"`network` is not the one this teacher copies: .* \(11 here, {count} there\)"
        before = weights(teacher.network)
        with pytest.raises(ValueError, match=expected):
            teacher.update(wrong)
        for name, p in weights(teacher.network).items():
            assert torch.equal(p, before[name])
