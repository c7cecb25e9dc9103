import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cyclevae.gradient_policy.contexts import detach, freeze
from cyclevae.testing import assert_frozen, assert_learns
from distributed import gather, run_ranks
from test_gradient_policy import (
    BLOCKS,
    DECODER,
    FROM_LATENT,
    Block,
    Toy,
    assert_same,
    cross_entropy,
    data,
    gradients,
    reference,
    step,
    supervised,
    toy,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")
TORCH_2_5 = torch.__version__.startswith("2.5.")


# torch.compile


@pytest.mark.parametrize("use_reentrant", [None, False], ids=["plain", "checkpoint"])
def test_freeze_inside_a_compiled_step(use_reentrant):
    model = toy(use_reentrant=use_reentrant)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(model, tokens, latents):
        return step(model, tokens, latents, freeze(model, "blocks.*", "head.*", model.from_latent))

    parameters = dict(model.named_parameters())
    for seed in range(2):
        model.zero_grad()
        compiled(model, *data(seed)).backward()
        assert_same(gradients(model), reference(model, data(seed), DECODER))
        assert all(p is parameters[name] for name, p in model.named_parameters())


def test_detach_inside_a_compiled_step():
    def losses(model, tokens, latents):
        with detach():
            z_hat = model(tokens, "t2l")
        with freeze(model, "blocks.*"):
            frozen = model(z_hat, "l2t")
        return supervised(model, tokens, latents) + cross_entropy(frozen, tokens)

    eager, compiled = toy(), toy()
    losses(eager, *data()).backward()
    torch.compile(losses, fullgraph=True, backend="aot_eager")(compiled, *data()).backward()
    assert_same(gradients(compiled), gradients(eager))


@pytest.mark.skipif(TORCH_2_5, reason="dynamo of torch 2.5 refuses a nested freeze")
def test_nested_freeze_inside_a_compiled_step():
    def losses(model, latents):
        with freeze(model, "blocks.*"), freeze(model, "*.bias"):
            return model(latents, "l2t").square().sum()

    model = toy()
    loss = torch.compile(losses, fullgraph=True, backend="aot_eager")(model, data()[1])
    frozen = BLOCKS | {"from_latent.bias"}
    assert_frozen(loss, [(name, model.get_parameter(name)) for name in frozen])
    assert_learns(loss, [model.from_latent.weight, model.table.weight])


def test_freeze_around_a_compiled_model_recompiles_nothing_after_the_first_step():
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return torch._dynamo.backends.registry.lookup_backend("aot_eager")(graph, inputs)

    model = toy()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(4):
        model.zero_grad()
        step(compiled, *data(seed), freeze(compiled, "blocks.*", compiled.head)).backward()
        assert_same(gradients(model), reference(model, data(seed), BLOCKS | {"table.weight"}))
        if seed == 0:
            first = len(frames)
    assert len(frames) == first


def test_inductor():
    def losses(model, x):
        hidden = checkpoint(model, x, use_reentrant=False)
        with freeze(model, "mix.*"):
            return model(hidden).square().sum()

    torch.manual_seed(0)
    eager = Block().double()  # small: the whole toy takes most of a minute to compile
    compiled = copy.deepcopy(eager)
    losses(eager, data()[1]).backward()
    torch.compile(losses, fullgraph=True)(compiled, data()[1]).backward()
    assert_same(gradients(compiled), gradients(eager))


# Distributed: the mean over ranks must be the mean of the ranks' references.


def assert_mean_of_references(actual, model, frozen, case):
    expected = [reference(model, data(rank), frozen) for rank in range(2)]
    mean = {
        name: gradient if gradient is None else (gradient + expected[1][name]) / 2
        for name, gradient in expected[0].items()
    }
    try:
        assert_same(actual, mean)
    except AssertionError as error:
        raise AssertionError(f"case {case}: {error}") from error


class Trainer(nn.Module):
    """What a host wraps in DDP: its forward runs the whole step."""

    def __init__(self, network, *patterns):
        super().__init__()
        self.network, self.patterns = network, patterns

    def forward(self, tokens, latents):
        return step(self.network, tokens, latents, freeze(self.network, *self.patterns))


DDP_CASES = [  # what is wrapped, find_unused_parameters, static_graph, use_reentrant
    ("trainer", False, False, None),
    ("trainer", False, False, False),
    ("trainer", True, False, None),
    ("trainer", True, False, False),
    ("trainer", False, True, None),
    ("trainer", False, True, False),
    # With find_unused_parameters=True, several calls of the wrapped network fail without freeze.
    ("network", False, False, None),
    ("network", False, False, False),
    ("network", False, True, None),
    ("network", False, True, False),
]


def ddp_worker(rank):
    for case in DDP_CASES:
        wrapped, find_unused, static, use_reentrant = case
        original = toy(use_reentrant=use_reentrant)
        model = copy.deepcopy(original)
        options = {"find_unused_parameters": find_unused, "static_graph": static}
        batch = data(rank)
        if wrapped == "trainer":
            ddp = DistributedDataParallel(Trainer(model, "blocks.*", "head.*"), **options)
            run = ddp
        else:
            ddp = DistributedDataParallel(model, **options)

            def run(*batch, ddp=ddp):
                return step(ddp, *batch, freeze(ddp, "blocks.*", "head.*"))

        for _ in range(2):
            ddp.zero_grad()
            run(*batch).backward()
            frozen = BLOCKS | {"table.weight"}
            assert_mean_of_references(gradients(model), original, frozen, case)
        # Accumulation: one step without synchronisation, one with.
        ddp.zero_grad()
        with ddp.no_sync():
            run(*batch).backward()
        run(*batch).backward()
        halved = {name: gradient / 2 for name, gradient in gradients(model).items()}
        assert_mean_of_references(halved, original, frozen, (*case, "no_sync"))


def test_ddp():
    run_ranks(ddp_worker)


def ddp_names_worker(rank):
    inner = toy()
    ddp = DistributedDataParallel(inner)
    trainer = nn.ModuleDict({"denoiser": ddp})
    for target, pattern in ((ddp, "blocks.*"), (trainer, "denoiser.blocks.*"), (ddp, inner.blocks)):
        with freeze(target, pattern):
            logits = inner(data()[1], "l2t")
        assert_frozen(logits.sum(), inner.blocks.parameters())
        assert_learns(logits.sum(), inner.from_latent.parameters())
    with pytest.raises(ValueError, match=r"'module.blocks.\*'.*Nearest: 'blocks.\*'"):
        freeze(ddp, "module.blocks.*").__enter__()


def test_names_under_ddp():
    run_ranks(ddp_names_worker, world_size=1)


def ddp_orphan_worker(rank):
    """A parameter that only a frozen pass uses: DDP must still hear of it, or its ranks diverge."""
    model = toy()
    ddp = DistributedDataParallel(model)
    for _ in range(2):
        ddp.zero_grad()
        z_hat = ddp(data(rank)[0], "t2l")
        with freeze(ddp):
            logits = ddp(z_hat, "l2t")
        cross_entropy(logits, data(rank)[0]).backward()
        for name in FROM_LATENT:
            # Zeros, not None: DDP without find_unused_parameters knows no other way.
            assert not model.get_parameter(name).grad.any()
        here, there = gather(gradients(model))
        assert_same(here, there, tolerance=0)


def test_ddp_with_a_parameter_only_used_frozen():
    run_ranks(ddp_orphan_worker)


def shard(model, *, per_block, **options):
    # Its first home, where it was until torch 2.6.
    from torch.distributed._composable.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    if per_block:
        for block in model.blocks:
            fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def full(model):
    return {
        name: gradient if gradient is None else gradient.full_tensor()
        for name, gradient in gradients(model).items()
    }


FSDP_CASES = [
    (per_block, reshard, use_reentrant)
    for per_block in (False, True)
    for reshard in (False, True)
    for use_reentrant in (None, False)
]


def fsdp_worker(rank):
    for case in FSDP_CASES:
        per_block, reshard, use_reentrant = case
        original = toy(use_reentrant=use_reentrant)
        model = shard(copy.deepcopy(original), per_block=per_block, reshard_after_forward=reshard)
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        for patterns, frozen in (
            ((), set(gradients(original))),
            (("blocks.*", "head.*"), BLOCKS | {"table.weight"}),
            ((model.blocks[1],), {name for name in BLOCKS if ".1." in name}),
        ):
            model.zero_grad()
            step(model, *data(rank), freeze(model, *patterns)).backward()
            assert_mean_of_references(full(model), original, frozen, (*case, patterns))
        # A frozen call before any other, nested selections, and a failing forward.
        model.zero_grad()
        with freeze(model, "blocks.*"), freeze(model, "*.bias"):
            frozen_first = cross_entropy(model(data(rank)[1], "l2t"), data(rank)[0])
        (frozen_first + supervised(model, *data(rank))).backward()
        actual = full(model)
        reference_model = copy.deepcopy(original)
        mean = []
        for other in range(2):
            with freeze(reference_model, "blocks.*", "*.bias"):
                loss = cross_entropy(reference_model(data(other)[1], "l2t"), data(other)[0])
            mean.append((loss + supervised(reference_model, *data(other))) / 2)
        sum(mean).backward()
        assert_same(actual, gradients(reference_model))
        with freeze(model):
            with pytest.raises(RuntimeError):
                model(torch.zeros(2, 9, dtype=torch.float64), "l2t")
            assert all(isinstance(p, nn.Parameter) for p in model.parameters())
        after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        assert after == hooks


@pytest.mark.skipif(TORCH_2_5, reason="FSDP2 of torch 2.5 needs CUDA")
def test_fsdp2():
    run_ranks(fsdp_worker)


def fsdp_mixed_worker(rank):
    """In bf16 there is no exact reference but a twin, sharded alike, with nothing frozen."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    batch = data(rank, dtype=torch.float32)
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for reshard in (False, True):
        for patterns, frozen in ((("blocks.*",), BLOCKS), (("*",), DECODER)):
            grads, z_grads = [], []
            for context in (freeze, lambda *_: nullcontext()):
                model = toy().float()
                with freeze(model, *patterns):  # what is known of it must not outlive sharding
                    pass
                model = shard(
                    model, per_block=True, mp_policy=precision, reshard_after_forward=reshard
                )
                z = batch[1].clone().requires_grad_()
                with context(model, *patterns):  # the first call of this model
                    logits = model(z, "l2t")
                assert logits.dtype == torch.bfloat16
                cross_entropy(logits.float(), batch[0]).backward()
                grads.append(full(model))
                z_grads.append(z.grad)
                # And what is not frozen learns in the next call.
                model.zero_grad()
                cross_entropy(model(batch[1], "l2t").float(), batch[0]).backward()
                assert all(full(model)[name].any() for name in DECODER)
            assert torch.equal(*z_grads) and z_grads[0].any()
            for name in DECODER:
                if name in frozen:
                    assert grads[0][name] is None or not grads[0][name].any(), name
                else:
                    assert torch.equal(grads[0][name], grads[1][name]), name
                assert grads[1][name].any(), name


@pytest.mark.skipif(TORCH_2_5, reason="FSDP2 of torch 2.5 needs CUDA")
def test_fsdp2_in_mixed_precision():
    run_ranks(fsdp_mixed_worker)


def fsdp_part_worker(rank):
    model = shard(toy(), per_block=True)
    with pytest.raises(ValueError, match=r"'weight' is a DTensor .* given to fully_shard"):
        freeze(model.blocks[0].mix).__enter__()
    with freeze(model.blocks[0], "mix.*") as frozen:
        logits = model(data(rank)[1], "l2t")
    with pytest.raises(ValueError, match="probe the model before fully_shard"):
        frozen.probe(logits.sum())
    with pytest.raises(ValueError, match="test the model before fully_shard"):
        assert_frozen(logits.sum(), model.blocks[0].mix.parameters())
    logits.sum().backward()
    assert model.blocks[0].mix.weight.grad is None
    assert model.blocks[0].norm.weight.grad is not None


@pytest.mark.skipif(TORCH_2_5, reason="FSDP2 of torch 2.5 needs CUDA")
def test_freezing_a_part_of_an_fsdp2_unit_is_an_error():
    run_ranks(fsdp_part_worker)


def fsdp1_worker(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(Toy(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match=r"not exact under Fully.*shard with torch's fully_shard"):
        freeze(model).__enter__()


def test_fsdp1_is_refused():
    run_ranks(fsdp1_worker, world_size=1)
