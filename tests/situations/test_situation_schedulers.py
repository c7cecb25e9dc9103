"""Whose steps and learning rates come from elsewhere."""

import warnings

import numpy
import pytest
import torch

import cyclevae as cv
from cyclevae.testing import toy_batch, toy_denoiser

_, TEXT, LATENT = toy_denoiser(seed=0)
LATE = cv.CycleText(weight=cv.ramp(4.0, warmup_steps=10, ramp_steps=10))
OBJECTIVE = cv.CycleObjective(TEXT, LATENT, [cv.Text(), cv.Latent(), LATE])


def test_a_schedule_knows_no_length_of_the_run():
    """Whose curve is another after a resume: https://github.com/Nerogar/OneTrainer/issues/1604."""
    whole = [OBJECTIVE.weights(step) for step in range(30)]
    again = cv.CycleObjective.from_config(OBJECTIVE.to_config())
    assert [again.weights(step) for step in range(15, 30)] == whole[15:]


def test_a_plateau_is_told_by_a_metric():
    """Who schedules by what is reported, as `ReduceLROnPlateau` does."""
    denoiser = toy_denoiser(seed=0)[0]
    optimizer = torch.optim.AdamW(denoiser.module.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for step in range(3):
        output = OBJECTIVE(denoiser, toy_batch(seed=step), step=step)
        output.loss.backward()
        optimizer.step()
        scheduler.step(output.metrics["text_loss"])
    assert scheduler.last_epoch == 3


def test_a_skipped_step_leaves_the_scheduler_alone():
    """Who steps the scheduler after an update that was left out; torch warns of a wrong order:
    https://github.com/pytorch/pytorch/issues/23480.
    """
    denoiser = toy_denoiser(seed=0)[0]
    optimizer = torch.optim.AdamW(denoiser.module.parameters(), 0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    objective = cv.CycleObjective(TEXT, LATENT, non_finite="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = objective(denoiser, toy_batch(seed=0), step=0)
        output.loss.backward()
        cv.skip_update(optimizer, torch.tensor(True))
        before = [p.clone() for p in denoiser.module.parameters()]
        optimizer.step()
        scheduler.step()
    assert all(torch.equal(*p) for p in zip(before, denoiser.module.parameters(), strict=True))


@pytest.mark.unhooked
def test_steps_as_other_libraries_count_them():
    """Whose step comes from a checkpoint: an integer of numpy, or a number of torch."""
    for step in (numpy.int64(15), numpy.int32(15)):
        assert OBJECTIVE.weights(step) == OBJECTIVE.weights(15)
