import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cyclevae as cv
import oracles
from cyclevae.processes.latent import direction, noise_latents
from strategies import latents, masks, quick, seeds

PREDICTIONS = ("epsilon", "x0", "v")
PAIRS = list(itertools.permutations(PREDICTIONS, 2))
TEXT = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schedule_is_the_hosts(schedule, dtype):
    time = torch.cat([torch.linspace(0, 1, 3001), torch.arange(1000) / 999]).clamp(0, 1)
    alpha, sigma = cv.LatentProcess(schedule).alpha_sigma(time.to(dtype))
    index = oracles.host_index(time.numpy()) if dtype == torch.float32 else None
    if index is None:
        index = np.floor(999 * time.double().numpy()).astype(int)
    alpha_bar = oracles.host_alpha_bar(schedule)[index].astype(float)
    assert alpha.dtype == sigma.dtype == dtype
    np.testing.assert_allclose(oracles.array(alpha) ** 2, alpha_bar, rtol=1e-3)
    np.testing.assert_allclose(oracles.array(sigma) ** 2, 1 - alpha_bar, rtol=1e-3)


def test_gain_of_the_hosts_cosine():
    table = {0.5: 1.01, 0.9: 6.37, 0.95: 12.8, 0.98: 32.1, 0.99: 64.2, 0.999: 642, 1.0: 6.42e4}
    gain = cv.LatentProcess("cosine", "epsilon").gain(torch.tensor(list(table)))
    np.testing.assert_allclose(gain, list(table.values()), rtol=5e-3)


@quick
@given(st.floats(0, 1))
def test_continuous_cosine(t):
    time = torch.tensor([t], dtype=torch.float64)
    alpha, sigma = cv.LatentProcess("continuous_cosine").alpha_sigma(time)
    assert float(alpha) == pytest.approx(math.cos(math.pi * t / 2), abs=1e-15)
    assert float(alpha**2 + sigma**2) == pytest.approx(1, abs=1e-15)


def test_continuous_cosine_is_exact_at_its_ends():
    ends = torch.tensor([0.0, 1.0])
    alpha, sigma = cv.LatentProcess("continuous_cosine").alpha_sigma(ends)
    assert (alpha.tolist(), sigma.tolist()) == ([1.0, 0.0], [0.0, 1.0])


def test_a_schedule_of_ones_own():
    process = cv.LatentProcess(lambda t: (1 - t, t), prediction="epsilon")
    time = torch.tensor([0.25, 1.0])
    assert process.gain(time).tolist() == [pytest.approx(1 / 3), math.inf]
    noised = process.noised(torch.ones(2, 3), torch.full((2, 3), 5.0), time)
    assert noised.tolist() == [[2.0] * 3, [5.0] * 3]


@pytest.mark.parametrize("shape", [(), (1, 0, 3), (0,), ("4",)])
@pytest.mark.unhooked
def test_shapes_of_a_latent_are_checked(shape):
    with pytest.raises(ValueError, match=r"such as \(d,\), \(n, d\) or \(c, h, w\)"):
        cv.LatentProcess(shape=shape)


def test_half_precision_times_are_read_in_fp32():
    alpha, _ = cv.LatentProcess().alpha_sigma(torch.tensor([0.5], dtype=torch.bfloat16))
    assert alpha.dtype == torch.float32


# --- conversions ------------------------------------------------------------------------------


