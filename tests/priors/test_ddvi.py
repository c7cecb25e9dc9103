import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles_diffusion as oracle
from analytic import Optimal
from cyclevae.losses.latent import t2l_loss
from cyclevae.model.denoiser import Denoised, EncoderDecoder, as_denoiser
from cyclevae.model.passes import l2t
from cyclevae.model.teacher import Teacher
from cyclevae.priors.ddvi import ddvi_sleep_loss, ddvi_wake_kl
from cyclevae.priors.weighting import weighted_times
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess
from cyclevae.testing import assert_frozen, assert_learns, toy_batch, toy_denoiser
from oracles import Spy, array
from strategies import quick, seeds

PREDICTIONS = ("epsilon", "x0", "v")
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
TEXT = TextProcess(mask_id=2, vocab_size=7, pad_id=0)
COSINE = LatentProcess(shape=(4,))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def wake(denoiser, teacher, z_hat, process=COSINE, tokens=None, mask=None, **options):
    if tokens is None:
        tokens = torch.full((len(z_hat), 2), 3)
    mask = tokens > 0 if mask is None else mask
    return ddvi_wake_kl(
        denoiser,
        teacher,
        tokens,
        mask,
        z_hat,
        text_process=TEXT,
        latent_process=process,
        **options,
    )


def sleep(denoiser, latents, mask, process=COSINE, text=TEXT, **options):
    return ddvi_sleep_loss(
        denoiser, latents, mask, text_process=text, latent_process=process, **options
    )


class Two:
    """Given a text one affine map of `z_t`, without a text another."""

    def __init__(self, slope=0.7):
        self.slope = slope

    @staticmethod
    def predict(z_t, time, text_time):
        return 0.7 * z_t + time if text_time == 0 else 0.2 * z_t - 0.1

    def denoise(self, tokens, latents, *, text_time, latent_time, **state):
        given = self.slope * latents + latent_time[:, None]
        known = text_time[:, None] == 0
        return Denoised(None, torch.where(known, given, 0.2 * latents - 0.1))


# --- the wake KL ------------------------------------------------------------------------------


@quick
@given(seeds, st.sampled_from(PREDICTIONS), st.sampled_from([(19, 979), (0, 999), (300, 400)]))
def test_loop(seed, prediction, steps):
    first, last = steps
    z_hat, noise = randn(5, 4, seed=seed % 997), randn(5, 4, seed=seed % 997 + 1)
    drawn = torch.randint(first, last + 1, (5,), generator=seeded(seed))
    time = ((drawn.double() + 0.5) / 999).clamp(max=1)
    value = wake(
        Two(),
        Two(),
        z_hat,
        LatentProcess(prediction=prediction),
        time=time,
        noise=noise,
        low=(first + 0.1) / 999,
        high=min((last + 0.5) / 999, 1.0),
    )
    total = 0.0
    width = math.log(oracle.SNR[first]) - math.log(oracle.SNR[last])
    for row, n, i, t in zip(array(z_hat), array(noise), drawn.tolist(), array(time), strict=True):
        z_t = oracle.ALPHA[i] * row + oracle.SIGMA[i] * n
        eps = [
            oracle.implied(Two.predict(z_t, t, known), z_t, i, prediction)[1] for known in (0, 1)
        ]
        total += width / 2 * ((eps[0] - eps[1]) ** 2).sum()
    assert value.item() == pytest.approx(total / 5, rel=1e-7)


def evenly(process, z_hat, low, high, rows=3000):
    """All combinations of spread times, latents and signs of the noise."""
    like = torch.zeros(rows, 1).double()
    limits = {"low": low, "high": high}
    times = weighted_times("likelihood", like, process, **limits, time=None, generator=seeded())[0]
    signs = torch.tensor([-1.0, 1.0]).double()
    times, z_hat, noise = torch.meshgrid(times, z_hat, signs, indexing="ij")
    times, z_hat, noise = (x.reshape(-1) for x in (times, z_hat, noise))
    return z_hat[:, None], {"time": times, "noise": noise[:, None]} | limits


