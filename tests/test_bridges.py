import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import cyclevae as cv
from strategies import masks, quick, seeds, texts

TEXT = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, special_ids=(5,))
FRAMED = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, start_id=3, end_id=4)
BRIDGES = ("argmax", "categorical")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(logits, rows, text=TEXT, temperature=1.0, seed=0):
    """Ids `[rows, s]` drawn for one text's logits `[s, v]`."""
    logits = logits.expand(rows, *logits.shape)
    mask = torch.ones(logits.shape[:2]).bool()
    return cv.categorical_text(
        logits, mask, text_process=text, temperature=temperature, generator=seeded(seed)
    )


# --- both bridges -----------------------------------------------------------------------------


@quick
@given(texts(vocab=7, dtype=torch.float32), st.sampled_from(BRIDGES), seeds)
def test_forbidden_ids_are_never_chosen(text, bridge, seed):
    """Not even where the model is all but sure of them, and at any magnitude."""
    logits, _, mask = text
    forbidden = list(TEXT.forbidden_ids)
    logits[..., forbidden] += 2 * logits.abs().max()
    y_hat = cv.pseudo_text(logits, mask, text_process=TEXT, bridge=bridge, generator=seeded(seed))
    assert y_hat.dtype == torch.int64
    assert (y_hat[~mask] == 0).all()
    assert set(y_hat[mask].tolist()) <= {1, 3, 4, 6}


@quick
@given(texts(vocab=7), st.sampled_from(BRIDGES))
def test_pseudo_texts_are_framed(text, bridge):
    logits, _, mask = text
    y_hat = cv.pseudo_text(logits, mask, text_process=FRAMED, bridge=bridge, generator=seeded())
    for row, kept in zip(y_hat, mask, strict=True):
        assert (row[~kept] == 0).all()
        words = row[kept].tolist()
        if words:
            assert words[-1] == 4
        if len(words) > 1:
            assert words[0] == 3
        assert set(words[1:-1]) <= {1, 5, 6}


@quick
@given(texts(vocab=7))
def test_argmax(text):
    logits, _, mask = text
    y_hat = cv.argmax_text(logits, mask, text_process=TEXT)
    for i, j in mask.nonzero().tolist():
        words = {k: float(logits[i, j, k]) for k in (1, 3, 4, 6)}
        assert words[int(y_hat[i, j])] == max(words.values())


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ids_carry_no_gradient_and_logits_stay_as_they_are(bridge, dtype):
    logits = torch.randn(2, 3, 7, generator=seeded()).to(dtype).requires_grad_()
    before = logits.detach().clone()
    mask = torch.ones(2, 3).bool()
    y_hat = cv.pseudo_text(logits, mask, text_process=TEXT, bridge=bridge, generator=seeded())
    assert not y_hat.requires_grad and not y_hat.is_floating_point()
    assert torch.equal(logits, before)


# --- categorical ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_softmax(temperature):
    logits, rows = torch.randn(3, 7, generator=seeded(1)).double(), 20_000
    y_hat = sample(logits, rows, temperature=temperature)
    words = [1, 3, 4, 6]
    expected = (logits[:, words] / temperature).softmax(dim=1) * rows
    for position in range(3):
        observed = [int((y_hat[:, position] == word).sum()) for word in words]
        assert sum(observed) == rows
        assert stats.chisquare(observed, expected[position].numpy()).pvalue > 1e-3


def test_positions_and_rows_are_drawn_apart():
    y_hat = sample(torch.zeros(2, 7), 4000)
    pairs = [[int(((y_hat == torch.tensor([a, b])).all(1)).sum()) for b in (1, 3, 4, 6)]
             for a in (1, 3, 4, 6)]  # fmt: skip
    assert stats.chi2_contingency(pairs).pvalue > 1e-3
    assert (
        stats.chi2_contingency(
            [[int((y_hat[half::2, 0] == word).sum()) for word in (1, 3, 4, 6)] for half in (0, 1)]
        ).pvalue
        > 1e-3
    )


