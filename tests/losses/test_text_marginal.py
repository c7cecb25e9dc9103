import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import oracles
from cyclevae import check_values
from cyclevae.gradient_policy.contexts import detach
from cyclevae.losses.text import text_loss
from cyclevae.losses.text_marginal import text_marginal_loss
from cyclevae.losses.unconditional import unconditional_loss
from cyclevae.model.denoiser import Denoised, as_denoiser
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess
from cyclevae.testing import assert_frozen, assert_learns, toy_batch, toy_denoiser
from oracles import Spy, array, assert_near_mean
from strategies import quick, seeds

TEXT = TextProcess(mask_id=2, vocab_size=7, pad_id=0)
COSINE = LatentProcess(shape=(4,))
REDUCTIONS = ("mean", "sum", "none", "nats")
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def marginal(denoiser, tokens, mask, **options):
    options = {"text_process": TEXT, "latent_process": COSINE} | options
    return text_marginal_loss(denoiser, tokens, mask, **options)


class Blind:
    """Logits that depend on the position only."""

    def __init__(self, logits):
        self.logits = logits

    def denoise(self, tokens, latents, **state):
        return Denoised(self.logits.expand(len(tokens), -1, -1), None)


def one_hot(tokens):
    return F.one_hot(tokens, 7).double()


def words(rows=3, length=4, seed=0):
    tokens = torch.randint(3, 7, (rows, length), generator=seeded(seed))
    mask = torch.arange(length) < torch.tensor([length, 2, 1, 3])[:rows, None]
    return tokens * mask, mask


# --- the bound --------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_blind_logits_give_the_full_cross_entropy(rate):
    """P(masked) = r: over all masks, 1/r sum_masked is exactly the sum at full mask."""
    logits, (tokens, mask) = randn(1, 3, 7), words(1, 3)
    full = float(text_loss(logits, tokens, mask, reduction="sum"))
    nll = array(text_loss(logits, tokens, mask, reduction="none"))[0]
    expected = sum(
        math.prod(rate if m else 1 - rate for m in masked) * (nll * masked).sum() / rate
        for masked in itertools.product([0, 1], repeat=3)
    )
    assert expected == pytest.approx(full)  # the identity
    rows = 1 if rate == 1 else 20_000
    got = marginal(
        Blind(logits),
        tokens.expand(rows, 3),
        mask.expand(rows, 3),
        text_time=rate,
        generator=seeded(),
        reduction="none",
    ).sum(dim=1)
    if rate == 1:
        assert float(got) == pytest.approx(full)
    else:
        assert_near_mean(array(got), full)


def test_the_drawn_rates_keep_the_identity():
    logits, (tokens, mask) = randn(1, 3, 7), words(1, 3)
    full = float(text_loss(logits, tokens, mask, reduction="sum"))
    rows = 40_000
    got = marginal(
        Blind(logits),
        tokens.expand(rows, 3),
        mask.expand(rows, 3),
        generator=seeded(),
        reduction="none",
    ).sum(dim=1)
    assert_near_mean(array(got), full)


@every_reduction
@quick
@given(seeds, st.sampled_from([0.0, 1e-4, 0.3, 1.0]), st.booleans())
def test_loop(reduction, seed, rate, relaxed):
    tokens, mask = words(4, seed=seed % 991)
    logits = randn(4, 4, 7, seed=seed % 991)
    got = marginal(
        Blind(logits),
        one_hot(tokens) if relaxed else tokens,
        mask,
        text_time=rate,
        noise=torch.zeros(4, 4).double(),
        generator=seeded(seed),
        reduction=reduction,
    )
    _, masked = TEXT.mask(tokens, mask, torch.full((4,), rate), generator=seeded(seed))
    nll = oracles.token_nll(logits, tokens, masked & mask) / max(rate, 1e-3)
    divisor = {"mean": max(int(mask.sum()), 1), "sum": 1, "nats": 4}
    expected = nll if reduction == "none" else nll.sum() / divisor[reduction]
    assert array(got) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("relaxed", [False, True])
