"""Decoding with the cycle as critic, against an enumeration of a small language."""

import math

import pytest
import torch
from torch import nn

import cyclevae as cv
from analytic import Perfect
from cyclevae.testing import toy_batch, toy_denoiser
from oracles import Spy

TEXT = cv.TextProcess(mask_id=2, vocab_size=6, pad_id=0, special_ids=(1,))
LATENT = cv.LatentProcess("continuous_cosine", prediction="x0", shape=(3,))
SMALL = {"text_process": TEXT, "latent_process": LATENT}
DENOISER, TOY_TEXT, TOY_LATENT = toy_denoiser(seed=0)
TOY = {"text_process": TOY_TEXT, "latent_process": TOY_LATENT}
_, MASK, Z = toy_batch(seed=0)[:3]


def seed(number=0):
    return torch.Generator().manual_seed(number)


def latents(rows, of=0):
    return torch.randn(rows, 3, generator=seed(of), dtype=torch.float64)


def nearest(world, z, lengths, cosine=False):
    """Over every text of these lengths: the one whose mean comes nearest, and how near."""
    found = []
    for n in lengths:
        for text, mean in zip(world.texts[n].tolist(), world.means[n].tolist(), strict=True):
            if cosine:
                dot = sum(a * b for a, b in zip(z, mean, strict=True))
                norms = [math.sqrt(sum(a * a for a in v)) for v in (z, mean)]
                found.append((1 - dot / norms[0] / norms[1], text))
            else:
                found.append((sum((a - b) ** 2 for a, b in zip(z, mean, strict=True)) / 3, text))
    return min(found)


@pytest.mark.parametrize(
    ("lengths", "distance"), [("given", "mse"), ("given", "cosine"), ("tried", "mse")]
)
def test_the_choice_is_that_of_a_search_through_all_texts(lengths, distance):
    world, z = Perfect(), latents(3)
    mask = torch.tensor([[True, False], [True, True]])
    if lengths == "given":
        mask = mask[[1, 0, 1]]
    best = cv.best_text(
        world,
        z,
        mask,
        **SMALL,
        samples=100,  # of at most 9 texts, none of which is rare at this temperature
        temperature=50.0,
        steps=2,
        length=lengths,
        distance=distance,
        generator=seed(),
    )
    for i, row in enumerate(z.tolist()):
        tried = (1, 2) if lengths == "tried" else (int(mask[i].sum()),)
        error, text = nearest(world, row, tried, cosine=distance == "cosine")
        assert best.tokens[i, best.attention_mask[i]].tolist() == text
        assert best.scores[i].item() == pytest.approx(error, rel=1e-6)
        assert (best.tokens[i, ~best.attention_mask[i]] == 0).all()


@pytest.mark.parametrize("lengths", ["given", "drawn", "tried"])
@pytest.mark.parametrize("text", [TOY_TEXT, cv.UniformTextProcess(vocab_size=7, pad_id=0)])
def test_samples_at_once_change_memory_alone(lengths, text):
    def found(at_once):
        spy = Spy(DENOISER)
        best = cv.best_text(
            spy,
            Z,
            MASK,
            text_process=text,
            latent_process=TOY_LATENT,
            samples=7,
            steps=3,
            length=lengths,
            at_once=at_once,
            generator=seed(),
        )
        return best, spy.calls

    (together, calls), (some, _), (apart, single) = (found(k) for k in (None, 3, 1))
    assert max(len(call["tokens"]) for call in single) == 3
    assert max(len(call["tokens"]) for call in calls) == 21
    for other in (some, apart):
        assert torch.equal(other.tokens, together.tokens)
        assert torch.equal(other.attention_mask, together.attention_mask)
        torch.testing.assert_close(other.scores, together.scores)
    shared = lengths != "tried" and not text.replaces
    decoder = [call for call in single if call["need"] == "logits"]
    assert len(decoder) == (1 + 7 * 2 if shared else 7 * 3)
    assert len(single) - len(decoder) == 7


def test_every_sample_is_read_from_the_same_noise_and_the_best_is_kept():
    spy = Spy(DENOISER)
    best = cv.best_text(spy, Z, MASK, **TOY, samples=6, steps=2, at_once=1, generator=seed())
    read = [call for call in spy.calls if call["need"] == "latents"]
    assert len({call["tokens"].numpy().tobytes() for call in read}) > 1
    scores = []
    for call in read:
        assert torch.equal(call["latents"], read[0]["latents"])
        again = DENOISER.denoise(**call).latent_prediction
        z_hat = TOY_LATENT.to_x0(again, call["latents"], call["latent_time"])
        scores.append((z_hat - Z).square().mean(dim=1))
    scores = torch.stack(scores)
    torch.testing.assert_close(best.scores, scores.min(dim=0).values)
    for i, k in enumerate(scores.argmin(dim=0).tolist()):
        assert torch.equal(best.tokens[i], read[k]["tokens"][i])


def test_drawn_lengths_are_those_of_the_given_texts():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    z = torch.randn(40, 4, generator=seed())
    best = cv.best_text(
        DENOISER, z, mask, **TOY, samples=3, steps=1, length="drawn", generator=seed()
    )
    assert set(best.attention_mask.sum(dim=1).tolist()) == {1, 3}


