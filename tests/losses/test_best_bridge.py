"""The latent cycle over the best of several pseudo-texts, against a search through them."""

import pytest
import torch

import cyclevae as cv
from cyclevae.testing import toy_batch, toy_denoiser
from oracles import Spy

DENOISER, TEXT, LATENT = toy_denoiser(seed=0)
PROCESSES = {"text_process": TEXT, "latent_process": LATENT}
_, MASK, Z = toy_batch(seed=0)[:3]
BEST = cv.TextBridge("best", samples=5, steps=2, temperature=2.0)


def test_the_loss_is_the_lowest_among_the_texts_and_teaches_the_encoder_alone():
    denoiser = toy_denoiser(seed=0)[0]
    spy = Spy(denoiser)
    generator = torch.Generator().manual_seed(0)
    loss = cv.cycle_latent_loss(
        spy, Z, MASK, **PROCESSES, bridge=BEST, reduction="none", generator=generator
    ).mean(dim=1)
    assert [call["need"] for call in spy.calls] == ["logits"] + ["logits", "latents"] * 5 + [
        "latents"
    ]
    *tried, read = [call for call in spy.calls if call["need"] == "latents"]
    losses, texts = [], []
    for call in tried:
        assert torch.equal(call["latents"], read["latents"])  # the same noise
        again = denoiser.denoise(**call).latent_prediction
        z_hat = LATENT.to_x0(again, call["latents"], call["latent_time"])
        losses.append((z_hat - Z).square().mean(dim=1))
        texts.append(call["tokens"])
    torch.testing.assert_close(loss, torch.stack(losses).min(dim=0).values)
    chosen = torch.stack(losses).argmin(dim=0)
    assert len(chosen.unique()) > 1
    assert torch.equal(read["tokens"], torch.stack(texts)[chosen, torch.arange(len(Z))])
    loss.mean().backward()
    assert denoiser.module.latent_head.weight.grad.abs().sum() > 0
    assert denoiser.module.text_head.weight.grad is None


def test_more_texts_lower_the_error_at_the_same_weights():
    def error(bridge):
        spread = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        return cv.cycle_latent_loss(
            DENOISER, spread, torch.ones(200, 5), **PROCESSES, bridge=bridge, generator=generator
        ).item()

    one, some, many = (
        error(b) for b in ("categorical", cv.TextBridge("best"), cv.TextBridge("best", samples=16))
    )
    assert many < some < one


@pytest.mark.parametrize("maker", [cv.Maker(), cv.Maker("evaluated")])
def test_an_objective_counts_its_passes_and_says_who_learns(maker):
    term = cv.CycleLatent(bridge=BEST, maker=maker)
    objective = cv.CycleObjective(TEXT, LATENT, [cv.Latent(), term])
    spy = Spy(DENOISER)
    objective(spy, toy_batch(seed=0), step=0).loss.backward()
    assert len(spy.calls) == objective.passes(step=0) == 1 + 1 + 5 + 5 + 1
    lines = [line.split() for line in objective.describe().splitlines()]
    picks = next(line for line in lines if "picks" in line)
    assert "nobody" in picks
    assert next(line for line in lines if "reads" in line)[-3:-1] == ["encoder_only,", "shared"]
    assert cv.CycleObjective.from_config(objective.to_config()) == objective
    assert objective.to_config()["terms"]["cycle_latent"]["bridge"]["samples"] == 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cv.TextBridge("best", samples=1), "`samples` must be an integer of at least 2"),
        (lambda: cv.TextBridge("best", temperature=0.0), "`temperature` must be above 0"),
        (lambda: cv.TextBridge("best", steps=0), "`steps` must be an integer of at least 1"),
        (lambda: cv.TextBridge("unmask", samples=4), "does not read `samples`.*'best', 'rloo'"),
        (
            lambda: cv.CycleLatent(bridge="best", maker=cv.Maker(guidance=2.0)),
            "the 'best' bridge chooses by the encoder of its maker.*guidance=2.0",
        ),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()