def test_what_the_model_sees(relaxed):
    denoiser, _, _ = toy_denoiser()
    tokens, mask = words()
    spy, rate, noise = Spy(denoiser), torch.tensor([0.4, 0.6, 1.0]), randn(3, 4).float()
    marginal(
        spy,
        one_hot(tokens).float() if relaxed else tokens,
        mask.long(),
        text_time=rate,
        noise=noise,
        generator=seeded(),
    )
    (call,) = spy.calls
    noisy, _ = TEXT.mask(tokens, mask, rate, generator=seeded())
    assert torch.equal(call["tokens"], noisy) and torch.equal(call["latents"], noise)
    assert torch.equal(call["text_time"], rate) and call["latent_time"].tolist() == [1, 1, 1]
    assert torch.equal(call["attention_mask"], mask) and call["need"] == "logits"
    assert noisy[2, 0] == 2 and (noisy != tokens).sum() < mask.sum()


def test_draws():
    """Stratified rates, standard normal latents in the shape of the process."""
    spy = Spy(toy_denoiser()[0])
    tokens = torch.full((1000, 3), 4)
    value = marginal(spy, tokens, tokens > 0, generator=seeded())
    (call,) = spy.calls
    rates = call["text_time"].sort().values
    assert float((rates - (torch.arange(1000) + 0.5) / 1000).abs().max()) <= 0.5 / 1000 + 1e-6
    assert call["latents"].shape == (1000, 4)
    assert float(call["latents"].std()) == pytest.approx(1, abs=0.05)
    again = marginal(toy_denoiser()[0], tokens, tokens > 0, generator=seeded())
    torch.testing.assert_close(again, value)
    assert marginal(toy_denoiser()[0], tokens, tokens > 0, generator=seeded(1)) != value


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "nats"])
@pytest.mark.parametrize("taught", ["none", "first", "all"])
def test_the_text_part_of_the_unconditional_loss(taught, reduction, relaxed):
    """On rows without a latent the two are the same bound, taught padding included."""
    denoiser, text, process = toy_denoiser()
    batch = toy_batch()
    mask = batch.attention_mask
    processes = {
        "text_process": dataclasses.replace(text, taught_padding=taught),
        "latent_process": process,
    }
    # what stands at padded positions must not matter
    tokens = batch.tokens.masked_fill(~mask, 5)
    same = {"text_time": torch.tensor([0.3, 0.7, 1.0]), "noise": randn(3, 4).float()}
    nobody = torch.zeros(3, dtype=torch.bool)
    expected = unconditional_loss(
        denoiser,
        tokens,
        torch.zeros(3, 4),
        mask,
        has_latent=nobody,
        reduction=reduction,
        latent_time=1.0,
        generator=seeded(),
        **same,
        **processes,
    ).text
    texts = one_hot(tokens).float() if relaxed else tokens
    options = {"reduction": reduction, "generator": seeded(), **same, **processes}
    torch.testing.assert_close(text_marginal_loss(denoiser, texts, mask, **options), expected)


@pytest.mark.parametrize("relaxed", [False, True])
def test_counts(relaxed):
    denoiser, (tokens, mask) = toy_denoiser()[0], words()
    text = one_hot(tokens) if relaxed else tokens
    total = marginal(denoiser, text, mask, generator=seeded(), reduction="sum")
    for reduction in ("mean", "nats"):
        value = marginal(denoiser, text, mask, generator=seeded(), reduction=reduction, count=10)
        torch.testing.assert_close(value, total / 10)


# --- relaxed texts ----------------------------------------------------------------------------


def test_a_relaxed_text_mixes_the_targets():
    logits, (tokens, mask) = randn(3, 4, 7), words()
    relaxed = (randn(3, 4, 7, seed=1) + 5 * one_hot(tokens)).softmax(-1).requires_grad_()
    assert torch.equal(relaxed.argmax(-1)[mask], tokens[mask])
    options = {"text_time": 0.5, "noise": torch.zeros(3, 4).double(), "reduction": "sum"}
    value = marginal(Blind(logits), relaxed, mask, generator=seeded(), **options)
    _, masked = TEXT.mask(relaxed.argmax(-1), mask, torch.full((3,), 0.5), generator=seeded())
    gradient = -logits.log_softmax(-1) * masked[..., None] / 0.5
    assert value.item() == pytest.approx((gradient * relaxed).sum().item())
    torch.testing.assert_close(torch.autograd.grad(value, relaxed)[0], gradient)
    assert 0 < masked.sum() < mask.sum()