def noised_at(time, schedule="cosine", shape=(3, 2)):
    """A clean latent and its noise, noised: every prediction of it is known."""
    time = torch.full((4,), time, dtype=torch.float64)
    alpha, sigma = cv.LatentProcess(schedule).alpha_sigma(time)
    x0, epsilon = randn(4, *shape), randn(4, *shape, seed=1)
    a, s = (x.view(-1, *[1] * len(shape)) for x in (alpha, sigma))
    known = {"x0": x0, "epsilon": epsilon, "v": a * epsilon - s * x0}
    return known, a * x0 + s * epsilon, alpha, sigma


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("time", [0.0, 0.3, 0.9, 0.98])
def test_conversion(source, target, time):
    known, z_t, alpha, sigma = noised_at(time)
    there = cv.convert(known[source], z_t, alpha, sigma, source=source, target=target)
    torch.testing.assert_close(there, known[target], rtol=1e-12, atol=1e-12)
    back = cv.convert(there, z_t, alpha, sigma, source=target, target=source)
    torch.testing.assert_close(back, known[source], rtol=1e-12, atol=1e-12)


@quick
@given(latents(scale=1.0), st.sampled_from(PAIRS), st.floats(0.05, 0.98), seeds)
def test_conversion_solves_the_linear_system(z_t, pair, t, seed):
    value = randn(*z_t.shape, seed=seed)
    time = torch.full((len(z_t),), t, dtype=torch.float64)
    alpha, sigma = cv.LatentProcess("continuous_cosine").alpha_sigma(time)
    source, target = pair
    got = cv.convert(value, z_t, alpha, sigma, source=source, target=target)
    expected = oracles.convert(value, z_t, alpha, sigma, source, target)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)


def test_conversion_to_itself_is_the_identity():
    value, alpha = randn(2, 3), torch.ones(2)
    for name in PREDICTIONS:
        assert cv.convert(value, value, alpha, alpha, source=name, target=name) is value


@pytest.mark.parametrize("time", [0.2, 0.9])
def test_errors_of_the_three_predictions(time):
    """`||d eps||^2 = S ||dz||^2` and `||dv||^2 = (1 + S) ||dz||^2`."""
    known, z_t, alpha, sigma = noised_at(time)
    wrong = known["x0"] + randn(4, 3, 2, seed=2)
    error = {
        name: (cv.convert(wrong, z_t, alpha, sigma, source="x0", target=name) - known[name])
        .square()
        .sum()
        for name in ("epsilon", "v")
    }
    on_x0, snr = (wrong - known["x0"]).square().sum(), (alpha / sigma)[0].square()
    torch.testing.assert_close(error["epsilon"], snr * on_x0)
    torch.testing.assert_close(error["v"], (1 + snr) * on_x0)
    process = cv.LatentProcess("cosine")
    torch.testing.assert_close(process.snr(torch.tensor([time]).double())[0], snr)


def test_signal_to_noise_ratio():
    alpha_bar = oracles.host_alpha_bar("cosine")[oracles.host_index([0.1, 0.5, 0.9])].astype(float)
    time = torch.tensor([0.1, 0.5, 0.9])
    snr = cv.LatentProcess("cosine").snr(time)
    np.testing.assert_allclose(snr, alpha_bar / (1 - alpha_bar), rtol=1e-3)
    ends = cv.LatentProcess("continuous_cosine").snr(torch.tensor([0.0, 0.5, 1.0]))
    assert ends.tolist() == [math.inf, pytest.approx(1.0), 0.0]
    gain = cv.LatentProcess("cosine").gain(time, source="epsilon")
    torch.testing.assert_close(snr, gain**-2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("space", PREDICTIONS)
def test_a_prediction_in_another_space(prediction, space):
    process = cv.LatentProcess("sigmoid", prediction=prediction)
    known, z_t, *_ = noised_at(0.4, "sigmoid")
    time = torch.full((4,), 0.4, dtype=torch.float64)
    got = process.in_space(known[prediction], z_t, time, space=space)
    torch.testing.assert_close(got, known[space])
    target = process.target(known["x0"], known["epsilon"], time, space=space)
    torch.testing.assert_close(target, known[space])
    half = process.in_space(known[prediction].bfloat16(), z_t.bfloat16(), time, space=space)
    assert half.dtype == (torch.float32 if space == prediction else torch.float64)


def test_directions():
    z = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6e-9, 8e-9], [3e-30, 4e-30], [3e8, 4e8]])
    unit = direction(z)
    expected = [[0.6, 0.8], [0.0, 0.0], [0.6, 0.8], [3e-22, 4e-22], [0.6, 0.8]]
    torch.testing.assert_close(unit, torch.tensor(expected))
    assert direction(z.bfloat16()).dtype == direction(z.half()).dtype == torch.float32
    assert torch.equal(direction(z[None]), unit[None])


