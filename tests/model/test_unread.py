"""Unread logits: the same numbers as of logits, of which none is of the size of the vocabulary."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import cyclevae as cv
from counters import HostSyncs, PeakBytes, SavedBytes
from cyclevae.bridges.words import argmax_of_rest
from cyclevae.diagnostics import cycle_report
from cyclevae.model import sweep
from cyclevae.model.linear_cross_entropy import each_nll, swept
from cyclevae.model.sweep import rows_at_a_time
from cyclevae.testing import ToyNetwork, check_denoiser, toy_batch
from unread import UnreadToy

V, H = 11, 3
TEXT = cv.TextProcess(mask_id=2, vocab_size=V, pad_id=0, start_id=1, end_id=3)
LATENT = cv.LatentProcess(shape=(4,))
TOKENS = torch.tensor([[1, 4, 5, 3], [1, 3, 0, 0], [1, 9, 3, 0]])
MASK = TOKENS > 0
MASKS = {"all": torch.ones_like(MASK), "some": MASK, "none": torch.zeros_like(MASK)}


def made(dtype=torch.float64, *, bias=True, seed=0):
    torch.manual_seed(seed)
    head = nn.Linear(H, V, bias=bias).to(dtype)
    return head, torch.randn(3, 4, H, dtype=dtype, requires_grad=True)


def results(function, head, hidden, **options):
    """A loss of logits, and its gradients, of plain and of unread ones."""
    found = []
    for logits in (head(hidden), cv.unread_logits(head, hidden)):
        value = function(logits)
        wanted = [hidden, *head.parameters()]
        gradients = torch.autograd.grad((value * value.detach().cos()).sum(), wanted)
        found.append((value, *gradients))
    return found


# The same numbers


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "nats", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_text_loss_is_that_of_logits(mask, reduction, bias):
    head, hidden = made(bias=bias)
    plain, unread = results(
        lambda logits: cv.text_loss(logits, TOKENS, mask, reduction=reduction), head, hidden
    )
    torch.testing.assert_close(unread, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("values", [True, False], ids=["counted on the host", "all positions"])
def test_what_does_not_count_is_not_looked_at(values):
    head, hidden = made()
    bad = hidden.detach().masked_fill(~MASK[..., None], torch.nan).requires_grad_()
    found = []
    with cv.check_values(values):
        for x in (hidden, bad):
            loss = cv.text_loss(cv.unread_logits(head, x), TOKENS, MASK)
            found.append((loss, *torch.autograd.grad(loss, [x, *head.parameters()])))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_first_and_second_derivatives(reduction):
    head, hidden = made()
    weights = torch.rand(3, 4, dtype=torch.float64)

    def loss(hidden, weight, bias):
        logits = cv.UnreadLogits(hidden, weight, bias)
        if reduction == "sum":
            return swept(logits, TOKENS, MASK, weights).total
        return each_nll(logits, TOKENS[..., None].expand(-1, -1, 2), MASK)

    inputs = (hidden, head.weight, head.bias)
    assert gradcheck(loss, inputs) and gradgradcheck(loss, inputs)


def test_a_backward_may_run_twice():
    head, hidden = made()
    loss = cv.text_loss(cv.unread_logits(head, hidden), TOKENS, MASK)
    first = torch.autograd.grad(loss, head.weight, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, head.weight)[0], 3 * first[0])


def test_a_tied_weight_gets_both_gradients():
    embedding, head = nn.Embedding(V, H), nn.Linear(H, V)
    head.weight = embedding.weight
    found = []
    for make in (head, lambda hidden: cv.unread_logits(head, hidden)):
        loss = cv.text_loss(make(embedding(TOKENS).tanh()), TOKENS, MASK)
        found.append(torch.autograd.grad(loss, embedding.weight))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
def test_autocast_is_that_of_the_pass(inside):
    head, hidden = made(torch.float32)
    found = []
    for make in (head, lambda hidden: cv.unread_logits(head, hidden)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = make(hidden)
            loss = cv.text_loss(logits, TOKENS, MASK) if inside else None
        assert logits.dtype == torch.bfloat16
        loss = cv.text_loss(logits, TOKENS, MASK) if loss is None else loss
        found.append((loss, *torch.autograd.grad(loss, [hidden, head.weight])))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1:], found[0][1:], rtol=2e-2, atol=1e-3)
    assert found[1][2].dtype == torch.float32


@pytest.mark.parametrize("units", [True, False], ids=["units of bf16", "products in fp32"])
@pytest.mark.parametrize("rows", [2, 100], ids=["one chunk", "chunks"])
def test_half_precision_on_any_cpu(units, rows, monkeypatch):
    """As far from float64 as logits in half precision are, and the same dtypes."""
    monkeypatch.setattr(sweep, "has_units", lambda: units)
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 50).bfloat16(), torch.randn(rows, 4, 16).bfloat16()
    tokens = torch.randint(50, (rows, 4))
    mask = torch.ones_like(tokens)
    assert (len(tokens.flatten()) > rows_at_a_time(head.weight)) == (rows > 2)
    exact_head = copy.deepcopy(head).double()
    found = []
    for make, network, x in (
        (exact_head, exact_head, hidden.double()),
        (head, head, hidden),
        (lambda x: cv.unread_logits(head, x), head, hidden),
    ):
        x = x.requires_grad_()
        loss = cv.text_loss(make(x), tokens, mask)
        found.append((loss, *torch.autograd.grad(loss, [x, *network.parameters()])))
    exact, plain, unread = found
    for true, theirs, ours in zip(exact, plain, unread, strict=True):
        assert ours.dtype == theirs.dtype
        error = (ours.double() - true).norm() / true.norm()
        assert error <= 1.5 * (theirs.double() - true).norm() / true.norm() + 1e-3


def test_units_of_half_precision_are_as_torch_tells(monkeypatch):
    for told in (True, False):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda told=told: told, raising=False)
        sweep.has_units.cache_clear()
        assert sweep.has_units() == told
        products = sweep.for_products(torch.zeros(1), torch.bfloat16)
        assert products.dtype == (torch.bfloat16 if told else torch.float32)
        assert sweep.for_products(torch.zeros(1), torch.float16).dtype == torch.float32
    sweep.has_units.cache_clear()


BRIDGES = ["argmax", "categorical", "straight_through", "gumbel", "soft"]


@pytest.mark.parametrize("bridge", [*BRIDGES, cv.TextBridge("categorical", temperature=0.5)])
def test_bridges_choose_the_same_words(bridge):
    head, hidden = made(torch.float32)
    texts = [
        cv.pseudo_text(
            logits,
            MASK,
            text_process=TEXT,
            bridge=bridge,
            generator=torch.Generator().manual_seed(1),
        )
        for logits in (head(hidden), cv.unread_logits(head, hidden))
    ]
    torch.testing.assert_close(*texts)


@pytest.mark.parametrize("known", [0.0, 0.5, 1.0])
def test_known_words_are_not_looked_for_again(known):
    head, hidden = made(torch.float32)
    head.bias.data[TEXT.mask_id] = 1.0  # often the most probable, and forbidden
    logits = cv.unread_logits(head, hidden)
    where = torch.rand(MASK.shape) < known
    best = swept(logits, TOKENS, where).best
    found = argmax_of_rest(best, where, logits, MASK, text_process=TEXT)
    torch.testing.assert_close(found, cv.argmax_text(head(hidden), MASK, text_process=TEXT))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_several_texts(temperature):
    head, hidden = made()
    texts = torch.stack([TOKENS, torch.where(TOKENS > 3, 8, TOKENS)])
    plain, unread = results(
        lambda logits: cv.text_log_prob(
            logits, texts, MASK, text_process=TEXT, temperature=temperature
        ),
        head,
        hidden,
    )
    torch.testing.assert_close(unread, plain)


# Whatever a step does with them

ROWS = {"text_process": cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0), "latent_process": LATENT}
FULL = cv.GradientPolicy("full")
GUIDED = cv.Maker("evaluated", guidance=2.0)
OBJECTIVES = {
    "recommended": {},
    "one pass for both": {"terms": [cv.Text(time=1.0), cv.CycleLatent(bridge="argmax")]},
    "bounds": {"terms": [cv.Text(weighting="bound"), cv.Unconditional()]},
    "joined": {"terms": [cv.Text(time=1.0), cv.Latent()], "join_passes": True},
    "made by others": {"terms": [cv.Text(null_rate=0.5), cv.CycleLatent(maker=GUIDED)]},
    "without what is not finite": {"terms": None, "non_finite": "zero"},
    "gumbel": {"terms": [cv.CycleLatent(bridge="gumbel", policy="full")]},
    "rloo": {"terms": [cv.CycleLatent(bridge="rloo", policy="full")]},
    "unmask": {"terms": [cv.CycleLatent(bridge=cv.TextBridge("unmask", steps=3)), cv.Text()]},
    "frozen": {"terms": [cv.CycleText(policy=cv.GradientPolicy("full", ("text_head.*",)))]},
}


def learned(network, objective, wrap=cv.as_denoiser, **options):
    output = objective(
        wrap(network), toy_batch(0), step=3, generator=torch.Generator().manual_seed(1), **options
    )
    output.loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return output.loss.detach(), dict(output.metrics), gradients


def checkpointed(network):
    return cv.checkpoint_passes(cv.as_denoiser(network))


def twins():
    torch.manual_seed(0)
    plain, unread = ToyNetwork(7, 4), UnreadToy(7, 4)
    unread.load_state_dict(plain.state_dict())
    return plain, unread


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        *((name, cv.as_denoiser) for name in OBJECTIVES),
        ("recommended", checkpointed),
        ("frozen", checkpointed),
    ],
)
def test_a_step_learns_the_same(name, wrap):
    plain, unread = twins()
    objective = cv.CycleObjective(**ROWS, **OBJECTIVES[name])
    expected = learned(plain, objective, wrap)
    torch.testing.assert_close(learned(unread, objective, wrap), expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_and_a_report_read_them():
    plain, unread = twins()
    batch = toy_batch(0)
    unread = cv.Teacher(unread).denoiser
    check_denoiser(cv.as_denoiser(UnreadToy(7, 4)), *ROWS.values(), relaxed=True)
    read = [
        cycle_report(d, batch, **ROWS, generator=torch.Generator().manual_seed(0))
        for d in (cv.as_denoiser(plain), unread)
    ]
    assert read[0].chance.accuracy == read[1].chance.accuracy
    assert read[0].text_loss == pytest.approx(read[1].text_loss)


def test_a_frozen_head_learns_nothing_and_hands_on_what_reaches_it():
    head, hidden = made()
    with cv.freeze(head, "weight") as frozen:
        logits = cv.unread_logits(head, hidden)
    frozen.probe(cv.text_loss(logits, TOKENS, MASK))
    cv.text_loss(logits, TOKENS, MASK).backward()
    assert head.weight.grad is None and head.bias.grad is not None and hidden.grad.any()


def test_a_function_of_ones_own_is_given_logits():
    seen = []

    def bridge(logits, mask, *, text_process, generator):
        seen.append(type(logits))
        return logits.argmax(dim=-1)

    head, hidden = made(torch.float32)
    cv.pseudo_text(cv.unread_logits(head, hidden), MASK, text_process=TEXT, bridge=bridge)
    assert seen == [torch.Tensor]


def test_to_all_else_they_are_logits():
    head, hidden = made()
    logits, plain = cv.unread_logits(head, hidden), head(hidden)
    assert (logits.shape, logits.dtype, logits.device, len(logits)) == (
        plain.shape,
        plain.dtype,
        plain.device,
        3,
    )
    assert logits.requires_grad and not logits.detach().requires_grad
    for function in (
        lambda x: torch.softmax(x, dim=-1),
        lambda x: x.float().log_softmax(-1),
        lambda x: nn.functional.cross_entropy(x.flatten(0, 1), TOKENS.flatten()),
        lambda x: torch.cat([x, x]),
        lambda x: plain + x,
        lambda x: x[0, 1, 2:],
        lambda x: x[MASK],
    ):
        torch.testing.assert_close(function(logits), function(plain))
    assert isinstance(logits[:2, 1:], cv.UnreadLogits)
    torch.testing.assert_close(logits[:2, 1:].read(), plain[:2, 1:])
    with pytest.raises(AttributeError, match="no attribute 'hiden'"):
        logits.hiden  # noqa: B018


class Scaled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


@pytest.mark.parametrize("kind", ["another class", "a hook", "another module"])
def test_a_head_that_is_more_than_its_weight_is_called(kind):
    head, hidden = made()
    if kind == "another class":
        head = copy.deepcopy(head)
        head.__class__ = Scaled
    elif kind == "a hook":
        head.register_forward_hook(lambda _, __, output: 2 * output)
    else:
        head = nn.Sequential(head)
    torch.testing.assert_close(cv.unread_logits(head, hidden), head(hidden))


def test_a_parametrized_head_teaches_what_made_its_weight():
    head, hidden = made()
    head = nn.utils.parametrizations.weight_norm(head)
    plain, unread = results(lambda logits: cv.text_loss(logits, TOKENS, MASK), head, hidden)
    torch.testing.assert_close(unread, plain)


def test_what_cannot_be_right_is_refused():
    head, hidden = made()
    with pytest.raises(TypeError, match="cast what it reads"):
        cv.unread_logits(head, hidden.float())
    with pytest.raises(ValueError, match=r"ids in \[0, 11\)"):
        cv.text_loss(cv.unread_logits(head, hidden), TOKENS + 9, MASK)
    logits = cv.unread_logits(head, hidden).detach()
    logits.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="sharded again before its logits were read"):
        cv.text_loss(logits, TOKENS, MASK)


def test_transforms_follow_plain_code():
    head, hidden = made()

    def loss(make):
        return lambda x: cv.text_loss(make(x), TOKENS, MASK)

    plain, unread = (
        torch.func.grad(loss(make))(hidden.detach())
        for make in (head, lambda x: cv.unread_logits(head, x))
    )
    torch.testing.assert_close(unread, plain)


# What it costs, counted


def costs(v, rows):
    """Of the loss of half of the positions, and its backward."""
    h, length = 8, 64
    head, hidden = nn.Linear(h, v), torch.randn(rows, length, h, requires_grad=True)
    tokens = torch.randint(v, (rows, length))
    mask = (2 * torch.arange(length) < length).expand(rows, -1)
    with FlopCounterMode(display=False) as flops, PeakBytes() as held:
        cv.text_loss(cv.unread_logits(head, hidden), tokens, mask).backward()
    return flops.get_total_flops(), held.peak


def test_the_head_runs_once_over_what_counts():
    assert costs(1000, 8)[0] == 3 * 2 * (8 * 32) * 8 * 1000


def test_no_tensor_of_vocabulary_size_grows_with_the_positions():
    (few, many), wide = (costs(4000, rows)[1] for rows in (8, 32)), costs(16_000, 32)[1]
    assert many - few < 4 * (24 * 64) * 8 * 10  # hidden states, and what is kept of them
    chunk = rows_at_a_time(torch.empty(0, 8))
    # weight's gradient twice, and what softmax needs of a chunk
    assert wide - many < 4 * 12_000 * (3 * 8 + 3 * chunk)


def test_nothing_waits_for_the_device():
    meta = torch.device("meta")
    network = UnreadToy(7, 4).to(meta)
    batch = cv.Batch(*[part.to(meta) for part in toy_batch(rows=4)[:6]])
    terms = [cv.Text(weighting="bound"), cv.CycleText(), cv.CycleLatent(bridge="categorical")]
    with HostSyncs() as syncs:
        cv.CycleObjective(**ROWS, terms=terms)(
            cv.as_denoiser(network), batch, step=3
        ).loss.backward()
    assert syncs.found == []


def test_a_step_keeps_no_logits():
    v = 4000
    kept, text = [], cv.TextProcess(mask_id=2, vocab_size=v, pad_id=0)
    objective = cv.CycleObjective(text, LATENT, [cv.Text(), cv.CycleText(pairs=True)])
    for kind in (ToyNetwork, UnreadToy):
        network = kind(v, 4)
        tokens = torch.randint(3, v, (8, 32))
        batch = cv.Batch(tokens, torch.ones_like(tokens), torch.randn(8, 4))
        with SavedBytes(network.parameters()) as saved:
            loss = objective(cv.as_denoiser(network), batch, step=0).loss
            kept.append(saved.live)
        del loss
    logits = 4 * 8 * 32 * v
    assert kept[0] > logits > 5 * kept[1]
