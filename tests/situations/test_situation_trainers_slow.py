"""Whose loop is another than ours. Frameworks: `tests/examples/test_recipes_in_use_slow.py`."""

import pickle

import pytest
import torch

import cyclevae as cv
from cyclevae.testing import toy_batch, toy_denoiser
from recipes import RECIPES, recipe

_, TEXT, LATENT = toy_denoiser(seed=0)
OBJECTIVES = {name: recipe(options) for name, options in RECIPES.items()}
every_recipe = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def run(objective, denoiser, seed=0):
    teacher = cv.Teacher(denoiser.module).denoiser
    generator = torch.Generator().manual_seed(seed)
    return objective(denoiser, toy_batch(rows=4), step=3, generator=generator, teacher=teacher)


@every_recipe
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_can_be_repeated(objective, mode):
    """Whose validation loss differs each time:
    https://github.com/ThilinaRajapakse/simpletransformers/issues/1393.
    """
    denoiser = toy_denoiser(seed=0)[0]
    with mode():
        first, second = (run(objective, denoiser) for _ in range(2))
    assert torch.equal(first.loss, second.loss) and not first.loss.requires_grad
    assert all(value.is_floating_point() for value in first.metrics.values())
    learned = run(objective, denoiser)  # and training goes on
    learned.loss.backward()
    torch.testing.assert_close(learned.loss.detach(), first.loss.clone())


@every_recipe
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_detection_finds_none(objective):
    """Who hunts a NaN by `set_detect_anomaly`, and must not be led to us."""
    with torch.autograd.set_detect_anomaly(True):
        run(objective, toy_denoiser(seed=0)[0]).loss.backward()


@every_recipe
def test_saved_tensors_may_be_kept_elsewhere(objective):
    """Who offloads activations by `save_on_cpu`."""
    denoisers = [toy_denoiser(seed=0)[0] for _ in range(2)]
    run(objective, denoisers[0]).loss.backward()
    with torch.autograd.graph.save_on_cpu():
        run(objective, denoisers[1]).loss.backward()
    expected, found = ([p.grad for p in d.module.parameters()] for d in denoisers)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_recipe
def test_an_objective_can_be_sent_to_workers(objective):
    """Whose processes are spawned, as on Windows:
    https://github.com/HazyResearch/cartridges/issues/20.
    """
    assert pickle.loads(pickle.dumps(objective)) == objective


def test_a_closure_may_ask_for_the_loss_again():
    """Who optimises by L-BFGS."""
    denoiser = toy_denoiser(seed=0)[0]
    objective = cv.CycleObjective(TEXT, LATENT)
    optimizer = torch.optim.LBFGS(denoiser.module.parameters(), max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = run(objective, denoiser).loss
        loss.backward()
        return loss

    before = closure().item()
    optimizer.step(closure)
    assert closure().item() < before


def test_a_batch_is_never_written_to():
    """Whose batch is used again, or is read-only:
    https://github.com/city96/ComfyUI-GGUF/issues/232.
    """
    denoiser = toy_denoiser(seed=0)[0]
    for objective in OBJECTIVES.values():
        batch = toy_batch(rows=4)
        versions = [part._version for part in batch if part is not None]
        teacher = cv.Teacher(denoiser.module).denoiser
        objective(denoiser, batch, step=3, teacher=teacher).loss.backward()
        assert versions == [part._version for part in batch if part is not None]
