"""The cost of a step that is told before it runs, against steps that run, and where none can."""

import random
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cyclevae as cv
from cyclevae.diagnostics import step_cost
from cyclevae.testing import ToyNetwork, toy_batch, toy_denoiser
from recipes import RECIPES, recipe

sys.path.append(str(Path(__file__).parents[2] / "examples" / "bench"))
sys.path.append(str(Path(__file__).parents[2] / "examples" / "sentences"))
from large import SD3, LLaDA
from mmdit_model import MMDiTDenoiser

V, D, LENGTH = 4000, 16, 64
ONE = [cv.Text(time=1.0), cv.Latent(), cv.CycleText()]


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def toy_module(objective, wrap=lambda denoiser: denoiser):
    denoiser = toy_denoiser(seed=0)[0]
    teacher = cv.Teacher(denoiser.network) if objective.setting.reads_teacher else None
    return cv.StepModule(wrap(denoiser), objective, teacher)


# FLOPs, to the last


@pytest.mark.parametrize("name", [*[*RECIPES][::4], "checkpointed"])  # some: each takes seconds
def test_flops_are_those_of_the_step_that_runs(name):
    objective = recipe(RECIPES.get(name, {}))
    wrap = cv.checkpoint_passes if name == "checkpointed" else lambda denoiser: denoiser
    module, batch = toy_module(objective, wrap), toy_batch(seed=0)
    calls = []
    for network in [module.network, *([module.teacher.network] if module.teacher else [])]:
        network.register_forward_pre_hook(lambda *_: calls.append(1))
    told = step_cost(module, batch)
    with cv.check_values(False):  # as on a GPU: what is read can save a product
        assert told.flops == flops(lambda: module(batch, 0).loss.backward()) > 0
    again = sum(found.learns for found in told.passes) if name == "checkpointed" else 0
    # hooks are copied with the network: the step's passes, those of an L2T step, and ours
    assert len(told.passes) == objective.passes(0)
    assert again or len(calls) == 2 * len(told.passes) + len(told.l2t.passes)
    assert told.forward == sum(found.forward for found in told.terms.values())
    assert told.backward == sum(found.backward for found in told.terms.values())


def test_a_pass_costs_what_it_costs_alone():
    module, batch = mmdit_module(ONE), pairs(6)
    told = step_cost(module, batch)
    tokens, mask, latents = batch[:3]
    ones, zeros = torch.ones(6), torch.zeros(6)
    state = {"text_time": zeros, "latent_time": ones, "attention_mask": mask}
    for found, need in zip(told.passes, ("logits", "latents", "logits"), strict=True):
        rows = found.rows
        state = {k: v[:1].expand(rows, *v.shape[1:]) for k, v in state.items()}
        inputs = [x[:1].expand(rows, *x.shape[1:]) for x in (tokens, latents)]
        with FlopCounterMode(display=False) as counter:
            logits, prediction = module.denoiser.denoise(*inputs, **state, need=need)
            forward = counter.get_total_flops()
            (prediction if logits is None else logits.hidden).sum().backward()
        assert found.forward == forward
        assert found.backward == pytest.approx(counter.get_total_flops() - forward, rel=1e-9)
    assert [found.direction for found in told.passes] == ["L2T", "T2L", "L2T"]
    assert [found.term for found in told.passes] == ["text", "latent", "cycle_text"]


# Bytes, against the allocator


def mmdit_module(terms, wrap=lambda denoiser: denoiser):
    torch.manual_seed(0)
    random.seed(0)  # of the streams that blocks of mmdit begin with
    network = MMDiTDenoiser(V, D, length=LENGTH, width=64, depth=1)
    objective = cv.CycleObjective(
        cv.TextProcess(2, V, pad_id=0), cv.LatentProcess("continuous_cosine"), terms
    )
    return cv.StepModule(wrap(cv.as_denoiser(network)), objective)


def pairs(rows):
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, V, (rows, LENGTH), generator=draw)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    latents = torch.randn(rows, D, generator=draw)
    return cv.Batch(tokens, mask, latents, tokens.flip(0)[:4], mask[:4])