def test_straight_through_pulls_towards_probable_words():
    """Through softmax the gradient is that of the expected cost, and sums to 0 over the ids."""
    logits = randn(1, 1, 7)
    scores = randn(1, 1, 7, seed=1).requires_grad_()
    probabilities = scores.softmax(-1)
    hard = one_hot(probabilities.argmax(-1))
    text = hard + probabilities - probabilities.detach()
    value = marginal(Blind(logits), text, torch.ones(1, 1), text_time=1.0)
    assert value.item() == pytest.approx(-float(logits.log_softmax(-1)[hard.bool()]))
    (gradient,) = torch.autograd.grad(value, scores, retain_graph=True)
    expected = -(probabilities * logits.log_softmax(-1)).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, scores)[0])
    assert float(gradient.sum()) == pytest.approx(0, abs=1e-12)


def test_gradcheck():
    logits, (tokens, mask) = randn(3, 4, 7), words()
    options = {"text_time": 0.5, "noise": torch.zeros(3, 4)}
    text = (one_hot(tokens) * 0.9 + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y: marginal(Blind(logits), y, mask, generator=seeded(), **options), text
    )
    learned = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: marginal(Blind(x), tokens, mask, generator=seeded(), **options), learned
    )


def test_who_learns():
    denoiser, (tokens, mask) = toy_denoiser()[0], words()
    named = dict(denoiser.module.named_parameters())
    latent_head = [(n, p) for n, p in named.items() if n.startswith("latent_head")]
    value = marginal(denoiser, tokens, mask)
    assert_learns(value, [(n, p) for n, p in named.items() if not n.startswith("latent_head")])
    assert_frozen(value, latent_head)
    relaxed = one_hot(tokens).requires_grad_()
    value = marginal(denoiser, relaxed, mask, text_time=1.0)
    assert_learns(value, [relaxed])
    assert_frozen(value, named.items())
    assert not marginal(denoiser, one_hot(tokens), mask).requires_grad
    with detach():
        assert not marginal(denoiser, tokens, mask, reduction="none").requires_grad


def test_gradients_of_ids_and_of_one_hot_rows_agree():
    """The value of a one-hot text is that of its ids, whatever the dtype."""
    denoiser, (tokens, mask) = toy_denoiser()[0], words()
    expected = marginal(denoiser, tokens, mask, generator=seeded(), reduction="none")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        text = one_hot(tokens).to(dtype)
        got = marginal(denoiser, text, mask, generator=seeded(), reduction="none")
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-6, atol=1e-6)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_impossible_ids_leave_no_nan():
    """A model that never says [MASK] has log p = -inf there, and a text never holds it: 0."""
    logits = randn(1, 2, 7)
    logits[..., 2] = -math.inf
    scores = randn(1, 2, 7, seed=1)
    scores[..., 2] = -math.inf
    scores.requires_grad_()
    value = marginal(Blind(logits), scores.softmax(-1), torch.ones(1, 2), text_time=1.0)
    value.backward()
    finite = torch.tensor([0, 1, 3, 4, 5, 6])
    expected = -(scores.softmax(-1) * logits.log_softmax(-1))[..., finite].sum() / 2
    assert value.item() == pytest.approx(expected.item())
    assert scores.grad.isfinite().all()


# --- extremes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_gradient_is_finite(relaxed, scale):
    tokens, mask = words()
    logits = (scale * randn(3, 4, 7)).float().requires_grad_()
    text = one_hot(tokens).float().requires_grad_() if relaxed else tokens
    value = marginal(Blind(logits), text, mask, text_time=torch.tensor([0.0, 1e-7, 1.0]))
    value.backward()
    assert value.isfinite() and (text if relaxed else logits).grad.isfinite().all()


