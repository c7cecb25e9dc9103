"""RLOO: unbiased, by enumerating every tuple of samples."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import cyclevae as cv
import oracles_bridges as oracles
from cyclevae.bridges.rloo import rloo_surrogate, text_log_prob
from strategies import quick, seeds, texts

PLAIN = cv.TextProcess(mask_id=1, vocab_size=4)
PLACED = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, special_ids=(5,), start_id=3, end_id=4)
PREDICTED = cv.TextProcess(mask_id=2, vocab_size=6, pad_id=0, end_id=4, end="predicted")
WORDS, LENGTH = (0, 2, 3), 2
TEXTS = torch.tensor(oracles.texts(WORDS, LENGTH))  # 9 of them


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def logits_of(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).requires_grad_()


LOGITS = logits_of(LENGTH, 4)
REWARDS = torch.randn(len(TEXTS), generator=seeded(1), dtype=torch.float64) * 3 + 2
CHANCES = torch.tensor(
    [
        math.prod(oracles.probabilities(LOGITS[j], (1,))[w] for j, w in enumerate(text))
        for text in TEXTS.tolist()
    ]
)


def log_probs(tokens, logits=LOGITS, text=PLAIN, **options):
    """Of texts `[k, b, s]` under one position's logits each."""
    logits = logits.expand(tokens.shape[-2], *logits.shape)
    mask = torch.ones(tokens.shape[-2:]).bool()
    return text_log_prob(logits, tokens, mask, text_process=text, **options)


def scores():
    """`d log p(y) / d logits` of every text, flat."""
    found = [torch.autograd.grad(log_p, LOGITS, retain_graph=True)[0] for log_p in
             log_probs(TEXTS)]  # fmt: skip
    return torch.stack(found).flatten(1)


def estimates(samples, rewards=REWARDS):
    """The estimate of every tuple of samples, `[n, s v]`, and the probability of each."""
    index = torch.tensor(list(itertools.product(range(len(TEXTS)), repeat=samples))).T
    logits = LOGITS.expand(index.shape[1], -1, -1).detach().requires_grad_()
    mask = torch.ones(index.shape[1], LENGTH).bool()
    log_p = text_log_prob(logits, TEXTS[index], mask, text_process=PLAIN)
    assert log_p.shape == index.shape
    surrogate = rloo_surrogate(log_p, rewards[index])
    assert surrogate.shape == index.shape[1:]
    gradients = torch.autograd.grad(surrogate.sum(), logits)[0]
    return -gradients.flatten(1), CHANCES[index].prod(dim=0), index


def true_gradient():
    log_p = log_probs(TEXTS)
    return torch.autograd.grad((log_p.exp() * REWARDS).sum(), LOGITS)[0].flatten()


# --- the estimator ----------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_the_mean_over_every_tuple_is_the_true_gradient(samples):
    found, chances, _ = estimates(samples)
    assert chances.sum() == pytest.approx(1, abs=1e-12)
    mean = chances @ found
    torch.testing.assert_close(mean, true_gradient(), rtol=0, atol=1e-12)
    assert mean.norm() > 0.1


@pytest.mark.parametrize("constant", [-7.0, 1e3])
def test_a_constant_added_to_all_rewards_changes_nothing(constant):
    first, shifted = (estimates(3, REWARDS + c)[0] for c in (0.0, constant))
    torch.testing.assert_close(shifted, first, rtol=0, atol=1e-11)


@pytest.mark.parametrize("samples", [2, 3])
def test_an_estimate_is_the_unbiased_covariance_of_rewards_and_scores(samples):
    found, _, index = estimates(samples)
    score = scores().numpy()
    for estimate, chosen in list(zip(found, index.T, strict=True))[:: 7 ** (samples - 2)]:
        for entry in range(score.shape[1]):
            covariance = np.cov(REWARDS[chosen], score[chosen, entry])[0, 1]
            assert float(estimate[entry]) == pytest.approx(covariance, abs=1e-12)


