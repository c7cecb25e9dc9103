"""The latent cycle through each text bridge: values, who learns, and what RLOO estimates."""

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import cyclevae as cv
import oracles_bridges as oracles
from cyclevae.bridges.text import TextBridge
from cyclevae.bridges.words import gumbel_text, soft_text, straight_through_text
from cyclevae.testing import ToyNetwork, assert_frozen, assert_learns, toy_batch, toy_denoiser
from oracles import Spy, assert_near_mean

FULL, DETACH = cv.GradientPolicy("full"), cv.GradientPolicy()
V = cv.LatentProcess(prediction="v", shape=(4,))
TEXT = toy_denoiser()[1]
MASK, LATENTS = toy_batch(seed=1, rows=3).attention_mask, toy_batch(seed=1, rows=3).latents.double()
NOISE = torch.randn(3, 4, generator=torch.Generator().manual_seed(7)).double()
RELAXED = ("straight_through", "sampled_straight_through", "gumbel", "soft")


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
    torch.manual_seed(seed)
    return Spy(cv.as_denoiser(cv.EncoderDecoder(Half("latents"), Half("logits")).double()))


def shared(seed=0):
    denoiser, _, _ = toy_denoiser(seed)
    denoiser.module.double()
    return Spy(denoiser)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cycle(spy, bridge, latents=LATENTS, mask=MASK, text=TEXT, process=V, seed=0, **options):
    options = {"noise": NOISE, "policy": FULL, "generator": seeded(seed), **options}
    return cv.cycle_latent_loss(
        spy, latents, mask, text_process=text, latent_process=process, bridge=bridge, **options
    )


def gradients(loss, module):
    named = list(module.named_parameters())
    found = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(named, found, strict=True)}  # fmt: skip


def assert_close(first, second, atol=1e-12):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=atol, msg=name)


ENCODER = {n for n, _ in towers().module.named_parameters() if n.startswith("encoder")}
DECODER = {n for n, _ in towers().module.named_parameters() if n.startswith("decoder")}
FUNCTIONS = {
    "straight_through": straight_through_text,
    "sampled_straight_through": lambda *a, **o: straight_through_text(*a, sample=True, **o),
    "gumbel": gumbel_text,
    "soft": lambda *a, generator, **o: soft_text(*a, **o),
}


# --- relaxed texts ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [towers, shared])
@pytest.mark.parametrize("name", RELAXED)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_relaxed_text_crosses_with_its_gradient(make, name, temperature):
    spy = make()
    loss = cycle(spy, TextBridge(name, temperature=temperature), seed=5)
    t2l = spy.calls[1]
    state = {"attention_mask": MASK}
    zero, one = torch.zeros(3), torch.ones(3)
    logits = spy.denoise(
        TEXT.fully_masked(MASK),
        LATENTS,
        text_time=one,
        latent_time=zero,
        need="logits",
        **state,
    ).logits
    options = {"text_process": TEXT, "temperature": temperature, "generator": seeded(5)}
    y_hat = FUNCTIONS[name](logits, MASK, **options)
    torch.testing.assert_close(t2l["tokens"], y_hat, rtol=0, atol=1e-15)
    v = spy.denoise(
        y_hat, NOISE, text_time=zero, latent_time=one, need="latents", **state
    ).latent_prediction
    alpha, sigma = V.alpha_sigma(one.double())
    by_hand = (alpha[:, None] * NOISE - sigma[:, None] * v - LATENTS).square().mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-12, atol=0)
    assert_close(gradients(loss, spy.module), gradients(by_hand, spy.module))
    assert_learns(loss, [p for p in spy.module.named_parameters() if "text_head" in p[0]])


