"""Guidance, null conditions and evaluation mode against closed forms, and makers in the losses."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.model.denoiser import Denoised
from cyclevae.testing import ToyNetwork, toy_batch, toy_denoiser

DENOISER, TEXT, LATENT = toy_denoiser(seed=0)
PROCESSES = {"text_process": TEXT, "latent_process": LATENT}
BATCH = toy_batch(rows=4)
TEACHER = cv.Teacher(toy_denoiser(seed=1)[0].module).denoiser
FULL = cv.GradientPolicy("full")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Gaussian:
    """`z ~ N(0, 9)` and `z | y ~ N(m_y, 1/4)`, denoised perfectly; y is the first word."""

    MEANS = torch.tensor([0.0, 0, 0, 1.0, -1.0, 2.0, -2.0], dtype=torch.float64)

    def __init__(self, process):
        self.process = process

    def law(self, tokens, text_time):
        null = text_time[:, None] == 1
        mean = torch.where(null, 0.0, self.MEANS[tokens[:, :1]])
        return mean, torch.where(null, 9.0, 0.25).double()

    def denoise(self, tokens, latents, *, text_time, latent_time, attention_mask, need):
        mean, variance = self.law(tokens, text_time)
        alpha, sigma = (x[:, None] for x in self.process.alpha_sigma(latent_time))
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        x0 = mean + gain * (latents - alpha * mean)
        epsilon = (latents - alpha * x0) / sigma
        v = alpha * epsilon - sigma * x0
        return Denoised(None, {"x0": x0, "epsilon": epsilon, "v": v}[self.process.prediction])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
def test_the_guided_score_of_gaussians(prediction, scale):
    """`s = (1 - w) s_null + w s_y`, in closed form, of every prediction."""
    process = cv.LatentProcess("continuous_cosine", prediction=prediction, shape=(2,))
    tokens = torch.tensor([[3, 4], [6, 4]])
    z_t = torch.randn(2, 2, generator=seeded(), dtype=torch.float64)
    time = torch.tensor([0.3, 0.7], dtype=torch.float64)
    both = {"text_process": TEXT, "latent_process": process}
    guided = cv.guided(Gaussian(process), scale, **both)
    found = cv.t2l(guided, tokens, torch.ones(2, 2), start=z_t, time=time, **both)
    alpha, sigma = (x[:, None] for x in process.alpha_sigma(time))
    score = (alpha * found.z_hat(process) - z_t) / sigma**2
    mean = Gaussian.MEANS[tokens[:, :1]]
    null = -z_t / (9 * alpha**2 + sigma**2)
    shown = -(z_t - alpha * mean) / (alpha**2 / 4 + sigma**2)
    torch.testing.assert_close(score, (1 - scale) * null + scale * shown)


def test_ddim_of_a_guided_gaussian_is_the_loop():
    process = cv.LatentProcess("continuous_cosine", prediction="v", shape=(2,))
    both, perfect = {"text_process": TEXT, "latent_process": process}, Gaussian(process)
    tokens, z_t = (
        torch.tensor([[3], [6]]),
        torch.randn(2, 2, dtype=torch.float64, generator=seeded()),
    )
    found = cv.encode_text(
        cv.guided(perfect, 2.0, **both),
        tokens,
        torch.ones(2, 1),
        bridge=cv.LatentBridge(steps=3),
        noise=z_t,
        **both,
    )
    for now, to in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
        x0 = []
        for text_time in (1.0, 0.0):
            mean, variance = perfect.law(tokens, torch.full((2,), text_time))
            alpha, sigma = (float(x) for x in process.alpha_sigma(torch.tensor([now]).double()))
            x0.append(
                mean + alpha * variance / (alpha**2 * variance + sigma**2) * (z_t - alpha * mean)
            )
        z_hat = x0[0] + 2 * (x0[1] - x0[0])
        alpha_to, sigma_to = (float(x) for x in process.alpha_sigma(torch.tensor([to]).double()))
        z_t = alpha_to * z_hat + sigma_to * (z_t - alpha * z_hat) / sigma
    torch.testing.assert_close(found, z_hat, atol=1e-6, rtol=1e-6)


class Words:
    """Log-probabilities of three words with a latent, and without one."""

    SHOWN = torch.tensor([0.7, 0.3, 0.0]).log()
    NULL = torch.tensor([0.25, 0.0, 0.75]).log()

    def denoise(self, tokens, latents, *, text_time, latent_time, attention_mask, need):
        logits = torch.where(latent_time[:, None, None] == 1, self.NULL, self.SHOWN)
        return Denoised(logits.expand(*tokens.shape, 3), None)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_guided_words_are_those_of_the_tempered_ratio(scale):
    """`p ~ p_null^(1 - w) p_shown^w`; a word that one rules out keeps what it has with a latent."""
    text = cv.TextProcess(mask_id=2, vocab_size=3)
    guided = cv.guided(Words(), scale, text_process=text, latent_process=LATENT)
    logits = cv.l2t(guided, torch.zeros(1, 4), torch.ones(1, 1), text_process=text)[0, 0]
    assert logits[2] == -math.inf
    ratio = math.log(0.25) * (1 - scale) + math.log(0.7) * scale
    assert logits.tolist()[:2] == pytest.approx([ratio, math.log(0.3)], abs=1e-6)


def test_guidance_of_1_is_none_and_of_0_the_null():
    assert cv.guided(DENOISER, 1.0, **PROCESSES) is DENOISER
    null = cv.without_condition(DENOISER, **PROCESSES)
    guided = cv.guided(DENOISER, 0.0, **PROCESSES)
    read = {"start": torch.randn(4, 4), **PROCESSES}
    found, wanted = (cv.t2l(d, *BATCH[:2], **read).prediction for d in (guided, null))
    torch.testing.assert_close(found, wanted)
    found, wanted = (  # which draws a latent
        cv.l2t(make(DENOISER, generator=seeded(), **PROCESSES), BATCH.latents, BATCH.attention_mask,
               text_process=TEXT)
        for make in (lambda d, **o: cv.guided(d, 0.0, **o), cv.without_condition)
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "make",
    [lambda **o: cv.guided(DENOISER, 2.0, **o), lambda **o: cv.without_condition(DENOISER, **o)],
)
def test_a_pass_of_both_directions_has_no_condition(make):
    with pytest.raises(ValueError, match=r"no condition that could be left out.*need='latents'"):
        cv.joint(make(**PROCESSES), BATCH.tokens, BATCH.latents, BATCH.attention_mask, **PROCESSES)


def test_rows_without_their_condition_are_told_nothing_of_it():
    rows = torch.tensor([True, False, True, False])
    null = cv.without_condition(DENOISER, rows=rows, generator=seeded(), **PROCESSES)
    tokens, mask, latents = BATCH[:3]
    for name, read in {
        "text": lambda d, x: cv.t2l(
            d, x, mask, latents=latents, time=0.5, noise=latents, **PROCESSES
        )[0],
        "latent": lambda d, x: cv.l2t(d, x, mask, text_process=TEXT),
    }.items():
        given = tokens if name == "text" else latents
        other = given.clamp(max=3) if name == "text" else -given
        null.generator.manual_seed(0)
        found = read(null, given)
        null.generator.manual_seed(0)
        again, plain = read(null, other), read(DENOISER, given)
        assert torch.equal(found[rows], again[rows]), name
        assert torch.equal(found[~rows], plain[~rows]), name
        assert not torch.equal(found[~rows], again[~rows]), name


def test_a_relaxed_text_is_hidden_as_its_ids_are():
    rows = torch.tensor([True, False, True, False])
    null = cv.without_condition(DENOISER, rows=rows, **PROCESSES)
    relaxed = torch.nn.functional.one_hot(BATCH.tokens, 7).float()
    read = {"start": torch.randn(4, 4), **PROCESSES}
    one, other = (cv.t2l(null, x, BATCH.attention_mask, **read)[0] for x in (BATCH.tokens, relaxed))
    torch.testing.assert_close(one, other)


class Dropped(ToyNetwork):
    """With dropout, and a memory of its modes."""

    def __init__(self):
        super().__init__(7, 4)
        self.drop, self.modes = nn.Dropout(0.5), []

    def forward(self, tokens, latents, **state):
        self.modes.append(self.drop.training)
        return super().forward(tokens, self.drop(latents), **state)


def test_an_evaluated_denoiser_has_no_dropout_no_graph_and_leaves_modes_alone():
    network = Dropped()
    network.shared.eval()
    modes = [m.training for m in network.modules()]
    maker = cv.evaluated(cv.as_denoiser(network))
    one, other = (
        cv.l2t(maker, BATCH.latents, BATCH.attention_mask, text_process=TEXT) for _ in range(2)
    )
    assert torch.equal(one, other) and not one.requires_grad
    with pytest.raises(ValueError, match="both"):
        cv.joint(
            cv.guided(maker, 2.0, **PROCESSES),
            *BATCH[:1],
            BATCH.latents,
            BATCH.attention_mask,
            **PROCESSES,
        )
    assert modes == [m.training for m in network.modules()] and network.modes == [False, False]


# In the losses: the first half is the maker's, the second trains the denoiser

GUIDED = cv.guided(TEACHER, 2.0, generator=seeded(3), **PROCESSES)


def gradients(loss):
    return torch.autograd.grad(loss, list(DENOISER.module.parameters()), allow_unused=True)


def text_cycle(**first):
    steps = cv.LatentBridge(steps=2, noise=0.5)
    return cv.cycle_text_loss(DENOISER, *BATCH[:2], bridge=steps, **first, **PROCESSES)


def latent_cycle(bridge="unmask", **first):
    bridge = cv.TextBridge("unmask", steps=2) if bridge == "unmask" else bridge
    mask = BATCH.attention_mask
    return cv.cycle_latent_loss(DENOISER, BATCH.latents, mask, bridge=bridge, **first, **PROCESSES)


def sleep(**first):
    loss = cv.ddvi_sleep_loss
    return loss(DENOISER, BATCH.latents, BATCH.attention_mask, **first, **PROCESSES)


def made_latent(generator):
    bridge = cv.LatentBridge(steps=2)
    return cv.encode_text(GUIDED, *BATCH[:2], bridge=bridge, generator=generator, **PROCESSES)


def made_text(generator):
    mask = BATCH.attention_mask
    return cv.unmask_text(GUIDED, BATCH.latents, mask, text_process=TEXT, steps=2)


def dreamt(generator):
    logits = cv.l2t(GUIDED, BATCH.latents, BATCH.attention_mask, text_process=TEXT)
    return cv.categorical_text(logits, BATCH.attention_mask, text_process=TEXT, generator=generator)


@pytest.mark.parametrize(
    ("loss", "name", "make"),
    [
        (text_cycle, "z_hat", made_latent),
        (latent_cycle, "y_hat", made_text),
        (sleep, "y_hat", dreamt),
    ],
)
def test_a_maker_makes_the_first_half_and_learns_nothing(loss, name, make):
    def state():
        GUIDED.null.generator.manual_seed(3)
        return seeded(5)

    generator = state()
    found = loss(maker=GUIDED, generator=generator)
    generator = state()
    wanted = loss(**{name: make(generator)}, generator=generator)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients(found), gradients(wanted))
    assert found != loss(generator=state())  # the live network would make another
    with pytest.raises(ValueError, match=f"`maker` has nothing to make beside a `{name}`"):
        loss(maker=GUIDED, **{name: make(generator)})
    if loss is not sleep:
        given = {"bridge": "gumbel"} if loss is latent_cycle else {}
        with pytest.raises(ValueError, match=r"another `maker` makes the bridge.*use 'detach'"):
            loss(maker=GUIDED, policy=FULL, **given)


def test_a_network_is_no_maker():
    with pytest.raises(TypeError, match=r"`maker` must be a Denoiser.*as_denoiser"):
        text_cycle(maker=TEACHER.module)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"by": "ema"}, "`by` is 'ema'"),
        ({"guidance": 0.0}, "`guidance` must be above 0"),
        ({"guidance": -1.0}, "`guidance` must be a finite number of at least 0"),
        ({"guidance": math.inf}, "`guidance` must be a finite number"),
    ],
)
def test_what_is_no_maker_is_refused(told, message):
    with pytest.raises(ValueError, match=message):
        cv.Maker(**told)
    with pytest.raises(ValueError, match=message):
        replace(cv.Maker(), **told)


def test_a_maker_needs_its_teacher():
    with pytest.raises(ValueError, match="needs a `teacher`"):
        cv.Maker("teacher").denoiser(DENOISER, None, **PROCESSES)
    assert cv.Maker().denoiser(DENOISER, None, **PROCESSES) is DENOISER
    with pytest.raises(ValueError, match="`scale` must be a finite number of at least 0"):
        cv.guided(DENOISER, -1.0, **PROCESSES)
