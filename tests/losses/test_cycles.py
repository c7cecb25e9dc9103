import dataclasses

import pytest
import torch
from hypothesis import given
from torch import nn

import cyclevae as cv
import oracles
from cyclevae.bridges.latent import LatentBridge, encode_text
from cyclevae.bridges.text import TextBridge
from cyclevae.testing import ToyNetwork, assert_frozen, assert_learns, toy_batch, toy_denoiser
from oracles import Spy
from strategies import quick, seeds

FULL = cv.GradientPolicy(bridge="full")
DETACH = cv.GradientPolicy()
LAST = cv.GradientPolicy(bridge="last")
V = cv.LatentProcess(prediction="v", shape=(4,))
EPSILON = cv.LatentProcess(prediction="epsilon", shape=(4,))


class Half(nn.Module):
    """One direction of a two-tower model: a network of its own, of which one head is read."""

    def __init__(self, need):
        super().__init__()
        self.net, self.need = ToyNetwork(7, 4), need
        delattr(self.net, "latent_head" if need == "logits" else "text_head")

    def forward(self, tokens, latents, **state):
        out = self.net(tokens, latents, need=self.need, **state)
        return out.logits if self.need == "logits" else out.latent_prediction


def towers(seed=0):
    """Two separate towers: the encoder and the decoder share nothing."""
    torch.manual_seed(seed)
    pair = cv.EncoderDecoder(Half("latents"), Half("logits"))
    return Spy(cv.as_denoiser(pair.double()))


def shared(seed=0):
    denoiser, _, _ = toy_denoiser(seed)
    denoiser.module.double()
    return Spy(denoiser)


TEXT = toy_denoiser()[1]
PAIRS = toy_batch(seed=1, rows=3)
TOKENS, MASK, LATENTS = PAIRS.tokens, PAIRS.attention_mask, PAIRS.latents.double()
NOISE = torch.randn(3, 4, generator=torch.Generator().manual_seed(7)).double()


def text_cycle(spy, tokens=TOKENS, mask=MASK, process=V, **options):
    options = {"noise": NOISE, **options}
    return cv.cycle_text_loss(
        spy, tokens, mask, text_process=TEXT, latent_process=process, **options
    )


def latent_cycle(spy, latents=LATENTS, mask=MASK, process=V, **options):
    options = {"noise": NOISE, **options}
    return cv.cycle_latent_loss(
        spy, latents, mask, text_process=TEXT, latent_process=process, **options
    )


def encode(spy, tokens=TOKENS, process=V, **options):
    options = {"start": "noise", "noise": NOISE, **options}
    encoded = cv.t2l(spy, tokens, MASK, text_process=TEXT, latent_process=process, **options)
    return encoded.z_hat(process)


def write(spy, latents=LATENTS):
    logits = cv.l2t(spy, latents, MASK, text_process=TEXT)
    return cv.argmax_text(logits, MASK, text_process=TEXT)


def gradients(loss, module):
    named = list(module.named_parameters())
    found = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    return {name: g for (name, _), g in zip(named, found, strict=True)}