def test_a_vector_shorter_than_a_hundred_millionth_has_no_direction():
    z = torch.tensor([[0.0, 0.0], [3e-9, 4e-9], [0.9e-8, 0.9e-8], [3.0, 4.0]], dtype=torch.float64)
    z.requires_grad_()
    unit = direction(z)
    torch.testing.assert_close(unit[1], torch.tensor([0.3, 0.4]).double())  # times 1e8
    torch.testing.assert_close(unit.norm(dim=1)[2:], torch.ones(2).double())
    (slope,) = torch.autograd.grad(unit[:, 0].sum(), z)
    assert not slope[:2].any() and slope[2].abs().max() > 1e7
    torch.testing.assert_close(slope[3], torch.tensor([0.128, -0.096]).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-4, 1.0, 1e4])
def test_the_gradient_of_a_direction_is_finite_and_not_radial(dtype, scale):
    z = (randn(5, 3) * scale).to(dtype).requires_grad_()
    (got,) = torch.autograd.grad(direction(z)[:, 0].sum(), z)
    assert got.isfinite().all()
    length = z.detach().double().norm(dim=1)
    if scale in (0.0, 1e-30):
        assert not got.any()  # too short to have a direction
    elif dtype != torch.float16 or scale > 1e-3:
        radial = (got * z).double().sum(dim=1)
        assert (radial.abs() <= 4 * torch.finfo(dtype).eps).all() and got.any()
        assert (got.double().norm(dim=1) * length <= 1.01).all()


# --- DDIM -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "continuous_cosine"])
@pytest.mark.parametrize("shape", [(4,), (3, 2)])
def test_a_ddim_step_keeps_latent_and_noise(schedule, shape):
    process, z, epsilon = cv.LatentProcess(schedule), randn(3, *shape), randn(3, *shape, seed=1)
    time = torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)
    to = torch.tensor([0.4, 0.0, 0.1], dtype=torch.float64)
    got = process.ddim(z, process.noised(z, epsilon, time), time, to)
    torch.testing.assert_close(got, process.noised(z, epsilon, to))


def test_a_ddim_step_is_alpha_x0_plus_sigma_epsilon():
    process, x0, z_t = cv.LatentProcess(), randn(3, 4), randn(3, 4, seed=1)
    time, to = torch.tensor([1.0, 0.7, 0.2]).double(), torch.tensor([0.9, 0.3, 0.1]).double()
    got = process.ddim(x0, z_t, time, to)
    (a, s), (b, r) = process.alpha_sigma(time), process.alpha_sigma(to)
    for i in range(3):
        epsilon = (z_t[i] - a[i] * x0[i]) / s[i]
        torch.testing.assert_close(got[i], b[i] * x0[i] + r[i] * epsilon)
    half = process.ddim(x0.bfloat16(), z_t.bfloat16(), time, to)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), got, rtol=0.02, atol=0.02)


def test_a_ddim_step_without_noise_is_finite():
    process, zero = cv.LatentProcess("continuous_cosine"), torch.zeros(2)
    x0, z_t = randn(2, 4), randn(2, 4, seed=1)
    torch.testing.assert_close(process.ddim(x0, z_t, zero, zero), x0)


def test_v_at_full_noise_is_minus_the_latent():
    process = cv.LatentProcess("continuous_cosine", prediction="v")
    v, z_t, one = randn(3, 4), randn(3, 4, seed=1), torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(process.to_x0(v, z_t, one), -v, rtol=0, atol=0)