POLICIES = [
    (FULL, ENCODER | DECODER),
    (cv.GradientPolicy("last"), ENCODER | DECODER),
    (cv.GradientPolicy("full", freeze=("encoder.*",)), DECODER),
    (cv.GradientPolicy("full", freeze_bridge=("decoder.*",)), ENCODER),
    (cv.GradientPolicy("full", freeze=("*",)), DECODER),
    (cv.GradientPolicy("full", freeze_bridge=("*",)), ENCODER),
    (
        cv.GradientPolicy("full", freeze=("*.bias",), freeze_bridge=("*.shared.*",)),
        {n for n in ENCODER if not n.endswith("bias")} | {n for n in DECODER if "shared" not in n},
    ),
]


@pytest.mark.parametrize("bridge", [*RELAXED, TextBridge("rloo", samples=3)], ids=str)
@pytest.mark.parametrize(("policy", "learns"), POLICIES)
def test_policies(bridge, policy, learns):
    spy = towers()
    loss = cycle(spy, bridge, policy=policy)
    got = {n for n, g in gradients(loss, spy.module).items() if g.any()}
    assert got == learns
    rest = [(n, p) for n, p in spy.module.named_parameters() if n not in learns]
    if rest:
        assert_frozen(loss, rest)


@pytest.mark.parametrize(
    "bridge", ["argmax", "categorical", TextBridge("unmask", steps=3)], ids=str
)
def test_ids_teach_the_decoder_nothing(bridge):
    spy = towers()
    loss = cycle(spy, bridge, policy=DETACH)
    assert_frozen(loss, [(n, p) for n, p in spy.module.named_parameters() if n in DECODER])
    assert_learns(loss, [(n, p) for n, p in spy.module.named_parameters() if n in ENCODER])
    spy = shared()  # where weights are shared, it is the gradient with the text as data
    loss, y_hat = cycle(spy, bridge, policy=DETACH), spy.calls[-1]["tokens"]
    as_data = cycle(spy, "argmax", y_hat=y_hat, policy=DETACH)
    assert torch.equal(loss, as_data)
    assert_close(gradients(loss, spy.module), gradients(as_data, spy.module), atol=0)


def test_unmasking_crosses_the_cycle():
    spy = shared()
    cycle(spy, TextBridge("unmask", steps=4), policy=DETACH)
    y_hat = cv.unmask_text(spy.denoiser, LATENTS, MASK, text_process=TEXT, steps=4)
    assert [call["need"] for call in spy.calls] == ["logits"] * 4 + ["latents"]
    assert torch.equal(spy.calls[-1]["tokens"], y_hat)


# --- halves -----------------------------------------------------------------------------------


BRIDGES = [
    *RELAXED,
    "argmax",
    "categorical",
    TextBridge("unmask", steps=2),
    TextBridge("rloo", samples=3, temperature=0.6),
    TextBridge("rloo", samples=4, marginal_weight=0.1),
]


@pytest.mark.parametrize("bridge", BRIDGES, ids=str)
def test_logits_that_are_there_save_a_pass(bridge):
    spy = shared()
    policy = FULL if TextBridge.of(bridge).has_gradient else DETACH
    whole = cycle(spy, bridge, policy=policy)
    passes = len(spy.calls)
    logits = cv.l2t(spy.denoiser, LATENTS, MASK, text_process=TEXT)
    halves = cycle(spy, bridge, policy=policy, logits=logits)
    assert len(spy.calls) == 2 * passes - 1
    assert torch.equal(whole, halves)
    assert_close(gradients(halves, spy.module), gradients(whole, spy.module), atol=0)


@pytest.mark.parametrize("bridge", BRIDGES, ids=str)
def test_the_announced_passes_are_those_that_run(bridge):
    bridge, spy = TextBridge.of(bridge), shared()
    policy = FULL if bridge.has_gradient else DETACH
    cycle(spy, bridge, policy=policy)
    term = cv.CycleLatent(bridge=bridge, policy=policy)
    assert len(spy.calls) == cv.CycleObjective(TEXT, V, [term]).passes(0)


