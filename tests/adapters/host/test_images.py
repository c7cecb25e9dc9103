"""The recipe for `latentIMG_mmdit`, with its own model of patches."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

sys.path.append(str(__import__("pathlib").Path(__file__).parents[1]))  # for the stand-in's data
from test_latentdlm_images_slow import WIDTH, WORDS, train


@pytest.fixture
def model(checkout, monkeypatch):
    """`MaskedDiffusionMMDiT` of the script, whose imports of pictures are not needed here."""
    for name in ("torchvision", "PIL"):
        stand_in = ModuleType(name)
        stand_in.transforms = stand_in.Image = ModuleType(name)
        stand_in.transforms.Compose = object
        monkeypatch.setitem(sys.modules, name, stand_in)
    path = checkout / "latentIMG_mmdit" / "train_image_discrete.py"
    spec = importlib.util.spec_from_file_location("latentimg", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "latentimg", module)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.MaskedDiffusionMMDiT(
        5 + WORDS, 32, WIDTH, 32, depth=2, num_residual_streams=2, max_length=8
    )


def test_texts_and_patches_learn_from_each_other(model):
    found = train(model, 60)
    assert found[-1]["text_loss"] < 0.5 * found[0]["text_loss"]
    assert found[-1]["latent_loss"] < found[0]["latent_loss"]
    assert found[-1]["cycle_text_loss"] < found[30]["cycle_text_loss"]