def test_a_predicted_end_cuts_what_is_read_and_what_is_returned():
    text = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, end_id=4, end="predicted")
    spy, mask = Spy(DENOISER), torch.ones(20, 5)
    z = torch.randn(20, 4, generator=seed())
    best = cv.best_text(
        spy, z, mask, text_process=text, latent_process=TOY_LATENT, samples=4, generator=seed()
    )
    assert (best.attention_mask.sum(dim=1) < 5).any()
    for row, kept in zip(best.tokens.tolist(), best.attention_mask.tolist(), strict=True):
        assert kept == [4 not in row[:place] for place in range(5)]
        assert all((word == 0) == (not k) for word, k in zip(row, kept, strict=True))
    tokens = cv.decode(spy, z, mask, text_process=text, temperature=1.0, generator=seed())
    assert all(set(row[row.index(4) + 1 :]) <= {0} for row in tokens.tolist() if 4 in row)


class Dropped(nn.Module):
    """A network in which dropout, if it is on, puts NaN everywhere."""

    def __init__(self):
        super().__init__()
        self.inner, self.dropout = DENOISER.module, nn.Dropout()

    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
        times = {"text_time": text_time, "latent_time": latent_time}
        logits, prediction = self.inner(tokens, latents, **times, attention_mask=attention_mask)
        bad = float("nan") if self.dropout.training else 0.0
        return logits + bad, prediction + bad


def test_the_doors_are_those_of_the_parts_in_evaluation_mode_without_a_graph():
    network = Dropped().train()
    denoiser, tokens = cv.as_denoiser(network), torch.full_like(MASK, 3, dtype=torch.long)
    noise = torch.randn(3, 4, generator=seed())
    bridge = cv.LatentBridge(steps=3, norm=2.0)
    z_hat = cv.encode(denoiser, tokens, MASK, **TOY, bridge=bridge, noise=noise)
    wanted = cv.encode_text(DENOISER, tokens, MASK, **TOY, bridge=bridge, noise=noise)
    assert torch.equal(z_hat, wanted) and not z_hat.requires_grad
    for steps, temperature in ((1, None), (4, None), (4, 0.7)):
        options = {"text_process": TOY_TEXT, "steps": steps, "temperature": temperature}
        text = cv.decode(denoiser, Z, MASK, **options, generator=seed())
        assert torch.equal(text, cv.unmask_text(DENOISER, Z, MASK, **options, generator=seed()))
    best = cv.best_text(denoiser, Z, MASK, **TOY, samples=2, generator=seed())
    assert best.scores.isfinite().all() and not best.scores.requires_grad
    assert network.training and network.dropout.training


def test_latents_of_variable_length_are_told_and_their_padding_is_not_scored():
    class Telling:
        takes_latent_mask = True

        def denoise(self, tokens, latents, *, latent_mask, **state):
            logits = torch.zeros(*tokens.shape, 7)
            return cv.Denoised(logits, tokens[:, :1, None].double().expand_as(latents))

    process = cv.LatentProcess("continuous_cosine", prediction="x0", shape=(2, 1))
    z = torch.tensor([[[4.0], [math.nan]], [[4.0], [5.0]]], dtype=torch.float64)
    kept = torch.tensor([[True, False], [True, True]])
    best = cv.best_text(
        Telling(),
        z,
        torch.ones(2, 1),
        text_process=TOY_TEXT,
        latent_process=process,
        samples=60,
        latent_mask=kept,
        generator=seed(),
    )
    torch.testing.assert_close(best.scores, torch.tensor([0.0, 0.5], dtype=torch.float64))


NAN = Z.masked_fill(torch.tensor([[False], [True], [False]]), math.nan)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "`samples` must be an integer of at least 1, got 0"),
        ({"samples": True}, "`samples` must be an integer of at least 1, got True"),
        ({"steps": 0}, "`steps` must be an integer of at least 1, got 0"),
        ({"at_once": 0}, "`at_once` must be an integer of at least 1, got 0"),
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0"),
        ({"temperature": -1.0}, "`temperature` must be a finite number of at least 0, got -1.0"),
        ({"temperature": math.nan}, "`temperature` must be a finite number"),
        ({"length": "draw"}, "`length` is 'draw'; did you mean 'drawn'?"),
        ({"distance": "cosin"}, "`distance` is 'cosin'; did you mean 'cosine'?"),
        ({"latents": NAN}, "`latents` must be finite, got NaN or infinity in 1 of 3 rows"),
        ({"latents": Z[:, :3]}, "`latents` must be latents of shape [b, 4], got float32 [3, 3]"),
        ({"latents": Z[:2]}, "`attention_mask` and `latents` must have the same number of rows"),
        ({"noise": Z[:2]}, "`noise` and `latents` must have the same number of rows, got 2 and 3"),
        ({"attention_mask": MASK & False}, "`attention_mask` must keep a position or more"),
        ({"attention_mask": MASK[:0], "length": "drawn"}, "`attention_mask`, which has no row"),
        (
            {"samples": 2, "length": "tried"},
            "`samples` must be at least the 3 lengths that are to be tried, got 2",
        ),
        ({"time": 1.5}, "`time` must lie in [0 (clean), 1 (full noise)]"),
    ],
)
def test_refusals_come_before_the_first_pass(options, words):
    spy = Spy(DENOISER)
    arguments = {"latents": Z, "attention_mask": MASK, **TOY, **options}
    with pytest.raises(ValueError) as caught:
        cv.best_text(spy, **arguments)
    assert words in str(caught.value)
    assert not spy.calls


@pytest.mark.unhooked
def test_a_critic_that_has_diverged_is_named():
    class Diverged(Perfect):
        def denoise(self, *args, **state):
            logits, z = super().denoise(*args, **state)
            return cv.Denoised(logits, z * math.nan)

    with pytest.raises(ValueError, match="has training diverged"):
        cv.best_text(Diverged(), latents(2), torch.ones(2, 2), **SMALL, samples=2)