@pytest.mark.parametrize("name", RELAXED)
def test_a_given_relaxed_text_keeps_its_graph_only_under_full(name):
    spy = towers()
    logits = cv.l2t(spy, LATENTS, MASK, text_process=TEXT)
    y_hat = cv.pseudo_text(logits, MASK, text_process=TEXT, bridge=name, generator=seeded())
    whole = cycle(spy, name)
    given = cycle(spy, "argmax", y_hat=y_hat)
    assert torch.equal(given, whole)
    assert_close(gradients(given, spy.module), gradients(whole, spy.module), atol=0)
    detached = cycle(spy, "argmax", y_hat=y_hat, policy=DETACH)
    assert torch.equal(detached, whole)
    assert_frozen(detached, [(n, p) for n, p in spy.module.named_parameters() if n in DECODER])


@pytest.mark.parametrize("end", ["placed", "predicted"])
def test_a_relaxed_text_is_cut_where_its_ids_are(end):
    text = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, end_id=4, end=end)
    spy, mask = shared(), torch.ones(3, 5).bool()
    logits = torch.randn(3, 5, 7, generator=seeded(), dtype=torch.float64)
    for bridge, policy in (("argmax", DETACH), ("straight_through", FULL)):
        cycle(spy, bridge, mask=mask, text=text, policy=policy, logits=logits)
    ids, relaxed = spy.calls
    assert torch.equal(relaxed["tokens"], torch.eye(7).double()[ids["tokens"]])
    assert torch.equal(relaxed["attention_mask"], ids["attention_mask"])
    assert ids["attention_mask"].all() == (end == "placed")


# --- a bridge of one's own --------------------------------------------------------------------


@pytest.mark.parametrize("policy", [DETACH, FULL])
def test_a_function_runs_without_a_graph_where_the_policy_detaches(policy):
    grad_enabled = []

    def mine(logits, attention_mask, *, text_process, generator):
        grad_enabled.append((torch.is_grad_enabled(), logits.requires_grad))
        return soft_text(logits, attention_mask, text_process=text_process)

    spy = towers()
    learns = policy is FULL
    for logits in (None, cv.l2t(spy.denoiser, LATENTS, MASK, text_process=TEXT)):
        loss = cycle(spy, mine, policy=policy, logits=logits)
        found = gradients(loss, spy.module)
        assert any(found[name].any() for name in DECODER) == learns
        assert grad_enabled.pop()[0] == learns
        same = cycle(spy, "soft")
        assert torch.equal(loss, same)
        if learns:
            assert_close(found, gradients(same, spy.module), atol=0)


def test_a_function_of_ids_cannot_teach():
    def mine(logits, attention_mask, **_):
        return torch.full(attention_mask.shape, 3)

    assert cycle(towers(), mine, policy=DETACH).isfinite()
    with pytest.raises(ValueError, match="pseudo-text of the 'mine' bridge is a choice of ids and"):
        cycle(towers(), mine)


# --- rloo: one texts' worth of samples, by enumeration ----------------------------------------

TINY = cv.TextProcess(mask_id=1, vocab_size=4)
WORDS = (0, 2, 3)


def tiny(seed=0, dimension=2):
    torch.manual_seed(seed)
    network = ToyNetwork(4, dimension).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)  # so that texts matter
    return Spy(cv.as_denoiser(network))


def code_length(tokens):
    """A price of each text, in nats."""
    return 0.3 * tokens.double().sum(dim=1) + 0.2 * (tokens[:, 0] == 2)


@pytest.fixture
def priced(monkeypatch):
    """The marginal of a text is known, and spread over its tokens as `none` has it."""

    def marginal(denoiser, tokens, attention_mask, *, reduction, **_):
        assert reduction == "none" and not torch.is_grad_enabled()
        return (code_length(tokens) / tokens.shape[1])[:, None].expand(tokens.shape).clone()

    monkeypatch.setattr("cyclevae.losses.cycle_latent.text_marginal_loss", marginal)