@pytest.mark.parametrize("samples", [2, 3])
def test_a_baseline_that_includes_the_sample_would_shrink_the_gradient(samples):
    """The trap that leaving one out avoids: `(K - 1) / K` of the gradient."""
    _, chances, index = estimates(samples)
    rewards, score = REWARDS[index], scores()[index]
    biased = ((rewards - rewards.mean(dim=0))[..., None] * score).mean(dim=0)
    shrunk = true_gradient() * (samples - 1) / samples
    torch.testing.assert_close(chances @ biased, shrunk, rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_the_variance_is_what_the_formula_says(samples):
    found, chances, _ = estimates(samples)
    mean, score = chances @ found, scores()
    variance = chances @ (found - mean).square().sum(dim=1)
    g = float(true_gradient().square().sum())
    mu = float(CHANCES @ REWARDS)
    spread = float(CHANCES @ (REWARDS - mu).square())
    size = float(CHANCES @ score.square().sum(dim=1))
    both = float(CHANCES @ ((REWARDS - mu).square() * score.square().sum(dim=1)))
    expected = (both - g) / samples + (spread * size + g) / (samples * (samples - 1))
    assert float(variance) == pytest.approx(expected, rel=1e-10)


def test_scores_grow_with_the_length():
    """`E ||s||^2 = sum_l (1 - sum_v p_lv^2)`."""
    p = [oracles.probabilities(LOGITS[j], (1,)) for j in range(LENGTH)]
    expected = sum(1 - (position**2).sum() for position in p)
    size = CHANCES @ scores().square().sum(dim=1)
    assert float(size) == pytest.approx(expected, rel=1e-12)


def test_the_best_constant_baseline():
    """`E[R ||s||^2] / E ||s||^2` has the smallest variance of all constants."""
    size = scores().square().sum(dim=1)
    best = float(CHANCES @ (REWARDS * size) / (CHANCES @ size))

    def variance(baseline):  # of (R - b) s, whose mean does not depend on b
        return float(CHANCES @ ((REWARDS - baseline).square() * size))

    assert variance(best) < min(variance(best + 1e-3), variance(best - 1e-3))
    derivative = (variance(best + 1e-5) - variance(best - 1e-5)) / 2e-5
    assert derivative == pytest.approx(0, abs=1e-8)


def test_by_hand():
    log_p = torch.tensor([[-1.0, -2.0], [-3.0, -1.0], [-2.0, -5.0]], requires_grad=True)
    rewards = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 9.0]], requires_grad=True)
    surrogate = rloo_surrogate(log_p, rewards)
    # advantages: 3 - 0, 0 - 1.5, 0 - 1.5; 0 - 4.5, 0 - 4.5, 9 - 0
    expected = [-(-3 + 4.5 + 3) / 3, -(9 + 4.5 - 45) / 3]
    assert surrogate.tolist() == pytest.approx(expected)
    surrogate.sum().backward()
    np.testing.assert_allclose(log_p.grad.T * 3, [[-3, 1.5, 1.5], [4.5, 4.5, -9]])
    assert rewards.grad is None


def test_equal_rewards_teach_nothing():
    log_p = torch.randn(4, 3, requires_grad=True)
    rloo_surrogate(log_p, torch.full((4, 3), 2.5)).sum().backward()
    assert not log_p.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_half_precision_is_computed_in_fp32(dtype, scale):
    log_p, rewards = (torch.randn(3, 5, generator=seeded(i)).to(dtype) for i in (0, 1))
    rewards = rewards * scale
    wide = rloo_surrogate(log_p.float(), rewards.float())
    got = rloo_surrogate(log_p.requires_grad_(), rewards)
    assert got.dtype == torch.float32 and torch.equal(got, wide)
    got.sum().backward()
    assert log_p.grad.isfinite().all()


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("log_p", "rewards", "expected"),
    [
        ((1, 3), (1, 3), r"\[k, b\] with k of at least 2, because the baseline .* got \[1, 3\]"),
        ((3,), (3,), r"\[k, b\] with k of at least 2.* got \[3\]"),
        ((2, 3), (2, 1), r"`rewards` and `log_probs` must have equal shapes, got \[2, 1\]"),
    ],
)
def test_bad_surrogates(log_p, rewards, expected):
    with pytest.raises(ValueError, match=expected):
        rloo_surrogate(torch.zeros(log_p), torch.zeros(rewards))