@every_prediction
@pytest.mark.parametrize("schedule", ["cosine", "continuous_cosine"])
def test_gaussians(schedule, prediction):
    """Where z_hat follows the posterior N(.7, .3) itself: KL(N(.7, .3) || N(0, 1)) = .49699."""
    process = LatentProcess(schedule, prediction=prediction)
    encoder = Optimal(process, given=Optimal(process, means=[0.7], variances=[0.3]))
    z_hat = torch.tensor([0.7 - 0.3**0.5, 0.7 + 0.3**0.5]).double()
    z_hat, draws = evenly(process, z_hat, low=0.0, high=0.999)
    value = float(wake(encoder, Optimal(process), z_hat, process, **draws))
    assert value == pytest.approx(oracle.normal_kl(0.7, 0.3), abs=2e-4)
    assert value == pytest.approx(0.49699, abs=2e-4)


@every_prediction
def test_zero_where_the_text_says_nothing(prediction):
    """phi(., y) = psi(., no text): exactly 0, with a zero gradient."""
    denoiser, _, _ = toy_denoiser()
    network = denoiser.module
    with torch.no_grad():
        network.word.weight.fill_(0.3)
        network.times.weight[:, 0] = 0
    teacher = Teacher(network)
    process = LatentProcess(prediction=prediction)
    value = wake(denoiser, teacher.denoiser, randn(3, 4).float(), process)
    value.backward()
    assert value.item() == 0
    assert not any(p.grad.any() for p in network.latent_head.parameters())
    with torch.no_grad():
        network.latent_head.bias.add_(0.1)
    assert wake(denoiser, teacher.denoiser, randn(3, 4).float(), process).item() > 0


def test_who_learns_from_the_wake_kl():
    denoiser, _, process = toy_denoiser()
    teacher = Teacher(denoiser.module, decay=1.0)
    with torch.no_grad():
        denoiser.module.latent_head.bias.add_(1)
    z_hat = randn(3, 4).float().requires_grad_()
    value = wake(denoiser, teacher.denoiser, z_hat, process)
    named = dict(denoiser.module.named_parameters())
    head = {name: p for name, p in named.items() if name.startswith("text_head")}
    assert_learns(value, [(n, p) for n, p in named.items() if n not in head])
    assert_frozen(value, head.items())
    assert_frozen(value, [z_hat, *teacher.parameters()])


def test_what_the_two_see():
    denoiser, _, process = toy_denoiser()
    live, teacher = Spy(denoiser), Spy(Teacher(denoiser.module).denoiser)
    tokens = torch.tensor([[3, 4, 0], [5, 0, 0]])
    z_hat = randn(2, 4).float()
    time, noise = torch.tensor([0.3, 0.6]), randn(2, 4, seed=1).float()
    options = {"time": time, "noise": noise}
    wake(live, teacher, z_hat, process, tokens=tokens, **options)
    null_mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0]])
    wake(live, teacher, z_hat, process, tokens=tokens, null_mask=null_mask, **options)
    for call in live.calls:
        assert torch.equal(call["tokens"], tokens) and call["need"] == "latents"
        assert call["text_time"].tolist() == [0, 0] and torch.equal(call["latent_time"], time)
        torch.testing.assert_close(call["latents"], process.noised(z_hat, noise, time))
    for call, text in zip(
        teacher.calls, ([[2, 2, 0], [2, 0, 0]], [[2, 2, 2, 2], [0, 2, 0, 0]]), strict=True
    ):
        assert call["tokens"].tolist() == text and call["need"] == "latents"
        assert call["text_time"].tolist() == [1, 1] and torch.equal(call["latent_time"], time)
        assert torch.equal(call["latents"], live.calls[0]["latents"])
        assert torch.equal(call["attention_mask"], call["tokens"] == 2)