def expected_gradient(spy, z, noise, temperature, price, error):
    """Of `E_y[error(y) + price * nats(y)]`, every text weighed by its probability."""
    mask = torch.ones(1, 2).bool()
    process = cv.LatentProcess(prediction="v", shape=(z.shape[1],))
    logits = cv.l2t(spy, z, mask, text_process=TINY)[0, :, list(WORDS)]
    chances = (logits / temperature).softmax(dim=-1)
    total = 0.0
    for words in oracles.texts(range(3), 2):
        tokens = torch.tensor([[WORDS[w] for w in words]])
        encoded = cv.t2l(
            spy,
            tokens,
            mask,
            text_process=TINY,
            latent_process=process,
            start="noise",
            noise=noise,
            time=torch.ones(1).double(),
        )
        chance = chances[0, words[0]] * chances[1, words[1]]
        cost = error(encoded.z_hat(process), z) + price * code_length(tokens).sum()
        total = total + chance * cost
    return total, gradients(total, spy.module)


def sq(scale):
    return lambda z_hat, z: scale * (z_hat - z).square().sum()


def angle(scale):
    return lambda z_hat, z: scale * (1 - torch.cosine_similarity(z_hat, z, dim=-1)).sum()


def tuples(logits, samples, temperature):
    """Every tuple of texts `[k, n, s]`, and the probability of each."""
    chance = [oracles.probabilities(position, (1,), temperature) for position in logits]
    texts = oracles.texts(WORDS, 2)
    of_text = torch.tensor([math.prod(chance[j][w] for j, w in enumerate(t)) for t in texts])
    index = torch.tensor(list(itertools.product(range(len(texts)), repeat=samples))).T
    return torch.tensor(texts)[index], of_text[index].prod(dim=0)


def drawing(monkeypatch, texts):
    """Let the next draws be these."""
    drawn = iter(texts)
    monkeypatch.setattr("cyclevae.bridges.text.categorical_text", lambda *_, **__: next(drawn))


Z, X = torch.tensor([[0.8, -1.1]]).double(), torch.tensor([[0.3, 0.5]]).double()
PAIR = cv.LatentProcess(prediction="v", shape=(2,))


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize(("distance", "error"), [("mse", sq(1)), ("cosine", angle(1))])
@pytest.mark.parametrize("kappa", [0.0, 0.7])
def test_rloo_is_the_gradient_of_the_expected_loss(
    samples, distance, error, kappa, priced, monkeypatch
):
    """Over every tuple of samples, a row each, with a real if tiny denoiser of shared weights.

    So the decoder's gradient and the encoder's pathwise one add up to that of the whole.
    """
    spy, temperature = tiny(), 0.8
    value, pathwise = expected_gradient(spy, Z, X, temperature, 0.0, error)
    _, expected = expected_gradient(spy, Z, X, temperature, kappa, error)
    logits = cv.l2t(spy, Z, torch.ones(1, 2), text_process=TINY)[0]
    texts, weights = tuples(logits, samples, temperature)
    drawing(monkeypatch, texts)
    rows = len(weights)
    losses = cycle(
        spy,
        TextBridge("rloo", samples=samples, temperature=temperature, marginal_weight=kappa),
        Z.expand(rows, -1),
        torch.ones(rows, 2).bool(),
        TINY,
        PAIR,
        noise=X.expand(rows, -1),
        distance=distance,
        reduction="none",
    )
    mean = (weights[:, None] * losses.view(rows, -1)).sum()
    assert mean.item() == pytest.approx(value.item(), abs=1e-12)  # the value holds no price
    assert_close(gradients(mean, spy.module), expected)
    assert any((expected[n] - pathwise[n]).abs().max() > 1e-3 for n in expected) == bool(kappa)
    assert expected["text_head.weight"].norm() > 1e-2  # the decoder learns


