"""Text processes of other noise than masks: their laws, and what they refuse."""

import math
from dataclasses import dataclass

import pytest
import torch

import cyclevae as cv

MASK = 2
UNIFORM = cv.UniformTextProcess(vocab_size=7, pad_id=0)
HYBRID = cv.HybridTextProcess(MASK, 7, pad_id=0, p_uniform=0.3)


class Late(cv.TextProcess):
    def shares(self, time):
        return cv.Shares(1 - time**2, time**2, torch.zeros_like(time))


class Both(cv.TextProcess):
    def shares(self, time):
        return cv.Shares(1 - time, time / 2, time / 2)


KINDS = {
    "mask": cv.TextProcess(MASK, 7, pad_id=0),
    "late": Late(MASK, 7, pad_id=0),
    "uniform": UNIFORM,
    "hybrid": HYBRID,
    "both": Both(MASK, 7, pad_id=0),
}
every_kind = pytest.mark.parametrize("process", KINDS.values(), ids=KINDS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@every_kind
def test_words_become_noise_in_these_shares(process):
    rows, length, time = 4, 20_000, torch.tensor([0.0, 0.2, 0.7, 1.0])
    tokens = torch.full((rows, length), 4)
    mask = torch.arange(length).expand(rows, -1) < length - 1000
    noised, counted = process.noised(tokens, mask, time, generator=seeded())
    again = process.noised(tokens, mask, time, generator=seeded()).tokens
    assert torch.equal(noised, again) and not noised[~mask].any()  # padding is the id 0
    words = [i for i in range(7) if i != process.mask_id]
    for row, kept, masked, random in zip(noised, *process.shares(time), strict=True):
        law = torch.zeros(7)
        law[words] = random / len(words)
        law[4] += kept
        if process.mask_id is not None:
            law[MASK] = masked
        found = torch.bincount(row[:-1000], minlength=7) / (length - 1000)
        assert ((found - law).abs() <= 4 * (law * (1 - law) / (length - 1000)).sqrt() + 1e-7).all()
    assert torch.equal(counted, mask if process.replaces else noised == MASK)
    start = process.at_full_noise(mask, generator=seeded())
    found = torch.bincount(start[mask], minlength=7) / mask.sum()
    assert ((found - law).abs() <= 4 * (law * (1 - law) / mask.sum()).sqrt() + 1e-7).all()
    assert not start[~mask].any()


def test_the_mixture_of_gidd():
    """Half of the time as many random words as its name says, and masks alone at full noise."""
    kept, masked, random = HYBRID.shares(torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(random, torch.tensor([0.3, 0.0]))
    torch.testing.assert_close(masked, torch.tensor([0.35, 1.0]))
    torch.testing.assert_close(kept, torch.tensor([0.35, 0.0]))
    mask = torch.tensor([[True, True, False]])
    assert HYBRID.at_full_noise(mask).tolist() == [[2, 2, 0]]


@every_kind
def test_the_time_of_a_share_of_noise(process):
    hidden = torch.tensor([0.0, 0.1, 0.5, 0.99, 1.0])
    found = 1 - process.shares(process.time_of(hidden)).kept
    torch.testing.assert_close(found, hidden, rtol=0, atol=1e-3)
    torch.testing.assert_close(found[1:], hidden[1:])


def test_taught_padding_is_noised_too():
    text = cv.UniformTextProcess(vocab_size=50_000, pad_id=0, taught_padding="first")
    mask = torch.tensor([[True, True, False, False]])
    noised, counted = text.noised(torch.tensor([[3, 4, 9, 9]]), mask, torch.ones(1))
    assert counted.tolist() == [[True, True, True, False]]
    assert noised[0, 2] != 0 and noised[0, 3] == 0


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (0.5, 0.25),
        (1, 1.0),
        (cv.TimePolicy("uniform"), 1 / 3),
        (cv.TimePolicy("uniform", low=0.5), 7 / 12),
        (cv.TimePolicy("full", high=0.5), 0.25),
        (cv.TimePolicy("full", high=cv.anneal(0.5, 0.9, steps=10)), None),
    ],
)
def test_the_share_of_words_that_count(time, expected):
    assert KINDS["late"].counted_share(time) == (expected and pytest.approx(expected, abs=1e-6))
    assert UNIFORM.counted_share(time) == 1
    average = time.average() if isinstance(time, cv.TimePolicy) else time
    assert KINDS["mask"].counted_share(time) == average


def test_a_logit_normal_share():
    time = cv.TimePolicy("logit_normal", mean=1.0)
    drawn = time(100_000, generator=seeded()).square().mean().item()
    assert KINDS["late"].counted_share(time) == pytest.approx(drawn, abs=1e-3)


class Tokenizer:
    mask_token_id, pad_token_id = 4, 0
    all_special_ids = (0, 2, 3, 4)

    def __len__(self):
        return 100

    def encode(self, text, add_special_tokens=True):
        return [2, 50, 3] if add_special_tokens else [50]