def test_the_teacher_runs_without_a_graph():
    calls = []

    class Watched(Optimal):
        def denoise(self, *arguments, **state):
            calls.append(torch.is_grad_enabled())
            return super().denoise(*arguments, **state)

    wake(Watched(COSINE), Watched(COSINE), randn(2, 4))
    assert calls == [True, False]


def test_defaults_draws_and_counts():
    denoiser = toy_denoiser()[0]
    teacher, z_hat = Teacher(denoiser.module).denoiser, randn(3, 4).float()
    value = partial(wake, denoiser, teacher, z_hat)
    first = value(generator=seeded())
    torch.testing.assert_close(value(generator=seeded(), low=0.02, high=0.98), first)
    assert not torch.equal(value(generator=seeded(1)), first)
    torch.testing.assert_close(value(generator=seeded(), count=12), first / 4)
    assert value(generator=seeded(), low=0.1) != first != value(generator=seeded(), high=0.9)
    # uniform in gamma, as the likelihood weighting is
    spy = Spy(denoiser)
    wake(spy, teacher, torch.zeros(500, 4), generator=seeded())
    expected = weighted_times(
        "likelihood",
        torch.zeros(500, 4),
        COSINE,
        low=0.02,
        high=0.98,
        time=None,
        generator=seeded(),
    )[0]
    assert torch.equal(spy.calls[0]["latent_time"], expected)


def test_gradcheck():
    slope = torch.tensor(0.7).double().requires_grad_()
    options = {"time": torch.tensor([0.1, 0.5, 0.9]).double(), "noise": randn(3, 4, seed=1)}

    def value(slope):
        return wake(Two(slope), Two(), randn(3, 4), **options)

    assert torch.autograd.gradcheck(value, slope)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    process = LatentProcess()
    encoder = Optimal(process, given=Optimal(process, means=[0.7], variances=[0.3]))
    z_hat, noise = randn(6, 4).to(dtype), randn(6, 4, seed=1).to(dtype)
    options = {"time": 0.5, "process": process}
    got = wake(encoder, Optimal(process), z_hat, noise=noise, **options)
    exact = wake(encoder, Optimal(process), z_hat.double(), noise=noise.double(), **options)
    assert got.dtype == torch.float32 and float(got) == pytest.approx(float(exact), rel=3e-2)


@every_prediction
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_wake_gradient_is_finite(prediction, scale):
    denoiser, _, _ = toy_denoiser()
    teacher = Teacher(denoiser.module)
    value = wake(
        denoiser,
        teacher.denoiser,
        scale * randn(4, 4).float(),
        LatentProcess(prediction=prediction),
        low=0.0,
        high=1.0,
        time=torch.tensor([0.0, 0.3, 0.9, 1.0]),
    )
    value.backward()
    assert value.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in denoiser.module.parameters())


def test_wake_without_rows_and_on_meta():
    denoiser, _, _ = toy_denoiser()
    teacher = Teacher(denoiser.module)
    empty = wake(denoiser, teacher.denoiser, torch.zeros(0, 4))
    assert empty == 0 and empty.requires_grad
    network = denoiser.module.to("meta")
    value = wake(
        denoiser,
        Teacher(network).denoiser,
        torch.empty(2, 4, device="meta"),
        tokens=torch.zeros(2, 3, dtype=torch.long, device="meta"),
        mask=torch.empty(2, 3, dtype=torch.bool, device="meta"),
    )
    value.backward()
    assert value.shape == ()


def test_wake_refusals():
    denoiser, _, _ = toy_denoiser()
    teacher = Teacher(denoiser.module).denoiser
    z_hat = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="`teacher` must be frozen"):
        wake(denoiser, denoiser, z_hat)
    with pytest.raises(ValueError, match=r"`z_hat` must be finite, .* has training diverged"):
        wake(denoiser, teacher, z_hat * math.nan)
    with pytest.raises(ValueError, match=r"`low` and `high` must be times"):
        wake(denoiser, teacher, z_hat, low=0.9, high=0.1)
    with pytest.raises(ValueError, match=r"`time` must lie in \[low, high\]"):
        wake(denoiser, teacher, z_hat, time=1.0)
    with pytest.raises(ValueError, match="`null_mask` must hold 1"):
        wake(denoiser, teacher, z_hat, null_mask=torch.full((2, 2), 2))