def assert_same(first, second):
    """Equal bit for bit, None included."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        other = second[name]
        assert (value is None) == (other is None), name
        assert value is None or torch.equal(value, other), name


def parts(spy, start):
    return [(n, p) for n, p in spy.module.named_parameters() if n.startswith(start)]


# --- what the two passes see ------------------------------------------------------------------


@pytest.mark.parametrize("make", [towers, shared])
@pytest.mark.parametrize("policy", [DETACH, FULL])
def test_text_cycle_decodes_z_hat_with_the_text_fully_masked(make, policy):
    spy = make()
    text_cycle(spy, policy=policy)
    t2l, l2t = spy.calls
    assert t2l["need"] == "latents" and l2t["need"] == "logits"
    assert torch.equal(t2l["tokens"], torch.where(MASK, TOKENS, 0))
    assert torch.equal(t2l["latents"], NOISE)
    assert not t2l["text_time"].any() and (t2l["latent_time"] == 1).all()
    assert torch.equal(l2t["tokens"], torch.where(MASK, 2, 0))
    assert (l2t["text_time"] == 1).all() and not l2t["latent_time"].any()
    prediction = spy.denoiser.denoise(**t2l).latent_prediction
    one = torch.ones(3).double()
    z_hat = oracles.convert(prediction, NOISE, *V.alpha_sigma(one), "v", "x0")
    torch.testing.assert_close(l2t["latents"], torch.from_numpy(z_hat))


@quick
@given(seeds)
def test_text_cycle_decodes_no_visible_word(seed):
    """Two texts with equal latents give one decoder input, so only the latent can tell them."""
    spy, generator = shared(), torch.Generator().manual_seed(seed)
    z_hat = torch.randn(3, 4, generator=generator).double()
    for _ in range(2):
        tokens = torch.randint(3, 7, TOKENS.shape, generator=generator)
        text_cycle(spy, tokens, z_hat=z_hat)
    first, second = spy.calls
    assert torch.equal(first["tokens"], second["tokens"])
    assert torch.equal(first["latents"], z_hat) and torch.equal(second["latents"], z_hat)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "nats"])
@pytest.mark.parametrize("count", [None, 11.0])
def test_text_cycle_is_the_cross_entropy_of_the_text(reduction, count):
    spy = shared()
    loss = text_cycle(spy, reduction=reduction, count=count)
    logits = spy.denoiser.denoise(**spy.calls[1]).logits
    expected = torch.as_tensor(oracles.text_loss(logits, TOKENS, MASK, reduction, count))
    torch.testing.assert_close(loss, expected.double())


@pytest.mark.parametrize("make", [towers, shared])
def test_latent_cycle_encodes_the_pseudo_text_from_noise(make):
    spy = make()
    latent_cycle(spy)
    l2t, t2l = spy.calls
    assert l2t["need"] == "logits" and t2l["need"] == "latents"
    assert torch.equal(l2t["latents"], LATENTS)
    assert torch.equal(l2t["tokens"], torch.where(MASK, 2, 0))
    assert torch.equal(t2l["latents"], NOISE) and (t2l["latent_time"] == 1).all()
    logits = spy.denoiser.denoise(**l2t).logits
    words = logits[..., [1, 3, 4, 5, 6]].argmax(dim=-1)
    expected = torch.tensor([1, 3, 4, 5, 6])[words] * MASK
    assert torch.equal(t2l["tokens"], expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "nats"])
@pytest.mark.parametrize("count", [None, 11.0])
@pytest.mark.parametrize("prediction", ["v", "x0", "epsilon"])
def test_latent_cycle_is_the_squared_error_of_the_clean_latent(reduction, count, prediction):
    spy, process = shared(), cv.LatentProcess(prediction=prediction, shape=(4,))
    loss = latent_cycle(spy, process=process, time=0.5, reduction=reduction, count=count)
    out = spy.denoiser.denoise(**spy.calls[1]).latent_prediction
    scales = process.alpha_sigma(torch.full((3,), 0.5).double())
    z_hat = torch.from_numpy(oracles.convert(out, NOISE, *scales, prediction, "x0"))
    expected = oracles.latent_loss(z_hat, LATENTS, reduction, count=count)
    torch.testing.assert_close(loss, torch.as_tensor(expected).double())


@quick
@given(seeds)
def test_the_encoder_never_sees_the_latent_unless_shown(seed):
    other = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).double()
    for show in (False, True):
        spy, inputs = shared(), []
        for z in (LATENTS, other):
            latent_cycle(spy, z, y_hat=TOKENS, time=0.5, show_latent=show)
            inputs.append(spy.calls.pop()["latents"])
        assert torch.equal(*inputs) == (not show)
        if show:
            alpha, sigma = V.alpha_sigma(torch.tensor([0.5]).double())
            torch.testing.assert_close(inputs[1], alpha * other + sigma * NOISE)


def test_without_noise_it_is_drawn_for_every_row_alike():
    spy = Spy(toy_denoiser()[0])
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        text_cycle(spy, noise=None, generator=generator)
        latent_cycle(spy, LATENTS.float(), noise=None, generator=generator)
    drawn = [call["latents"] for call in spy.calls if call["need"] == "latents"]
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[4]) and not torch.equal(drawn[1], drawn[5])
    assert all(len(z.unique()) == z.numel() for z in drawn)


def test_latents_of_three_axes():
    class Wide(nn.Module):
        def forward(self, tokens, latents, *, attention_mask, **state):
            logits = latents.flatten(1).sum(dim=1)[:, None, None] * torch.arange(7.0).double()
            return logits.expand(*tokens.shape, 7), latents + attention_mask.sum(1)[:, None, None]

    spy, process = Spy(cv.as_denoiser(Wide())), cv.LatentProcess(prediction="x0", shape=(2, 3))
    z, noise = torch.randn(2, 3, 2, 3).double()
    lengths = MASK.sum(1)[:, None, None]
    loss = latent_cycle(spy, z, process=process, noise=noise)
    torch.testing.assert_close(loss, (noise + lengths - z).square().mean())
    assert text_cycle(spy, process=process, noise=noise).isfinite()


# --- one call, or two halves ------------------------------------------------------------------


@pytest.mark.parametrize("make", [towers, shared])
def test_last_and_full_are_one_policy_where_one_pass_makes_the_bridge(make):
    spy = make()
    last, full = text_cycle(spy, policy=LAST), text_cycle(spy, policy=FULL)
    assert torch.equal(last, full)
    assert_same(gradients(last, spy.module), gradients(full, spy.module))


@pytest.mark.parametrize("policy", [DETACH, LAST, FULL])
@pytest.mark.parametrize("prediction", ["v", "x0", "epsilon"])
def test_text_cycle_decodes_what_a_bridge_of_some_steps_writes(policy, prediction):
    spy, process = shared(), cv.LatentProcess(prediction=prediction, shape=(4,))
    bridge = LatentBridge(steps=3, threshold=1.0, norm=1.5)
    options = {"process": process, "time": 0.8, "policy": policy}
    loss = text_cycle(spy, bridge=bridge, **options)
    *encodes, l2t = spy.calls
    assert [call["need"] for call in encodes] == ["latents"] * 3 and l2t["need"] == "logits"
    times = torch.tensor([call["latent_time"][0] for call in encodes])
    torch.testing.assert_close(times, 0.8 * torch.tensor([1, 2 / 3, 1 / 3]))
    z_hat = encode_text(
        spy,
        TOKENS,
        MASK,
        text_process=TEXT,
        latent_process=process,
        noise=NOISE,
        bridge=bridge,
        time=0.8,
        policy=policy,
    )
    assert torch.equal(l2t["latents"], z_hat)
    torch.testing.assert_close(z_hat.norm(dim=1), torch.full((3,), 1.5).double())
    halves = text_cycle(spy, z_hat=z_hat, **options)
    assert torch.equal(halves, loss)
    assert_same(gradients(halves, spy.module), gradients(loss, spy.module))


@pytest.mark.parametrize("given", [True, False])
def test_noise_crosses_to_the_decoder_alone(given):
    """Of a `z_hat` that is given, the bridge's steps, threshold and norm are the caller's."""
    spy, bridge = shared(), LatentBridge(noise=0.5, threshold=0.1, norm=3.0, steps=2)
    z_hat = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
    generator = torch.Generator().manual_seed(0)
    options = {"z_hat": z_hat} if given else {}
    text_cycle(spy, bridge=bridge, generator=generator, **options)
    assert len(spy.calls) == (1 if given else 3)
    clean = z_hat
    if not given:
        spy_calls = [call["latents"] for call in spy.calls[:2]]
        quiet = text_cycle(spy, bridge=LatentBridge(threshold=0.1, norm=3.0, steps=2))
        assert all(
            torch.equal(a, b["latents"]) for a, b in zip(spy_calls, spy.calls[3:5], strict=True)
        )
        clean = spy.calls[5]["latents"]
        assert quiet.isfinite()
    crossed = spy.calls[0 if given else 2]["latents"]
    drawn = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(crossed, clean + 0.5 * drawn)


def test_noise_at_the_bridge_lets_the_gradient_through():
    spy = towers()
    seed = {"generator": torch.Generator().manual_seed(0)}
    loss = text_cycle(spy, bridge=LatentBridge(noise=0.1), policy=FULL, **seed)
    assert_learns(loss, parts(spy, "encoder"))


@pytest.mark.parametrize("make", [towers, shared])
@pytest.mark.parametrize("policy", [DETACH, FULL])
def test_text_cycle_takes_its_first_half(make, policy):
    spy = make()
    whole = text_cycle(spy, policy=policy)
    z_hat = encode(spy)
    spy.calls.clear()
    halves = text_cycle(spy, z_hat=z_hat, policy=policy)
    assert len(spy.calls) == 1
    assert torch.equal(halves, whole)
    assert_same(gradients(halves, spy.module), gradients(whole, spy.module))


@pytest.mark.parametrize(
    "bridge", ["argmax", "categorical", TextBridge("categorical", temperature=0.02)]
)
def test_latent_cycle_takes_its_first_half(bridge):
    spy = shared()
    options = {"bridge": bridge}
    whole = latent_cycle(spy, generator=torch.Generator().manual_seed(3), **options)
    y_hat = cv.pseudo_text(
        cv.l2t(spy, LATENTS, MASK, text_process=TEXT),
        MASK,
        text_process=TEXT,
        generator=torch.Generator().manual_seed(3),
        **options,
    )
    spy.calls.clear()
    halves = latent_cycle(spy, y_hat=y_hat)
    assert len(spy.calls) == 1
    assert torch.equal(halves, whole)
    assert_same(gradients(halves, spy.module), gradients(whole, spy.module))


# --- who learns -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [towers, shared])
def test_detached_text_cycle_has_the_gradient_with_z_hat_as_data(make):
    spy = make()
    data = encode(spy).detach()
    as_data = text_cycle(spy, z_hat=data, policy=FULL)
    for loss in (text_cycle(spy), text_cycle(spy, z_hat=encode(spy))):
        assert_same(gradients(loss, spy.module), gradients(as_data, spy.module))


def test_detached_text_cycle_teaches_the_decoder_alone():
    spy = towers()
    loss = text_cycle(spy)
    assert_frozen(loss, parts(spy, "encoder"))
    assert_learns(loss, [p for p in parts(spy, "decoder") if "head" in p[0]])


@pytest.mark.parametrize("make", [towers, shared])
@pytest.mark.parametrize("process", [V, EPSILON])
def test_full_text_cycle_has_the_gradient_of_a_hand_written_loop(make, process):
    spy, time = make(), torch.full((3,), 0.8).double()
    loss = text_cycle(spy, process=process, time=0.8, policy=FULL)
    state = {"attention_mask": MASK}
    prediction = spy.denoise(
        TOKENS, NOISE, text_time=0 * time, latent_time=time, need="latents", **state
    ).latent_prediction
    alpha_bar = oracles.host_alpha_bar("cosine")[799].item()
    alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if process is V:
        z_hat = alpha * NOISE - sigma * prediction
    else:
        z_hat = (NOISE - sigma * prediction) / alpha
    masked, one = torch.where(MASK, 2, 0), torch.ones(3).double()
    logits = spy.denoise(
        masked, z_hat, text_time=one, latent_time=0 * one, need="logits", **state
    ).logits
    total = torch.zeros(()).double()
    for i, j in MASK.nonzero().tolist():
        total = total - logits[i, j].log_softmax(dim=0)[TOKENS[i, j]]
    by_hand = total / MASK.sum()
    torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=0)
    got, expected = gradients(loss, spy.module), gradients(by_hand, spy.module)
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-7)
    if make is towers:
        assert_learns(loss, parts(spy, "encoder"))


def test_latent_cycle_teaches_the_encoder_alone():
    spy = towers()
    for options in ({}, {"bridge": "categorical"}, {"show_latent": True, "time": 0.5}):
        loss = latent_cycle(spy, **options)
        assert_frozen(loss, parts(spy, "decoder"))
        assert all(g is None for n, g in gradients(loss, spy.module).items() if "decoder" in n)
        assert_learns(loss, parts(spy, "encoder"))


def test_latent_cycle_has_the_gradient_with_the_pseudo_text_as_data():
    spy = shared()
    with torch.no_grad():
        y_hat = write(spy)
    as_data = latent_cycle(spy, y_hat=y_hat)
    assert_same(gradients(latent_cycle(spy), spy.module), gradients(as_data, spy.module))


@pytest.mark.parametrize("policy", [DETACH, FULL])
def test_text_cycle_gradcheck(policy):
    spy = shared()
    weight = spy.module.shared.weight
    frozen = encode(spy).detach()  # detached, a finite difference would move the bridge too

    def loss(moved):
        spy.module.shared.weight.data.copy_(moved)
        return text_cycle(spy, policy=policy, z_hat=frozen if policy is DETACH else None)

    start, step, direction = weight.detach().clone(), 1e-5, torch.randn(4, 4).double()
    slope = (loss(start + step * direction) - loss(start - step * direction)) / (2 * step)
    exact = (gradients(loss(start), spy.module)["shared.weight"] * direction).sum()
    torch.testing.assert_close(slope, exact, rtol=1e-6, atol=1e-9)


ENCODER = {n for n, _ in towers().module.named_parameters() if n.startswith("encoder")}
DECODER = {n for n, _ in towers().module.named_parameters() if n.startswith("decoder")}
TEXT_POLICIES = [
    (FULL, ENCODER | DECODER),
    (cv.GradientPolicy("full", freeze=("decoder.*",)), ENCODER),
    (cv.GradientPolicy("full", freeze_bridge=("encoder.*",)), DECODER),
    (cv.GradientPolicy("full", freeze=("*",)), ENCODER),
    (LAST, ENCODER | DECODER),
    (cv.GradientPolicy("last", freeze=("*",)), ENCODER),
    (cv.GradientPolicy("last", freeze_bridge=("encoder.*",)), DECODER),
    (cv.GradientPolicy("full", freeze_bridge=("*",)), DECODER),
    (DETACH, DECODER),
    (cv.GradientPolicy(freeze=("*.word.weight",)), DECODER - {"decoder.net.word.weight"}),
    (
        cv.GradientPolicy("full", freeze=("decoder.net.shared.*",), freeze_bridge=("*.bias",)),
        {n for n in ENCODER if not n.endswith("bias")}
        | {n for n in DECODER if ".shared." not in n},
    ),
]


def assert_exactly(loss, spy, learns):
    got = {n for n, g in gradients(loss, spy.module).items() if g is not None and g.any()}
    assert got == learns
    rest = [(n, p) for n, p in spy.module.named_parameters() if n not in learns]
    if rest:
        assert_frozen(loss, rest)


@pytest.mark.parametrize(("policy", "learns"), TEXT_POLICIES)
@pytest.mark.parametrize("steps", [1, 3])
def test_text_policies(policy, learns, steps):
    spy = towers()
    loss = text_cycle(spy, policy=policy, bridge=LatentBridge(steps=steps))
    assert_exactly(loss, spy, learns)
    assert all(p.requires_grad for p in spy.module.parameters())


@pytest.mark.parametrize(
    ("frozen", "learns"),
    [
        ((), ENCODER),
        (("encoder.net.word.*",), ENCODER - {"encoder.net.word.weight"}),
        (("*.bias",), {n for n in ENCODER if not n.endswith("bias")}),
        (("decoder.*",), ENCODER),
    ],
)
def test_latent_policies(frozen, learns):
    spy = towers()
    assert_exactly(latent_cycle(spy, policy=cv.GradientPolicy(freeze=frozen)), spy, learns)


def test_freezing_changes_no_value_and_no_other_gradient():
    spy = shared()
    frozen = text_cycle(spy, policy=cv.GradientPolicy("full", freeze=("text_head.*",)))
    free = text_cycle(spy, policy=FULL)
    assert torch.equal(frozen, free)
    expected = gradients(free, spy.module)
    expected |= {"text_head.weight": None, "text_head.bias": None}
    assert_same(gradients(frozen, spy.module), expected)


# --- refusals ---------------------------------------------------------------------------------


def test_the_latent_cycle_has_no_full_bridge():
    spy = shared()
    with pytest.raises(
        ValueError, match=r"the 'argmax' bridge .* no gradient.*policy\.bridge='full'; use 'detach'"
    ):
        latent_cycle(spy, policy=FULL)
    assert spy.calls == []


@pytest.mark.parametrize("cycle", [text_cycle, latent_cycle])
@pytest.mark.parametrize("time", [1.0, 0.95, torch.tensor([0.1, 0.5, 1.0])])
def test_epsilon_at_full_noise_is_refused_before_any_pass(cycle, time):
    spy, generator = shared(), torch.Generator().manual_seed(0)
    before = generator.get_state()
    with pytest.raises(ValueError, match=r"max_gain.*predict `v` or `x0`.*capped time"):
        cycle(spy, process=EPSILON, time=time, noise=None, generator=generator)
    assert spy.calls == []
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("cycle", [text_cycle, latent_cycle])
def test_epsilon_at_a_capped_time_is_allowed(cycle):
    spy = shared()
    loss = cycle(spy, process=EPSILON, time=0.9)
    loss.backward()
    encoder = next(call for call in spy.calls if call["need"] == "latents")
    assert torch.equal(encoder["latents"], NOISE)  # pure noise, stated to be at 0.9
    assert (encoder["latent_time"] == 0.9).all()
    assert loss.isfinite()


def test_the_objective_refuses_epsilon_at_full_noise():
    with pytest.raises(ValueError, match="max_gain"):
        cv.CycleObjective(TEXT, EPSILON)
    for term in (cv.CycleText, cv.CycleLatent):
        with pytest.raises(ValueError, match="max_gain"):
            objective(term(), process=EPSILON)
    below = cv.TimePolicy("uniform", high=0.9)
    objective(cv.Latent(time=below), cv.CycleText(time=0.9), cv.CycleLatent(time=0.9))
    objective(cv.Text(), cv.Latent(), cv.Unconditional(), process=EPSILON)


# --- in a whole step --------------------------------------------------------------------------


def objective(*terms, process=V):
    return cv.CycleObjective(TEXT, process, terms)


def cycle_of_texts(**options):
    """On all rows, without noise on the bridge."""
    return cv.CycleText(**{"weight": 1.0, "bridge": LatentBridge(), "pairs": True, **options})


def step(run, spy, batch, seed=0):
    return run(spy, batch, step=0, generator=torch.Generator().manual_seed(seed))


class Dataset:
    """Pairs of which the first are given, and of the others each half to another task."""

    def __init__(self, rows=9):
        generator = torch.Generator().manual_seed(0)
        self.mask = torch.arange(5) < torch.randint(1, 6, (rows, 1), generator=generator)
        self.tokens = torch.randint(3, 7, (rows, 5), generator=generator)
        self.latents = torch.randn(rows, 4, generator=generator).double()

    def batch(self):
        tokens, mask, z = self.tokens * self.mask, self.mask, self.latents
        return cv.Batch(tokens[:3], mask[:3], z[:3], tokens[3:5], mask[3:5], z[5:])


@quick
@given(seeds)
@pytest.mark.slow
def test_hidden_partners_change_nothing(seed):
    """Neither the texts of unpaired latents, nor their lengths, nor latents of unpaired texts."""
    run = objective(
        cv.Text(time=1.0),
        cv.Latent(),
        cv.Unconditional(),
        cycle_of_texts(),
        cv.CycleLatent(bridge="argmax", pairs=True),
        cv.Prior("mmd"),
    )
    results, spies, generator = [], [], torch.Generator().manual_seed(seed)
    data = Dataset()
    for _ in range(2):
        spies.append(shared())
        out = step(run, spies[-1], data.batch())
        results.append({"total": out.loss, **gradients(out.loss, spies[-1].module)})
        data.tokens[5:] = torch.randint(3, 7, (4, 5), generator=generator)
        data.mask[5:] = torch.arange(5) < torch.randint(1, 6, (4, 1), generator=generator)
        data.latents[3:5] = torch.randn(2, 4, generator=generator)
    assert_same(*results)
    for first, second in zip(*(spy.calls for spy in spies), strict=True):
        assert_same(*({k: v for k, v in c.items() if k != "need"} for c in (first, second)))


@pytest.mark.parametrize("latent_time", [1.0, 0.5, cv.TimePolicy("uniform")])
@pytest.mark.parametrize("policy", [DETACH, FULL])
def test_no_bridge_has_seen_the_true_latent(latent_time, policy):
    """Other latents beside the texts leave the text cycle and the prior as they were."""
    run = objective(
        cv.Latent(weight=1.0, time=latent_time), cycle_of_texts(policy=policy), cv.Prior("mmd")
    )
    data, outputs = Dataset(), []
    for _ in range(2):
        spy = shared()
        outputs.append(step(run, spy, data.batch()).metrics)
        data.latents = data.latents.flip(0) * 3
    times = {
        t for call in spy.calls if call["need"] == "latents" for t in call["latent_time"].tolist()
    }
    if isinstance(latent_time, cv.TimePolicy):
        assert len(times) == 4 and max(times) == 1.0
    else:
        assert times == {latent_time, 1.0}
    first, second = outputs
    for name in ("cycle_text_loss", "prior_loss", "latent_pred_norm"):
        assert torch.equal(first[name], second[name]), name
    assert not torch.equal(first["latent_loss"], second["latent_loss"])


BASE = (cv.Text(time=1.0), cv.Latent(weight=1.0))


@pytest.mark.parametrize(
    "beside",
    [(), BASE[1:], (cv.Prior("mmd"),), (*BASE, cv.Prior("mmd"))],
    ids=["nothing", "latent", "prior", "all"],
)
@pytest.mark.parametrize(("policy", "learns"), TEXT_POLICIES)
@pytest.mark.slow
def test_the_objective_honours_the_policy_whatever_runs_beside(policy, learns, beside):
    """The gradient of the text cycle itself: what moves with its weight."""
    spy, batch = towers(), Dataset().batch()
    first, second = (
        gradients(
            step(objective(cycle_of_texts(weight=w, policy=policy), *beside), spy, batch).loss,
            spy.module,
        )
        for w in (1.0, 3.0)
    )
    both = {n: (g, second[n]) for n, g in first.items() if g is not None}
    own = {n for n, (g, other) in both.items() if (other - g).abs().max() > 1e-12}
    assert own == learns


@pytest.mark.parametrize("policy", [policy for policy, _ in TEXT_POLICIES])
@pytest.mark.parametrize("beside", [None, (), BASE[1:]], ids=["nothing", "cycle", "latent too"])
@pytest.mark.slow
def test_the_prior_teaches_the_encoder_whatever_the_text_policy(policy, beside):
    spy, batch = towers(), Dataset().batch()
    others = () if beside is None else (cycle_of_texts(policy=policy), *beside)
    first, second = (
        gradients(step(objective(*others, cv.Prior("mmd", weight=w)), spy, batch).loss, spy.module)
        for w in (1.0, 3.0)
    )
    own = {n for n in first if first[n] is not None and not torch.equal(first[n], second[n])}
    assert own == ENCODER


@pytest.mark.parametrize("term", [cycle_of_texts(), cv.CycleLatent(bridge="argmax", pairs=True)])
def test_cycles_split_into_steps_have_the_gradient_of_the_whole(term):
    data, spy = Dataset(), shared()
    whole = data.batch()
    whole = whole._replace(unpaired_tokens=None, unpaired_attention_mask=None)
    whole = whole._replace(unpaired_latents=None)
    # no noise in the encoder's input, so that the split draws nothing else
    process = dataclasses.replace(V, schedule="continuous_cosine")
    quiet = Quiet(spy)
    run = objective(term, process=process)
    counts = run.counts(whole)
    expected = gradients(step(run, quiet, whole).loss, spy.module)
    total = torch.zeros(()).double()
    for part in (slice(1), slice(1, 3)):
        piece = cv.Batch(*(None if x is None else x[part] for x in whole))
        total = total + run(quiet, piece, step=0, counts=counts).loss
    for key, value in gradients(total, spy.module).items():
        if expected[key] is not None:
            torch.testing.assert_close(value, expected[key])


class Quiet(Spy):
    """A denoiser whose encoder is shown no noise."""

    def denoise(self, tokens, latents, *, need, **state):
        latents = latents * 0 if need == "latents" else latents
        return super().denoise(tokens, latents, need=need, **state)