def test_a_ddim_step_cures_no_start_at_full_noise():
    """From 1 to .98 it multiplies an error of epsilon by the 2000 by which alpha grows."""
    process, (start, to) = cv.LatentProcess("cosine"), torch.tensor([[1.0], [0.98]]).double()
    epsilon, error, z_t = randn(1, 8), randn(1, 8, seed=1), randn(1, 8, seed=2)
    assert float(process.alpha_sigma(start)[0] ** 2) == pytest.approx(2.43e-10, rel=2e-3)

    def arrives(epsilon):
        clean = cv.convert(epsilon, z_t, *process.alpha_sigma(start), source="epsilon", target="x0")
        return process.ddim(clean, z_t, start, to)

    moved = arrives(epsilon + error) - arrives(epsilon)
    torch.testing.assert_close(moved / error, torch.full_like(error, -2000.0), rtol=2e-3, atol=0)


def test_the_copy_model_decodes_to_nothing():
    process = cv.LatentProcess("cosine", prediction="epsilon", max_gain=1e6)
    z_t = randn(3, 4)
    x0 = process.to_x0(z_t, z_t, torch.ones(3, dtype=torch.float64))
    assert 0 < x0.norm() < 1e-4 * z_t.norm()


def test_epsilon_is_converted_in_fp32_whatever_comes():
    """In bf16 a perfect epsilon decodes to an error of 15; in fp32 to one of 0.002."""
    process = cv.LatentProcess("cosine", prediction="epsilon", max_gain=1e6)
    x0, epsilon = randn(64, 64, dtype=torch.float32), randn(64, 64, seed=1, dtype=torch.float32)
    one = torch.ones(64)
    z_t = process.noised(x0, epsilon, one)
    assert (process.to_x0(epsilon, z_t, one) - x0).square().mean().sqrt() < 0.01
    bf16 = [x.bfloat16() for x in (epsilon, z_t)]
    alpha, sigma = process.alpha_sigma(one)
    got = cv.convert(*bf16, alpha, sigma, source="epsilon", target="x0")
    wide = cv.convert(*(x.float() for x in bf16), alpha, sigma, source="epsilon", target="x0")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wide, rtol=0, atol=0)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conversions_do_not_round_where_everything_is_bf16(source, target):
    inputs = *randn(2, 8, 4).bfloat16(), *torch.tensor([[0.6], [0.8]]).bfloat16().expand(2, 8)
    names = {"source": source, "target": target}
    got, wide = cv.convert(*inputs, **names), cv.convert(*(x.double() for x in inputs), **names)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bf16_is_computed_in_fp32_and_returned_in_bf16(prediction):
    process = cv.LatentProcess(prediction=prediction)
    value, z_t = (randn(3, 4, seed=i).bfloat16() for i in (0, 1))
    time = torch.tensor([0.1, 0.5, 0.9])
    x0, wide = process.to_x0(value, z_t, time), process.to_x0(value.float(), z_t.float(), time)
    assert x0.dtype == torch.bfloat16
    torch.testing.assert_close(x0, wide.bfloat16(), rtol=0, atol=0)
    noised = process.noised(value, z_t, time)
    assert noised.dtype == torch.bfloat16
    wide = process.noised(value.float(), z_t.float(), time).bfloat16()
    torch.testing.assert_close(noised, wide, rtol=0, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", [(4,), (3, 2)])
def test_target_and_noising(prediction, shape):
    process = cv.LatentProcess("sigmoid", prediction=prediction)
    known, z_t, *scales = noised_at(0.4, "sigmoid", shape)
    time = torch.full((4,), 0.4, dtype=torch.float64)
    torch.testing.assert_close(process.noised(known["x0"], known["epsilon"], time), z_t)
    torch.testing.assert_close(noise_latents(known["x0"], known["epsilon"], *scales), z_t)
    target = process.target(known["x0"], known["epsilon"], time)
    torch.testing.assert_close(target, known[prediction])
    torch.testing.assert_close(process.to_x0(target, z_t, time), known["x0"])


def test_each_row_has_its_own_time():
    process, z, noise = cv.LatentProcess("linear"), randn(3, 2, 2), randn(3, 2, 2, seed=1)
    time = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    whole = process.noised(z, noise, time)
    rows = [process.noised(z[i : i + 1], noise[i : i + 1], time[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(rows))


# --- ill-conditioned times --------------------------------------------------------------------


@pytest.mark.parametrize("time", [1.0, 0.95, torch.tensor([0.1, 0.95])])
def test_epsilon_above_max_gain_is_refused_with_its_cures(time):
    process = cv.LatentProcess("cosine", prediction="epsilon")
    with pytest.raises(ValueError) as caught:
        process.refuse_ill_conditioned(time)
    for part in (
        "an epsilon prediction at time",
        "above max_gain = 10",
        "predict `v` or `x0`",
        "capped time such as 0.9",
        "TimePolicy('uniform', high=0.9)",
        "a few DDIM steps, the last one differentiable",
        "LatentBridge(steps=4) with GradientPolicy('last')",
    ):
        assert part in str(caught.value)


def test_the_refusal_names_time_and_gain():
    process = cv.LatentProcess("cosine", prediction="epsilon")
    expected = re.escape("at time 1 has a gain of 6.418e+04")
    with pytest.raises(ValueError, match=expected):
        process.to_x0(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2))


def test_zero_terminal_snr_is_refused():
    process = cv.LatentProcess("continuous_cosine", prediction="epsilon", max_gain=1e30)
    with pytest.raises(ValueError, match="gain of inf"):
        process.refuse_ill_conditioned(1.0)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_v_and_x0_are_never_refused(prediction):
    for schedule in ("cosine", "linear", "sigmoid", "continuous_cosine"):
        process = cv.LatentProcess(schedule, prediction=prediction)
        process.refuse_ill_conditioned(1.0)
        x0 = process.to_x0(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2))
        assert torch.isfinite(x0).all()


@pytest.mark.parametrize("space", ["x0", "v"])
def test_epsilon_is_refused_in_every_other_space(space):
    process, time = cv.LatentProcess(prediction="epsilon"), torch.tensor([0.95, 0.1, 1.0, 0.3])
    with pytest.raises(ValueError, match=r"an epsilon prediction at time 1 has a gain of 6\.418"):
        process.refuse_ill_conditioned(time, space=space)
    with pytest.raises(ValueError, match="above max_gain"):
        process.in_space(torch.zeros(4, 2), torch.zeros(4, 2), time, space=space)
    process.refuse_ill_conditioned(time, space="epsilon")
    process.in_space(torch.zeros(4, 2), torch.zeros(4, 2), time, space="epsilon")


@pytest.mark.parametrize("space", ["epsilon", "v"])
def test_x0_is_refused_in_another_space_near_no_noise(space):
    process, time = cv.LatentProcess(prediction="x0"), torch.tensor([0.95, 0.01, 1.0, 0.3])
    alpha, sigma = process.alpha_sigma(time[1:2])
    gain = f"{float(alpha / sigma if space == 'epsilon' else 1 / sigma):.4g}"
    with pytest.raises(ValueError) as caught:
        process.refuse_ill_conditioned(time, space=space)
    for part in (
        f"an x0 prediction at time 0.01 has a gain of {gain}, above max_gain = 10: its error",
        f"in the space of '{space}'. Ways out: compute the loss in the space of the prediction",
        "TimePolicy('uniform', low=0.1)",
    ):
        assert part in str(caught.value)
    assert "DDIM" not in str(caught.value)
    process.refuse_ill_conditioned(0.1, space=space)
    process.refuse_ill_conditioned(0.0, space="x0")
    with pytest.raises(ValueError, match="gain of inf"):
        cv.LatentProcess("continuous_cosine", "x0").refuse_ill_conditioned(0.0, space=space)


def test_the_clean_latent_is_the_space_by_default():
    cv.LatentProcess("continuous_cosine", "x0").refuse_ill_conditioned(0.0)


@pytest.mark.unhooked
def test_shapes_are_equal_or_refused():
    process, time, wide, flat = (
        cv.LatentProcess(),
        torch.ones(2),
        torch.zeros(2, 1, 3),
        torch.ones(2, 3),
    )
    calls = {
        ("noise", "latents"): lambda: process.target(flat, wide, time),
        ("prediction", "z_t"): lambda: process.in_space(wide, flat, time, space="x0"),
        ("x0", "z_t"): lambda: process.ddim(wide, flat, time, time / 2),
    }
    for (first, second), call in calls.items():
        expected = rf"`{first}` and `{second}` must have equal shapes.*; drop the middle axis"
        with pytest.raises(ValueError, match=expected):
            call()


@pytest.mark.parametrize("space", PREDICTIONS)
@pytest.mark.parametrize("time", [0.0, 1.0])
def test_v_is_never_refused_in_any_space(space, time):
    cv.LatentProcess("continuous_cosine", "v").refuse_ill_conditioned(time, space=space)


def test_a_gain_of_exactly_max_gain_is_allowed():
    own = cv.LatentProcess(lambda t: (1 / (1 + t), t / (1 + t)), prediction="epsilon", max_gain=0.5)
    own.refuse_ill_conditioned(0.5)
    with pytest.raises(ValueError, match=r"gain of 0\.6"):
        own.refuse_ill_conditioned(0.6)


def test_max_gain_is_the_line():
    inside = cv.LatentProcess("cosine", prediction="epsilon")
    inside.refuse_ill_conditioned(0.9)
    inside.refuse_ill_conditioned(torch.zeros(0))
    cv.LatentProcess("cosine", prediction="epsilon", max_gain=1e5).refuse_ill_conditioned(1.0)
    tight = cv.LatentProcess("cosine", prediction="epsilon", max_gain=6.0)
    with pytest.raises(ValueError, match="above max_gain = 6:"):
        tight.refuse_ill_conditioned(0.9)


def test_without_value_checks_only_numbers_are_refused():
    process = cv.LatentProcess("cosine", prediction="epsilon")
    with cv.check_values(False):
        process.refuse_ill_conditioned(torch.ones(2))
        with pytest.raises(ValueError, match="max_gain"):
            process.refuse_ill_conditioned(1.0)


# --- text -------------------------------------------------------------------------------------


def test_masking_rate():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((5, 4000), 4)
    kept = torch.arange(4000).expand(5, -1) < 3600
    rate = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    _, masked = TEXT.mask(tokens, kept, rate, generator=generator)
    counts = masked.sum(dim=1).tolist()
    assert counts[0] == 0 and counts[-1] == 3600
    for count, r in zip(counts[1:-1], rate.tolist()[1:-1], strict=True):
        assert abs(count - 3600 * r) < 4 * math.sqrt(3600 * r * (1 - r))


@quick
@given(masks(), seeds)
def test_masking_touches_nothing_else(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 7, mask.shape, generator=generator)
    rate = torch.rand(len(mask), generator=generator)
    noised, masked = TEXT.mask(tokens, mask, rate, generator=generator)
    assert not (masked & ~mask).any()
    expected = torch.where(masked, 2, torch.where(mask, tokens, 0))
    assert torch.equal(noised, expected)
    assert torch.equal(TEXT.fully_masked(mask), torch.where(mask, 2, 0))
    assert torch.equal(TEXT.pad(tokens, mask), torch.where(mask, tokens, 0))


@pytest.mark.parametrize(
    ("taught", "expected"),
    [("none", [1, 0, 1, 0, 0]), ("first", [1, 0, 1, 1, 0]), ("all", [1, 0, 1, 1, 1])],
)
def test_padding_that_the_decoder_is_taught(taught, expected):
    text = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, taught_padding=taught)
    mask = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    words = torch.tensor([[3, 4, 5, 6, 3]] * 2)
    targets, counted = text.targets(words, mask)
    assert counted.tolist() == [[bool(x) for x in expected], [True] * 5]
    assert targets.tolist() == [[3, 0, 5, 0, 0], [3, 4, 5, 6, 3]]
    assert text.fully_masked(mask)[0].tolist() == [2 * x for x in expected]
    noised, masked = text.mask(words, mask, torch.ones(2))
    assert torch.equal(masked, counted) and torch.equal(noised, text.fully_masked(mask))


