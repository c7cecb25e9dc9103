import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cyclevae as cv
import oracles
import oracles_latents
from counters import PeakBytes, SavedBytes
from cyclevae.losses import cross_entropy
from cyclevae.losses.latent import min_snr_weight
from cyclevae.processes.schedules import anneal
from cyclevae.processes.times import TimePolicy
from cyclevae.testing import toy_batch, toy_denoiser
from oracles import Spy, array, assert_near_mean
from strategies import latents, magnitudes, masks, quick, seeds, splits, texts

REDUCTIONS = ("mean", "sum", "none", "nats")
DISTANCES = {
    "mse": lambda p, t: oracles.latent_loss(p, t, "none"),
    "cosine": oracles_latents.cosine_distance,
    "normalized_mse": oracles_latents.normalized_square,
}
PREDICTIONS = ("epsilon", "x0", "v")
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


# --- distances and weights --------------------------------------------------------------------


def reduced(values, reduction, count):
    values = np.asarray(values)
    if reduction == "none":
        return values
    return values.sum() / (1 if reduction == "sum" else count or values.size)


@quick
@given(latents(), st.sampled_from(list(DISTANCES)), st.sampled_from(REDUCTIONS[:3]), counts, seeds)
def test_distances(target, distance, reduction, count, seed):
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed)).double()
    prediction = target + noise
    got = cv.latent_loss(prediction, target, distance=distance, reduction=reduction, count=count)
    expected = reduced(DISTANCES[distance](prediction, target), reduction, count)
    np.testing.assert_allclose(array(got), expected, rtol=1e-9, atol=1e-13)


@quick
@given(latents(), st.sampled_from(list(DISTANCES)), st.sampled_from(REDUCTIONS[:3]), counts, seeds)
def test_weights_multiply_rows_and_not_the_denominator(target, distance, reduction, count, seed):
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(target.shape, generator=generator).double()
    weight = torch.rand(len(target), generator=generator).double() * 5
    options = {"distance": distance, "reduction": reduction, "count": count}
    got = cv.latent_loss(prediction, target, weight=weight, **options)
    each = DISTANCES[distance](prediction, target)
    each = each * array(weight).reshape(-1, *[1] * (each.ndim - 1))
    np.testing.assert_allclose(array(got), reduced(each, reduction, count), rtol=1e-9, atol=1e-13)


def test_weights_of_nats():
    prediction, target = torch.randn(2, 3, 4).double()
    weight, variance = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 1, 2, 3]).double()
    got = cv.latent_loss(prediction, target, weight=weight, reduction="nats", variance=variance)
    rows = ((prediction - target).square() / (2 * variance)).sum(dim=1)
    torch.testing.assert_close(got, (rows * weight).sum() / 3)
    assert cv.latent_loss(prediction.float(), target.float(), weight=weight.double()).dtype == (
        torch.float32
    )


def test_the_normalized_mse_is_the_hosts():
    """`F.mse_loss` of both vectors through `F.normalize(p=2, dim=-1, eps=1e-8)`."""
    prediction, target = torch.randn(2, 5, 3, 4)
    prediction[0, 0], target[1, 1], prediction[2, 2] = 0.0, 0.0, 1e-9
    unit = [nn.functional.normalize(x, p=2, dim=-1, eps=1e-8) for x in (prediction, target)]
    got = cv.latent_loss(prediction, target, distance="normalized_mse")
    torch.testing.assert_close(got, nn.functional.mse_loss(*unit))
    got = cv.latent_loss(prediction, target, distance="cosine", reduction="none")
    expected = 1 - nn.functional.cosine_similarity(*unit, dim=-1)
    nonzero = torch.ones(5, 3).bool()
    nonzero[0, 0] = nonzero[1, 1] = nonzero[2, 2] = False
    torch.testing.assert_close(got[nonzero], expected[nonzero])
    assert got[0, 0] == got[1, 1] == 1


@quick
@given(latents(scale=3.0), seeds)
def test_the_normalized_square_is_twice_the_cosine_distance(target, seed):
    prediction = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed)).double()
    options = {"reduction": "none"}
    cosine = cv.latent_loss(prediction, target, distance="cosine", **options)
    square = cv.latent_loss(prediction, target, distance="normalized_mse", **options)
    torch.testing.assert_close(square.sum(dim=-1), 2 * cosine)
    assert cosine.shape == target.shape[:-1] and square.shape == target.shape
    assert (cosine > -1e-12).all() and (cosine < 2 + 1e-12).all()