@pytest.mark.parametrize(
    ("options", "error", "nat"),
    [  # the error of the one row, and what a nat of its text costs
        ({"reduction": "mean"}, sq(1 / 2), 1 / 2),
        ({"reduction": "mean", "count": 5, "distance": "cosine"}, angle(1 / 5), 1 / 5),
        ({"reduction": "nats", "count": 4}, sq(1 / 8), 1 / 4),
    ],
)
@pytest.mark.slow
def test_rewards_have_the_scale_of_the_reduction(options, error, nat, priced, monkeypatch):
    spy, kappa = tiny(), 0.7
    _, expected = expected_gradient(spy, Z, X, 1.0, nat * kappa, error)
    logits = cv.l2t(spy, Z, torch.ones(1, 2), text_process=TINY)[0]
    total, bridge = 0.0, TextBridge("rloo", marginal_weight=kappa)
    texts, weights = tuples(logits, 2, 1.0)
    for pair, weight in zip(texts.unbind(1), weights, strict=True):
        if pair[0].tolist() > pair[1].tolist():
            continue  # the other order is the same estimate
        drawing(monkeypatch, pair[:, None])
        mask = torch.ones(1, 2).bool()
        loss = cycle(spy, bridge, Z, mask, TINY, PAIR, noise=X, **options)
        total = total + weight * loss * (1 if torch.equal(*pair) else 2)
    assert_close(gradients(total, spy.module), expected)


def test_the_value_is_the_mean_over_samples_and_all_see_the_same_noise():
    spy = shared()
    bridge = TextBridge("rloo", samples=3)
    loss = cycle(spy, bridge, noise=None, show_latent=True, time=0.4)
    l2t, *encoders = spy.calls
    assert l2t["need"] == "logits" and len(encoders) == 3
    texts = torch.stack([call["tokens"] for call in encoders])
    assert len(texts.unique(dim=0)) == 3
    for call in encoders:
        assert torch.equal(call["latents"], encoders[0]["latents"])
        assert call["need"] == "latents" and (call["latent_time"] == 0.4).all()
    errors = [
        V.to_x0(
            spy.denoiser.denoise(**call).latent_prediction,
            call["latents"],
            call["latent_time"],
        )
        - LATENTS
        for call in encoders
    ]
    expected = torch.stack(errors).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_rloo_draws_its_texts_like_the_categorical_bridge():
    spy = shared()
    options = {"temperature": 0.5}
    cycle(spy, TextBridge("rloo", samples=2, **options), seed=3)
    generator = seeded(3)
    logits = cv.l2t(spy.denoiser, LATENTS, MASK, text_process=TEXT)
    for call in spy.calls[1:]:
        drawn = cv.categorical_text(logits, MASK, text_process=TEXT, generator=generator, **options)
        assert torch.equal(call["tokens"], drawn)


@pytest.mark.parametrize("distance", ["mse", "cosine", "normalized_mse"])
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_reductions_of_rloo_agree(distance, shape):
    """In value and in gradient; and rows are rewarded apart from each other."""
    network = Wide(shape).double()
    spy, rows = Spy(cv.as_denoiser(network)), len(MASK)
    z, noise = torch.randn(2, rows, *shape, generator=seeded(1), dtype=torch.float64)
    process = cv.LatentProcess(prediction="x0", shape=shape)
    bridge = TextBridge("rloo", samples=3)
    elements = rows * math.prod(shape if distance != "cosine" else shape[:-1])

    def run(**options):
        return cycle(
            spy, bridge, z, MASK, process=process, noise=noise, distance=distance, **options
        )

    total, none, mean = (run(reduction=r) for r in ("sum", "none", "mean"))
    assert none.shape == ((rows, *shape) if distance != "cosine" else (rows, *shape[:-1]))
    for other, factor in (
        (none.sum(), 1),
        (mean, elements),
        (run(reduction="mean", count=7), 7),
        *([(run(reduction="nats"), 2 * rows)] if distance == "mse" else []),
    ):
        torch.testing.assert_close(other * factor, total, rtol=1e-12, atol=1e-12)
        scaled = gradients(other * factor, network)
        assert_close(scaled, gradients(total, network), atol=1e-10)
    # each row's share is that of the row alone, with the same texts
    for row in range(rows):
        share = gradients(none[row].sum(), network)
        assert share["text_head.weight"].any()
    if distance != "mse":
        with pytest.raises(ValueError, match="nats"):
            run(reduction="nats")