def test_masking_is_reproducible():
    tokens, kept, rate = torch.full((2, 50), 4), torch.ones(2, 50).bool(), torch.full((2,), 0.5)
    first, again, other = (
        TEXT.mask(tokens, kept, rate, generator=torch.Generator().manual_seed(s))[1]
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_padding_without_a_padding_id_is_masked():
    text = cv.TextProcess(mask_id=2, vocab_size=7)
    mask = torch.tensor([[True, False]])
    assert text.fully_masked(mask).tolist() == [[2, 2]]
    assert text.pad(torch.tensor([[4, 5]]), mask).tolist() == [[4, 2]]
    with pytest.raises(ValueError, match="'first' needs the `pad_id` that the decoder is to write"):
        cv.TextProcess(mask_id=2, vocab_size=7, taught_padding="first")


@pytest.mark.unhooked
def test_an_unknown_kind_of_taught_padding():
    with pytest.raises(ValueError, match="`taught_padding` is 'last'; known are"):
        cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, taught_padding="last")


FRAMED = cv.TextProcess(mask_id=2, vocab_size=9, pad_id=0, special_ids=(7,), start_id=3, end_id=4)


def test_frame():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    framed = FRAMED.frame(torch.full((5, 4), 5), mask.bool())
    expected = [[3, 5, 5, 4], [3, 5, 4, 0], [0, 0, 3, 4], [0, 4, 0, 0], [0, 0, 0, 0]]
    assert framed.tolist() == expected
    assert TEXT.frame(torch.full((5, 4), 5), mask.bool()).tolist() == (mask * 5).tolist()


