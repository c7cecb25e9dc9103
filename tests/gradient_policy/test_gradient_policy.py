import copy
import gc
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cyclevae as cv
from cyclevae.gradient_policy.contexts import detach, freeze, gate_params
from cyclevae.gradient_policy.gate import Frozen, refuse_reentrant
from cyclevae.gradient_policy.policy import GradientPolicy
from cyclevae.testing import ToyNetwork, assert_frozen, assert_learns, toy_batch, toy_denoiser

VOCAB, WIDTH, LENGTH = 7, 4, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        return hidden + torch.tanh(self.mix(self.norm(hidden)))


class Toy(nn.Module):
    """Encoder and decoder in one: shared blocks, a table tied to the head, as in the hosts."""

    def __init__(self, *, use_reentrant=None):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.to_latent = nn.Linear(WIDTH, WIDTH)
        self.from_latent = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x, mode):
        if mode == "t2l":
            hidden = self.table(x)
        else:
            hidden = self.from_latent(x)[:, None].expand(-1, LENGTH, -1)
        for block in self.blocks:
            if self.use_reentrant is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self.use_reentrant)
        return self.to_latent(hidden.mean(1)) if mode == "t2l" else self.head(hidden)


FROM_LATENT = {"from_latent.weight", "from_latent.bias"}
BLOCKS = {
    f"blocks.{i}.{leaf}"
    for i in (0, 1)
    for leaf in ("norm.weight", "norm.bias", "mix.weight", "mix.bias")
}
DECODER = BLOCKS | FROM_LATENT | {"table.weight"}


def toy(seed=0, **options):
    torch.manual_seed(seed)
    return Toy(**options).double()


def data(seed=0, rows=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (rows, LENGTH), generator=generator)
    return tokens, torch.randn(rows, WIDTH, generator=generator, dtype=dtype)


def cross_entropy(logits, tokens):
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def supervised(model, tokens, latents):
    text = cross_entropy(model(latents, "l2t"), tokens)
    return text + nn.functional.mse_loss(model(tokens, "t2l"), latents)


def step(model, tokens, latents, context):
    """The supervised terms and one cycle whose second pass runs in `context`: four calls."""
    z_hat = model(tokens, "t2l")
    with context:
        logits = model(z_hat, "l2t")
    return supervised(model, tokens, latents) + cross_entropy(logits, tokens)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def reference(model, batch, frozen):
    """Gradients of `step`, its frozen pass run in a copy whose frozen gradients are dropped."""
    model, twin = copy.deepcopy(model), copy.deepcopy(model)
    tokens, latents = batch
    logits = twin(model(tokens, "t2l"), "l2t")
    (supervised(model, tokens, latents) + cross_entropy(logits, tokens)).backward()
    total = gradients(model)
    for name, gradient in gradients(twin).items():
        if name not in frozen and gradient is not None:
            total[name] = gradient if total[name] is None else total[name] + gradient
    return total