def allocated(call):
    """The most that the CPU's allocator had given away, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("terms", "wrap"),
    [
        (ONE, None),
        (ONE, cv.checkpoint_passes),
        ([*ONE, cv.CycleLatent(pairs=True), cv.Prior("moment")], None),
        ([cv.Text(time=1.0)], None),
        ([cv.Latent(), cv.CycleText(policy="full")], None),
    ],
    ids=["recipe", "checkpointed", "four passes", "L2T", "through the bridge"],
)
def test_live_bytes_are_those_of_the_allocator(terms, wrap):
    module, batch = mmdit_module(terms, wrap or (lambda denoiser: denoiser)), pairs(8)
    for _ in range(2):  # from the second step on there are gradients, and tables
        module(batch, 0).loss.backward()
    found = allocated(lambda: module(batch, 0).loss.backward())
    told = step_cost(module, batch)
    assert told.live == pytest.approx(found, rel=0.05)
    whole = sum(term.live for term in told.terms.values()) + told.on_the_way
    assert whole == pytest.approx(told.live, rel=0.01)


def test_gradients_and_parameters_are_beside():
    module = mmdit_module(ONE)
    module.network.word.requires_grad_(False)
    module.network.text_head.register_forward_hook(lambda *_: None)  # so logits are in memory
    told = step_cost(module, pairs(4), dtype=torch.bfloat16)
    sizes = [p.numel() for p in module.network.parameters()]
    assert told.parameters == 2 * sum(sizes)
    assert told.gradients == 2 * (sum(sizes) - V * 64)
    assert told.live < 0.8 * step_cost(module, pairs(4)).live  # losses stay in float32


# What cannot run here


def test_a_network_of_eight_billion_parameters_is_told():
    with torch.device("meta"):
        network = LLaDA()
    length, width, depth, inner, v = 1024, 4096, 32, 12_288, 126_464
    tokens = torch.zeros(2, length, dtype=torch.long)
    batch = cv.Batch(tokens, torch.ones_like(tokens), torch.zeros(2, 1024))
    objective = cv.CycleObjective(
        cv.TextProcess(2, v),
        cv.LatentProcess(),
        [cv.Text(time=1.0), cv.Latent(), cv.CycleText(pairs=True)],
    )
    began = time.process_time()
    told = step_cost(cv.StepModule(cv.as_denoiser(network), objective), batch, dtype=torch.bfloat16)
    assert time.process_time() - began < 60
    assert 8.0e9 < told.parameters / 2 < 8.05e9
    rows = length + 1  # and the latent's position
    block = rows * (4 * width**2 + 3 * width * inner) + 2 * rows**2 * width
    text, _, _ = told.passes
    small = 2 * 2 * (1024 + 2) * width  # of the latent's way in
    assert text.forward == 2 * 2 * (depth * block + length * v * width) + small
    assert told.flops == pytest.approx(3 * told.l2t.flops, rel=0.05)


def test_attention_is_fused():
    """As many FLOPs as of the products written out, and no scores kept."""
    kept, counted = [], []
    for length in (256, 512):
        torch.manual_seed(0)
        network = SD3(100, channels=2, side=4, caption_dim=8, width=16, depth=1, heads=2)
        tokens = torch.randint(3, 100, (1, length))
        batch = cv.Batch(tokens, torch.ones_like(tokens), torch.randn(1, 2, 4, 4))
        processes = cv.TextProcess(2, 100), cv.LatentProcess("flow", prediction="velocity")
        objective = cv.CycleObjective(*processes, [cv.Text(time=1.0)])
        module = cv.StepModule(cv.as_denoiser(network), objective)
        told = step_cost(module, batch)
        kept.append(told.live)
        counted.append(told.forward)
        with sdpa_kernel(SDPBackend.MATH):
            assert flops(lambda m=module, b=batch: m(b, 0)) == told.forward
    assert kept[1] < 2.05 * kept[0]
    assert counted[1] > 3 * counted[0]


def test_attention_of_other_shapes():
    class Network(ToyNetwork):
        def forward(self, tokens, latents, **state):
            q = latents[:, None, None].expand(-1, 4, 3, -1)
            k = latents[:, None, None].expand(-1, 2, 5, -1)
            F.scaled_dot_product_attention(q, k, k, is_causal=False, enable_gqa=True)
            mixed = F.scaled_dot_product_attention(q[:, 0], k[:, 0], k[:, 0])
            return super().forward(tokens, latents + mixed.mean(1), **state)

    _, *processes = toy_denoiser(seed=0)
    module = cv.StepModule(cv.as_denoiser(Network(7, 4)), cv.CycleObjective(*processes))
    assert (
        step_cost(module, toy_batch(seed=0)).flops
        > step_cost(toy_module(module.objective), toy_batch(seed=0)).flops
    )


# What is left as it was, and what is refused


def test_nothing_is_changed():
    module, batch = mmdit_module(ONE), pairs(4)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    random_state = torch.get_rng_state()
    told = step_cost(module, batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None and not p.is_meta for p in module.parameters())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert step_cost(module, batch) == told
    assert f"{told.live / told.l2t.live:.2f} times the live bytes" in str(told)


def test_tensors_outside_of_parameters_are_told_too():
    class Network(ToyNetwork):
        def __init__(self):
            super().__init__(7, 4)
            self.scales = [torch.ones(4), torch.ones(4)]

        def forward(self, tokens, latents, **state):
            return super().forward(tokens, latents * self.scales[0] + torch.arange(4), **state)

    _, *processes = toy_denoiser(seed=0)
    module = cv.StepModule(cv.as_denoiser(Network()), cv.CycleObjective(*processes))
    assert step_cost(module, toy_batch(seed=0)).flops > 0


class Reads(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x


def test_a_network_that_reads_values_is_named():
    class Network(ToyNetwork):
        def __init__(self):
            super().__init__(7, 4)
            self.shared = nn.Sequential(self.shared, Reads())

    _, *processes = toy_denoiser(seed=0)
    module = cv.StepModule(cv.as_denoiser(Network()), cv.CycleObjective(*processes))
    module(toy_batch(seed=0), 0)  # which runs
    with pytest.raises(ValueError, match=r"cannot be told on meta: shared\.1 \(Reads, line \d+\)"):
        step_cost(module, toy_batch(seed=0))


def test_what_is_no_step_is_refused():
    denoiser, *processes = toy_denoiser(seed=0)
    objective = cv.CycleObjective(*processes)
    batch = toy_batch(seed=0)
    with pytest.raises(TypeError, match=r"write StepModule\(denoiser, objective\)"):
        step_cost(denoiser, batch)
    with pytest.raises(ValueError, match="`batch` must be a Batch"):
        step_cost(cv.StepModule(denoiser, objective), batch._asdict())
    with pytest.raises(TypeError, match="must be a CycleObjective or phases"):
        step_cost(cv.StepModule(denoiser, lambda *_, **__: None), batch)
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="say the dtype"):
        step_cost(cv.StepModule(denoiser, objective), batch)

    class Own:
        network = denoiser.network

        def denoise(self, *args, **state):
            return denoiser.denoise(*args, **state)

    with pytest.raises(TypeError, match=r"Own has no `with_network\(network\)`"):
        step_cost(cv.StepModule(Own(), objective), batch)
    with pytest.raises(ValueError, match="nothing to train on"):
        step_cost(
            cv.StepModule(denoiser, cv.CycleObjective(*processes, [cv.Text(weight=0)])), batch
        )


def test_blocks_that_checkpoint_run_again_on_meta():
    """Where autograd runs a block again, in which no mode of the forward is left."""
    told = []
    for wrap in (lambda denoiser: denoiser, cv.checkpoint_passes):
        network = LLaDA(100, 8, width=16, depth=2, heads=2, inner=32)
        tokens = torch.randint(3, 100, (2, 32))
        batch = cv.Batch(tokens, torch.ones_like(tokens), torch.randn(2, 8))
        processes = cv.TextProcess(2, 100), cv.LatentProcess()
        objective = cv.CycleObjective(*processes, [cv.Text(time=1.0), cv.Latent()])
        told.append(step_cost(cv.StepModule(wrap(cv.as_denoiser(network)), objective), batch))
    plain, again = told
    # the last products of a pass are not made again
    more = (again.backward - plain.backward) / plain.forward
    assert 0.8 < more <= 1
    assert again.live < plain.live
