"""A model that has learned nothing is said to be at chance, whatever else is well with it."""

import math

import pytest
import torch

import cyclevae as cv
from cyclevae.diagnostics import Chance, Retrieval, cycle_report, verdicts
from cyclevae.diagnostics.chance import chance
from cyclevae.testing import ToyNetwork
from toys import PROCESSES, Toy, batch, encode, read

WORDS = 24


def found(report):
    return {verdict.name: verdict.ok for verdict in report.verdicts}


@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_an_untrained_model_is_at_chance(seed, framed):
    """Also where a first and a last token, which are placed, are right in every row."""
    torch.manual_seed(seed)
    text = cv.TextProcess(mask_id=0, vocab_size=WORDS + 4, pad_id=1)
    if framed:
        text = cv.TextProcess(mask_id=0, vocab_size=WORDS + 4, pad_id=1, start_id=2, end_id=3)
    denoiser = cv.as_denoiser(ToyNetwork(WORDS + 4, 8))
    mask = torch.arange(6) < torch.randint(3, 7, (128, 1))
    tokens = text.frame(torch.randint(4, WORDS + 4, (128, 6)), mask)
    pairs = cv.Batch(tokens, mask, torch.randn(128, 8))
    process = cv.LatentProcess(prediction="v", shape=(8,))
    report = cycle_report(denoiser, pairs, text_process=text, latent_process=process, samples=1)
    assert found(report)["decoder at chance"] is False
    assert found(report)["encoder at chance"] is False
    assert "decoder at chance" in report.summary and "encoder at chance" in str(report)


def test_what_has_learned_is_not_at_chance():
    report = cycle_report(Toy(), batch(), samples=1, **PROCESSES)
    assert all(found(report).values())
    assert report.summary == "9 of 9 pitfalls tested on 64 pairs; none of them found"
    half = Toy(lambda tokens: 0.3 * encode(tokens), lambda z: 0.2 * read(z).clamp(min=-20))
    report = cycle_report(half, batch(), samples=1, **PROCESSES)
    assert found(report)["decoder at chance"] and found(report)["encoder at chance"]


def test_the_guess_is_of_other_rows_and_of_chosen_words():
    tokens = torch.tensor([[3, 5], [3, 6], [3, 7], [3, 8], [4, 5], [3, 6]])
    mask = torch.ones_like(tokens).bool()
    logits = torch.nn.functional.one_hot(tokens, 9).float()
    latents = torch.arange(6.0)[:, None] // 2
    measured = chance(logits, tokens, mask, latents)
    # position 0: five of six; position 1: 7 is guessed where 5, 7, 5 are not, 6 where 5, 7, 5 are
    assert measured.accuracy == 1 and measured.words == 12
    assert measured.guess == pytest.approx(5 / 12)
    first = -(5 * math.log(5 / 6) + math.log(1 / 6))
    second = -(4 * math.log(2 / 6) + 2 * math.log(1 / 6))
    assert measured.entropy == pytest.approx((first + second) / 12)
    assert measured.alike == pytest.approx(2 / 6)
    masked = mask.clone()
    masked[:, 0] = False
    assert chance(logits, tokens, masked, latents).guess == 0


def decoder(accuracy, guess=0.1, words=10_000, loss=3.0, entropy=3.0):
    return verdicts.decoder_at_chance(Chance(words, accuracy, guess, loss, entropy, 0.01))


def test_what_luck_can_do():
    assert decoder(0.1).ok is False and "10.0% of 10000 words" in decoder(0.1).sentence
    assert decoder(0.11).ok is False and decoder(0.13).ok is True
    assert decoder(0.1, loss=2.6).ok is True  # where guesses agree but odds do not
    assert decoder(0.12, words=30).ok is None and decoder(0.05, words=30).ok is False
    assert decoder(0.6, words=30).ok is True
    assert decoder(0.0, words=0).ok is None
    assert decoder(0.1, loss=math.nan).ok is False
    assert decoder(1.0, guess=1.0).ok is False  # of texts that are all alike

    def encoder(error, recall, alike=0.01, rows=100):
        return verdicts.encoder_at_chance(error, Retrieval(recall, 0.0, 0.0), alike, rows).ok

    assert encoder(0.9, 0.0) is True and encoder(0.99, 0.01) is False
    assert encoder(5.0, 0.5) is True  # another scale
    assert encoder(1.0, 0.2, alike=1 / 16, rows=16) is True
    assert encoder(1.0, 0.125, alike=1 / 16, rows=16) is None
    assert encoder(math.nan, 0.01) is False


@pytest.mark.parametrize("judge", [verdicts.ignored_latent])
@pytest.mark.parametrize(
    "numbers", [(math.nan, 1.0, 9.0), (math.nan,) * 3, (math.nan, 0.1, math.inf)]
)
def test_what_is_no_number_was_not_heard(judge, numbers):
    assert judge(*numbers).ok is False
    assert verdicts.ignored_text(*numbers[:2], 1.0, numbers[2]).ok is False
    assert verdicts.ignored_latent(1.0, math.nan, 9.0).ok is None


@pytest.mark.unhooked
def test_a_decoder_that_diverged_is_named():
    with pytest.raises(ValueError, match=r"logits must be finite, got NaN.*has training diverged"):
        cycle_report(Toy(read=lambda z: read(z) * math.nan), batch(), **PROCESSES)