@pytest.mark.parametrize("distance", ["cosine", "normalized_mse"])
def test_distances_of_directions_train_no_norm(distance):
    prediction, target = torch.randn(2, 4, 3).double()
    prediction.requires_grad_()
    loss = cv.latent_loss(prediction, target, distance=distance)
    torch.testing.assert_close(cv.latent_loss(7 * prediction, target / 3, distance=distance), loss)
    (got,) = gradient(loss, prediction)
    assert (got * prediction).sum(dim=1).abs().max() < 1e-15 < got.abs().max()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 2)])
def test_distance_gradcheck(distance, shape):
    inputs = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True).unbind()
    weight = torch.rand(shape[0]).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, t, w: cv.latent_loss(p, t, distance=distance, weight=w), (*inputs, weight)
    )


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_distance_gradients_are_finite(distance, dtype, scale):
    prediction = (torch.randn(4, 3) * scale).to(dtype)
    prediction[0], prediction[1] = 0.0, prediction[2]
    prediction.requires_grad_()
    for target in (torch.zeros(4, 3), torch.ones(4, 3), prediction.detach().float()):
        loss = cv.latent_loss(prediction, target.to(dtype), distance=distance)
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert gradient(loss, prediction)[0].isfinite().all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_no_latent_has_no_distance(distance):
    prediction = torch.zeros(0, 4, requires_grad=True)
    for weight in (None, torch.zeros(0)):
        loss = cv.latent_loss(prediction, torch.zeros(0, 4), distance=distance, weight=weight)
        assert loss.item() == 0 and loss.requires_grad


BAD_WEIGHTS = [
    (
        torch.ones(3),
        r"`weight` must be floats of shape \[2\], one for each row, got .*float32 \[3\]",
    ),
    (torch.ones(2, 1), r"`weight` must be floats .* got torch.float32 \[2, 1\]"),
    (torch.ones(2).long(), r"`weight` must be floats .* got torch.int64 \[2\]"),
    (torch.tensor([1.0, -1e-3]), "`weight` must be at least 0 in every row, got negative or NaN"),
    (torch.tensor([math.nan, 1.0]), "`weight` must be at least 0 in every row"),
]


@pytest.mark.parametrize(("weight", "expected"), BAD_WEIGHTS)
@pytest.mark.unhooked
def test_bad_weights(weight, expected):
    with pytest.raises(ValueError, match=expected):
        cv.latent_loss(torch.zeros(2, 4), torch.zeros(2, 4), weight=weight)
    with cv.check_values(False):
        cv.latent_loss(torch.zeros(2, 4), torch.zeros(2, 4), weight=torch.tensor([1.0, -1.0]))


@pytest.mark.unhooked
def test_distances_broadcast_nothing():
    expected = (
        r"`prediction` and `target` must have equal shapes, got \[2, 1, 4\] and \[2, 4\]; drop"
    )
    with pytest.raises(ValueError, match=expected):
        cv.latent_loss(torch.zeros(2, 1, 4), torch.zeros(2, 4))


@pytest.mark.unhooked
def test_unknown_distances():
    with pytest.raises(ValueError, match="`distance` is 'cosin'; did you mean 'cosine'"):
        cv.latent_loss(torch.zeros(2, 4), torch.zeros(2, 4), distance="cosin")


@pytest.mark.parametrize("distance", ["cosine", "normalized_mse"])
def test_nats_of_a_direction_are_refused(distance):
    with pytest.raises(ValueError, match=f"reduction='nats' .* distance='{distance}' is not: use"):
        cv.latent_loss(torch.ones(2, 4), torch.ones(2, 4), distance=distance, reduction="nats")


# --- min-SNR ----------------------------------------------------------------------------------


def table(snr, gamma):
    cut = min(snr, gamma)
    return {"x0": cut, "epsilon": cut / snr, "v": cut / (snr + 1)}


