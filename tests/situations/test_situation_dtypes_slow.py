"""Whose tensors have another dtype, layout or origin than ours in the examples."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cyclevae as cv
from cyclevae._base import precision
from cyclevae.testing import toy_batch, toy_denoiser
from recipes import RECIPES, recipe

DENOISER, TEXT, LATENT = toy_denoiser(seed=0)
OBJECTIVES = {name: recipe(options) for name, options in RECIPES.items()}
every_recipe = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def step(objective, batch, denoiser=None):
    denoiser = denoiser or toy_denoiser(seed=0)[0]
    teacher = cv.Teacher(denoiser.module).denoiser
    generator = torch.Generator().manual_seed(0)
    output = objective(denoiser, batch, step=3, generator=generator, teacher=teacher)
    output.loss.backward()
    return output.loss.detach(), [p.grad for p in denoiser.module.parameters()]


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


@every_recipe
def test_latents_that_were_made_in_inference_mode(objective):
    """Who encodes under `inference_mode`: https://github.com/facebookresearch/dinov2/issues/472."""
    batch = toy_batch(rows=4)
    with torch.inference_mode():
        made = cv.Batch(*[None if part is None else part.clone() for part in batch])
    assert made.latents.is_inference()
    assert_same(step(objective, made), step(objective, batch))


@every_recipe
def test_latents_of_another_layout(objective):
    """Who permutes them: https://github.com/pytorch/examples/issues/836."""
    batch = toy_batch(rows=4)
    turned = [part.T.contiguous().T if part is not None else None for part in batch]
    assert not turned[2].is_contiguous()
    found, expected = step(objective, cv.Batch(*turned)), step(objective, batch)
    torch.testing.assert_close(found, expected)


def test_logits_that_are_no_number_at_padding_poison_nothing():
    """Whose network overflows there: https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/3117."""
    tokens, mask, _ = toy_batch(seed=0)[:3]
    clean = torch.randn(*tokens.shape, 7, generator=torch.Generator().manual_seed(0))
    for bad in (torch.nan, torch.inf):
        logits = clean.masked_fill(~mask[..., None], bad).requires_grad_()
        loss = cv.text_loss(logits, tokens, mask)
        loss.backward()
        assert torch.equal(loss.detach(), cv.text_loss(clean, tokens, mask))
        assert logits.grad.isfinite().all()


class NoDoubles(TorchDispatchMode):
    """As on Apple's GPUs: no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        made = result if isinstance(result, tuple | list) else [result]
        for tensor in made:
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                assert tensor.dtype != torch.float64, function
        return result


@every_recipe
def test_no_float64_is_made_on_the_device(objective, monkeypatch):
    """Whose device has none: https://github.com/pytorch/pytorch/issues/122602."""
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ("meta",))
    network = toy_denoiser(seed=0)[0].module.to("meta")
    teacher = cv.Teacher(network).denoiser
    batch = cv.Batch(*[part.to("meta") for part in toy_batch(rows=4)[:6]])
    with NoDoubles():
        objective(cv.as_denoiser(network), batch, step=3, teacher=teacher).loss.backward()
        objective.counts(batch)
