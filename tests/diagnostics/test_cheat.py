"""The cheat test: an encoder that hides the text must be caught, an honest one must pass."""

import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.diagnostics import CheatTest, Treatment, cheat_test
from cyclevae.testing import toy_batch, toy_denoiser
from oracles import Spy
from toys import PROCESSES, TEXT, Toy, encode, hidden, pairs, read, read_digits


def cheat(denoiser, **options):
    return cheat_test(denoiser, *pairs(), **PROCESSES, **options)


def test_an_honest_encoder_survives():
    found = cheat(Toy())
    assert found.cycle == found.pairs == 1
    assert found.floor < 0.15  # one of 16 words
    for treatment in found.treatments:
        assert treatment.cycle > 0.95 and treatment.pairs > 0.95, treatment


def test_digits_that_hide_the_text_do_not():
    """The cycle is perfect, and so is the decoder on pairs; yet nothing meaningful crosses."""
    found = cheat(Toy(hidden, read_digits))
    assert found.cycle == found.pairs == 1
    assert found.shuffled < 0.15
    small = {t.name: t.cycle for t in found.treatments if t.size <= 0.1}
    assert set(small) == {"noise 0.03", "noise 0.1", "grid 1/16", "grid 1/4"}
    assert max(small.values()) < 0.3


def test_a_decoder_that_ignores_the_latent_is_no_better_shuffled():
    deaf = Toy(read=lambda z: read(torch.ones_like(z)))
    found = cheat(deaf)
    assert found.cycle == found.pairs == found.shuffled
    assert all(t.cycle == found.cycle for t in found.treatments)


def test_what_crosses():
    spy = Spy(Toy())
    tokens, latents, mask = pairs()
    cheat_test(spy, tokens, latents, mask, noises=(0.5,), grids=(2,), **PROCESSES)
    encoded, cycle, true, shuffled, chance, *treated = spy.calls
    assert encoded["need"] == "latents" and encoded["latent_time"].eq(1).all()
    assert torch.equal(encoded["tokens"], tokens)
    z_hat = encode(tokens)
    assert torch.equal(cycle["latents"], z_hat) and torch.equal(true["latents"], latents)
    assert torch.equal(shuffled["latents"], z_hat.roll(1, 0))
    assert chance["latent_time"].eq(1).all() and chance["latents"].std() > 0.8
    assert torch.equal(chance["latents"], encoded["latents"])
    std = latents.std(0)
    noise = (treated[0]["latents"] - z_hat) / (0.5 * std)
    torch.testing.assert_close(noise, encoded["latents"])
    torch.testing.assert_close(treated[1]["latents"], latents + 0.5 * std * noise)
    for call in treated[2:]:
        steps = call["latents"] / (std / 2)
        torch.testing.assert_close(steps, steps.round())
        assert ((call["latents"] - z_hat).abs() <= std / 4 + 1e-6).all()
    decodings = spy.calls[1:]
    assert all(torch.equal(c["tokens"], TEXT.fully_masked(mask.bool())) for c in decodings)


def test_the_size_of_a_treatment_is_the_change_it_makes():
    tokens = torch.full((4000, 2), 3)
    latents = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * 3
    spy = Spy(Toy())
    found = cheat_test(
        spy, tokens, latents, tokens > 0, noises=(0.2,), grids=(3,), variance=9.0, **PROCESSES
    )
    for treatment, call in zip(found.treatments, spy.calls[6::2], strict=True):
        size = (call["latents"] - latents).square().mean().sqrt() / 3
        assert size.item() == pytest.approx(treatment.size, rel=0.02)


def test_a_given_z_hat_and_the_noise_of_the_bridge():
    spy = Spy(Toy())
    tokens, latents, mask = pairs()
    bridge = cv.LatentBridge(noise=0.5)
    cheat_test(spy, tokens, latents, mask, z_hat=0 * latents, bridge=bridge, **PROCESSES)
    assert all(call["need"] == "logits" for call in spy.calls)
    assert spy.calls[0]["latents"].std().item() == pytest.approx(0.5, abs=0.05)


def test_the_steps_of_the_bridge():
    spy = Spy(Toy())
    processes = PROCESSES | {"latent_process": cv.LatentProcess(prediction="epsilon")}
    cheat_test(spy, *pairs(), bridge=cv.LatentBridge(steps=2), time=0.9, **processes)
    times = [c["latent_time"].unique().item() for c in spy.calls if c["need"] == "latents"]
    assert times == pytest.approx([0.9, 0.45])


def test_padding_never_counts():
    tokens, latents, mask = pairs()
    mask[:, 1] = 0
    wrong = tokens.clone()
    wrong[:, 1] = 3
    found = cheat_test(Toy(), wrong, latents, mask, z_hat=latents, **PROCESSES)
    assert found.cycle == found.pairs == 1


def test_dead_dimensions_are_no_obstacle():
    tokens, latents, mask = pairs()
    still = torch.cat([latents[:, :7], 0 * latents[:, 7:]], dim=1)
    found = cheat_test(Toy(), tokens, still, mask, **PROCESSES)
    assert found.cycle == 1


def test_modes_and_random_state_are_left_alone():
    denoiser, text, latent = toy_denoiser()
    module = denoiser.module
    module.shared = nn.Sequential(module.shared, nn.Dropout(0.5))
    tokens, mask, latents = toy_batch(rows=4)[:3]
    before = torch.get_rng_state()
    options = {"text_process": text, "latent_process": latent}
    assert cheat_test(denoiser, tokens, latents, mask, **options) == cheat_test(
        denoiser, tokens, latents, mask, **options
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in module.modules())
    half = cheat_test(
        denoiser.__class__(module.bfloat16()), tokens, latents.bfloat16(), mask, **options
    )
    assert 0 <= half.cycle <= 1


def test_the_floor():
    assert CheatTest(1.0, 1.0, 0.3, 0.2, ()).floor == 0.3
    assert CheatTest(1.0, 1.0, 0.1, 0.2, (Treatment("noise 1", 1.0, 0.5, 0.5),)).floor == 0.2


TOKENS, Z = torch.tensor([[3, 4], [5, 6]]), torch.eye(8)[:2]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"latents": Z[:1], "tokens": TOKENS[:1]}, "`latents` needs at least 2 rows"),
        ({"latents": torch.ones(2, 8)}, "`latents` are equal in all rows"),
        ({"noises": (0.1, -1.0)}, "`noises` must be a finite number of at least 0, got -1.0"),
        ({"grids": (0,)}, "`grids` must be above 0, got 0"),
        ({"variance": 0.0}, "`variance` must be above 0, got 0"),
        ({"z_hat": Z[:, :4]}, "`z_hat` and `latents` must have equal shapes"),
        ({"mask": TOKENS[:, :1]}, "`attention_mask` must have the shape of its tokens"),
        ({"latent_process": cv.LatentProcess(prediction="epsilon")}, "a gain of .* above max_gain"),
    ],
)
@pytest.mark.unhooked
def test_refused(changes, expected):
    given = {"tokens": TOKENS, "latents": Z, "mask": TOKENS > 0, **PROCESSES} | changes
    inputs = [given.pop(name) for name in ("tokens", "latents", "mask")]
    with pytest.raises(ValueError, match=expected):
        cheat_test(Toy(), *inputs, **given)
