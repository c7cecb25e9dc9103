"""Who learns from which term, by autograd, alone and beside others."""

from dataclasses import replace

import pytest
import torch

import cyclevae as cv
from cyclevae.testing import assert_frozen, assert_learns, toy_batch
from running import (
    DENOISER,
    FIVE,
    FULL,
    ONE_SHOT,
    of,
    run,
    teacher_of,
    tower,
    two_towers,
)

BATCH, THREE = toy_batch(rows=4), cv.LatentBridge(steps=3)
TEXT_CYCLE, LATENT_CYCLE = replace(FIVE[3], weight=1.0), replace(FIVE[1], weight=1.0)


def text_cycle(*policy, bridge=ONE_SHOT):
    return replace(TEXT_CYCLE, policy=cv.GradientPolicy(*policy), bridge=bridge)


@pytest.mark.parametrize(
    ("term", "learns", "frozen"),
    [
        (text_cycle(), "decoder", "encoder"),
        (text_cycle("full"), "encoder", None),
        (text_cycle("full", ("decoder.*",)), "encoder", "decoder"),
        (text_cycle("full", (), ("encoder.*",)), "decoder", "encoder"),
        (text_cycle(bridge=THREE), "decoder", "encoder"),
        (text_cycle("last", ("decoder.*",), bridge=THREE), "encoder", "decoder"),
        (LATENT_CYCLE, "encoder", "decoder"),
        (cv.Prior("mmd"), "encoder", "decoder"),
        (cv.Prior("sigreg"), "encoder", "decoder"),
        (cv.Prior("learned"), "encoder", "decoder"),
        (cv.Prior("ddvi"), "encoder", "decoder"),
        (cv.Prior("mmd", bridge=THREE), "encoder", "decoder"),
        (cv.Prior("mmd", bridge=THREE, through="full"), "encoder", "decoder"),
        (cv.Sleep(), "encoder", "decoder"),
        (cv.Distill(), "encoder", "decoder"),
        (cv.CycleLatent(bridge="best"), "encoder", "decoder"),
        (cv.Contrastive(), "encoder", "decoder"),
        (cv.TextMarginal(bridge="soft"), "decoder", "encoder"),
        (cv.Text(time=1.0), "decoder", "encoder"),
        (cv.Text(), "decoder", "encoder"),
        (cv.Latent(), "encoder", "decoder"),
        (cv.Latent(time=0.5), "encoder", "decoder"),
    ],
)
def test_who_learns_from_which_term(term, learns, frozen):
    denoiser = two_towers()
    loss = run(of(term), denoiser, teacher=teacher_of(denoiser)).loss
    assert_learns(loss, tower(denoiser, learns))
    if frozen:
        assert_frozen(loss, tower(denoiser, frozen))


def gradients(weight, *objectives):
    return [torch.autograd.grad(run(o).loss, weight)[0] for o in objectives]


def test_a_prior_trains_what_the_cycle_freezes():
    """Beside a text cycle with a frozen bridge, the prior's gradient is that of the prior alone."""
    cycle, prior = text_cycle("full", (), ("latent_head.*",)), cv.Prior("mmd")
    weight = DENOISER.module.latent_head.weight
    torch.testing.assert_close(*gradients(weight, of(cycle, prior), of(prior)))
    assert_frozen(run(of(cycle)).loss, [("latent_head.weight", weight)])


def test_the_base_decoder_loss_trains_what_the_latent_cycle_freezes():
    policy = cv.GradientPolicy("full", (), ("text_head.*",))
    text, cycle = cv.Text(time=1.0), replace(LATENT_CYCLE, bridge="soft", policy=policy)
    weight = DENOISER.module.text_head.weight
    torch.testing.assert_close(*gradients(weight, of(text, cycle), of(text)))