def test_ids_are_read_off_a_tokenizer():
    uniform = cv.UniformTextProcess.from_tokenizer(Tokenizer())
    hybrid = cv.HybridTextProcess.from_tokenizer(Tokenizer(), p_uniform=0.1, taught_padding="all")
    assert (uniform.mask_id, uniform.pad_id, uniform.start_id, uniform.end_id) == (None, 0, 2, 3)
    assert 4 in uniform.forbidden_ids and uniform.null_id == 1
    assert (hybrid.mask_id, hybrid.p_uniform, hybrid.taught_padding) == (4, 0.1, "all")


def with_shares(*found):
    class Wrong(cv.TextProcess):
        def shares(self, time):
            return cv.Shares(*(share(time) for share in found))

    return Wrong(MASK, 7)


class Unmasked(cv.UniformTextProcess):
    def shares(self, time):
        return cv.Shares(1 - time, time, 0 * time)


class Steep(Late):
    def slopes(self, time):
        return super().slopes(time)


REFUSED = {
    "a mask in uniform noise": (
        lambda: cv.UniformTextProcess(7, mask_id=2),
        r"`mask_id` is 2, and uniform noise has no mask: leave it out .*HybridTextProcess",
    ),
    "no mask": (lambda: cv.TextProcess(None, 7), "`mask_id` must be an integer id, got None"),
    "no mask to mix": (
        lambda: cv.HybridTextProcess(None, 7, p_uniform=0.1),
        "`mask_id` must be an",
    ),
    "masks alone": (lambda: cv.HybridTextProcess(2, 7, p_uniform=0), "use TextProcess for masks"),
    "all uniform": (lambda: cv.HybridTextProcess(2, 7, p_uniform=1), "between 0 and 1, got 1"),
    "gamma": (lambda: cv.HybridTextProcess(2, 7, p_uniform=0.1, gamma=4), "above 2 random words"),
    "sum": (lambda: with_shares(lambda t: 1 - t, lambda t: t, lambda t: t), "must add up to 1"),
    "ends": (
        lambda: with_shares(lambda t: 1 - t / 2, lambda t: t / 2, torch.zeros_like),
        "none at time 1, and the shares that are kept are 1 and 0.5: mend `shares` of Wrong",
    ),
    "words that come back": (
        lambda: with_shares(
            lambda t: 1 - t - 0.3 * (2 * math.pi * t).sin() * t,
            lambda t: t + 0.3 * (2 * math.pi * t).sin() * t,
            torch.zeros_like,
        ),
        "words become the mask at a rate below 0, .* as if noise were taken back: mend `shares`",
    ),
    "slopes": (
        lambda: Steep(MASK, 7),
        "`slopes` of Steep are not the derivatives of its `shares`: kept",
    ),
    "masks without a mask": (lambda: Unmasked(vocab_size=7), "of Unmasked mask words, and it has"),
    "full masks": (lambda: UNIFORM.fully_masked(torch.ones(1, 2) > 0), "use `at_full_noise`"),
    "masking": (
        lambda: UNIFORM.mask(torch.ones(1, 2).long(), torch.ones(1, 2) > 0, torch.ones(1)),
        "UniformTextProcess has no mask: use `noised`",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_right_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_mask_method_of_ones_own_is_refused():
    with pytest.raises(TypeError, match="Old has a `mask` of its own, which no loss would call"):

        class Old(cv.TextProcess):
            def mask(self, *arguments, **options):
                return arguments


@dataclass(frozen=True)
class Rare(cv.TextProcess):
    """Masks a fifth as many words, and tells no one."""

    slower: float = 5.0

    def noised(self, tokens, attention_mask, time, *, generator=None):
        return super().noised(tokens, attention_mask, time / self.slower, generator=generator)


class Told(Rare):
    def weigh(self, errors, time):
        return self.slower * super().weigh(errors, time)


def test_noise_of_ones_own_needs_weights_of_its_own():
    processes = {
        "text_process": Rare(2, 7, pad_id=0),
        "latent_process": cv.LatentProcess(shape=(4,)),
    }
    message = "Rare has a noise of its own, and weighs errors in the bound as TextProcess"
    for term in (cv.Unconditional(), cv.TextMarginal(), cv.Text(weighting="bound")):
        with pytest.raises(ValueError, match=f"`terms`: {term.name}: {message}"):
            cv.CycleObjective(**processes, terms=[term])
        cv.CycleObjective(Told(2, 7), processes["latent_process"], [term])
    cv.CycleObjective(**processes, terms=[cv.Text()])
    rloo = cv.TextBridge("rloo", marginal_weight=0.1)
    with pytest.raises(ValueError, match=message):
        term = cv.CycleLatent(bridge=rloo, policy=cv.GradientPolicy("full"))
        cv.CycleObjective(**processes, terms=[term])

    class Unigram(cv.UniformTextProcess):
        def noise(self, attention_mask, time, *, generator=None):
            return self.pad(torch.full(attention_mask.shape, 5), attention_mask)

        def weigh(self, errors, time):
            return errors

    with pytest.raises(
        ValueError, match=r"Unigram has a noise of its own.*: say how it differs by"
    ):
        Unigram(vocab_size=7).check_bound()
    errors = torch.ones(1, 1)
    assert Told(2, 7).weigh(errors, torch.tensor([0.5])).item() == 10
