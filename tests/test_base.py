import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cyclevae as cv
import oracles
from cyclevae.testing import toy_batch, toy_denoiser
from oracles import Spy, array, assert_near_mean
from strategies import latents, magnitudes, masks, quick, seeds, splits, texts

REDUCTIONS = ("mean", "sum", "none", "nats")
reductions = st.sampled_from(REDUCTIONS)
counts = st.one_of(st.none(), st.sampled_from([0.5, 3.0, 1e4]))


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def close(got, expected, rtol=1e-9, scale=0.0):
    """Equal up to rounding, also that of terms as large as `scale` which cancel."""
    expected = np.asarray(expected)
    largest = np.abs(expected).max(initial=0.0)
    atol = rtol * largest + 1e-13 * scale
    np.testing.assert_allclose(array(got), expected, rtol=rtol, atol=atol)


# --- text_loss --------------------------------------------------------------------------------


@quick
@given(texts(), reductions, counts)
def test_text_loss(text, reduction, count):
    got = cv.text_loss(*text, reduction=reduction, count=count)
    largest = float(text[0].abs().max()) * text[1].numel() / min(count or 1, 1)
    close(got, oracles.text_loss(*text, reduction, count), scale=largest)


@pytest.mark.parametrize("make", [torch.Tensor.int, torch.Tensor.float, torch.Tensor.bool])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64, torch.uint8])
def test_masks_and_tokens_of_other_dtypes(make, ids):
    logits, tokens = torch.randn(2, 3, 5), torch.tensor([[1, 4, 0], [2, 0, 0]])
    got = cv.text_loss(logits, tokens.to(ids), make(tokens > 0))
    close(got, oracles.text_loss(logits, tokens, tokens > 0), 1e-6)


@quick
@given(texts(), reductions, seeds)
def test_padding_never_counts(text, reduction, seed):
    """What stands at padding, up to infinity, changes neither the loss nor any gradient."""
    logits, tokens, mask = text
    generator = torch.Generator().manual_seed(seed)
    other = torch.where(
        mask, tokens, torch.randint(logits.shape[-1], mask.shape, generator=generator)
    )
    noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype) * 1e30
    moved = torch.where(mask[..., None], logits, noise).requires_grad_()
    logits.requires_grad_()
    loss = cv.text_loss(logits, tokens, mask, reduction=reduction)
    again = cv.text_loss(moved, other, mask, reduction=reduction)
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    (first,), (second,) = gradient(loss.sum(), logits), gradient(again.sum(), moved)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert not first[~mask].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_at_padding_reaches_no_gradient(bad):
    """A row that is all padding is NaN after many an attention's softmax."""
    tokens, mask = torch.tensor([[1, 1], [1, 1]]), torch.tensor([[True, False], [False, False]])
    logits = torch.zeros(2, 2, 4).masked_fill(~mask[..., None], bad).requires_grad_()
    loss = cv.text_loss(logits, tokens, mask)
    close(loss, math.log(4), 1e-6)
    (got,) = gradient(loss, logits)
    assert torch.isfinite(got).all() and not got[~mask].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 2])
def test_no_text_gives_zero_with_a_graph(reduction, rows):
    logits = torch.randn(rows, 3, 5, requires_grad=True)
    tokens = torch.zeros(rows, 3, dtype=torch.int64)
    loss = cv.text_loss(logits, tokens, torch.zeros(rows, 3).bool(), reduction=reduction).sum()
    assert loss.item() == 0 and loss.requires_grad
    (got,) = gradient(loss, logits)
    assert got.shape == logits.shape and not got.any()


@quick
@given(texts())
def test_none_then_sum_is_sum(text):
    none = cv.text_loss(*text, reduction="none")
    torch.testing.assert_close(none.sum(), cv.text_loss(*text, reduction="sum"))


def test_text_loss_is_computed_in_fp32():
    logits, tokens = torch.randn(2, 3, 50).bfloat16() * 8, torch.randint(50, (2, 3))
    mask = torch.ones(2, 3).bool()
    loss = cv.text_loss(logits, tokens, mask)
    assert loss.dtype == torch.float32
    close(loss, oracles.text_loss(logits, tokens, mask), 1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_text_gradcheck(reduction):
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    tokens, mask = torch.randint(4, (2, 3)), torch.tensor([[1, 1, 0], [1, 0, 1]]).bool()
    assert torch.autograd.gradcheck(
        lambda x: cv.text_loss(x, tokens, mask, reduction=reduction), logits
    )


@quick
@given(magnitudes)
def test_text_gradient_is_finite_at_any_magnitude(magnitude):
    logits = (torch.randn(2, 3, 4) * magnitude).requires_grad_()
    loss = cv.text_loss(logits, torch.randint(4, (2, 3)), torch.ones(2, 3).bool())
    (got,) = gradient(loss, logits)
    assert torch.isfinite(got).all()
    assert got.sum(dim=-1).abs().max() < 1e-6  # softmax minus one-hot


# --- latent_loss ------------------------------------------------------------------------------


@quick
@given(latents(), reductions, counts, st.sampled_from([1.0, 0.3, 20.0]), seeds)
def test_latent_loss(target, reduction, count, variance, seed):
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed)).double()
    prediction = target + noise
    got = cv.latent_loss(prediction, target, reduction=reduction, count=count, variance=variance)
    close(got, oracles.latent_loss(prediction, target, reduction, variance, count))


