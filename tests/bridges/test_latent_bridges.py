import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cyclevae as cv
import oracles_latents
from cyclevae.bridges.latent import LatentBridge, encode_text
from cyclevae.testing import assert_frozen, assert_learns, toy_batch, toy_denoiser
from oracles import Spy, array
from strategies import latents, quick

PREDICTIONS = ("epsilon", "x0", "v")
DETACH, LAST, FULL = (cv.GradientPolicy(bridge) for bridge in ("detach", "last", "full"))
TEXT = toy_denoiser()[1]
TOKENS, MASK = toy_batch(seed=1)[:2]
THRESHOLD = LatentBridge(threshold=0.3, quantile=0.8)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


NOISE = randn(3, 4, seed=7)


def toy(seed=0):
    denoiser, *_ = toy_denoiser(seed)
    denoiser.module.double()
    return Spy(denoiser)


def process_of(prediction, schedule="cosine", **options):
    return cv.LatentProcess(schedule, prediction=prediction, shape=(4,), **options)


def encode(spy, process, tokens=TOKENS, mask=MASK, **options):
    options = {"noise": NOISE, "policy": FULL, **options}
    return encode_text(spy, tokens, mask, text_process=TEXT, latent_process=process, **options)


def one_shot(spy, process, **options):
    options = {"start": "noise", "noise": NOISE, **options}
    encoded = cv.t2l(spy, TOKENS, MASK, text_process=TEXT, latent_process=process, **options)
    return encoded.z_hat(process)