@pytest.mark.parametrize("space", PREDICTIONS)
@pytest.mark.parametrize("gamma", [None, 1, 5.0, 20.0])
def test_min_snr_weights(space, gamma):
    time = torch.tensor([0.01, 0.1, 0.2, 0.3, 0.5, 0.9, 0.99]).double()
    process = cv.LatentProcess("continuous_cosine", prediction="x0" if space == "v" else "v")
    snr = 1 / np.tan(np.pi / 2 * array(time)) ** 2
    options = {} if gamma is None else {"gamma": gamma}
    expected = [table(s, gamma or 5.0)[space] for s in snr]
    got = min_snr_weight(process, time, space=space, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    own = cv.LatentProcess("continuous_cosine", prediction=space)
    assert torch.equal(min_snr_weight(own, time, **options), got)


def test_min_snr_weights_at_the_ends():
    ends = torch.tensor([0.0, 1.0])
    expected = {"x0": [5.0, 0.0], "epsilon": [0.0, 1.0], "v": [0.0, 0.0]}
    for space, values in expected.items():
        got = min_snr_weight(cv.LatentProcess("continuous_cosine"), ends, space=space)
        assert got.tolist() == values


@quick
@given(st.floats(0.05, 0.95), seeds)
def test_the_weighted_loss_is_the_same_in_each_space(t, seed):
    process = cv.LatentProcess("cosine")
    time = torch.full((3,), t, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    z, noise, wrong = torch.randn(3, 3, 4, generator=generator).double()
    z_t, scales = process.noised(z, noise, time), process.alpha_sigma(time)
    losses = []
    for space in PREDICTIONS:
        prediction = cv.convert(wrong, z_t, *scales, source="x0", target=space)
        target = process.target(z, noise, time, space=space)
        weight = min_snr_weight(process, time, space=space)
        losses.append(cv.latent_loss(prediction, target, weight=weight, reduction="nats"))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


@pytest.mark.unhooked
def test_bad_min_snr():
    time = torch.ones(1)
    with pytest.raises(ValueError, match="`gamma` must be above 0"):
        min_snr_weight(cv.LatentProcess(), time, gamma=0.0)
    with pytest.raises(ValueError, match="`space` is 'epsilo'; did you mean 'epsilon'"):
        min_snr_weight(cv.LatentProcess(), time, space="epsilo")


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
        assert cv.latent_loss(torch.ones(1, 1), torch.zeros(1, 1), count=zero) == 1


@pytest.mark.parametrize("count", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_a_count_below_one_is_a_denominator_too(count):
    """The rows of all ranks over their number: one row on one of two ranks is half a row."""
    logits, tokens = torch.zeros(1, 1, 4), torch.tensor([[1]])
    text = cv.text_loss(logits, tokens, torch.ones(1, 1), count=count)
    assert float(text) == pytest.approx(2 * math.log(4))
    latent = cv.latent_loss(torch.ones(1, 1), torch.zeros(1, 1), count=count)
    assert float(latent) == 2.0


def test_no_id_of_a_large_vocabulary_is_taken_for_padding():
    """`F.cross_entropy` marks what it ignores by an id; a real one must never be it."""
    tokens = torch.arange(256)[None]
    losses = cv.text_loss(torch.zeros(1, 256, 256), tokens, torch.ones(1, 256), reduction="none")
    torch.testing.assert_close(losses, torch.full((1, 256), math.log(256)))


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


def t2l_loss(spy, process, batch=None, **options):
    return cv.t2l_loss(
        spy, *(batch or pairs()), text_process=toy()[1], latent_process=process, **options
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("space", PREDICTIONS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("min_snr", [None, 2.0])
def test_t2l_loss_in_every_space(prediction, space, distance, min_snr):
    spy, _, process = toy(prediction)
    _, z, _ = pairs()
    noise, time = torch.randn(3, 4).double(), torch.tensor([0.2, 0.5, 0.8]).double()
    options = {"distance": distance, "min_snr": min_snr, "space": space}
    got = t2l_loss(spy, process, time=time, noise=noise, **options)
    (call,) = spy.calls
    said = spy.denoiser.denoise(**call).latent_prediction
    alpha, sigma = process.alpha_sigma(time)
    said = oracles.convert(said, call["latents"], alpha, sigma, prediction, space)
    a, s = alpha[:, None], sigma[:, None]
    target = {"epsilon": noise, "x0": z, "v": a * noise - s * z}[space]
    each = DISTANCES[distance](torch.from_numpy(said), target)
    if min_snr is not None:
        snr = array(alpha / sigma) ** 2
        weight = np.array([table(x, min_snr)[space] for x in snr])
        each = each * weight.reshape(-1, *[1] * (each.ndim - 1))
    close(got, each.mean())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_t2l_loss_weighted_by_min_snr_is_one_loss(prediction):
    spy, _, process = toy(prediction)
    options = {"time": 0.4, "noise": torch.randn(3, 4).double(), "min_snr": 5.0}
    x0, epsilon, v, own = (
        t2l_loss(spy, process, space=space, **options) for space in ("x0", "epsilon", "v", None)
    )
    torch.testing.assert_close(x0, epsilon, rtol=1e-5, atol=0)
    torch.testing.assert_close(x0, v, rtol=1e-5, atol=0)
    torch.testing.assert_close(x0, own, rtol=1e-5, atol=0)


@pytest.mark.parametrize("space", PREDICTIONS)
def test_t2l_gradient_in_every_space(space):
    """The gradient is `1/S`-fold, and so on, of that in the own space: errors scale."""
    spy, _, process = toy("v")
    parameters = list(spy.module.latent_head.parameters())
    options = {"time": 0.6, "noise": torch.randn(3, 4).double()}
    own = gradient(t2l_loss(spy, process, **options), *parameters)
    snr = float(process.snr(torch.tensor([0.6])))
    factor = {"x0": 1 / (1 + snr), "epsilon": snr / (1 + snr), "v": 1.0}[space]
    got = gradient(t2l_loss(spy, process, space=space, **options), *parameters)
    for value, expected in zip(got, own, strict=True):
        torch.testing.assert_close(value, factor * expected, rtol=1e-5, atol=1e-12)


def test_t2l_loss_draws_times_from_a_policy():
    spy, _, process = toy()
    policy = TimePolicy("logit_normal", high=anneal(0.4, 0.9, steps=10), mean=1.0)
    for step in (0, 10):
        seed = torch.Generator().manual_seed(0)
        t2l_loss(spy, process, pairs(rows=8), time=policy, step=step, generator=seed)
        expected = policy(8, step=step, generator=torch.Generator().manual_seed(0))
        assert torch.equal(spy.calls.pop()["latent_time"], expected)
    t2l_loss(spy, process, time=TimePolicy(high=policy.high))
    assert spy.calls.pop()["latent_time"].tolist() == [pytest.approx(0.4)] * 3  # step 0
    first = t2l_loss(spy, process, time=None, generator=torch.Generator().manual_seed(0))
    again = t2l_loss(
        spy, process, time=TimePolicy("uniform"), generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(first, again)


@pytest.mark.parametrize("distance", DISTANCES)
def test_t2l_loss_on_the_meta_device(distance):
    denoiser, text, process = toy_denoiser()
    denoiser.module.to("meta")
    tokens, z, mask = (x.to("meta") for x in pairs())
    options = {"time": None, "space": "x0", "min_snr": 5.0, "distance": distance}
    options |= {"text_process": text, "latent_process": process}
    assert cv.t2l_loss(denoiser, tokens, z.float(), mask, **options).is_meta


@pytest.mark.parametrize(
    ("prediction", "space", "time", "high"),
    [
        ("epsilon", "x0", 1.0, True),
        ("epsilon", "v", torch.tensor([0.1, 0.2, 0.95]), True),
        ("epsilon", "x0", None, True),
        ("epsilon", "v", TimePolicy("logit_normal"), True),
        ("epsilon", "x0", TimePolicy("uniform", high=lambda step: 0.95), True),
        ("x0", "epsilon", 0.001, False),
        ("x0", "v", None, False),
        ("x0", "v", TimePolicy("logit_normal", low=0.001, high=0.9), False),
        ("x0", "epsilon", torch.tensor([0.001, 0.5, 0.95]), False),
    ],
)
def test_t2l_loss_refuses_spaces_before_any_pass_or_draw(prediction, space, time, high):
    spy, _, process = toy(prediction)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    expected = "predict `v` or `x0`" if high else "compute the loss in the space of the prediction"
    refused = pytest.raises(ValueError, match=rf"above max_gain = 10.*{expected}")
    with cv.check_values(None if isinstance(time, torch.Tensor) else False), refused:
        t2l_loss(spy, process, time=time, space=space, generator=generator)
    assert not spy.calls and torch.equal(generator.get_state(), before)
    t2l_loss(spy, process, time=time)
    inside = TimePolicy("uniform", low=0.1, high=0.9)
    t2l_loss(spy, process, time=inside, space=space)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"distance": "mes"}, "`distance` is 'mes'; did you mean 'mse'"),
        ({"space": "x_0"}, "`space` is 'x_0'; did you mean 'x0'"),
        ({"min_snr": 0.0}, "`min_snr` must be above 0"),
        ({"min_snr": -1.0}, "`min_snr` must be a finite number"),
    ],
)
@pytest.mark.unhooked
def test_t2l_options_are_refused_before_any_pass(options, expected):
    spy, _, process = toy()
    with pytest.raises(ValueError, match=expected):
        t2l_loss(spy, process, **options)
    assert not spy.calls


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
    tokens, z, mask = pairs(rows=160)
    blind, seed = cv.as_denoiser(Blind()), torch.Generator().manual_seed(0)
    full = unconditional(blind, text, process, (tokens, z, mask), text_time=1.0).text.item()
    logits = blind.module.logits[: tokens.shape[1]].expand(160, -1, -1)
    assert full == pytest.approx(oracles.text_loss(logits, tokens, mask), rel=1e-6)
    with torch.no_grad():
        draws = [
            unconditional(blind, text, process, (tokens, z, mask), generator=seed).text.item()
            for _ in range(150)
        ]
    assert_near_mean(draws, full)
    assert np.std(draws) / math.sqrt(len(draws)) < 0.02 * full  # or the test could not fail


def test_a_rate_of_zero_masks_nothing_and_costs_nothing():
    spy, text, process = toy()
    losses = unconditional(spy, text, process, pairs(), text_time=0.0)
    assert losses.text.item() == 0
    tiny = unconditional(spy, text, process, pairs(), text_time=1e-30)
    assert math.isfinite(tiny.text.item())


@pytest.mark.parametrize("reduction", ["mean", "sum", "nats"])
def test_unconditional_reductions(reduction):
    spy, text, process = toy()
    tokens, z, mask = pairs(rows=4)
    has_text = torch.tensor([True, True, False, True])
    has_latent = torch.tensor([True, False, False, True])
    rate, noise = torch.tensor([0.3, 0.9, 1.0, 0.5]).double(), torch.randn(4, 4).double()
    options = {"text_time": rate, "latent_time": 0.5, "noise": noise, "reduction": reduction}
    options |= {"has_text": has_text, "has_latent": has_latent}
    draw = {"generator": torch.Generator().manual_seed(0)}
    got = unconditional(spy, text, process, (tokens, z, mask), **options, **draw)
    out = spy.denoiser.denoise(**spy.calls[0])
    kept = mask & has_text[:, None]
    nll = oracles.token_nll(out.logits, tokens, (spy.calls[0]["tokens"] == 2) & kept)
    total = (nll / array(rate)[:, None]).sum()
    square = oracles.latent_loss(
        out.latent_prediction, process.target(z, noise, torch.full((4,), 0.5).double()), "none"
    )[array(has_latent) > 0]
    texts = {"mean": int(kept.sum()), "sum": 1, "nats": 3}[reduction]
    rows = {"mean": 8, "sum": 1, "nats": 4}[reduction]  # nats: half the square, over two rows
    close(got.text, total / texts)
    close(got.latent, square.sum() / rows, 1e-6)
    if reduction == "nats":
        counts = {"text_count": 6.0, "latent_count": 4.0}
        draw = {"generator": torch.Generator().manual_seed(0)}
        halved = unconditional(spy, text, process, (tokens, z, mask), **options, **draw, **counts)
        torch.testing.assert_close(halved.text, got.text / 2)
        torch.testing.assert_close(halved.latent, got.latent / 2)


@pytest.mark.unhooked
def test_unconditional_loss_has_no_reduction_none():
    spy, text, process = toy()
    with pytest.raises(ValueError, match="`reduction` is 'none'; known are 'mean', 'nats', 'sum'"):
        unconditional(spy, text, process, pairs(), reduction="none")
    assert not spy.calls


def test_a_text_that_is_left_out_trains_the_latent_of_its_row_without_it():
    """The state a learned prior asks for: a latent beside a fully masked text."""
    spy, text, process = toy()
    tokens, z, mask = pairs(rows=4)
    null = torch.tensor([False, True, True, False])
    options = {"text_time": 0.5, "latent_time": 0.5, "noise": torch.randn(4, 4).double()}
    losses = unconditional(spy, text, process, (tokens, z, mask), has_text=~null, **options)
    (call,) = spy.calls
    assert torch.equal(call["tokens"][null], torch.where(mask, 2, 0)[null])
    assert call["text_time"].tolist() == [0.5, 1.0, 1.0, 0.5]
    out = spy.denoiser.denoise(**call)
    kept = mask & ~null[:, None]  # the denominator counts the other rows alone
    masked = (call["tokens"] == 2) & kept
    close(losses.text, oracles.masked_bound(out.logits, tokens, masked, [0.5] * 4, kept), 1e-6)
    target = process.target(z, options["noise"], call["latent_time"])
    close(losses.latent, oracles.latent_loss(out.latent_prediction, target), 1e-6)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- padding that is taught, and texts of which a part is shown ---------------------------------


@pytest.mark.parametrize(
    ("taught", "counted"), [("none", [3, 2]), ("first", [4, 3]), ("all", [5, 5])]
)
def test_taught_padding_counts_in_every_decoder_loss(taught, counted):
    denoiser, _, process = toy_denoiser(seed=0)
    text = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=1, taught_padding=taught)
    mask = torch.arange(5) < torch.tensor([[3], [2]])
    tokens, z = torch.tensor([[3, 4, 5, 6, 6], [4, 4, 0, 0, 0]]), torch.randn(2, 4)
    logits = cv.l2t(denoiser, z, mask, text_process=text)
    nll = -logits.log_softmax(-1)
    expected = sum(
        nll[row, i, tokens[row, i] if mask[row, i] else 1]
        for row in range(2)
        for i in range(counted[row])
    ) / sum(counted)
    processes = {"text_process": text, "latent_process": process}
    losses = [
        cv.l2t_loss(denoiser, tokens, z, mask, text_process=text),
        cv.cycle_text_loss(denoiser, tokens, mask, z_hat=z, **processes),
    ]
    terms = [cv.Text(time=1.0), cv.Latent(), cv.CycleLatent(bridge="argmax", pairs=True)]
    objective = cv.CycleObjective(text, process, terms)
    batch = cv.Batch(tokens, mask, z)
    losses.append(objective(denoiser, batch, step=0).metrics["text_loss"])
    for loss in losses:
        torch.testing.assert_close(loss, expected)
    assert objective.counts(batch)["text_loss"] == sum(counted)
    given = {"text_time": 1.0, "noise": z, "latent_time": 0.5}
    joint = cv.joint(denoiser, tokens, z, mask, **processes, **given)
    both = cv.unconditional_loss(denoiser, tokens, z, mask, **processes, **given)
    targets, kept = text.targets(tokens, mask)
    torch.testing.assert_close(both.text, cv.text_loss(joint.logits, targets, kept))


@pytest.mark.parametrize("text_time", [0.3, cv.TimePolicy("uniform", low=0.2, high=0.9)])
def test_the_base_decoder_loss_of_texts_of_which_a_part_is_shown(text_time):
    denoiser, text, process = toy_denoiser(seed=0)
    tokens, mask, z = toy_batch(rows=6)[:3]
    loss = cv.l2t_loss(
        denoiser, tokens, z, mask, text_process=text, text_time=text_time, generator=seeded(3)
    )
    generator = seeded(3)
    rate = text_time(6, generator=generator) if callable(text_time) else torch.full((6,), text_time)
    noisy, masked = text.mask(tokens, mask, rate, generator=generator)
    zero = torch.zeros(6)
    logits = denoiser.denoise(
        noisy, z, text_time=rate, latent_time=zero, attention_mask=mask, need="logits"
    ).logits
    expected = F.cross_entropy(logits[masked], tokens[masked])
    torch.testing.assert_close(loss, expected)
    cycle = cv.CycleLatent(bridge="argmax", pairs=True)
    objective = cv.CycleObjective(text, process, [cv.Text(time=text_time), cycle])
    assert objective.passes(0) == 3  # a part of the text must not become a bridge
    assert replace(objective, terms=[cv.Text(time=text_time)]).passes(0) == 1
    output = objective(denoiser, cv.Batch(tokens, mask, z), step=0, generator=seeded(3))
    torch.testing.assert_close(output.metrics["text_loss"], expected.detach())
    count = objective.counts(cv.Batch(tokens, mask, z))["text_loss"]
    average = text_time.average() if isinstance(text_time, cv.TimePolicy) else text_time
    assert count.item() == pytest.approx(average * mask.sum().item())
    moving = cv.TimePolicy("uniform", high=cv.anneal(0.5, 0.9, steps=10))
    objective = replace(objective, terms=[cv.Text(time=moving), cycle])
    assert "text_loss" not in objective.counts(cv.Batch(tokens, mask, z))


# --- cross-entropy in chunks ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0, 1, 6, 11, 12])
def test_rows_that_do_not_count_are_left_out(monkeypatch, kept, dtype):
    monkeypatch.setattr(cross_entropy, "chunk_of", lambda logits: 5)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 50, generator=generator).to(dtype)
    tokens = torch.randint(0, 50, (2, 6), generator=generator)
    mask = (torch.randperm(12, generator=generator) < kept).view(2, 6)
    logits[~mask] = torch.nan
    weight = torch.randn(2, 6, generator=generator)
    found = []
    for counted in (cross_entropy._counted, lambda mask: (None, mask)):
        monkeypatch.setattr(cross_entropy, "_counted", counted)
        x = logits.clone().requires_grad_()
        loss = (cross_entropy.token_nll(x, tokens, mask) * weight).sum()
        found.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    torch.testing.assert_close(*found)
    assert found[0][1].isfinite().all()