@pytest.mark.parametrize("shape", [(3, 2), (3, 4, 2)])
def test_latent_nats_of_a_diagonal_gaussian(shape):
    """Half the squared error over the variance is what varies in `-log N(z; prediction, v)`."""
    prediction, target = torch.randn(2, *shape).double()
    variance = torch.tensor([0.5, 4.0]).double()
    got = cv.latent_loss(prediction, target, reduction="nats", variance=variance)
    close(got, oracles.latent_loss(prediction, target, "nats", variance))
    density = torch.distributions.Normal(prediction, variance.sqrt())
    at_mean = density.log_prob(prediction) - density.log_prob(target)
    torch.testing.assert_close(got, at_mean.flatten(1).sum(dim=1).mean())


def test_unit_nats_are_half_the_sum_over_rows():
    prediction, target = torch.randn(2, 5, 3).double()
    nats = cv.latent_loss(prediction, target, reduction="nats")
    torch.testing.assert_close(nats, cv.latent_loss(prediction, target, reduction="sum") / 2 / 5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_latent_gives_zero_with_a_graph(reduction):
    prediction = torch.zeros(0, 4, requires_grad=True)
    loss = cv.latent_loss(prediction, torch.zeros(0, 4), reduction=reduction).sum()
    assert loss.item() == 0 and loss.requires_grad


def test_latent_loss_is_computed_in_fp32():
    prediction, target = torch.randn(2, 4, 3).bfloat16()
    loss = cv.latent_loss(prediction, target)
    assert loss.dtype == torch.float32
    close(loss, oracles.latent_loss(prediction, target), 1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_latent_gradcheck(reduction):
    inputs = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True).unbind()
    variance = torch.tensor([0.5, 2.0]).double()
    assert torch.autograd.gradcheck(
        lambda p, t: cv.latent_loss(p, t, reduction=reduction, variance=variance), inputs
    )


def test_latent_gradient_is_exactly_zero_at_the_target():
    prediction = torch.randn(3, 4, requires_grad=True)
    (got,) = gradient(cv.latent_loss(prediction, prediction.detach()), prediction)
    assert not got.any()


# --- counts -----------------------------------------------------------------------------------


@quick
@given(st.data(), st.sampled_from(["mean", "nats"]), st.sampled_from([1, 2, 4]))
def test_any_split_has_the_gradient_of_the_whole(data, reduction, ranks):
    """Accumulated over steps and averaged over ranks, with the count of the whole over ranks."""
    mask = data.draw(masks(rows=6))
    cuts = data.draw(splits(6))
    torch.manual_seed(0)
    logits = torch.randn(*mask.shape, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    tokens, target = torch.randint(4, mask.shape), torch.randn(6, 3).double()
    tokens_or_rows = max(int(mask.sum()), 1) if reduction == "mean" else 6
    elements_or_rows = 18 if reduction == "mean" else 6
    as_tensor = data.draw(st.booleans())

    def count(total):
        share = total / ranks
        return torch.tensor(share, dtype=torch.float64) if as_tensor else share

    whole = cv.text_loss(logits, tokens, mask, reduction=reduction)
    whole = whole + cv.latent_loss(z, target, reduction=reduction)
    parts = torch.zeros((), dtype=torch.float64)
    for start, stop in itertools.pairwise(cuts):
        part = slice(start, stop)
        parts = parts + cv.text_loss(
            logits[part],
            tokens[part],
            mask[part],
            reduction=reduction,
            count=count(tokens_or_rows),
        )
        parts = parts + cv.latent_loss(
            z[part], target[part], reduction=reduction, count=count(elements_or_rows)
        )
    torch.testing.assert_close(parts / ranks, whole)
    for got, expected in zip(
        gradient(parts / ranks, logits, z), gradient(whole, logits, z), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_a_count_of_zero_divides_by_nothing():
    logits, tokens = torch.randn(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64)
    for zero in (0.0, torch.zeros(())):
        assert cv.text_loss(logits, tokens, tokens > 0, count=zero) == 0


# --- base passes ------------------------------------------------------------------------------


def toy(prediction="v", seed=0):
    denoiser, text, _ = toy_denoiser(seed)
    denoiser.module.double()
    return Spy(denoiser), text, cv.LatentProcess(prediction=prediction, shape=(4,))


def pairs(rows=3):
    batch = toy_batch(seed=1, rows=rows)
    return batch.tokens, batch.latents.double(), batch.attention_mask


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_l2t_loss_is_the_masked_cross_entropy_given_the_latent(reduction):
    spy, text, _ = toy()
    tokens, z, mask = pairs()
    got = cv.l2t_loss(spy, tokens, z, mask, text_process=text, reduction=reduction)
    (call,) = spy.calls
    assert torch.equal(call["tokens"], torch.where(mask, 2, 0))
    assert torch.equal(call["latents"], z)
    assert (call["text_time"] == 1).all() and (call["latent_time"] == 0).all()
    assert call["need"] == "logits"
    logits = spy.denoiser.denoise(**call).logits
    close(got, oracles.text_loss(logits, tokens, mask, reduction))


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_t2l_loss_is_the_squared_error_of_the_prediction(prediction, reduction):
    spy, text, process = toy(prediction)
    tokens, z, mask = pairs()
    noise, time = torch.randn(3, 4).double(), torch.tensor([0.1, 0.5, 1.0]).double()
    got = cv.t2l_loss(
        spy,
        tokens,
        z,
        mask,
        text_process=text,
        latent_process=process,
        time=time,
        noise=noise,
        reduction=reduction,
    )
    (call,) = spy.calls
    alpha_bar = oracles.host_alpha_bar("cosine")[oracles.host_index(time)].astype(float)[:, None]
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    x, e = array(z), array(noise)
    close(call["latents"], alpha * x + sigma * e, 1e-3)
    assert torch.equal(call["tokens"], tokens)
    assert torch.equal(call["latent_time"], time) and not call["text_time"].any()
    assert call["need"] == "latents"
    target = torch.from_numpy({"epsilon": e, "x0": x, "v": alpha * e - sigma * x}[prediction])
    out = spy.denoiser.denoise(**call).latent_prediction
    close(got, oracles.latent_loss(out, target, reduction), 1e-3)


def test_t2l_loss_draws_stratified_times_for_none():
    spy, text, process = toy()
    batch = pairs(rows=8)
    seed = torch.Generator().manual_seed(0)
    cv.t2l_loss(spy, *batch, text_process=text, latent_process=process, time=None, generator=seed)
    times = spy.calls[0]["latent_time"].sort().values
    assert (times.mul(8).ceil() == torch.arange(1, 9)).all()


def test_base_losses_split_into_steps_have_the_gradient_of_the_whole():
    spy, text, process = toy()
    tokens, z, mask = pairs(rows=5)
    noise, parameters = torch.randn(5, 4).double(), list(spy.module.parameters())

    def loss(part, tokens_count, elements):
        kind = {"text_process": text}
        total = cv.l2t_loss(spy, tokens[part], z[part], mask[part], count=tokens_count, **kind)
        return total + cv.t2l_loss(
            spy,
            tokens[part],
            z[part],
            mask[part],
            latent_process=process,
            noise=noise[part],
            count=elements,
            **kind,
        )

    whole = gradient(loss(slice(None), None, None), *parameters)
    n = float(mask.sum())
    parts = loss(slice(2), n, 20.0) + loss(slice(2, 5), n, 20.0)
    for got, expected in zip(gradient(parts, *parameters), whole, strict=True):
        torch.testing.assert_close(got, expected)


# --- unconditional_loss -----------------------------------------------------------------------


def unconditional(spy, text, process, batch, **options):
    return cv.unconditional_loss(spy, *batch, text_process=text, latent_process=process, **options)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("partial", [False, True])
def test_unconditional_loss(prediction, partial):
    spy, text, process = toy(prediction)
    tokens, z, mask = pairs(rows=4)
    rate, time = torch.tensor([0.3, 0.9, 1.0, 0.5]).double(), torch.rand(4).double()
    noise = torch.randn(4, 4).double()
    has_text = torch.tensor([True, True, False, True]) if partial else torch.ones(4).bool()
    has_latent = torch.tensor([True, False, True, True]) if partial else torch.ones(4).bool()
    got = unconditional(
        spy,
        text,
        process,
        (tokens, z, mask),
        text_time=rate,
        latent_time=time,
        noise=noise,
        generator=torch.Generator().manual_seed(0),
        **({"has_text": has_text, "has_latent": has_latent} if partial else {}),
    )
    (call,) = spy.calls
    out = spy.denoiser.denoise(**call)
    kept = mask & has_text[:, None]
    masked = (call["tokens"] == 2) & kept
    bound = oracles.masked_bound(out.logits, tokens, masked, rate, kept)
    close(got.text, bound)
    target = process.target(z, noise, time)
    square = oracles.latent_loss(out.latent_prediction, target, "none")[array(has_latent) > 0]
    close(got.latent, square.mean())
    if not partial:
        return
    assert (call["tokens"][2] == torch.where(mask[2], 2, 0)).all()
    assert call["text_time"].tolist() == [*rate[:2].tolist(), 1.0, 0.5]
    assert torch.equal(call["latents"][1], noise[1]) and call["latent_time"][1] == 1


@quick
@given(seeds)
def test_rows_without_a_part_contribute_nothing_to_it(seed):
    """Whatever stands where the text or the latent is missing, losses and gradients are equal."""
    spy, text, process = toy()
    tokens, z, mask = pairs(rows=4)
    has_text = torch.tensor([True, True, False, False])
    has_latent = torch.tensor([True, False, True, False])
    generator = torch.Generator().manual_seed(seed)
    parameters, results = list(spy.module.parameters()), []
    for _ in range(2):
        loss = unconditional(
            spy,
            text,
            process,
            (tokens, z, mask),
            has_text=has_text,
            has_latent=has_latent,
            generator=torch.Generator().manual_seed(0),
        )
        results.append([loss.text, loss.latent, *gradient(sum(loss), *parameters)])
        junk = torch.randint(3, 7, tokens.shape, generator=generator)
        tokens = torch.where(has_text[:, None], tokens, junk)
        z = torch.where(has_latent[:, None], z, torch.randn(4, 4, generator=generator) * 1e3)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("missing", ["text", "latent"])
def test_no_row_with_a_part_gives_zero_with_a_graph(missing):
    spy, text, process = toy()
    none = {f"has_{missing}": torch.zeros(3).bool()}
    losses = unconditional(spy, text, process, pairs(), **none)
    loss, other = getattr(losses, missing), losses.text + losses.latent
    assert loss.item() == 0 and loss.requires_grad and other > 0
    assert all(g is None or not g.any() for g in gradient(loss, *spy.module.parameters()))


def test_unconditional_loss_takes_latents_of_three_axes():
    class Flat(nn.Module):
        def forward(self, tokens, latents, **state):
            return torch.zeros(*tokens.shape, 7).double(), latents * 0.5

    spy, process = Spy(cv.as_denoiser(Flat())), cv.LatentProcess(prediction="x0")
    tokens, _, mask = pairs()
    z, noise = torch.randn(2, 3, 2, 2).double()
    time = torch.tensor([0.2, 0.4, 0.6]).double()
    losses = unconditional(
        spy,
        toy()[1],
        process,
        (tokens, z, mask),
        has_latent=torch.tensor([True, False, True]),
        latent_time=time,
        noise=noise,
    )
    z_t = process.noised(z, noise, time)
    square = oracles.latent_loss(z_t / 2, z, "none")
    close(losses.latent, square[[0, 2]].mean())


def test_unconditional_counts():
    spy, text, process = toy()
    batch = pairs()
    options = {"noise": torch.randn(3, 4).double(), "text_time": 1.0, "latent_time": 0.5}
    own = unconditional(spy, text, process, batch, **options)
    n = float(batch[2].sum())
    halved = unconditional(
        spy, text, process, batch, text_count=2 * n, latent_count=24.0, **options
    )
    torch.testing.assert_close(halved.text, own.text / 2)
    torch.testing.assert_close(halved.latent, own.latent / 2)


class Blind(nn.Module):
    """Logits that depend on the position only."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(3)))

    def forward(self, tokens, latents, **state):
        return self.logits[: tokens.shape[1]].expand(len(tokens), -1, -1), latents


def test_the_bound_of_a_blind_decoder_is_its_full_mask_cross_entropy():
    """`P(masked) = r` cancels `1/r`: the bound's mean is the loss at full mask, in nats."""
    text, process = toy()[1:]
    tokens, z, mask = pairs(rows=16)
    blind, seed = cv.as_denoiser(Blind()), torch.Generator().manual_seed(0)
    full = unconditional(blind, text, process, (tokens, z, mask), text_time=1.0).text.item()
    logits = blind.module.logits[: tokens.shape[1]].expand(16, -1, -1)
    assert full == pytest.approx(oracles.text_loss(logits, tokens, mask), rel=1e-6)
    with torch.no_grad():
        draws = [
            unconditional(blind, text, process, (tokens, z, mask), generator=seed).text.item()
            for _ in range(1500)
        ]
    assert_near_mean(draws, full)
    assert np.std(draws) / math.sqrt(len(draws)) < 0.02 * full  # or the test could not fail


def test_a_rate_of_zero_masks_nothing_and_costs_nothing():
    spy, text, process = toy()
    losses = unconditional(spy, text, process, pairs(), text_time=0.0)
    assert losses.text.item() == 0
    tiny = unconditional(spy, text, process, pairs(), text_time=1e-30)
    assert math.isfinite(tiny.text.item())
