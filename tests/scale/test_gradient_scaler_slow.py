"""Optimizers in the wrappers of frameworks, whose imports take seconds."""

import pytest
import torch

from cyclevae.scale.non_finite import skip_update


def accelerated(optimizer):
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    return AcceleratedOptimizer(optimizer)


def lightning(optimizer):
    from lightning.pytorch.core.optimizer import LightningOptimizer

    return LightningOptimizer(optimizer)


@pytest.mark.parametrize("wrap", [accelerated, lightning])
def test_an_optimizer_in_the_wrapper_of_a_framework(wrap):
    weight = torch.nn.Parameter(torch.ones(2))
    inside = torch.optim.AdamW([weight], lr=0.1, fused=True)
    skip_update(wrap(inside), torch.tensor(True))
    weight.grad = torch.ones(2)
    inside.step()
    assert weight.tolist() == [1, 1]
    inside.step()
    assert weight.tolist() != [1, 1]
