"""Labels through a noisy channel, against Bayes' rule by enumeration."""

import math

import pytest
import torch

import cyclevae as cv
from analytic import Perfect
from cyclevae.losses import channel
from cyclevae.testing import toy_batch, toy_denoiser
from oracles import Spy

TEXT = cv.TextProcess(mask_id=2, vocab_size=6, pad_id=0, special_ids=(1,))
LATENT = cv.LatentProcess("continuous_cosine", prediction="x0", shape=(3,))
SMALL = {"text_process": TEXT, "latent_process": LATENT}
DENOISER, TOY_TEXT, TOY_LATENT = toy_denoiser(seed=0)
TOY = {"text_process": TOY_TEXT, "latent_process": TOY_LATENT}
TOKENS, MASK, Z = toy_batch(seed=0)[:3]
TOKENS2 = torch.tensor([[3, 0], [4, 5], [5, 5], [5, 0]])
MASK2 = TOKENS2 > 0


def seed(number=0):
    return torch.Generator().manual_seed(number)


def many(rows=7, of=1):
    return torch.randn(rows, 3, generator=seed(of), dtype=torch.float64)


def log_likelihood(world, text, z):
    """Of one decoder pass from full noise: each word by itself, by a sum over all texts."""
    n = len(text)
    joint = [
        p * math.exp(-sum((a - b) ** 2 for a, b in zip(z, mean, strict=True)) / 2 / world.variance)
        for p, mean in zip(world.priors[n].tolist(), world.means[n].tolist(), strict=True)
    ]
    total = 0.0
    for place, word in enumerate(text):
        here = [
            p
            for p, other in zip(joint, world.texts[n].tolist(), strict=True)
            if other[place] == word
        ]
        total += math.log(math.fsum(here) / math.fsum(joint))
    return total


def by_bayes(world, text, candidates, log_prior, likelihood=1.0, variance=math.inf):
    """The posterior mean, over lists."""
    n = len(text)
    mean = world.means[n][world.texts[n].tolist().index(text)].tolist()
    scores = [
        likelihood * log_likelihood(world, text, z)
        + prior
        - sum((a - b) ** 2 for a, b in zip(z, mean, strict=True)) / 2 / variance
        for z, prior in zip(candidates, log_prior, strict=True)
    ]
    mass = [math.exp(score - max(scores)) for score in scores]
    return [
        math.fsum(m * z[d] for m, z in zip(mass, candidates, strict=True)) / math.fsum(mass)
        for d in range(3)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"log_prior": torch.randn(7, generator=seed(2), dtype=torch.float64)},
        {"likelihood": 0.3, "variance": 2.0},
        {"likelihood": 0.3, "variance": 0.1, "at_once": 3},
    ],
)
def test_the_posterior_is_that_of_bayes_rule(options):
    world, candidates = Perfect(), many()
    found = cv.channel_latents(world, TOKENS2, MASK2, candidates, **SMALL, top=None, **options)
    given = {k: options[k] for k in ("likelihood", "variance") if k in options}
    prior = options.get("log_prior", torch.zeros(7)).tolist()
    for i, row in enumerate(TOKENS2.tolist()):
        text = [word for word in row if word]
        wanted = by_bayes(world, text, candidates.tolist(), prior, **given)
        torch.testing.assert_close(
            found[i], torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12
        )


def test_of_one_word_it_is_the_posterior_of_the_generative_model():
    """`sum_j p(z_j) p(y | z_j) z_j`, with `p(y | z)` by the densities of latents given texts."""
    world, candidates = Perfect(longest=1), many()
    tokens = world.texts[1]
    found = cv.channel_latents(world, tokens, tokens > 0, candidates, **SMALL)
    off = (candidates[:, None] - world.means[1]).square().sum(dim=2)
    joint = world.priors[1] * (-off / 2 / world.variance).exp()
    given_z = joint / joint.sum(dim=1, keepdim=True)  # [m, texts]
    wanted = (given_z / given_z.sum(dim=0)).T @ candidates
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("numbers", [1, 100, 2**22])
def test_the_nearest_are_found_whatever_the_parts(numbers, monkeypatch):
    monkeypatch.setattr(channel, "_NUMBERS", numbers)
    z_hat, candidates = many(5, of=3) + 100, many(200) + 100
    prior = torch.zeros(200)
    prior[::3] = -math.inf
    places = channel.nearest(z_hat, candidates, prior, 9)
    distance = torch.cdist(z_hat, candidates)
    distance[:, ::3] = math.inf
    assert torch.equal(places, distance.argsort(dim=1)[:, :9])


