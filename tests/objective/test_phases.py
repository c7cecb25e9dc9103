"""Phases: one cycle after the other, and then gradients across the bridges."""

import json
from dataclasses import replace

import pytest
import torch

import cyclevae as cv
from cyclevae.testing import assert_frozen, assert_learns, toy_batch, toy_denoiser
from running import FIVE, FULL, ONE_SHOT, of, run, seeded, tower, two_towers

CYCLES = ("cycle_text", "cycle_latent")


def three(*terms, **options):
    return cv.phases(of(*terms or FIVE), latent_cycle_from=2, full_gradient_from=4, **options)


def bridges(objective, step):
    return {
        term.name: term.policy.bridge
        for term in objective.at(step).terms
        if isinstance(term, cv.CycleText | cv.CycleLatent)
    }


def test_phases_open_one_cycle_after_the_other_and_then_the_bridges():
    objective = three()
    cycles = [sorted(objective.weights(step).keys() & set(CYCLES)) for step in range(6)]
    assert cycles == [["cycle_text"]] * 2 + [["cycle_latent", "cycle_text"]] * 4
    closed, opened = dict.fromkeys(CYCLES, "detach"), dict.fromkeys(CYCLES, "full")
    assert [bridges(objective, step) for step in range(6)] == [
        *[{"cycle_text": "detach"}] * 2,
        *[closed] * 2,
        *[opened] * 2,
    ]
    assert [objective.passes(step) for step in (1, 3, 5)] == [4, 5, 5]
    assert objective.counts(toy_batch()) == of(*FIVE).counts(toy_batch())
    assert [objective.describe(step) for step in (0, 3, 9)] == [
        objective.at(step).describe() for step in (0, 3, 9)
    ]
    (text,) = [term for term in objective.at(5).terms if term.name == "cycle_latent"]
    assert text.bridge == cv.TextBridge("straight_through")


def test_each_of_several_cycles_is_opened_and_keeps_what_else_it_is():
    frozen = cv.GradientPolicy(freeze=("word.*",))
    second = cv.CycleText(name="second", policy=frozen, bridge=ONE_SHOT, fraction=0.5)
    objective = three(*FIVE, second, text_bridge=cv.TextBridge("gumbel", temperature=0.5))
    last = objective.at(4).terms
    assert last[-1] == replace(second, policy=cv.GradientPolicy("full", ("word.*",)))
    assert last[1] == replace(FIVE[1], policy=FULL, bridge=cv.TextBridge("gumbel", temperature=0.5))
    assert last[0] == FIVE[0] and objective.at(1).terms == (FIVE[0], *FIVE[2:], second)


def test_a_phase_for_a_cycle_that_is_not_there_is_refused():
    without = of(FIVE[0], *FIVE[2:])
    with pytest.raises(ValueError, match="the objective has none: add a CycleLatent to its terms"):
        cv.phases(without, latent_cycle_from=2, full_gradient_from=4)
    assert cv.phases(without, latent_cycle_from=4, full_gradient_from=4).passes(5) == 4


@pytest.mark.parametrize(("step", "both"), [(0, False), (3, False), (4, True)])
def test_who_learns_in_which_phase(step, both):
    denoiser = two_towers()
    objective = cv.phases(
        of(cv.CycleText(bridge=ONE_SHOT)), latent_cycle_from=4, full_gradient_from=4
    )
    loss = objective(denoiser, toy_batch(), step=step).loss
    assert_learns(loss, tower(denoiser, "decoder"))
    (assert_learns if both else assert_frozen)(loss, tower(denoiser, "encoder"))


def test_phases_train_in_a_step_module_and_survive_json():
    denoiser = toy_denoiser(seed=0)[0]
    objective = three(text_bridge=cv.TextBridge("gumbel", temperature=0.5))
    config = json.loads(json.dumps(objective.to_config()))
    again = cv.Phases.from_config(config)
    assert again == objective and again.to_config() == config and hash(again) == hash(objective)
    assert again != three()
    with pytest.raises(ValueError, match="`key` is 'objectve'; did you mean 'objectives'"):
        cv.Phases.from_config({**config, "objectve": 1})
    for key in config:
        with pytest.raises(ValueError, match=f"`{key}` is missing from the configuration of phas"):
            cv.Phases.from_config({name: config[name] for name in config if name != key})
    module = cv.StepModule(denoiser, objective)
    for step in (0, 3, 5):
        direct = objective(denoiser, toy_batch(), step=step, generator=seeded()).loss
        assert module(toy_batch(), step, seeded()).loss == direct


def test_any_objectives_may_follow_each_other():
    """The phase of a step is that whose start was last, and counts of the others are left out."""
    first, second = of(cv.Text(time=1.0)), of(cv.Latent(), cv.Prior("learned"))
    objective = cv.Phases((first, second), (0, 3))
    assert [objective.at(step) is second for step in (0, 2, 3, 100)] == [False, False, True, True]
    counts = objective.counts(toy_batch())
    assert counts.keys() == {"text_loss", "latent_loss", "prior_loss"}
    doubled = {name: 2 * count for name, count in counts.items()}
    for batch_counts, factor in ((counts, 1), (doubled, 2)):
        loss = run(objective, batch=toy_batch(), counts=batch_counts).loss
        torch.testing.assert_close(loss * factor, run(first, batch=toy_batch()).loss)
    with pytest.raises(ValueError, match="unknown count 'txt_loss'; did you mean 'text_loss'"):
        run(objective, counts={"txt_loss": 1})
    with pytest.raises(ValueError, match="reads a frozen copy of the network, and none was given"):
        run(objective, step=3)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("objectives", "starts", "message"),
    [
        ([], [], "one step for each of the 0 objectives"),
        ([of(*FIVE)], [], "one step for each of the 1 objectives, in order from 0, got ()"),
        ([of(*FIVE)], [1], "in order from 0, got (1,)"),
        ([of(*FIVE)] * 2, [0], "for each of the 2 objectives"),
        ([of(*FIVE)] * 3, [0, 5, 3], "in order from 0, got (0, 5, 3)"),
        ([FIVE], [0], "`objectives` must be a CycleObjective, got"),
    ],
)
def test_phases_that_do_not_fit(objectives, starts, message):
    with pytest.raises(ValueError) as caught:
        cv.Phases(objectives, starts)
    assert message in str(caught.value)