def test_forbidden_ids():
    assert TEXT.forbidden_ids == (0, 2)
    assert FRAMED.forbidden_ids == (0, 2, 3, 4, 7)
    assert cv.TextProcess(mask_id=2, vocab_size=7).forbidden_ids == (2,)
    logits = torch.zeros(1, 2, 9)
    allowed = FRAMED.forbid(logits)
    assert (allowed == -math.inf)[0, 0].nonzero().flatten().tolist() == [0, 2, 3, 4, 7]
    assert not logits.any()  # a copy


class Tokenizer(SimpleNamespace):
    """As `transformers` names things; `before` and `behind` are what it adds to a text."""

    before, behind = (), ()

    def __len__(self):
        return 12

    def encode(self, text, add_special_tokens=True):
        return [*self.before, 9, *self.behind] if add_special_tokens else [9]


def test_from_tokenizer():
    bert = Tokenizer(
        mask_token_id=3,
        pad_token_id=0,
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=None,
        eos_token_id=None,
        all_special_ids=[4, 0, 1, 2, 3, 3],
        before=(1,),
        behind=(2,),
    )
    text = cv.TextProcess.from_tokenizer(bert)
    assert text == cv.TextProcess(
        mask_id=3, vocab_size=12, pad_id=0, special_ids=(0, 1, 2, 3, 4), start_id=1, end_id=2
    )
    assert text.forbidden_ids == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("adds", "frame"),
    [
        ({}, (None, None)),  # as GPT-2, which has an end and never adds it
        ({"before": (5,)}, (5, None)),  # as Llama
        ({"behind": (6,)}, (None, 6)),  # as T5
        ({"before": (0,), "behind": (6,)}, (0, 6)),  # 0 is an id, not a lack
    ],
)
def test_what_a_tokenizer_adds_is_asked_of_it(adds, frame):
    names = {"bos_token_id": 5, "eos_token_id": 6, "cls_token_id": 7, "sep_token_id": 8}
    text = cv.TextProcess.from_tokenizer(Tokenizer(mask_token_id=3, **names, **adds))
    assert (text.start_id, text.end_id, text.pad_id) == (*frame, None)
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 4]]), 12).float()
    if frame == (None, None):  # no word is lost to a token that texts do not carry
        mask = torch.ones(1, 3, dtype=torch.bool)
        assert cv.argmax_text(logits, mask, text_process=text).tolist() == [[1, 2, 4]]


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (
            Tokenizer(mask_token_id=3, before=(5, 6)),
            "makes \\[5, 6, 9\\] of a text that is \\[9\\]",
        ),
        (Tokenizer(mask_token_id=3, behind=(5, 6)), "one token in front"),
        (Tokenizer(mask_token_id=3, encode=None), "cannot be asked which tokens it adds"),
        (Tokenizer(mask_token_id=3, encode=lambda t, add_special_tokens: []), r"makes \[\] of"),
        (Tokenizer(mask_token_id=3, unk_token_id=3), "mask and the unknown token .* both 3"),
        (Tokenizer(mask_token_id=3, pad_token_id=3), "`pad_id` and `mask_id` are both 3"),
        (Tokenizer(mask_token_id=3, behind=(3,)), "`end_id` and `mask_id` are both 3"),
        (Tokenizer(mask_token_id=3, before=(3,)), "`start_id` and `mask_id` are both 3"),
    ],
)
def test_a_tokenizer_whose_frame_or_mask_cannot_be_used(tokenizer, words):
    with pytest.raises(ValueError, match=words):
        cv.TextProcess.from_tokenizer(tokenizer)