def assert_same(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None, name
        else:
            torch.testing.assert_close(
                actual[name], gradient, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


class Denoiser:
    def __init__(self, module):
        self.module = module


SELECTIONS = [
    pytest.param(lambda m: freeze(m), DECODER | {"to_latent.weight", "to_latent.bias"}, id="all"),
    pytest.param(lambda m: freeze(m, "blocks.*"), BLOCKS, id="group"),
    pytest.param(lambda m: freeze(m, "blocks.*", "from_*"), BLOCKS | FROM_LATENT, id="groups"),
    pytest.param(
        lambda m: freeze(m, "*.bias"), {n for n in DECODER if n.endswith("bias")}, id="leaf"
    ),
    pytest.param(lambda m: freeze(m, "head.*"), {"table.weight"}, id="second name of a tie"),
    pytest.param(lambda m: freeze(m, "table.weight"), {"table.weight"}, id="first name of a tie"),
    pytest.param(lambda m: freeze(m, m.blocks, m.from_latent), BLOCKS | FROM_LATENT, id="modules"),
    pytest.param(lambda m: freeze(Denoiser(m), "blocks.*"), BLOCKS, id="denoiser"),
    pytest.param(lambda m: freeze(Denoiser(m), m.blocks), BLOCKS, id="denoiser and module"),
]


@pytest.mark.parametrize("use_reentrant", [None, False], ids=["plain", "checkpoint"])
@pytest.mark.parametrize(("context", "frozen"), SELECTIONS)
def test_only_the_frozen_pass_teaches_nothing(context, frozen, use_reentrant):
    model = toy(use_reentrant=use_reentrant)
    step(model, *data(), context(model)).backward()
    assert_same(gradients(model), reference(model, data(), frozen))
    # And the choice matters: with nothing frozen the gradients would be others.
    free = reference(model, data(), set())
    assert any((free[n] - gradients(model)[n]).abs().max() > 1e-3 for n in frozen)


def test_frozen_pass_alone():
    model = toy()
    latents = data()[1].requires_grad_()
    with freeze(model, "blocks.*"):
        logits = model(latents, "l2t")
    assert_frozen(logits.sum(), [(n, model.get_parameter(n)) for n in BLOCKS])
    assert_learns(logits.sum(), [("latents", latents), *model.from_latent.named_parameters()])


@pytest.mark.parametrize("where", ["inside", "after"])
def test_backward_may_run_anywhere(where):
    model = toy()
    context = ExitStack()
    with context:
        context.enter_context(freeze(model, "blocks.*"))
        loss = cross_entropy(model(data()[1], "l2t"), data()[0])
        if where == "inside":
            loss.backward()
    if where == "after":
        loss.backward()
    assert {name for name, gradient in gradients(model).items() if gradient is not None} == (
        FROM_LATENT | {"table.weight"}
    )


def test_accumulated_gradients_are_kept():
    model = toy()
    supervised(model, *data()).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    with freeze(model):
        loss = supervised(model, *data())
    loss.backward()
    assert_same(gradients(model), before, tolerance=0)


class Square(nn.Module):
    """Recomputed with other saved tensors, this would be silently wrong: same shapes everywhere."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


def test_checkpoint_of_square_linears_is_not_silently_wrong():
    torch.manual_seed(0)
    model = Square().double()
    x = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        z = x.clone().requires_grad_()
        with freeze(model):
            y = run(z)
        y.square().sum().backward()
        grads.append(z.grad)
    assert_same({"bridge": grads[1]}, {"bridge": grads[0]})
    assert all(p.grad is None for p in model.parameters())


def test_weight_read_by_another_module():
    class Reader(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.tables = [table]  # a module in a list is no submodule, but its swap is seen

        def forward(self, x):
            return nn.functional.linear(x, self.tables[0].weight)

    model = toy()
    reader = Reader(model.table)
    x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    with freeze(model, "table.*"):
        y = reader(x)
    assert_frozen(y.sum(), [model.table.weight])
    assert_learns(y.sum(), [x])
    assert_learns(reader(x).sum(), [model.table.weight])


def test_weight_read_by_an_autograd_function():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            return gradient @ weight, gradient.T @ x

    class Fused(nn.Linear):
        def forward(self, x):
            return Product.apply(x, self.weight) + self.bias

    torch.manual_seed(0)
    fused, plain = Fused(3, 2).double(), nn.Linear(3, 2).double()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(4, 3, dtype=torch.float64)
    grads = []
    for layer in (fused, plain):
        z = x.clone().requires_grad_()
        with freeze(layer, "weight"):
            frozen = layer(z)
        (frozen.square().sum() + layer(2 * z).square().sum()).backward()
        grads.append({"z": z.grad, **gradients(layer)})
    assert_same(*grads)
    normal = torch.autograd.grad(plain(2 * x).square().sum(), plain.weight)[0]
    assert_same({"weight": fused.weight.grad}, {"weight": normal})


def test_parametrized_weights_are_frozen_by_their_originals():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    x = torch.ones(1, 2)
    with freeze(model, "0.*") as frozen:
        loss = model(x).square().sum()
    frozen.probe(loss)
    assert_learns(loss, model[1].parameters())
    assert_learns(model(x).square().sum(), model[0].parameters())
    with freeze(model, "0.parametrizations.weight.original0"):
        loss = model(x).square().sum()
    (scale, direction) = model[0].parametrizations.weight.parameters()
    assert_frozen(loss, [scale])
    assert_learns(loss, [direction, model[0].bias])
    # A weight that was computed outside, and kept, is computed again.
    with nn.utils.parametrize.cached():
        model(x)
        with freeze(model, "0.*") as frozen:
            loss = model(x).square().sum()
    frozen.probe(loss)


def test_another_thread_sees_the_frozen_parameters():
    """The swap is in the module, which all threads share; what ran before or after learns."""
    model, x = toy(), data()[1]
    with ThreadPoolExecutor(1) as pool:
        with freeze(model, "blocks.*"):
            meanwhile = pool.submit(model, x, "l2t").result()
        after = pool.submit(model, x, "l2t").result()
    assert_frozen(meanwhile.sum(), model.blocks.parameters())
    assert_learns(meanwhile.sum(), model.from_latent.parameters())
    assert_learns(after.sum(), model.blocks.parameters())


@pytest.mark.parametrize("patterns", [(), ("blocks.*",)])
def test_a_frozen_pass_saves_and_computes_what_a_normal_one_does(patterns):
    """Equal saved tensors are what makes recomputation exact; freezing saves no work."""

    def cost(context):
        saved = {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        model, z = toy(), data()[1].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context(model):
            loss = cross_entropy(model(z, "l2t"), data()[0])
        with FlopCounterMode(display=False) as flops:
            loss.backward()
        return sum(saved.values()), flops.get_total_flops()

    normal = cost(lambda _: nullcontext())
    assert cost(lambda model: freeze(model, *patterns)) == normal
    assert min(normal) > 0
    # The counters can tell: without grad for the parameters there is less of both.
    toggled = cost(lambda model: nullcontext(model.requires_grad_(False)))
    assert all(less < usual for less, usual in zip(toggled, normal, strict=True))


def test_shared_module_is_frozen_by_either_path():
    for pattern in ("first.*", "second.*"):
        shared = nn.Linear(2, 2)
        model = nn.ModuleDict({"first": shared, "second": shared, "other": nn.Linear(2, 2)})
        with freeze(model, pattern):
            y = model["other"](model["second"](model["first"](torch.ones(1, 2))))
        assert_frozen(y.sum(), shared.parameters())
        assert_learns(y.sum(), model["other"].parameters())
        assert isinstance(shared.weight, nn.Parameter)


@pytest.mark.parametrize("frozen_first", [True, False])
def test_autocast(frozen_first):
    """The casts that autocast caches in one pass must serve the other with the right gradient."""

    def run(model, twin, context):
        tokens, latents = data(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = []
            for frozen in (frozen_first, not frozen_first):
                with context if frozen else nullcontext():
                    losses.append(
                        cross_entropy((twin if frozen else model)(latents, "l2t"), tokens)
                    )
            sum(losses).backward()
        return gradients(model)

    model = toy().float()
    twin = copy.deepcopy(model)
    expected = run(copy.deepcopy(model), twin, nullcontext())
    actual = run(model, model, freeze(model))
    for name in DECODER:
        torch.testing.assert_close(actual[name], expected[name], rtol=2e-2, atol=2e-3)


def test_detach_beside_autocast_leaves_later_passes_their_gradient():
    def run(bridge):
        model = toy().float()
        tokens, latents = data(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if bridge:
                with detach():
                    assert not model(tokens, "t2l").requires_grad
            loss = supervised(model, tokens, latents)
        loss.backward()
        return gradients(model)

    assert_same(run(bridge=True), run(bridge=False), tolerance=0)


def test_detach_restores_what_it_found():
    for enabled in (True, False):
        torch.set_autocast_cache_enabled(enabled)
        try:
            with pytest.raises(KeyError), detach():
                assert not torch.is_grad_enabled()
                assert not torch.is_autocast_cache_enabled()
                raise KeyError
            assert torch.is_autocast_cache_enabled() is enabled
            assert torch.is_grad_enabled()
        finally:
            torch.set_autocast_cache_enabled(True)


def test_state_dict_is_the_same_before_inside_and_after():
    model = toy()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with freeze(model):
        inside = model.state_dict()
    for state in (inside, model.state_dict()):
        assert list(state) == list(before)
        assert all(torch.equal(state[key], before[key]) for key in before)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]


def test_what_a_module_holds_inside():
    model = toy()
    table, bias = model.table.weight, model.to_latent.bias
    with freeze(model, "head.*"):
        assert model.table.weight is model.head.weight is not table
        assert model.table.weight.requires_grad
        assert model.table.weight.data_ptr() == table.data_ptr()
        assert model.to_latent.bias is bias
    assert model.table.weight is model.head.weight is table


def test_parameters_that_do_not_require_grad_are_left_alone():
    model = toy()
    model.blocks[0].requires_grad_(False)
    held = model.blocks[0].mix.weight
    with freeze(model, "blocks.*"):
        assert model.blocks[0].mix.weight is held
        logits = model(data()[1], "l2t")
    assert not held.requires_grad
    assert_frozen(logits.sum(), model.blocks.parameters())
    assert_learns(logits.sum(), model.from_latent.parameters())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.sampled_from(["blocks.*", "blocks.0.*", "*.bias", "head.*", "from_latent.*", "*"]),
        min_size=1,
        max_size=4,
    )
)
def test_nested_selections_add_up_and_leave_nothing_behind(patterns):
    chosen = {
        "blocks.*": BLOCKS,
        "blocks.0.*": {name for name in BLOCKS if name.startswith("blocks.0.")},
        "*.bias": {name for name in DECODER if name.endswith(".bias")},
        "head.*": {"table.weight"},
        "from_latent.*": FROM_LATENT,
        "*": DECODER,
    }
    model = toy()
    parameters = dict(model.named_parameters())
    outputs = []
    with ExitStack() as stack:
        for pattern in patterns:
            stack.enter_context(freeze(model, pattern))
            outputs.append(model(data()[1], "l2t"))
    assert all(p is parameters[name] for name, p in model.named_parameters())
    frozen = set()
    for pattern, output in zip(patterns, outputs, strict=True):
        frozen |= chosen[pattern]
        assert_frozen(output.sum(), [(name, parameters[name]) for name in frozen])
        learning = [(name, parameters[name]) for name in DECODER - frozen]
        if learning:
            assert_learns(output.square().sum(), learning)


def test_exceptions_restore_the_parameters():
    model = toy()
    parameters = dict(model.named_parameters())
    with pytest.raises(KeyError), freeze(model), freeze(model, "blocks.*"):
        raise KeyError
    with pytest.raises(ValueError, match="nothing_such"), freeze(model):
        freeze(model, "blocks.*", "nothing_such").__enter__()
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_one_context_object_can_be_entered_again_and_nested():
    model = toy()
    table = model.table.weight
    context = freeze(model)
    for _ in range(2):
        with context, context:
            assert model.table.weight is not table
        assert model.table.weight is table


def test_names_resolve_at_every_entry():
    model = toy()
    context = freeze(model, "to_latent.*")
    with context:
        pass
    model.to_latent = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    with context:
        z = model(data()[0], "t2l")
    assert_frozen(z.sum(), model.to_latent.parameters())


def test_leaving_in_the_wrong_order_is_an_error_and_restores_the_parameters():
    model = toy()
    table = model.table.weight
    outer, inner = freeze(model), freeze(model)
    outer.__enter__()
    inner.__enter__()
    for context in (outer, inner):
        with pytest.raises(RuntimeError, match="leave nested contexts in reverse order"):
            context.__exit__(None, None, None)
    assert model.table.weight is model.head.weight is table


def test_a_parameter_replaced_inside_is_an_error_and_stays():
    model = toy()
    new = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="replaced inside"), freeze(model):
        model.to_latent.bias = new
    assert model.to_latent.bias is new
    assert isinstance(model.to_latent.weight, nn.Parameter)


def test_no_graph_inside_no_grad_and_inference_mode():
    model = toy()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), freeze(model):
            assert not model(data()[1], "l2t").requires_grad
        with freeze(model), mode():
            assert not model(data()[1], "l2t").requires_grad
    assert_learns(model(data()[1], "l2t").sum(), model.blocks.parameters())


def test_in_place_renormalised_embedding():
    model = nn.Sequential(nn.Embedding(3, 2, max_norm=1.0), nn.Linear(2, 2))
    with freeze(model, "0.*"):
        y = model(torch.tensor([0, 1]))
    assert_frozen(y.sum(), model[0].parameters())
    assert_learns(y.sum(), model[1].parameters())


def test_wrappers_do_not_appear_in_names():
    model = toy()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    with freeze(model, "blocks.0.mix.weight"):
        logits = model(data()[1], "l2t")
    inner = model.blocks[0]._checkpoint_wrapped_module
    assert_frozen(logits.sum(), [inner.mix.weight])
    assert_learns(logits.sum(), [inner.mix.bias])


def test_nothing_keeps_the_module_alive():
    model = toy()
    with freeze(model):
        model(data()[1], "l2t").sum().backward()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


# Another gate than the one of `freeze`.


class Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *parameters):
        return tuple([parameter.detach() for parameter in parameters])

    @staticmethod
    def backward(ctx, *gradients):
        return tuple([gradient / 2 for gradient in gradients])


def test_a_gate_of_ones_own_decides_about_the_gradient():
    model, whole = toy(), toy()
    supervised(whole, *data()).backward()
    groups = []

    def gate(parameters):
        groups.append(len(parameters))
        return Halve.apply(*parameters)

    with Frozen(model, ("blocks.*",), gate):
        loss = supervised(model, *data())
    loss.backward()
    assert sum(groups) == len(BLOCKS)
    halved = {n: p.grad / (1 + (n in BLOCKS)) for n, p in whole.named_parameters()}
    assert_same(gradients(model), halved)


# What cannot be exact is refused.


def test_reentrant_checkpointing_is_refused():
    model = toy(use_reentrant=True)
    latents = data()[1].requires_grad_()
    with freeze(model):
        logits = model(latents, "l2t")
    for refused in (
        lambda: refuse_reentrant([logits]),
        lambda: assert_frozen(logits.sum(), model.parameters()),
    ):
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            refused()


def test_reentrant_checkpointing_before_the_bridge_is_allowed():
    encoder, decoder = toy(use_reentrant=True), toy(use_reentrant=False)
    bridge = encoder(data()[0], "t2l")
    logits = decoder(bridge, "l2t")
    refuse_reentrant([logits, torch.zeros(1)], bridge=bridge)
    with pytest.raises(RuntimeError, match="reentrant"):
        refuse_reentrant([logits])


class Named(torch.autograd.Function):
    """A function that keeps an attribute called like a method of its node."""

    @staticmethod
    def forward(ctx, x):
        ctx.name = "mine"
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_functions_may_keep_what_they_like():
    x = torch.ones(2, requires_grad=True)
    refuse_reentrant([Named.apply(x)])
    with pytest.raises(RuntimeError, match="reentrant"):
        refuse_reentrant([Named.apply(checkpoint(torch.exp, x, use_reentrant=True))])


class Checkpointed(ToyNetwork):
    """The toy network with both heads, or one of them, under reentrant checkpointing."""

    def __init__(self, *names):
        super().__init__(vocab_size=7, latent_dim=4)
        for name in names:
            head = getattr(self, name)
            head.forward = partial(checkpoint, head.forward, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs")  # of checkpoint, in a pass without a graph
@pytest.mark.parametrize("head", ["text_head", "latent_head"])
@pytest.mark.parametrize("frozen", ["freeze", "freeze_bridge"])
@pytest.mark.parametrize("direction", ["text", "latent", "marginal"])
def test_losses_refuse_reentrant_checkpointing_in_the_pass_that_they_freeze(
    direction, frozen, head
):
    torch.manual_seed(0)
    denoiser, (_, text, latent) = cv.as_denoiser(Checkpointed(head)), toy_denoiser()
    policy = GradientPolicy("full", **{frozen: ("shared.*",)})
    batch = toy_batch()
    processes = {"text_process": text, "latent_process": latent}

    def loss():
        if direction == "text":
            return cv.cycle_text_loss(denoiser, *batch[:2], policy=policy, **processes)
        if direction == "latent":
            return cv.cycle_latent_loss(
                denoiser,
                batch.latents,
                batch.attention_mask,
                bridge="soft",
                policy=policy,
                **processes,
            )
        term = cv.TextMarginal(bridge="soft", freeze=policy.freeze_bridge, pairs=True)
        return cv.CycleObjective(*processes.values(), [term])(denoiser, batch, step=0).loss

    bridge_head = {"text": "latent_head"}.get(direction, "text_head")
    in_that_pass = (frozen == "freeze_bridge") == (head == bridge_head)
    # the text marginal reads the pseudo-text by the text head, and `freeze` is not about that pass
    if in_that_pass and (direction, frozen) != ("marginal", "freeze"):
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            loss()
    else:
        loss()


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("head", ["text_head", "latent_head"])
def test_zeroing_refuses_reentrant_checkpointing_as_frozen_passes_do(head, values):
    """Run again, the pass is guarded no more, and its gradients are NaN."""
    torch.manual_seed(0)
    denoiser, (_, text, latent) = cv.as_denoiser(Checkpointed(head)), toy_denoiser()
    objective = cv.CycleObjective(text, latent, non_finite="zero")
    refused = pytest.raises(RuntimeError, match="use_reentrant=False")
    with cv.check_values(values), refused:
        objective(denoiser, toy_batch(), step=0)
    assert all(isinstance(p, nn.Parameter) for p in denoiser.module.parameters())


@pytest.mark.parametrize("name", ["CheckpointFunction", "UnslothCheckpointer", "MyCheckpointing"])
def test_checkpointing_of_other_libraries_is_refused(name):
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    Again.__name__ = name
    function = type(name, (Again,), {})
    with pytest.raises(RuntimeError, match="reentrant"):
        refuse_reentrant([function.apply(torch.ones(1, requires_grad=True))])


def python_alias(model, x):
    return nn.functional.linear(x, model.alias[0])


def functional(model, x):
    parameters = {"weight": model.alias[0], "bias": model.inner.bias}
    return torch.func.functional_call(model.inner, parameters, (x,))


def of_the_module(model, x):
    return model.inner(x)


class Aliased(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.alias, self.run = [self.inner.weight], run

    def forward(self, x):
        return self.run(self, x)


@pytest.mark.parametrize("run", [python_alias, functional])
def test_the_probe_names_what_leaks(run):
    model, x = Aliased(run), torch.ones(2, WIDTH, requires_grad=True)
    with freeze(model) as frozen:
        loss = model(x).sum()
    with pytest.raises(RuntimeError, match=r"would learn from `loss`: 'inner.weight'\. .*alias.*"):
        frozen.probe(loss)
    with pytest.raises(AssertionError, match="would learn"):
        assert_frozen(loss, model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_gated_parameters_for_functional_call():
    model, twin = toy(), toy()
    chosen = {n: p for n, p in model.named_parameters(remove_duplicate=False) if "blocks" not in n}
    gated = gate_params(chosen)
    assert gated["head.weight"] is gated["table.weight"] and gated["head.weight"].requires_grad
    z = data()[1].requires_grad_()
    with freeze(model, "blocks.0.*"):  # and freeze acts on what is not given
        logits = torch.func.functional_call(model, gated, (z, "l2t"))
    learning = {name for name in BLOCKS if ".1." in name}
    (logits.square().sum() + supervised(model, *data())).backward()
    logits = twin(z.detach(), "l2t")
    wanted = [twin.get_parameter(name) for name in sorted(learning)]
    added = torch.autograd.grad(logits.square().sum(), wanted)
    supervised(twin, *data()).backward()
    for parameter, gradient in zip(wanted, added, strict=True):
        parameter.grad += gradient
    assert_same(gradients(model), gradients(twin))
    assert z.grad.any()


def test_gated_parameters_under_the_transforms_of_functorch():
    layer, x = nn.Linear(2, 2).double(), torch.randn(3, 2, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        hidden = torch.func.functional_call(layer, parameters, x)
        return torch.func.functional_call(layer, gate_params(parameters), hidden).square().sum()

    actual = torch.func.grad(loss)(parameters, x)
    with_freeze = layer(x)
    with freeze(layer):
        with_freeze = layer(with_freeze)
    with_freeze.square().sum().backward()
    assert_same(actual, gradients(layer))
    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    assert_same({name: g.sum(0) for name, g in rows.items()}, actual)


def test_the_probe_finds_nothing_where_nothing_leaks():
    model, x = Aliased(of_the_module), torch.ones(2, WIDTH, requires_grad=True)
    model.inner.bias.requires_grad_(False)
    with freeze(model) as frozen:
        loss = model(x).sum()
    frozen.probe(loss)
    frozen.probe(loss)  # the graph is kept
    with pytest.raises(RuntimeError, match=r"'inner.weight'\. .* `loss` holds a pass outside"):
        frozen.probe(loss + model(x).sum())


def test_the_probe_says_what_is_wrong():
    model = toy(use_reentrant=True)
    with freeze(model) as frozen:
        loss = model(data()[1].requires_grad_(), "l2t").sum()
        with pytest.raises(ValueError, match="after the context has ended"):
            frozen.probe(loss)
    with freeze(model, "head.*"), pytest.raises(ValueError, match="after the context has ended"):
        frozen.probe(loss)  # in another context, of a part
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        frozen.probe(loss)
    with pytest.raises(ValueError, match="has no graph"):
        frozen.probe(loss.detach())


def test_recurrent_layers_are_refused():
    model = nn.ModuleDict({"rnn": nn.GRU(2, 2), "out": nn.Linear(2, 2)})
    with freeze(model, "out.*"):
        pass
    with pytest.raises(ValueError, match=r"'rnn.weight_ih_l0' belongs to a GRU, .*leave it out"):
        freeze(model).__enter__()


@pytest.fixture
def untyped():
    """What users see: the type checks of the test run would speak first."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


FREEZE_ERRORS = [
    (lambda m: (3,), r"needs a torch.nn.Module or an object whose `.module` is one, got int: give"),
    (lambda m: (Denoiser(None),), r"got Denoiser: give your denoiser a `.module`"),
    (lambda m: (nn.ReLU(),), r"got a ReLU that holds no parameters"),
    (lambda m: (m, "blocs.*"), r"'blocs.*' of freeze\(\) matches no parameter name.*'blocks.*'"),
    (lambda m: (m, "blocks"), r"must match a full name.* Nearest: 'blocks.*'"),
    (lambda m: (m, "to_latent.wieght"), r"Nearest: 'to_latent.weight'"),
    (lambda m: (m, "zzz"), r"Nearest: 'table.*', 'to_latent.*', 'from_latent.*', 'blocks.*', "),
    (lambda m: (m, "blocks.*", "nope.*"), r"'nope.*' of freeze\(\) matches no"),
    (lambda m: (m, toy()), r"submodule Toy, which holds no parameter of the target: pass a sub"),
    (lambda m: (m, nn.ReLU()), r"submodule ReLU.* Its parameters are 'table.weight', .*, \.\.\."),
]


@pytest.mark.parametrize(("arguments", "text"), FREEZE_ERRORS)
def test_freeze_says_what_is_wrong(arguments, text):
    model = toy()
    with pytest.raises(ValueError, match=text):
        freeze(*arguments(model)).__enter__()
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_a_collection_of_patterns_is_refused(untyped):
    with pytest.raises(ValueError, match=r"unpack collections, freeze\(model, \*patterns\)"):
        freeze(toy(), ("blocks.*", "head.*")).__enter__()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"bridge": "stop"}, r"`bridge` must be 'detach' .*'last' .* or 'full' .*, got 'stop'"),
        ({"freeze": "decoder.*"}, r"bare string 'decoder.\*': write \('decoder.\*',\)"),
        ({"bridge": "full", "freeze_bridge": "a.*"}, r"`freeze_bridge` .* write \('a.\*',\)"),
        ({"freeze": ["decoder.*"]}, r"`freeze` must be a tuple of shell patterns .*\['decoder"),
        ({"freeze": (3,)}, r"`freeze` must be a tuple of shell patterns .*\(3,\)"),
        (
            {"freeze_bridge": ("a.*",)},
            r"no meaning with bridge='detach'.* set bridge='last' or 'full'",
        ),
        ({"freeze": ("*",)}, r"nothing would learn with bridge='detach'"),
        (
            {"bridge": "full", "freeze": ("a.*", "*"), "freeze_bridge": ("*",)},
            r"nothing would learn with bridge='full'",
        ),
        (
            {"bridge": "last", "freeze": ("*",), "freeze_bridge": ("*",)},
            r"nothing would learn with bridge='last'",
        ),
    ],
)
def test_policy_says_what_is_wrong(untyped, fields, text):
    with pytest.raises(ValueError, match=text):
        GradientPolicy(**fields)