# --- the log-probability ----------------------------------------------------------------------


def by_hand(logits, text, mask, process, temperature=1.0):
    """`sum log p` over the drawn words of one text, up to the first predicted end."""
    kept = [j for j in range(len(text)) if mask[j]]
    drawn = list(kept)
    if process.start_id is not None:
        drawn = [j for j in drawn if j != kept[0]]
    if process.end_id is not None and process.end == "placed":
        drawn = [j for j in drawn if j != kept[-1]]
    total = 0.0
    for j in drawn:
        chances = oracles.probabilities(logits[j], process.forbidden_ids, temperature)
        total += math.log(chances[text[j]])
        if process.end == "predicted" and text[j] == process.end_id:
            break
    return total


@quick
@given(texts(vocab=7), seeds, st.sampled_from([0.5, 1.0, 3.0]))
def test_text_log_prob(text, seed, temperature):
    logits, _, mask = text
    logits = logits / logits.abs().max().clamp(min=1) * 9
    options = {"text_process": PLACED, "temperature": temperature}
    tokens = torch.stack(
        [cv.categorical_text(logits, mask, generator=seeded(seed + i), **options) for i in (0, 1)]
    )
    got = text_log_prob(logits, tokens, mask, **options)
    assert got.shape == (2, len(mask))
    for k, i in itertools.product(range(2), range(len(mask))):
        expected = by_hand(logits[i], tokens[k, i].tolist(), mask[i], PLACED, temperature)
        assert float(got[k, i]) == pytest.approx(expected, abs=1e-9)
    one = text_log_prob(logits, tokens[1].int(), mask, **options)
    assert torch.equal(one, got[1])


@pytest.mark.parametrize(
    ("process", "mask"),
    [
        (PLAIN, [1, 1, 1]),
        (PLAIN, [1, 0, 1]),
        (PLACED, [1, 1, 1, 1]),
        (PLACED, [0, 1, 1, 1]),
        (PREDICTED, [1, 1, 1]),
        (PREDICTED, [0, 1, 1]),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_the_probabilities_of_all_texts_sum_to_one(process, mask, temperature):
    """Of the texts that are left where some were framed or cut to the same."""
    mask = torch.tensor([mask]).bool()
    logits = logits_of(1, mask.shape[1], process.vocab_size).detach() * 2
    words = [i for i in range(process.vocab_size) if i not in process.forbidden_ids]
    left = {
        tuple(process.cut(process.frame(torch.tensor([text]), mask), mask)[0][0].tolist())
        for text in oracles.texts(words, mask.shape[1])
    }
    tokens = torch.tensor(sorted(left))[:, None]
    options = {"text_process": process, "temperature": temperature}
    log_p = text_log_prob(logits, tokens, mask, **options)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("process", [PLACED, PREDICTED])
@pytest.mark.slow
def test_it_is_the_distribution_that_is_drawn_from(process):
    rows, mask, temperature = 20_000, torch.ones(1, 4 if process is PLACED else 2).bool(), 0.6
    logits = logits_of(1, mask.shape[1], process.vocab_size).detach()
    many = mask.expand(rows, -1)
    options = {"text_process": process, "temperature": temperature}
    drawn = cv.categorical_text(logits.expand(rows, -1, -1), many, generator=seeded(3), **options)
    left, count = process.cut(drawn, many)[0].unique(dim=0, return_counts=True)
    expected = text_log_prob(logits, left[:, None], mask, **options)[:, 0].exp() * rows
    assert expected.sum() == pytest.approx(rows, rel=1e-9)  # all of them have come up
    assert stats.chisquare(count, expected).pvalue > 1e-3


def test_words_behind_a_predicted_end_do_not_count():
    """They are cut off, so no reward depends on them, and their score would be noise."""
    logits, mask = logits_of(1, 4, 6), torch.tensor([[0, 1, 1, 1]]).bool()
    tokens = torch.tensor([[0, 3, 4, 5]])
    cut, kept = PREDICTED.cut(tokens, mask)
    assert cut.tolist() == [[0, 3, 4, 0]] and kept.tolist() == [[False, True, True, False]]
    got = [
        text_log_prob(logits, text, left, text_process=PREDICTED)
        for text, left in ((tokens, mask), (cut, mask), (cut, kept))
    ]
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])
    assert got[0].item() == pytest.approx(by_hand(logits[0], [0, 3, 4, 5], mask[0], PREDICTED))
    gradient = torch.autograd.grad(got[0].sum(), logits)[0]
    assert gradient[0, 1:3].any(dim=1).all() and not gradient[0, [0, 3]].any()