def test_temperature_limits():
    logits = torch.randn(4, 7, generator=seeded(2))
    best = cv.argmax_text(logits[None], torch.ones(1, 4).bool(), text_process=TEXT)
    for cold in (1e-4, 1e-30):
        assert (sample(logits, 50, temperature=cold) == best).all()
    hot = sample(logits, 4000, temperature=1e6)
    observed = [int((hot == word).sum()) for word in (1, 3, 4, 6)]
    assert stats.chisquare(observed).pvalue > 1e-3


@pytest.mark.parametrize("magnitude", [1e-6, 1e6, 1e30])
def test_a_word_is_drawn_at_any_magnitude(magnitude):
    y_hat = sample(torch.randn(4, 7, generator=seeded(3)) * magnitude, 50)
    assert set(y_hat.flatten().tolist()) <= {1, 3, 4, 6}


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize(("logit", "temperature"), [(1.0, 1e-39), (math.inf, 1.0), (math.nan, 1.0)])
def test_forbidden_ids_are_not_chosen_where_numbers_overflow(bridge, logit, temperature):
    """A pseudo-text of padding or mask ids would look like one, and losses would not show it."""
    logits = torch.zeros(1, 4, 7)
    logits[..., 3:5] = logit
    y_hat = cv.pseudo_text(
        logits,
        torch.ones(1, 4).bool(),
        text_process=TEXT,
        bridge=bridge,
        temperature=temperature,
        generator=seeded(),
    )
    assert set(y_hat.flatten().tolist()) <= {3, 4}


def test_draws_are_reproducible():
    logits = torch.zeros(20, 7)
    assert torch.equal(sample(logits, 3, seed=5), sample(logits, 3, seed=5))
    assert not torch.equal(sample(logits, 3, seed=5), sample(logits, 3, seed=6))


def test_pseudo_text_is_the_named_bridge():
    logits, mask = torch.randn(2, 3, 7, generator=seeded()), torch.ones(2, 3).bool()
    options = {"text_process": TEXT}
    hot = options | {"temperature": 9.0}
    argmax = cv.argmax_text(logits, mask, **options)
    drawn = cv.categorical_text(logits, mask, generator=seeded(), **hot)
    assert torch.equal(cv.pseudo_text(logits, mask, **hot), argmax)
    again = cv.pseudo_text(logits, mask, bridge="categorical", generator=seeded(), **hot)
    assert torch.equal(again, drawn) and not torch.equal(drawn, argmax)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperatures(temperature):
    with pytest.raises(ValueError, match="`temperature` must be"):
        sample(torch.zeros(2, 7), 1, temperature=temperature)


# --- lengths ----------------------------------------------------------------------------------


@quick
@given(masks(), st.integers(0, 6), seeds)
def test_lengths_are_those_of_the_batchs_texts(mask, rows, seed):
    drawn = cv.draw_lengths(mask, rows, generator=seeded(seed))
    assert drawn.shape == (rows, mask.shape[1]) and drawn.dtype == torch.bool
    assert {tuple(row) for row in drawn.tolist()} <= {tuple(row) for row in mask.tolist()}
    assert torch.equal(drawn, cv.draw_lengths(mask, rows, generator=seeded(seed)))


def test_every_length_is_drawn_alike():
    mask = torch.arange(4) < torch.tensor([[1], [2], [4]])
    lengths = cv.draw_lengths(mask, 6000, generator=seeded()).sum(dim=1)
    observed = [int((lengths == n).sum()) for n in (1, 2, 4)]
    assert stats.chisquare(observed).pvalue > 1e-3


def test_no_text_to_take_a_length_from():
    with pytest.raises(ValueError, match="the batch's texts, and it holds none; give `pseudo_text"):
        cv.draw_lengths(torch.ones(0, 3).bool(), 2)