@pytest.mark.parametrize("relaxed", [False, True])
def test_nan_logits_at_padding(relaxed):
    tokens, mask = words()
    logits = randn(3, 4, 7).masked_fill(~mask[..., None], math.nan)
    text = one_hot(tokens).requires_grad_() if relaxed else tokens
    value = marginal(Blind(logits), text, mask, text_time=1.0)
    assert value.isfinite()
    if relaxed:
        value.backward()
        assert text.grad.isfinite().all()


@pytest.mark.parametrize("relaxed", [False, True])
def test_nothing_to_read(relaxed):
    denoiser = toy_denoiser()[0]
    for rows, mask in ((2, torch.zeros(2, 3).bool()), (0, torch.ones(0, 3).bool())):
        tokens = torch.full((rows, 3), 4)
        text = one_hot(tokens).requires_grad_() if relaxed else tokens
        with check_values(False):
            value = marginal(denoiser, text, mask)
        assert value.item() == 0 and value.requires_grad


@pytest.mark.parametrize("relaxed", [False, True])
def test_half_precision_and_autocast(relaxed):
    tokens, mask = words()
    logits = randn(3, 4, 7).bfloat16()
    text = one_hot(tokens).bfloat16() if relaxed else tokens
    options = {"text_time": 0.7, "noise": torch.zeros(3, 4)}
    got = marginal(Blind(logits), text, mask, generator=seeded(), **options)
    exact = marginal(Blind(logits.float()), text, mask, generator=seeded(), **options)
    assert got.dtype == torch.float32 and torch.equal(got, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = marginal(Blind(logits), text, mask, generator=seeded(), **options)
    assert torch.equal(inside, got)


@pytest.mark.parametrize("relaxed", [False, True])
def test_runs_on_meta(relaxed):
    network = toy_denoiser()[0].module.to("meta")
    tokens = torch.empty(2, 3, dtype=torch.long, device="meta")
    text = torch.empty(2, 3, 7, device="meta", requires_grad=True) if relaxed else tokens
    mask = torch.empty(2, 3, dtype=torch.bool, device="meta")
    value = marginal(as_denoiser(network), text, mask)
    value.backward()
    assert value.shape == ()


# --- refusals ---------------------------------------------------------------------------------


def test_refusals():
    denoiser, (tokens, mask) = toy_denoiser()[0], words()
    with pytest.raises(ValueError, match=r"`tokens` must hold ids in \[0, 7\)"):
        marginal(denoiser, tokens + 7, mask)
    with pytest.raises(ValueError, match="`tokens` must be finite"):
        marginal(denoiser, one_hot(tokens) * math.nan, mask)
    with pytest.raises(ValueError, match=r"`tokens` .* relaxed text .* = 7 ids, got float64"):
        marginal(denoiser, torch.zeros(3, 4, 6).double(), mask)
    with pytest.raises(ValueError, match="`attention_mask` must hold 1"):
        marginal(denoiser, tokens, 2 * mask.long())
    with pytest.raises(ValueError, match=r"`text_time` must lie in \[0"):
        marginal(denoiser, tokens, mask, text_time=1.5)
    with pytest.raises(ValueError, match=r"set `shape` on the LatentProcess"):
        marginal(denoiser, tokens, mask, latent_process=LatentProcess())
    with pytest.raises(ValueError, match=r"`noise` must be latents of shape \[b, 4\]"):
        marginal(denoiser, tokens, mask, noise=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="returned no logits"):
        marginal(Silent(), tokens, mask)


class Silent:
    def denoise(self, tokens, latents, **state):
        return Denoised(None, None)


@pytest.mark.unhooked
def test_refused_shapes():
    denoiser, (tokens, mask) = toy_denoiser()[0], words()
    with pytest.raises(ValueError, match="`reduction` is 'nat'; did you mean 'nats'"):
        marginal(denoiser, tokens, mask, reduction="nat")
    with pytest.raises(ValueError, match="`noise` and `tokens` must have the same number of rows"):
        marginal(denoiser, tokens, mask, noise=torch.zeros(2, 4))
    for text in (tokens, one_hot(tokens)):
        with pytest.raises(ValueError, match="`attention_mask` must have the shape of its tokens"):
            marginal(denoiser, text, mask[:2])
    with pytest.raises(TypeError, match="`tokens` must hold integer ids"):
        marginal(denoiser, tokens.double(), mask)