def test_policies_that_make_sense():
    assert GradientPolicy() == GradientPolicy("detach", (), ())
    GradientPolicy(freeze=("decoder.*",))
    GradientPolicy(bridge="full", freeze=("*",))
    GradientPolicy(bridge="full", freeze=("decoder.*",), freeze_bridge=("*",))
    GradientPolicy(bridge="last", freeze=("*",))
    GradientPolicy(bridge="last", freeze=("decoder.*",), freeze_bridge=("encoder.*",))
    with pytest.raises(AttributeError):
        GradientPolicy().bridge = "full"


@pytest.mark.parametrize("bridge", ["detach", "last", "full"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("patterns", [(), ("blocks.*",)])
def test_a_pass_of_the_bridge_learns_as_the_policy_says(bridge, last, patterns):
    if bridge == "detach" and patterns:
        return
    model, policy = toy(), GradientPolicy(bridge, freeze_bridge=patterns)
    with policy.bridge_pass(model, last=last):
        loss = model(data()[0], "t2l").square().sum()
    learns = {"detach": False, "last": last, "full": True}[bridge]
    assert loss.requires_grad == learns
    if learns:
        assert_learns(loss, model.to_latent.named_parameters())
        (assert_frozen if patterns else assert_learns)(loss, model.blocks.named_parameters())
    with policy.bridge_pass(model):  # the last one, if nothing is said
        assert model(data()[0], "t2l").requires_grad == (bridge != "detach")
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


# The asserts.


def test_asserts_name_the_offender():
    used, idle = nn.Linear(2, 2), nn.Linear(2, 2)
    loss = used(torch.ones(1, 2)).sum()
    pairs = [*used.named_parameters(), *(("idle." + n, p) for n, p in idle.named_parameters())]
    with pytest.raises(AssertionError, match=r"these would learn: weight, bias$"):
        assert_frozen(loss, pairs)
    with pytest.raises(AssertionError, match=r"these would learn: parameter 1$"):
        assert_frozen(loss, [idle.weight, used.weight])
    with pytest.raises(AssertionError, match=r"none reaches: idle.weight, idle.bias$"):
        assert_learns(loss, pairs)
    with pytest.raises(AssertionError, match=r"it is zero in all of: weight, bias$"):
        assert_learns(loss * 0, used.named_parameters())
    assert_learns(loss, used.parameters())
    assert_frozen(loss, idle.parameters())
    assert used.weight.grad is None


def test_asserts_count_parameters_that_require_no_grad_as_frozen():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    loss = layer(torch.ones(1, 2)).sum()
    assert_frozen(loss, [layer.bias])
    with pytest.raises(AssertionError, match=r"none reaches: bias$"):
        assert_learns(loss, layer.named_parameters())


@pytest.mark.parametrize("check", [assert_frozen, assert_learns])
def test_asserts_refuse_to_test_nothing(check):
    layer = nn.Linear(2, 2)
    loss = layer(torch.ones(1, 2)).sum()
    with pytest.raises(ValueError, match=re.escape("`parameters` is empty")):
        check(loss, [])
    with pytest.raises(ValueError, match="has no graph"):
        check(loss.detach(), layer.parameters())
    with freeze(layer), pytest.raises(ValueError, match="take them outside"):
        check(loss, layer.parameters())