class Wide(nn.Module):
    """A toy for latents of any shape."""

    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(0)
        size = math.prod(shape)
        self.shape, self.word = shape, nn.Embedding(7, size)
        self.text_head, self.latent_head = nn.Linear(size, 5 * 7), nn.Linear(size, size)

    def forward(self, tokens, latents, *, attention_mask, **_):
        words = (cv.embed_tokens(self.word.weight, tokens) * attention_mask[..., None]).sum(1)
        logits = self.text_head(latents.flatten(1)).view(-1, 5, 7)[:, : tokens.shape[1]]
        return logits, self.latent_head(words).view(-1, *self.shape)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_marginal_is_that_of_texts_alone(weight):
    """A pass more per sample: texts partly masked, beside pure noise. It changes no value."""
    spy = towers()
    bridge = TextBridge("rloo", samples=3, marginal_weight=weight)
    loss = cycle(spy, bridge)
    priced = spy.calls[4:]
    assert len(priced) == (3 if weight else 0)
    for call, encoded in zip(priced, spy.calls[1:4], strict=False):
        assert call["need"] == "logits" and (call["latent_time"] == 1).all()
        assert torch.equal(call["latents"], NOISE)
        assert torch.equal(call["text_time"], priced[0]["text_time"])
        visible = call["tokens"] != TEXT.mask_id
        assert torch.equal(call["tokens"][visible], encoded["tokens"][visible])
        assert torch.equal(call["attention_mask"], encoded["attention_mask"])
    rates = torch.stack([call["text_time"] for call in priced]) if priced else torch.rand(1, 3)
    assert len(rates[0].unique()) == 3
    free = cycle(towers(), TextBridge("rloo", samples=3))
    torch.testing.assert_close(loss, free, rtol=1e-12, atol=0)


def test_the_end_of_a_predicted_text_is_learned():
    """A text is scored up to its first end, by the reward of what is left of it."""
    text = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, end_id=4, end="predicted")
    spy, mask = towers(), torch.ones(3, 5).bool()
    logits = torch.zeros(3, 5, 7, dtype=torch.float64, requires_grad=True)
    bridge = TextBridge("rloo", samples=4)
    loss = cycle(spy, bridge, mask=mask, text=text, logits=logits)
    kept = torch.stack([call["attention_mask"] for call in spy.calls])
    gradient = torch.autograd.grad(loss, logits)[0]
    assert torch.equal(gradient.any(dim=-1), kept.any(dim=0))
    assert not kept.all() and gradient[..., 4].any()


def test_rloo_is_near_the_true_gradient_over_many_rows():
    """With real draws: the mean over equal rows is the exact gradient, within their noise."""
    spy, rows = tiny(), 1000
    _, expected = expected_gradient(spy, Z, X, 1.0, 0.0, sq(1))
    z, noise, mask = (t.expand(rows, -1) for t in (Z, X, torch.ones(1, 2).bool()))
    logits = cv.l2t(spy, z, mask, text_process=TINY).detach().requires_grad_()
    bridge, options = TextBridge("rloo", samples=4), {"noise": noise, "reduction": "sum"}
    loss = cycle(spy, bridge, z, mask, TINY, PAIR, logits=logits, **options)
    per_row = torch.autograd.grad(loss, logits)[0].sum(dim=1)  # what reaches the head's bias
    for word in WORDS:
        assert_near_mean(per_row[:, word].numpy(), expected["text_head.bias"][word].item())


# --- refusals ---------------------------------------------------------------------------------


def refused(expected, bridge="argmax", error=ValueError, **options):
    spy, generator = towers(), seeded()
    before = generator.get_state()
    with pytest.raises(error, match=expected):
        cycle(spy, bridge, generator=generator, **options)
    assert spy.calls == [] and torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("bridge", [*RELAXED, "rloo"])
def test_a_gradient_is_not_dropped_in_silence(bridge):
    refused(f"the '{bridge}' bridge has a gradient .* GradientPolicy", bridge, policy=DETACH)