def test_only_the_nearest_are_weighed():
    candidates = torch.randn(50, 4, generator=seed())
    noise = torch.randn(3, 4, generator=seed(1))
    options = {"noise": noise, "likelihood": 0.5, **TOY}
    found = cv.channel_latents(DENOISER, TOKENS, MASK, candidates, top=4, **options)
    z_hat = cv.encode(DENOISER, TOKENS, MASK, noise=noise, **TOY)
    for i in range(3):
        near = (candidates - z_hat[i]).square().sum(dim=1).argsort()[:4]
        alone = cv.channel_latents(
            DENOISER,
            TOKENS[i : i + 1],
            MASK[i : i + 1],
            candidates[near],
            top=None,
            **{**options, "noise": noise[i : i + 1]},
        )
        torch.testing.assert_close(found[i : i + 1], alone)


@pytest.mark.parametrize("text", [TOY_TEXT, cv.UniformTextProcess(vocab_size=7, pad_id=0)])
def test_candidates_at_once_change_memory_alone(text):
    candidates = torch.randn(9, 4, generator=seed())
    found = []
    for at_once, passes, rows in ((1, 5, 3), (2, 3, 6), (8, 1, 15)):
        spy = Spy(DENOISER)
        found.append(
            cv.channel_latents(
                spy,
                TOKENS,
                MASK,
                candidates,
                text_process=text,
                latent_process=TOY_LATENT,
                top=5,
                at_once=at_once,
                generator=seed(),
            )
        )
        assert [call["need"] for call in spy.calls] == ["latents"] + ["logits"] * passes
        assert max(len(call["tokens"]) for call in spy.calls) == rows
        torch.testing.assert_close(found[-1], found[0])
        assert not found[-1].requires_grad


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"top": None}, False),
        ({"top": 3}, False),
        ({"top": 2}, True),
        ({"top": None, "variance": 1.0}, True),
        ({"top": 2, "variance": 1.0, "z_hat": Z}, False),
    ],
)
def test_the_encoder_runs_where_its_prediction_is_read(options, asked):
    spy = Spy(DENOISER)
    cv.channel_latents(spy, TOKENS, MASK, Z, **TOY, **options)
    assert ("latents" in {call["need"] for call in spy.calls}) is asked


def test_a_candidate_left_out_weighs_nothing_even_among_the_nearest():
    """Also where fewer are left than are asked for."""
    candidates = torch.cat([Z, Z + 1, Z - 1])
    prior = torch.full((9,), -math.inf).index_fill(0, torch.tensor([0, 5]), 0.0)
    wanted = cv.channel_latents(DENOISER, TOKENS, MASK, candidates[[0, 5]], **TOY)
    for top in (None, 2, 4, 8):
        found = cv.channel_latents(
            DENOISER, TOKENS, MASK, candidates, **TOY, top=top, log_prior=prior
        )
        torch.testing.assert_close(found, wanted)


NAN = Z.masked_fill(torch.tensor([[False], [True], [False]]), math.nan)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": Z[:0]}, "`candidates` holds no latent"),
        ({"candidates": NAN}, "`candidates` must be finite, got NaN or infinity in 1 of 3 rows"),
        ({"candidates": Z[:, :3]}, "`candidates` must be latents of shape [b, 4]"),
        ({"z_hat": NAN}, "`z_hat` must be finite"),
        ({"z_hat": Z[:2]}, "`z_hat` and `tokens` must have the same number of rows, got 2 and 3"),
        ({"noise": Z[:2]}, "`noise` and `tokens` must have the same number of rows, got 2 and 3"),
        ({"top": 0}, "`top` must be an integer of at least 1, got 0"),
        ({"at_once": 0}, "`at_once` must be an integer of at least 1, got 0"),
        ({"likelihood": 0.0}, "`likelihood` must be above 0, got 0"),
        ({"variance": -1.0}, "`variance` must be a finite number of at least 0, got -1.0"),
        ({"log_prior": torch.zeros(2)}, "`log_prior` must be floats of shape [m] = [3]"),
        (
            {"log_prior": torch.full((3,), math.nan)},
            "`log_prior` must be finite, or minus infinity",
        ),
        ({"log_prior": torch.full((3,), -math.inf)}, "which leaves no candidate"),
        ({"attention_mask": MASK & False}, "`attention_mask` must keep a position or more"),
        ({"tokens": TOKENS + 4}, "`tokens` must hold ids in [0, 7)"),
    ],
)
def test_refusals_come_before_the_first_pass(options, words):
    spy = Spy(DENOISER)
    arguments = {"tokens": TOKENS, "attention_mask": MASK, "candidates": Z, **TOY, **options}
    with pytest.raises(ValueError) as caught:
        cv.channel_latents(spy, **arguments)
    assert words in str(caught.value)
    assert not spy.calls