@pytest.mark.parametrize(
    "other",
    [
        cv.Prior("mmd", bridge=THREE, through="full"),
        text_cycle("full", bridge=THREE),
        cv.Contrastive(bridge=THREE, through="full"),
    ],
)
def test_the_last_pass_is_taught_alone_beside_who_teaches_all(other):
    """Of three passes: what the prior gives the weights is what it gives them by itself."""
    prior = cv.Prior("moment", bridge=THREE, through="last", name="last")
    weights = list(DENOISER.module.parameters())

    def of_prior(*terms):
        losses = of(*terms).losses(DENOISER, BATCH, step=0, generator=torch.Generator())
        return torch.autograd.grad(losses["last"], weights, allow_unused=True)

    torch.testing.assert_close(of_prior(other, prior), of_prior(prior))
    full = of_prior(replace(prior, through="full"))
    assert not torch.equal(of_prior(prior)[0], full[0])


def test_a_weight_scales_the_gradient():
    gradients = []
    for weight in (1.0, 3.0):
        loss = run(of(cv.Text(weight=weight, time=1.0))).loss
        gradients.append(torch.autograd.grad(loss, DENOISER.module.text_head.weight)[0])
    torch.testing.assert_close(3 * gradients[0], gradients[1])


def test_a_loss_above_its_cap_counts_as_the_cap_and_has_no_gradient():
    free = of(*FIVE)
    capped = of(replace(FIVE[0], cap=0.5), FIVE[1], replace(FIVE[2], cap=1e3), *FIVE[3:])
    weight = DENOISER.module.shared.weight
    outputs = [run(objective) for objective in (free, capped)]
    (before, before_grad), (after, after_grad) = (
        (output.metrics, torch.autograd.grad(output.loss, weight)[0]) for output in outputs
    )
    assert before["text_loss"] > 0.5 and after["text_loss"] == 0.5
    assert before["latent_loss"] == after["latent_loss"]
    torch.testing.assert_close(after["loss"], before["loss"] - before["text_loss"] + 0.5)
    generator = torch.Generator().manual_seed(0)
    text = free.losses(DENOISER, BATCH, step=0, generator=generator)["text"]
    torch.testing.assert_close(after_grad, before_grad - torch.autograd.grad(text, weight)[0])


def test_a_cap_is_of_each_part():
    """The two losses of the unconditional mode are capped one by one, before they are weighed."""
    both = cv.Unconditional(weight=2.0)
    plain = run(of(both)).metrics
    parts = [plain[f"unconditional_{part}_loss"] for part in ("text", "latent")]
    cap = (min(parts) + max(parts)).item() / 2
    metrics = run(of(replace(both, cap=cap))).metrics
    expected = [part.clamp(max=cap) for part in parts]
    torch.testing.assert_close(
        [metrics[f"unconditional_{part}_loss"] for part in ("text", "latent")], expected
    )
    torch.testing.assert_close(metrics["loss"], 2 * sum(expected))


@pytest.mark.parametrize("policy", [FULL, cv.GradientPolicy("full", ("shared.*",))])
def test_losses_add_up_to_the_loss(policy):
    objective = of(*FIVE[:3], replace(FIVE[3], policy=policy))
    losses = objective.losses(DENOISER, BATCH, step=0, generator=torch.Generator().manual_seed(0))
    assert list(losses) == list(objective.weights(0)) == [term.name for term in objective.terms]
    output = run(objective)
    torch.testing.assert_close(sum(losses.values()), output.loss)
    for name, weight in objective.weights(0).items():
        torch.testing.assert_close(losses[name].detach(), weight * output.metrics[f"{name}_loss"])


def test_a_schedule_may_begin_where_nobody_learns():
    idle = cv.GradientPolicy(freeze=("encoder_only", "decoder_only", "shared"))
    late = cv.PolicySchedule((idle, cv.GradientPolicy()), starts=(0, 1000))
    assert of(replace(TEXT_CYCLE, policy=late)).passes(step=0) == 2
    with pytest.raises(ValueError, match="nobody learns from `cycle_text`"):
        of(replace(TEXT_CYCLE, policy=idle))
