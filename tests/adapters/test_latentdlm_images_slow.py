"""The recipe for the host's model of image patches, on one of its signature."""

import importlib.util
from pathlib import Path

import torch
from mmdit.mmdit_generalized_pytorch import MMDiT
from torch import nn

import cyclevae as cv

PATH = Path(__file__).parents[2] / "examples" / "latentdlm" / "images.py"
_spec = importlib.util.spec_from_file_location("latentdlm_images", PATH)
images = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(images)

WORDS, LENGTH, PATCHES, WIDTH = 12, 6, 16, 24


class PatchModel(nn.Module):
    """As `MaskedDiffusionMMDiT`: no head for patches, and one time."""

    def __init__(self, vocab, width, hidden=32):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, hidden), nn.Embedding(LENGTH, hidden)
        self.time = nn.Linear(2, hidden)
        self.mmdit = MMDiT(
            depth=2, dim_modalities=(hidden, width), dim_cond=hidden, num_residual_streams=1
        )
        self.text_head = nn.Linear(hidden, vocab)

    def forward(self, text_tokens, image_tokens, text_mask, timesteps):
        text = self.embed(text_tokens) + self.place.weight[: text_tokens.shape[1]]
        text, image = self.mmdit(
            modality_tokens=(text, image_tokens),
            modality_masks=(text_mask.bool(), None),
            time_cond=self.time(torch.stack([timesteps, timesteps.square()], dim=1)),
        )
        return self.text_head(text), image


def captions(rows, seed):
    """Captions of a word twice, and patches of random directions that tell the word."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(5, 5 + WORDS, (rows,), generator=generator)
    tokens = torch.zeros(rows, LENGTH, dtype=torch.long)
    tokens[:, 0], tokens[:, 1:3], tokens[:, 3] = 2, words[:, None], 3
    directions = torch.randn(5 + WORDS, PATCHES, WIDTH, generator=torch.Generator().manual_seed(0))
    return cv.Batch(tokens, tokens != 0, directions[words])


def train(model, steps):
    step = images.step_module(
        model, mask_id=4, vocab_size=5 + WORDS, pad_id=0, warmup_steps=steps // 2
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for number in range(steps):
        optimizer.zero_grad()
        output = step(captions(16, number), step=number)
        output.loss.backward()
        optimizer.step()
        found.append({name: value.item() for name, value in output.metrics.items()})
    return found


def test_texts_and_patches_learn_from_each_other():
    torch.manual_seed(0)
    found = train(PatchModel(5 + WORDS, WIDTH), 60)
    assert found[-1]["text_loss"] < 0.5 * found[0]["text_loss"]
    assert found[-1]["latent_loss"] < found[0]["latent_loss"]
    assert found[-1]["cycle_text_loss"] < found[30]["cycle_text_loss"]
    assert found[-1]["cycle_latent_loss"] < found[30]["cycle_latent_loss"]