@pytest.mark.parametrize("tokenizer", [Tokenizer(), Tokenizer(mask_token_id=None)])
def test_from_tokenizer_without_a_mask_token(tokenizer):
    with pytest.raises(ValueError, match=r"\(Tokenizer\) has no mask token; add one.*\[MASK\]"):
        cv.TextProcess.from_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"mask_id": 7}, r"`mask_id` must lie in \[0, 7\), got 7"),
        ({"mask_id": -1}, "`mask_id` .* got -1"),
        ({"pad_id": 9}, "`pad_id` .* got 9"),
        ({"start_id": 7}, "`start_id` .* got 7"),
        ({"end_id": -2}, "`end_id` .* got -2"),
        ({"special_ids": (1, 8)}, r"`special_ids\[1\]` .* got 8"),
        ({"pad_id": 2}, "`pad_id` and `mask_id` are both 2.* or leave `pad_id` out"),
        ({"end_id": 2, "end": "predicted"}, "`end_id` and `mask_id` are both 2"),
        ({"mask_id": None}, "`mask_id` must be an integer id, got None"),
        ({"mask_id": "2"}, "`mask_id` must be an integer id, got '2'"),
        ({"start_id": 3.0}, "`start_id` must be an integer id, got 3.0"),
        ({"special_ids": (1, None)}, r"`special_ids\[1\]` must be an integer id, got None"),
        ({"vocab_size": 7.0}, "`vocab_size` must be an integer of at least 1, got 7.0"),
        ({"special_ids": tuple(range(7))}, "every id of the vocabulary is forbidden"),
    ],
)
@pytest.mark.unhooked
def test_ids_out_of_range(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        cv.TextProcess(**{"mask_id": 2, "vocab_size": 7, **arguments})
