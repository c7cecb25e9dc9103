"""K-step unmasking, against a loop that reveals one word after another."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import cyclevae as cv
import oracles_bridges as oracles
from cyclevae.bridges.unmasking import unmask_text
from cyclevae.testing import toy_denoiser
from oracles import Spy
from strategies import masks, quick, seeds

PLAIN = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0)
FRAMED = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, special_ids=(5,), start_id=3, end_id=4)
PREDICTED = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, end_id=4, end="predicted")


class Telling(nn.Module):
    """Logits that depend on every word seen, and on the time, so that each pass is another."""

    def __init__(self, length=6, vocab_size=7):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.places = nn.Parameter(torch.randn(length, vocab_size, generator=generator).double())
        self.words = nn.Parameter(
            torch.randn(length, vocab_size, length, vocab_size, generator=generator).double()
        )

    def forward(self, tokens, latents, *, text_time, attention_mask, **_):
        length = tokens.shape[1]
        seen = torch.nn.functional.one_hot(tokens, 7) * attention_mask[..., None]
        table = self.words[:length, :, :length]
        logits = torch.einsum("bjw,jwlv->blv", seen.double(), table) + self.places[:length]
        return logits + latents[:, None, :] * (1 + text_time[:, None, None]), latents


def telling():
    return Spy(cv.as_denoiser(Telling()))


def latents_of(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 7, generator=generator, dtype=torch.float64)


def by_hand(network, z, mask, steps, process):
    """One row: pass, rank, reveal; lists and loops."""
    text = [process.mask_id if kept else process.fill_id for kept in mask]
    kept = [j for j in range(len(mask)) if mask[j]]
    placed = {}
    if process.start_id is not None and kept:
        placed[kept[0]] = process.start_id
    if process.end_id is not None and process.end == "placed" and kept:
        placed[kept[-1]] = process.end_id
    open_ = [j for j in kept if j not in placed]
    words, calls = len(open_), []
    for step in range(1, steps + 1):
        masked = len(kept) if step == 1 else len(open_)
        time = 1.0 if step == 1 else masked / max(len(kept), 1)
        calls.append((list(text), time))
        logits = network(
            torch.tensor([text]),
            z[None],
            text_time=torch.tensor([time]),
            attention_mask=torch.tensor([mask]),
        )[0][0]
        chances = {j: oracles.probabilities(logits[j], process.forbidden_ids) for j in open_}
        surest = sorted(open_, key=lambda j: -chances[j].max())
        target = math.ceil(words * step / steps)
        for j in surest[: target - (words - len(open_))]:
            text[j] = int(chances[j].argmax())
            open_.remove(j)
        for j, word in placed.items():
            text[j] = word
    return text, calls


@quick
@given(
    masks(length=6, kept=True),
    st.integers(1, 8),
    st.sampled_from([PLAIN, FRAMED, PREDICTED]),
    seeds,
)
def test_unmasking_is_that_of_a_loop(mask, steps, process, seed):
    spy, z = telling(), latents_of(len(mask), seed)
    y_hat = unmask_text(spy, z, mask, text_process=process, steps=steps)
    assert len(spy.calls) == steps
    for i, row in enumerate(mask.tolist()):
        text, calls = by_hand(spy.module, z[i], row, steps, process)
        assert y_hat[i].tolist() == text
        for call, (tokens, time) in zip(spy.calls, calls, strict=True):
            assert call["tokens"][i].tolist() == tokens
            assert call["text_time"][i].item() == pytest.approx(time)
    for call in spy.calls:
        assert call["need"] == "logits" and not call["latent_time"].any()
        assert torch.equal(call["latents"], z) and torch.equal(call["attention_mask"], mask)


@quick
@given(masks(length=6, kept=True), st.integers(2, 8), st.sampled_from([PLAIN, FRAMED]), seeds)
def test_every_step_reveals_and_none_takes_back(mask, steps, process, seed):
    spy = telling()
    y_hat = unmask_text(spy, latents_of(len(mask), seed), mask, text_process=process, steps=steps)
    seen = [call["tokens"] for call in spy.calls] + [y_hat]
    chosen = process.chosen(mask)
    words = chosen.sum(dim=1)
    for step, (before, after) in enumerate(pairwise(seen), start=1):
        revealed = before != process.mask_id
        assert torch.equal(after[revealed], before[revealed])
        assert (after[~mask] == 0).all()
        standing = (chosen & (after != process.mask_id)).sum(dim=1)
        assert torch.equal(standing, (words * step / steps).ceil().long())
        if process is FRAMED:
            assert torch.equal(after[mask & ~chosen], process.frame(after, mask)[mask & ~chosen])
    assert not torch.isin(y_hat[chosen], torch.tensor(process.forbidden_ids)).any()


@quick
@given(masks(kept=True), st.sampled_from([PLAIN, FRAMED, PREDICTED]), seeds)
def test_one_step_is_the_argmax_of_a_plain_pass(mask, process, seed):
    denoiser, _, _ = toy_denoiser(seed=1)
    spy, z = Spy(denoiser), torch.randn(len(mask), 4, generator=torch.Generator().manual_seed(seed))
    logits = cv.l2t(spy, z, mask, text_process=process)
    y_hat = unmask_text(spy, z, mask, text_process=process, steps=1)
    assert torch.equal(y_hat, cv.argmax_text(logits, mask, text_process=process))
    plain, first = spy.calls
    assert plain.keys() == first.keys()
    for name, value in plain.items():
        assert value == first[name] if name == "need" else torch.equal(value, first[name]), name


@pytest.mark.parametrize("steps", [1, 3])
def test_logits_that_are_there_save_a_pass(steps):
    spy, z, mask = telling(), latents_of(3), torch.ones(3, 6).bool()
    logits = cv.l2t(spy.denoiser, z, mask, text_process=PLAIN)
    whole = unmask_text(spy, z, mask, text_process=PLAIN, steps=steps)
    assert len(spy.calls) == steps
    saved = unmask_text(spy, z, mask, text_process=PLAIN, steps=steps, logits=logits)
    assert len(spy.calls) == 2 * steps - 1
    assert torch.equal(saved, whole)


def test_more_steps_read_what_was_written():
    """Where words depend on each other, one pass writes them as if they did not."""
    spy, z, mask = telling(), latents_of(8), torch.ones(8, 6).bool()
    one, six = (unmask_text(spy, z, mask, text_process=PLAIN, steps=k) for k in (1, 6))
    assert not torch.equal(one, six)


def test_nobody_learns():
    spy, mask = telling(), torch.ones(2, 6).bool()
    y_hat = unmask_text(spy, latents_of(2).requires_grad_(), mask, text_process=PLAIN, steps=2)
    assert not y_hat.is_floating_point() and not y_hat.requires_grad
    logits = cv.l2t(spy, latents_of(2), mask, text_process=PLAIN)
    assert logits.requires_grad  # and may be given
    unmask_text(spy, latents_of(2), mask, text_process=PLAIN, steps=2, logits=logits)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_words_are_drawn_where_a_temperature_is_given(temperature):
    """In one step, from the distribution of `categorical_text`, bit for bit."""
    spy, z, mask = telling(), latents_of(1).expand(4000, -1), torch.ones(4000, 2).bool()
    options = {"text_process": PLAIN, "temperature": temperature}
    generator = torch.Generator().manual_seed(0)
    y_hat = unmask_text(spy, z, mask, steps=1, generator=generator, **options)
    logits = cv.l2t(spy, z, mask, text_process=PLAIN)
    generator.manual_seed(0)
    assert torch.equal(y_hat, cv.categorical_text(logits, mask, generator=generator, **options))


def test_the_more_probable_of_two_drawn_words_stands_first():
    """Exactly: P(first revealed = j, w) is the chance that w was drawn at j and won."""
    rows, temperature = 20_000, 1.5
    spy, z = telling(), latents_of(1).expand(20_000, -1)
    mask = torch.ones(rows, 2).bool()
    generator = torch.Generator().manual_seed(0)
    unmask_text(
        spy,
        z,
        mask,
        text_process=PLAIN,
        steps=2,
        temperature=temperature,
        generator=generator,
    )
    logits = cv.l2t(spy, z[:1], mask[:1], text_process=PLAIN)[0]
    chances = [oracles.probabilities(logits[j], (0, 2), temperature) for j in (0, 1)]
    expected, first = {}, spy.calls[1]["tokens"]
    for v in (1, 3, 4, 5, 6):
        for w in (1, 3, 4, 5, 6):
            left = (v, 2) if chances[0][v] >= chances[1][w] else (2, w)
            expected[left] = expected.get(left, 0.0) + rows * chances[0][v] * chances[1][w]
    observed = [int((first == torch.tensor(key)).all(dim=1).sum()) for key in expected]
    assert sum(observed) == rows
    assert stats.chisquare(observed, list(expected.values())).pvalue > 1e-3


def test_confidence_is_the_probability_itself():
    """One near rival or four far ones: at a temperature of 2 the order would be the other."""
    logits = torch.full((1, 2, 7), -9.0)
    logits[0, 0, 3:5] = torch.tensor([4.0, 3.2])
    logits[0, 1, [3, 1, 4, 5, 6]] = torch.tensor([4.0, 1.5, 1.5, 1.5, 1.5])
    spy, mask = telling(), torch.ones(1, 2).bool()
    unmask_text(spy, latents_of(1), mask, text_process=PLAIN, steps=2, logits=logits)
    assert spy.calls[0]["tokens"].tolist() == [[2, 3]]


def test_ties_go_from_left_to_right():
    class Even(nn.Module):
        def forward(self, tokens, latents, **_):
            return torch.zeros(*tokens.shape, 7), latents

    spy = Spy(cv.as_denoiser(Even()))
    unmask_text(spy, torch.zeros(1, 4), torch.ones(1, 4), text_process=PLAIN, steps=4)
    texts = [call["tokens"].tolist() for call in spy.calls]
    assert texts == [[[2, 2, 2, 2]], [[1, 2, 2, 2]], [[1, 1, 2, 2]], [[1, 1, 1, 2]]]


def test_logits_that_are_not_finite_still_end_in_a_text():
    class Broken(nn.Module):
        def forward(self, tokens, latents, **_):
            logits = torch.zeros(*tokens.shape, 7)
            logits[:, 1, 3], logits[:, 2, 4] = math.nan, math.inf
            return logits, latents

    y_hat = unmask_text(
        cv.as_denoiser(Broken()), torch.zeros(1, 4), torch.ones(1, 4), text_process=PLAIN, steps=3
    )
    assert set(y_hat.flatten().tolist()) <= {1, 3, 4, 5, 6}


def test_nothing_is_read_back():
    denoiser, text, _ = toy_denoiser()
    denoiser.module.to("meta")
    y_hat = unmask_text(
        denoiser,
        torch.zeros(3, 4, device="meta"),
        torch.ones(3, 5, dtype=torch.bool, device="meta"),
        text_process=text,
        steps=3,
    )
    assert y_hat.shape == (3, 5) and y_hat.is_meta


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 0}, "`steps` must be an integer of at least 1, got 0"),
        ({"steps": 1.5}, "`steps` must be an integer of at least 1, got 1.5"),
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0"),
        ({"logits": torch.zeros(2, 6, 6)}, r"`logits` must be .* 7 ids, got \[2, 6, 6\]"),
        ({"logits": torch.zeros(2, 5, 7)}, r"`attention_mask` must have the shape .* \[2, 5\]"),
        (
            {"attention_mask": torch.ones(3, 6)},
            "`attention_mask` and `latents` must have the same number",
        ),
        ({"attention_mask": torch.ones(2)}, r"`attention_mask` must have shape \[b, s\]"),
        ({"latents": torch.full((2, 7), math.nan)}, "`latents` must be finite"),
    ],
)
def test_bad_arguments(options, expected):
    spy = telling()
    given = {"latents": latents_of(2), "attention_mask": torch.ones(2, 6), "steps": 2, **options}
    with pytest.raises(ValueError, match=expected):
        unmask_text(spy, text_process=PLAIN, **given)
    assert spy.calls == []


UNIFORM = cv.UniformTextProcess(vocab_size=7, pad_id=0, start_id=3, end_id=4)
HYBRID = cv.HybridTextProcess(2, 7, pad_id=0, p_uniform=0.3)


@pytest.mark.parametrize("process", [UNIFORM, HYBRID])
def test_where_noise_is_random_words_they_are_drawn_again(process):
    """Of each pass the surest words stand, and noise of that time is at the other places."""
    spy, rows, steps = telling(), 2000, 3
    z, mask = latents_of(1).expand(rows, -1), torch.arange(6).expand(rows, -1) < 5
    options = {"text_process": process, "steps": steps}
    y_hat, again = (
        unmask_text(spy, z, mask, generator=torch.Generator().manual_seed(0), **options)
        for _ in range(2)
    )
    assert torch.equal(y_hat, again) and len(spy.calls) == 2 * steps
    places = process.chosen(mask)
    words = int(places[0].sum())
    assert (spy.calls[0]["text_time"] == 1).all()
    for step, (call, after) in enumerate(pairwise(spy.calls[:steps]), start=1):
        logits = spy.denoiser.denoise(**call).logits
        drawn = cv.argmax_text(logits, mask, text_process=process)
        sure = process.forbid(logits).softmax(dim=-1).amax(dim=-1).masked_fill(~places, -1)
        order = sure.argsort(dim=1, descending=True)
        due = math.ceil(words * step / steps)
        stand = torch.zeros_like(mask).scatter(1, order[:, :due], True)
        assert torch.equal(after["tokens"][stand], drawn[stand])
        hidden = places & ~stand
        time = process.time_of(torch.tensor([(words - due) / 5]))
        torch.testing.assert_close(after["text_time"], time.expand(rows))
        _, masked, random = process.shares(time)
        law = random / (masked + random) / process.noise_ids * torch.ones(7)
        if process.mask_id is not None:
            law[2] = masked / (masked + random)
        found = torch.bincount(after["tokens"][hidden], minlength=7)
        used, law = law > 0, law.double()
        assert stats.chisquare(found[used], law[used] / law.sum() * found.sum()).pvalue > 1e-3
    last = spy.denoiser.denoise(**spy.calls[steps - 1]).logits
    assert torch.equal(y_hat, cv.argmax_text(last, mask, text_process=process))
    assert not torch.isin(y_hat[places], torch.tensor(process.forbidden_ids)).any()


@pytest.mark.parametrize("process", [UNIFORM, HYBRID])
def test_logits_at_hand_save_the_first_pass_and_its_noise(process):
    spy, z, mask = telling(), latents_of(2), torch.ones(2, 6, dtype=torch.bool)
    logits = cv.l2t(spy, z, mask, text_process=process)
    state = torch.random.get_rng_state()
    one = unmask_text(spy, z, mask, text_process=process, steps=1, logits=logits)
    assert torch.equal(one, cv.argmax_text(logits, mask, text_process=process))
    assert torch.equal(state, torch.random.get_rng_state()) and len(spy.calls) == 1