def test_an_end_that_is_also_the_padding_id():
    """As in GPT-2: what pads a text on its left does not end it."""
    text = cv.TextProcess(mask_id=2, vocab_size=6, pad_id=4, end_id=4, end="predicted")
    tokens, mask = torch.tensor([[4, 3, 4, 3]]), torch.tensor([[0, 1, 1, 1]]).bool()
    cut, kept = text.cut(tokens, mask)
    assert cut.tolist() == [[4, 3, 4, 4]] and kept.tolist() == [[False, True, True, False]]


@quick
@given(texts(vocab=7), seeds)
def test_the_gradient_sums_to_zero_over_the_vocabulary(text, seed):
    logits, _, mask = text
    logits = (logits / logits.abs().max().clamp(min=1)).requires_grad_()
    tokens = cv.categorical_text(logits, mask, text_process=PLACED, generator=seeded(seed))
    total = text_log_prob(logits, tokens, mask, text_process=PLACED, temperature=0.5).sum()
    gradient = torch.autograd.grad(total, logits)[0]
    assert gradient.sum(dim=-1).abs().max() < 1e-12
    assert not gradient[..., list(PLACED.forbidden_ids)].any()
    assert not gradient[~PLACED.chosen(mask)].any()


def test_text_log_prob_gradcheck():
    tokens = torch.tensor([[3, 1, 6, 4], [3, 6, 4, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()

    def log_p(logits):
        return text_log_prob(logits, tokens, mask, text_process=PLACED, temperature=0.7)

    assert torch.autograd.gradcheck(log_p, [logits_of(2, 4, 7)])


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_finite_and_padding_is_not_looked_at(scale, dtype):
    logits = torch.randn(2, 4, 7, generator=seeded()) * scale
    logits[1, 3] = math.nan
    logits = logits.to(dtype).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    tokens = cv.categorical_text(logits, mask, text_process=PLACED, generator=seeded())
    log_p = text_log_prob(logits, tokens, mask, text_process=PLACED)
    assert log_p.dtype == torch.float32 and log_p.isfinite().all()
    assert torch.autograd.grad(log_p.sum(), logits)[0].isfinite().all()


def test_a_text_that_no_draw_can_give():
    logits, mask = torch.zeros(1, 2, 4), torch.ones(1, 2)
    assert text_log_prob(logits, torch.tensor([[1, 3]]), mask, text_process=PLAIN) == -math.inf


@pytest.mark.unhooked
def test_bad_texts():
    logits, mask, tokens = torch.zeros(1, 2, 4), torch.ones(1, 2), torch.zeros(1, 2).long()

    def refused(expected, logits=logits, tokens=tokens, mask=mask, error=ValueError, **options):
        with pytest.raises(error, match=expected):
            text_log_prob(logits, tokens, mask, text_process=PLAIN, **options)

    refused(r"`logits` must be \[b, s, v\]", logits=torch.zeros(1, 2, 5))
    refused(r"`tokens` must hold ids in \[0, 4\)", tokens=tokens + 4)
    refused(r"`attention_mask` must have the shape .* \[1, 3\]", tokens=torch.zeros(1, 3).long())
    refused("`temperature` must be above 0", temperature=0.0)
    refused("`tokens` must hold integer ids", tokens=tokens.float(), error=TypeError)