@pytest.mark.parametrize("bridge", ["argmax", "categorical", "unmask"])
@pytest.mark.parametrize("policy", [FULL, cv.GradientPolicy("last")])
def test_a_gradient_is_not_invented(bridge, policy):
    refused(f"the '{bridge}' bridge is a choice of ids and has no gradient", bridge, policy=policy)


def test_what_is_given_must_fit():
    ids, logits = torch.full(MASK.shape, 3), torch.zeros(*MASK.shape, 7)
    refused("the pseudo-text given as `y_hat` is a choice of ids and has no gradient", y_hat=ids)
    refused("give no `logits` beside it", y_hat=ids, logits=logits, policy=DETACH)
    refused("let the 'rloo' bridge, .*, draw its own", "rloo", y_hat=ids)
    refused("`y_hat` must be finite", y_hat=logits / 0)


@pytest.mark.unhooked
def test_shapes_are_checked():
    refused("`y_hat` must hold ids", y_hat=torch.full(MASK.shape, 7), policy=DETACH)
    refused(r"`y_hat` .* relaxed text \[b, s, v\]", y_hat=torch.zeros(*MASK.shape, 6))
    refused("`attention_mask` must have the shape", y_hat=torch.zeros(3, 4, 7))
    refused(r"`logits` must be \[b, s, v\]", logits=torch.zeros(*MASK.shape, 6), policy=DETACH)
    refused("`attention_mask` must have the shape", logits=torch.zeros(3, 4, 7), policy=DETACH)
    refused("`bridge` is 'agmax'; did you mean 'argmax'", "agmax", policy=DETACH)
    refused("`distance` is 'msee'", distance="msee", policy=DETACH)
    refused("`reduction` is 'nat'", reduction="nat", policy=DETACH)


# --- odd batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("bridge", BRIDGES, ids=str)
@pytest.mark.parametrize("rows", [0, 2])
def test_rows_without_words_and_no_rows_at_all(bridge, rows):
    spy = shared()
    mask = torch.zeros(rows, 3).bool()
    policy = FULL if TextBridge.of(bridge).has_gradient else DETACH
    z = torch.randn(rows, 4).double()
    if rows:
        with pytest.raises(ValueError, match="`attention_mask` must keep a position or more"):
            cycle(spy, bridge, z, mask, noise=z, policy=policy)
    for reduction in ("mean", "sum", "nats"):
        with cv.check_values(False):
            loss = cycle(spy, bridge, z, mask, noise=z, policy=policy, reduction=reduction)
        assert loss.isfinite() and (rows or loss == 0)
        found = gradients(loss, spy.module)
        assert all(g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("bridge", BRIDGES, ids=str)
def test_nothing_is_read_back(bridge):
    denoiser, text, latent = toy_denoiser()
    denoiser.module.to("meta")
    policy = FULL if TextBridge.of(bridge).has_gradient else DETACH
    loss = cv.cycle_latent_loss(
        denoiser,
        torch.zeros(3, 4, device="meta"),
        torch.ones(3, 5, dtype=torch.bool, device="meta"),
        text_process=text,
        latent_process=latent,
        bridge=bridge,
        policy=policy,
    )
    assert loss.is_meta and loss.shape == ()


@pytest.mark.parametrize("bridge", BRIDGES, ids=str)
@pytest.mark.parametrize("cast", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_half_precision(bridge, cast):
    denoiser, text, latent = toy_denoiser()
    dtype = torch.bfloat16 if cast is nullcontext else torch.float32
    denoiser.module.to(dtype)
    policy = FULL if TextBridge.of(bridge).has_gradient else DETACH
    with cast():
        loss = cv.cycle_latent_loss(
            denoiser,
            torch.randn(3, 4, dtype=dtype),
            MASK,
            text_process=text,
            latent_process=latent,
            bridge=bridge,
            policy=policy,
        )
    assert loss.dtype == torch.float32
    found = gradients(loss, denoiser.module)
    assert all(g.isfinite().all() for g in found.values())
    assert found["text_head.weight"].any() == (policy is FULL)
