"""A user's file as strict checkers read it: `make lint` runs mypy over it, tests run it."""

from typing import assert_type

import pytest
import torch
from torch import Tensor

import cyclevae as cv
from cyclevae.testing import toy_denoiser


def batch() -> cv.Batch:
    """Pairs, texts and latents."""
    tokens = torch.tensor([[3, 4, 0], [5, 6, 3]])
    mask, latents = tokens > 0, torch.zeros(2, 4)
    pairs = cv.Batch.of_pairs(tokens, mask, latents)
    return pairs | cv.Batch.of_texts(tokens, mask) | cv.Batch.of_latents(latents)


def test_a_step_is_typed() -> None:
    """What comes out is no Any, and a name of no policy is found before anything runs."""
    denoiser, text_process, latent_process = toy_denoiser(seed=0)
    terms = [cv.Text(), cv.Latent(), cv.CycleText(policy="decoder_isolated"), cv.CycleLatent()]
    step = cv.StepModule(denoiser, cv.CycleObjective(text_process, latent_process, terms))
    output = assert_type(step(batch(), 0), cv.StepOutput)
    assert_type(output.loss, Tensor)
    with pytest.raises((ValueError, TypeError)):  # of the other cycle
        cv.CycleText(policy="encoder_isolated")  # type: ignore[arg-type]


def test_losses_take_the_parts_of_a_batch() -> None:
    """None of them may be None to a checker, and none is."""
    denoiser, text_process, latent_process = toy_denoiser(seed=0)
    tokens, mask, latents = batch().need_pairs()
    loss = cv.cycle_text_loss(
        denoiser, tokens, mask, text_process=text_process, latent_process=latent_process
    )
    assert_type(loss, Tensor)
    logits = cv.l2t(denoiser, latents, mask, text_process=text_process)
    assert_type(cv.text_loss(logits, tokens, mask), Tensor)
    assert_type(cv.collate([{"tokens": [3, 4]}]).need_texts()[0], Tensor)