def gradients(loss, spy):
    found = torch.autograd.grad(loss, list(spy.module.parameters()), allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


class Says:
    """A denoiser whose latent prediction is any function of what it sees and when."""

    def __init__(self, says):
        self.says = says

    def denoise(self, tokens, latents, *, latent_time, **state):
        return cv.Denoised(None, self.says(latents, latent_time))


# --- DDIM -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("per_row", [True, False])
def test_the_oracle_recovers_the_latent(prediction, steps, per_row):
    """The true noise of `z_t = alpha z + sigma eps`, whatever is shown: every step must keep it."""
    process, z, epsilon = process_of(prediction), randn(3, 4), randn(3, 4, seed=1)
    time = torch.tensor([0.9, 0.6, 0.3]).double() if per_row else 0.9
    start = time if per_row else torch.full((3,), 0.9)
    spy = Spy(Says(lambda z_t, t: process.target(z, epsilon, t)))
    got = encode(
        spy,
        process,
        time=time,
        noise=process.noised(z, epsilon, start),
        bridge=LatentBridge(steps=steps),
    )
    tight = {"rtol": 1e-10, "atol": 1e-10} if per_row else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got, z, **tight)
    assert len(spy.calls) == steps
    for k, call in enumerate(spy.calls):
        torch.testing.assert_close(call["latent_time"], start * (1 - k / steps))
        seen = process.noised(z, epsilon, call["latent_time"])
        torch.testing.assert_close(call["latents"], seen, **tight)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_oracle_recovers_the_latent_from_full_noise(prediction, steps):
    process, z = process_of(prediction, "continuous_cosine"), randn(3, 4)
    spy = Spy(Says(lambda z_t, t: process.target(z, NOISE, t)))
    got = encode(spy, process, bridge=LatentBridge(steps=steps))
    torch.testing.assert_close(got, z, rtol=1e-6, atol=1e-6)
    for call in spy.calls:
        seen = process.noised(z, NOISE, call["latent_time"])
        torch.testing.assert_close(call["latents"], seen, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("bridge", [LatentBridge(), THRESHOLD], ids=["plain", "threshold"])
def test_ddim_against_a_loop(prediction, steps, bridge):
    """On a network; with thresholding, of every step's clean latent, as in Imagen."""
    spy, process = toy(), process_of(prediction)
    time = torch.tensor([0.9, 0.7, 0.4]).double()
    got = encode(spy, process, time=time, bridge=replace(bridge, steps=steps))
    assert len(spy.calls) == steps
    scales = []
    for k in range(steps):
        scales.append([array(x)[:, None] for x in process.alpha_sigma(time * (1 - k / steps))])

    def predict(k, z_t):
        call = {**spy.calls[k], "latents": torch.from_numpy(z_t)}
        return array(spy.denoiser.denoise(**call).latent_prediction)

    def guard(z):
        if bridge.threshold is None:
            return z
        return oracles_latents.threshold(torch.from_numpy(z), bridge.threshold, bridge.quantile)

    expected, states = oracles_latents.ddim(predict, array(NOISE), scales, prediction, guard)
    np.testing.assert_allclose(array(got), expected, rtol=1e-9, atol=1e-12)
    for call, state in zip(spy.calls, states, strict=True):
        np.testing.assert_allclose(array(call["latents"]), state, rtol=1e-9, atol=1e-12)
        assert call["need"] == "latents" and not call["text_time"].any()
        assert torch.equal(call["tokens"], torch.where(MASK, TOKENS, 0))


def test_many_steps_draw_a_sample_where_one_gives_the_mean():
    """Gaussian latents, optimal predictions: one step is `E z`, and many transport the noise."""
    mean, deviation = torch.tensor([1.0, -2.0, 0.0, 3.0]).double(), 0.5
    process, noise = process_of("v", "continuous_cosine"), randn(64, 4)
    tokens, mask = torch.full((64, 2), 3), torch.ones(64, 2).bool()

    def optimal(z_t, t):
        alpha, sigma = (x[:, None] for x in process.alpha_sigma(t))
        pull = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        z = mean + pull * (z_t - alpha * mean)
        epsilon = (z_t - alpha * z) / sigma.clamp(min=1e-12)
        return alpha * epsilon - sigma * z

    def run(steps):
        bridge = LatentBridge(steps=steps)
        return encode(Says(optimal), process, tokens, mask, noise=noise, bridge=bridge)

    torch.testing.assert_close(run(1), mean.expand(64, 4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(400), mean + deviation * noise, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("time", [0.9, 0.5, torch.tensor([0.9, 0.1, 0.5])])
def test_one_step_is_one_pass_bit_for_bit(prediction, time):
    spy, process = toy(), process_of(prediction)
    got, expected = encode(spy, process, time=time), one_shot(spy, process, time=time)
    assert torch.equal(got, expected)
    first, second = spy.calls
    assert all(
        torch.equal(first[k], second[k]) for k in ("tokens", "latents", "text_time", "latent_time")
    )
    for a, b in zip(gradients(got.sum(), spy), gradients(expected.sum(), spy), strict=True):
        assert torch.equal(a, b)
    single = Spy(toy_denoiser()[0])
    drawn = [
        run(single, process, noise=None, time=time, generator=torch.Generator().manual_seed(3))
        for run in (encode, one_shot)
    ]
    assert torch.equal(*drawn)
    assert torch.equal(encode(spy, process_of("v")), one_shot(spy, process_of("v"), time=1.0))


@pytest.mark.parametrize("steps", [1, 3])
def test_noise_is_drawn_once(steps):
    spy, process = Spy(toy_denoiser()[0]), process_of("v")
    options = {"noise": None, "bridge": LatentBridge(steps=steps)}
    first, again, other = (
        encode(spy, process, generator=torch.Generator().manual_seed(s), **options)
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.float32 and len(spy.calls) == 3 * steps
    expected = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spy.calls[0]["latents"], expected)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("time", [1.0, 0.95, torch.tensor([0.1, 0.95, 0.5])])
def test_an_epsilon_start_near_full_noise_is_refused(steps, time):
    """DDIM is no cure: the first step multiplies the same error."""
    spy, generator = toy(), torch.Generator().manual_seed(0)
    before = generator.get_state()
    with pytest.raises(ValueError, match=r"max_gain.*LatentBridge\(steps=4\).*GradientPolicy"):
        encode(
            spy,
            process_of("epsilon"),
            time=time,
            noise=None,
            generator=generator,
            bridge=LatentBridge(steps=steps),
        )
    assert not spy.calls and torch.equal(generator.get_state(), before)


def test_a_number_is_refused_where_values_are_not_read():
    with cv.check_values(False), pytest.raises(ValueError, match="max_gain"):
        encode(toy(), process_of("epsilon"))


def test_latents_of_three_axes():
    process = cv.LatentProcess("continuous_cosine", prediction="v", shape=(2, 3))
    z, noise = randn(2, 3, 2, 3)
    spy = Spy(Says(lambda z_t, t: process.target(z, noise, t)))
    got = encode(spy, process, noise=noise, bridge=LatentBridge(steps=3))
    torch.testing.assert_close(got, z, rtol=1e-6, atol=1e-6)


def test_bf16_in_bf16_out():
    denoiser, *_ = toy_denoiser()
    denoiser.module.bfloat16()
    process, noise = process_of("v"), NOISE.bfloat16()
    bridge = LatentBridge(steps=3, threshold=0.5, norm=2.0, noise=0.1)
    got = encode(denoiser, process, noise=noise, bridge=bridge)
    assert got.dtype == bridge.noised(got).dtype == torch.bfloat16 and got.isfinite().all()


# --- who learns -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_a_detached_bridge_has_no_graph(steps):
    spy, process = toy(), process_of("v")
    bridge = LatentBridge(steps=steps, threshold=2.0, norm=1.0)
    got = encode(spy, process, policy=DETACH, bridge=bridge, noise=NOISE.clone().requires_grad_())
    assert not got.requires_grad
    assert torch.equal(got, encode(spy, process, policy=FULL, bridge=bridge))
    single = toy_denoiser()[0]
    assert not encode_text(
        single, TOKENS, MASK, text_process=TEXT, latent_process=process
    ).requires_grad


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_last_has_the_gradient_of_one_pass_at_the_last_state(prediction):
    spy, process = toy(), process_of(prediction)
    time = torch.tensor([0.9, 0.7, 0.4]).double()
    start = NOISE.clone().requires_grad_()
    got = encode(spy, process, time=time, noise=start, policy=LAST, bridge=LatentBridge(steps=3))
    last = spy.calls[-1]
    alone = one_shot(spy, process, time=time * (1 - 2 / 3), noise=last["latents"])
    assert torch.equal(got, alone)
    assert torch.autograd.grad(got.sum(), start, retain_graph=True, allow_unused=True) == (None,)
    weight = randn(3, 4, seed=5)
    for a, b in zip(
        gradients((got * weight).sum(), spy), gradients((alone * weight).sum(), spy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_full_has_the_gradient_of_all_passes():
    spy, process = toy(), process_of("v")
    time, weight = torch.tensor([0.9, 0.7, 0.4]).double(), randn(3, 4, seed=5)
    start = NOISE.clone().requires_grad_()
    options = {"time": time, "bridge": LatentBridge(steps=2)}
    got = encode(spy, process, noise=start, policy=FULL, **options)
    (on_start,) = torch.autograd.grad(got.sum(), start, retain_graph=True)
    assert on_start.any()
    z_t = NOISE  # by hand
    for k, now in enumerate((time, time / 2)):
        said = spy.denoise(
            TOKENS,
            z_t,
            text_time=0 * time,
            latent_time=now,
            attention_mask=MASK,
            need="latents",
        ).latent_prediction
        alpha, sigma = (x[:, None] for x in process.alpha_sigma(now))
        x0, epsilon = alpha * z_t - sigma * said, sigma * z_t + alpha * said
        if k == 0:
            alpha, sigma = (x[:, None] for x in process.alpha_sigma(time / 2))
            z_t = alpha * x0 + sigma * epsilon
    expected = gradients((x0 * weight).sum(), spy)
    last = gradients((encode(spy, process, policy=LAST, **options) * weight).sum(), spy)
    for a, b in zip(gradients((got * weight).sum(), spy), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(last, expected, strict=True))


@pytest.mark.parametrize("policy", [LAST, FULL])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_encoder_learns_but_for_what_is_frozen(policy, steps):
    spy, process = toy(), process_of("v")
    named = dict(spy.module.named_parameters())
    encoder = {n: p for n, p in named.items() if not n.startswith("text_head")}
    bridge = LatentBridge(steps=steps, threshold=2.0, norm=1.0)
    loss = encode(spy, process, policy=policy, bridge=bridge).square()[:, 0].sum()
    assert_learns(loss, encoder.items())
    frozen = replace(policy, freeze_bridge=("shared.*", "word.*"))
    loss = encode(spy, process, policy=frozen, bridge=bridge).square()[:, 0].sum()
    held = {n: p for n, p in encoder.items() if n.startswith(("shared", "word"))}
    assert_frozen(loss, held.items())
    assert_learns(loss, encoder.items() - held.items())
    assert all(isinstance(p, nn.Parameter) for p in spy.module.parameters())


def test_last_keeps_the_memory_of_one_pass():
    spy, process, kept = toy(), process_of("v"), {}
    for policy in (DETACH, LAST, FULL):
        for steps in (1, 5):
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t) or t, lambda t: t
            ):
                encode(spy, process, policy=policy, bridge=LatentBridge(steps=steps))
            kept[policy.bridge, steps] = len(saved)
    assert kept["detach", 1] == kept["detach", 5] == 0
    assert kept["last", 5] <= kept["last", 1] == kept["full", 1] > 0
    assert kept["full", 5] > 4 * kept["full", 1]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bridge_gradcheck(prediction):
    spy, process = toy(), process_of(prediction)
    bridge = LatentBridge(steps=2, threshold=1e3, norm=2.0)
    start = NOISE.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: encode(spy, process, noise=x, time=0.6, bridge=bridge), start
    )


# --- dynamic thresholding ---------------------------------------------------------------------


@quick
@given(latents(), st.sampled_from([0.1, 1.0, 2.81]), st.sampled_from([0.3, 0.5, 0.995, 1.0]))
def test_dynamic_thresholding(z, c, quantile):
    bridge = LatentBridge(threshold=c, quantile=quantile)
    got = array(bridge.thresholded(z))
    np.testing.assert_allclose(got, oracles_latents.threshold(z, c, quantile), rtol=1e-12)
    assert (np.abs(got) <= c * (1 + 1e-12)).all()


def test_thresholding_by_hand():
    z = torch.tensor([[0.5, -1.0, 4.0], [0.1, 0.2, -0.3]]).double().requires_grad_()
    bridge = LatentBridge(threshold=0.8, quantile=0.75)  # s = (1 + 4) / 2 and 0.8
    got = bridge.thresholded(z)
    first = torch.tensor([0.5, -1.0, 2.5]).double() * 0.8 / 2.5
    torch.testing.assert_close(got[0], first)
    assert torch.equal(got[1], z[1])  # within the threshold nothing changes, not a bit
    (slope,) = torch.autograd.grad(got.sum(), z)
    expected = torch.tensor([[0.32, 0.32, 0.0], [1.0, 1.0, 1.0]]).double()
    torch.testing.assert_close(slope, expected)


def test_the_default_threshold_quantile_is_that_of_the_standard_normal():
    assert LatentBridge().quantile == 0.995
    share = (randn(400_000).abs() < 2.81).double().mean()
    assert abs(share - 0.995) < 5e-4
    bridge = LatentBridge(threshold=2.81)
    assert bridge == LatentBridge(threshold=2.81, quantile=0.995)


def test_thresholding_of_many_numbers():
    """`torch.quantile` takes no more than 2^24."""
    z = torch.zeros(2, 2**23 + 1)
    z[0, :4] = 9.0
    got = LatentBridge(threshold=1.0, quantile=1.0).thresholded(z)
    assert got[0, :4].tolist() == [1.0] * 4 and not got[1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
@pytest.mark.parametrize("bridge", [THRESHOLD, LatentBridge(norm=2.0)], ids=["threshold", "norm"])
def test_guards_are_finite(dtype, scale, bridge):
    z = (randn(3, 4) * scale).to(dtype)
    z[0] = 0.0
    z.requires_grad_()
    got = bridge.normed(bridge.thresholded(z))
    assert got.dtype == dtype and got.isfinite().all()
    (slope,) = torch.autograd.grad(got.float().sum(), z)
    assert slope.isfinite().all()


# --- norm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4)])
def test_norm(shape):
    z = randn(*shape)
    got = LatentBridge(norm=2.5).normed(z)
    torch.testing.assert_close(got.norm(dim=-1), torch.full(shape[:-1], 2.5).double())
    torch.testing.assert_close(
        nn.functional.cosine_similarity(got, z, dim=-1).sum(),
        torch.tensor(float(np.prod(shape[:-1]))).double(),
    )
    assert LatentBridge().normed(z) is z
    assert LatentBridge().thresholded(z) is z


def test_the_norm_has_no_radial_gradient():
    """The Jacobian is `norm / |z| (I - u u^T)`."""
    z = randn(4)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: LatentBridge(norm=2.5).normed(x[None])[0], z
    )
    u = z / z.norm()
    torch.testing.assert_close(jacobian, 2.5 / z.norm() * (torch.eye(4) - torch.outer(u, u)))
    assert (jacobian @ u).abs().max() < 1e-14


def test_the_norm_of_nothing_has_no_gradient():
    z = torch.zeros(2, 4, requires_grad=True)
    got = LatentBridge(norm=2.0).normed(z)
    assert not got.any()
    assert not torch.autograd.grad(got.sum(), z)[0].any()


def test_norm_is_of_the_last_state_alone_and_after_the_threshold():
    spy, process = toy(), process_of("v")
    plain = encode(spy, process, bridge=replace(THRESHOLD, steps=2))
    states = [call["latents"] for call in spy.calls]
    spy.calls.clear()
    normed = encode(spy, process, bridge=replace(THRESHOLD, steps=2, norm=3.0))
    assert all(torch.equal(a, b["latents"]) for a, b in zip(states, spy.calls, strict=True))
    torch.testing.assert_close(normed, 3 * plain / plain.norm(dim=1, keepdim=True))


# --- noise ------------------------------------------------------------------------------------


def test_noise():
    z, bridge = randn(4000, 3, 2), LatentBridge(noise=0.3)
    first, again, other = (
        bridge.noised(z, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    added = (first - z) / 0.3
    assert added.mean().abs() < 4 / math.sqrt(added.numel())
    assert (added.std() - 1).abs() < 4 / math.sqrt(2 * added.numel())
    assert len(added.unique()) == added.numel()
    assert LatentBridge().noised(z) is z
    (slope,) = torch.autograd.grad(bridge.noised(z.requires_grad_()).sum(), z)
    assert (slope == 1).all()


def test_noise_is_not_part_of_z_hat():
    spy, process = toy(), process_of("v")
    noisy, quiet = (encode(spy, process, bridge=LatentBridge(noise=s)) for s in (5.0, 0.0))
    assert torch.equal(noisy, quiet)


@pytest.mark.parametrize(("noise", "variance", "dim"), [(0.5, 1.0, 64), (2.0, 0.3, 1), (1, 0, 8)])
def test_capacity(noise, variance, dim):
    """The mutual information of a Gaussian signal and its noised copy, from determinants."""
    both = np.array([[variance, variance], [variance, variance + noise**2]])
    nats = np.log(both[0, 0] * both[1, 1] / np.linalg.det(both)) / 2 if variance else 0.0
    got = LatentBridge(noise=noise).capacity(variance, dim)
    assert (
        got == pytest.approx(dim * nats) == pytest.approx(dim / 2 * np.log(1 + variance / noise**2))
    )
    assert LatentBridge().capacity(variance, dim) == math.inf


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 0}, "`steps` must be an integer of at least 1, got 0"),
        ({"steps": -2}, "`steps` must be an integer of at least 1, got -2"),
        ({"steps": 2.0}, "`steps` must be an integer of at least 1, got 2.0"),
        ({"noise": -0.1}, "`noise` must be a finite number of at least 0, got -0.1"),
        ({"noise": math.nan}, "`noise` must be a finite number"),
        ({"threshold": 0.0}, "`threshold` must be above 0"),
        ({"threshold": math.inf}, "`threshold` must be a finite number"),
        ({"norm": 0.0}, "`norm` must be above 0"),
        ({"norm": -1.0}, "`norm` must be a finite number"),
        ({"threshold": 1.0, "quantile": 0.0}, r"`quantile` must lie in \(0, 1\], got 0.0"),
        ({"threshold": 1.0, "quantile": 1.01}, "`quantile` must lie in .* got 1.01"),
        ({"threshold": 1.0, "quantile": math.nan}, "`quantile` must lie in .* got nan"),
        (
            {"quantile": 0.9},
            r"`quantile` = 0.9 has no effect without a `threshold`.*LatentBridge\(threshold=2.81\)",
        ),
    ],
)
@pytest.mark.unhooked
def test_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        LatentBridge(**options)


@pytest.mark.unhooked
def test_a_text_is_checked_before_any_pass():
    spy, process = toy(), process_of("v")
    with pytest.raises(TypeError, match="`time` must be floating point"):
        encode(spy, process, time=torch.ones(3).long())
    with pytest.raises(ValueError, match="`time` must lie in"):
        encode(spy, process, time=1.5)
    with pytest.raises(ValueError, match="set `shape` on the LatentProcess"):
        encode(spy, cv.LatentProcess(), noise=None)
    with pytest.raises(ValueError, match="`noise` must be latents of shape"):
        encode(spy, process, noise=torch.zeros(3, 5))
    assert not spy.calls


def test_a_bridge_is_a_value():
    assert LatentBridge() == LatentBridge(1, 0.0, None, 0.995, None)
    assert hash(LatentBridge(2, norm=1.0)) == hash(LatentBridge(2, norm=1.0))