@pytest.mark.unhooked
def test_wake_shapes():
    denoiser, _, _ = toy_denoiser()
    teacher = Teacher(denoiser.module).denoiser
    with pytest.raises(ValueError, match="`z_hat` and `tokens` must have the same number of rows"):
        wake(denoiser, teacher, torch.zeros(2, 4), tokens=torch.full((3, 2), 3))
    with pytest.raises(ValueError, match="`null_mask` and `tokens` must have the same number of"):
        wake(denoiser, teacher, torch.zeros(2, 4), null_mask=torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"`z_hat` must be latents of shape \[b, 4\]"):
        wake(denoiser, teacher, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of its tokens"):
        wake(denoiser, teacher, torch.zeros(2, 4), mask=torch.ones(2, 3))


# --- the sleep term ---------------------------------------------------------------------------


def separate():
    """An encoder and a decoder with no parameter in common."""
    parts = [toy_denoiser(seed)[0].module for seed in (0, 1)]

    class Part(torch.nn.Module):
        def __init__(self, network, which):
            super().__init__()
            self.network, self.which = network, which

        def forward(self, *arguments, **state):
            return self.network(*arguments, **state)[self.which]

    return as_denoiser(EncoderDecoder(Part(parts[0], 1), Part(parts[1], 0)))


def test_sleep_is_denoising_given_the_dreamt_text():
    denoiser, text, process = toy_denoiser()
    _, mask, latents = toy_batch()[:3]
    y_hat = torch.randint(3, 7, mask.shape, generator=seeded())
    for options in ({}, {"time": 0.4}, {"reduction": "none"}, {"reduction": "nats", "count": 7}):
        processes = {"text_process": text, "latent_process": process}
        said = {"time": None} | options
        expected = t2l_loss(denoiser, y_hat, latents, mask, generator=seeded(), **processes, **said)
        got = sleep(denoiser, latents, mask, y_hat=y_hat, generator=seeded(), **options)
        torch.testing.assert_close(got, expected)
    noise = randn(3, 4).float()
    given = {"time": torch.tensor([0.1, 0.5, 0.9]), "noise": noise}
    spy = Spy(denoiser)
    sleep(spy, latents, mask, y_hat=y_hat, **given)
    (call,) = spy.calls
    assert torch.equal(call["latent_time"], given["time"])
    torch.testing.assert_close(call["latents"], process.noised(latents, noise, given["time"]))
    assert torch.equal(call["tokens"], y_hat * mask) and not call["text_time"].any()


def test_the_text_is_sampled_from_the_decoder():
    denoiser, text, _ = toy_denoiser()
    with torch.no_grad():
        denoiser.module.text_head.bias.copy_(torch.tensor([9.0, 0, 9, 0, 1, 2, 0]))
    rows = 4000
    latents, mask = randn(1, 4).float().expand(rows, 4), torch.ones(rows, 1, dtype=torch.bool)
    spy = Spy(denoiser)
    sleep(spy, latents, mask, generator=seeded())
    dream, encode = spy.calls
    assert dream["need"] == "logits" and (dream["tokens"] == 2).all()
    assert torch.equal(dream["latents"], latents) and not dream["latent_time"].any()
    assert encode["need"] == "latents"
    logits = l2t(denoiser, latents[:1], mask[:1], text_process=text)[0, 0].detach()
    logits[[0, 2]] = -math.inf  # padding and the mask are never dreamt
    share = torch.bincount(encode["tokens"].flatten(), minlength=7) / rows
    torch.testing.assert_close(share, logits.softmax(0), atol=0.03, rtol=0)
    sleep(spy, latents, mask, generator=seeded())  # whatever the global random state
    assert torch.equal(spy.calls[3]["tokens"], encode["tokens"])


def test_who_learns_from_the_sleep_term():
    batch = toy_batch()
    denoiser = separate()
    latents = batch.latents.clone().requires_grad_()
    for options in ({}, {"y_hat": batch.tokens}):
        loss = sleep(denoiser, latents, batch.attention_mask, **options)
        named = list(denoiser.module.named_parameters())
        encoder = [(n, p) for n, p in named if "encoder" in n and "text_head" not in n]
        assert_learns(loss, encoder)
        assert_frozen(loss, [(n, p) for n, p in named if "decoder" in n])
    shared = toy_denoiser()[0]
    loss = sleep(shared, batch.latents, batch.attention_mask)
    assert_frozen(loss, shared.module.text_head.named_parameters())
    assert_learns(loss, shared.module.latent_head.named_parameters())


def test_the_shared_gradient_is_that_of_the_text_as_data():
    denoiser, _, _ = toy_denoiser()
    batch = toy_batch()
    options = {"time": 0.5, "noise": randn(3, 4).float()}
    spy = Spy(denoiser)
    parameters = [p for n, p in denoiser.module.named_parameters() if "text_head" not in n]
    loss = sleep(spy, batch.latents, batch.attention_mask, generator=seeded(), **options)
    y_hat = spy.calls[1]["tokens"]
    again = sleep(denoiser, batch.latents, batch.attention_mask, y_hat=y_hat, **options)
    for left, right in zip(
        *(torch.autograd.grad(value, parameters) for value in (loss, again)), strict=True
    ):
        torch.testing.assert_close(left, right)


def test_predicted_ends_cut_the_dream():
    text = TextProcess(mask_id=2, vocab_size=7, pad_id=0, end_id=6, end="predicted")
    denoiser, _, _ = toy_denoiser()
    spy, y_hat = Spy(denoiser), torch.tensor([[3, 6, 4], [3, 4, 5]])
    sleep(spy, randn(2, 4).float(), torch.ones(2, 3), text=text, y_hat=y_hat)
    (call,) = spy.calls
    assert call["attention_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert call["tokens"].tolist() == [[3, 6, 0], [3, 4, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sleep_is_finite_at_extremes(dtype):
    denoiser = as_denoiser(toy_denoiser()[0].module.to(dtype))
    for scale in (0.0, 1e-4, 1e4):
        loss = sleep(denoiser, (scale * randn(3, 4)).to(dtype), torch.ones(3, 2))
        assert loss.isfinite() and loss.dtype == torch.float32


def test_sleep_on_meta():
    network = toy_denoiser()[0].module.to("meta")
    loss = sleep(
        as_denoiser(network),
        torch.empty(2, 4, device="meta"),
        torch.empty(2, 3, dtype=torch.bool, device="meta"),
    )
    loss.backward()
    assert loss.shape == ()


def test_sleep_refusals():
    denoiser, _, _ = toy_denoiser()
    mask = torch.ones(2, 3)
    with pytest.raises(ValueError, match="`latents` must be finite"):
        sleep(denoiser, torch.full((2, 4), math.nan), mask)
    with pytest.raises(ValueError, match=r"`y_hat` must hold ids in \[0, 7\)"):
        sleep(denoiser, torch.zeros(2, 4), mask, y_hat=torch.full((2, 3), 7))
    with pytest.raises(ValueError, match="`attention_mask` must hold 1"):
        sleep(denoiser, torch.zeros(2, 4), 2 * mask)


@pytest.mark.unhooked
def test_sleep_shapes():
    denoiser, _, _ = toy_denoiser()
    with pytest.raises(
        ValueError, match="`attention_mask` and `latents` must have the same number"
    ):
        sleep(denoiser, torch.zeros(2, 4), torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"`latents` must be latents of shape \[b, 4\]"):
        sleep(denoiser, torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="`attention_mask` must have the shape of its tokens"):
        sleep(denoiser, torch.zeros(2, 4), torch.ones(2, 3), y_hat=torch.full((2, 4), 3))