def test_what_is_kept_is_of_the_rows_that_count():
    logits = torch.zeros(4, 100, 1000, requires_grad=True)
    mask = torch.arange(100).expand(4, 100) < 25
    with SavedBytes() as saved:
        loss = cv.text_loss(logits * 1, torch.zeros(4, 100, dtype=torch.long), mask)
        assert saved.live < 0.27 * 4 * logits.numel()
    del loss


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_chunks_do_not_show(monkeypatch, chunk, dtype, tolerance):
    monkeypatch.setattr(cross_entropy, "chunk_of", lambda logits: chunk)
    logits = (5 * torch.randn(3, 4, 7, generator=seeded(0))).to(dtype)
    mask = torch.arange(4) < torch.tensor([[4], [2], [0]])
    logits[~mask] = torch.nan
    tokens = torch.randint(7, (3, 4), generator=seeded(1))
    exact = logits.double().requires_grad_()
    logits.requires_grad_()
    expected = F.cross_entropy(exact[mask], tokens[mask])
    loss = cv.text_loss(logits, tokens, mask)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    (found,), (gradient,) = (
        torch.autograd.grad(x, y) for x, y in ((loss, logits), (expected, exact))
    )
    assert found.dtype == dtype and not found[~mask].any()
    torch.testing.assert_close(
        found.double(), gradient.nan_to_num(), rtol=tolerance, atol=tolerance
    )


def test_cross_entropy_keeps_no_copy_of_the_logits():
    logits = torch.randn(16, 64, 8192, dtype=torch.bfloat16, requires_grad=True)
    tokens, mask = torch.zeros(16, 64, dtype=torch.long), torch.ones(16, 64, dtype=torch.bool)
    size = logits.numel() * 2
    with PeakBytes() as held:
        loss = cv.text_loss(logits, tokens, mask)
        assert held.live < 0.01 * size and held.peak < 0.35 * size
        loss.backward()
    assert held.peak < 1.6 * size  # the gradient, and one chunk in fp32


def test_the_cap_of_text_times_moves_with_the_step():
    denoiser, text_process, _ = toy_denoiser(seed=0)
    tokens, mask, z = toy_batch(rows=64)[:3]
    policy = cv.TimePolicy("full", high=cv.anneal(0.4, 0.9, steps=10))

    def loss(time, step=0):
        return cv.l2t_loss(
            denoiser,
            tokens,
            z,
            mask,
            text_process=text_process,
            text_time=time,
            step=step,
            generator=torch.Generator().manual_seed(0),
        )

    assert loss(policy, step=0) == loss(0.4) != loss(policy, step=10) == loss(0.9)
