"""Latents of variable length, and a network that reads what a mask keeps of them."""

import math

import torch
from torch import nn

import cyclevae as cv
from cyclevae.model.denoiser import Denoised, embed_tokens

TEXT = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0)
LATENT = cv.LatentProcess(prediction="v")
PROCESSES = {"text_process": TEXT, "latent_process": LATENT}


class Sequence(nn.Module):
    """Means of what is kept of both parts; at padding it says NaN, as a network may."""

    def __init__(self, width=3, vocab_size=7):
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.shared, self.times = nn.Linear(width, width), nn.Linear(2, width)
        self.text_head, self.latent_head = nn.Linear(width, vocab_size), nn.Linear(width, width)
        self.roles = cv.Roles(encoder_only=("latent_head.*",), decoder_only=("text_head.*",))

    def forward(
        self, tokens, latents, *, text_time, latent_time, attention_mask, latent_mask=None, **_
    ):
        if latent_mask is None:
            latent_mask = torch.ones_like(latents[..., 0], dtype=torch.bool)
        words = embed_tokens(self.word.weight, tokens)
        keep = attention_mask[..., None].to(words)
        mean = (keep * words).sum(dim=1) / keep.sum(dim=1).clamp(min=1)
        keep = latent_mask[..., None].to(words)
        mean = mean + (keep * latents).sum(dim=1) / keep.sum(dim=1).clamp(min=1)
        mean = mean + self.times(torch.stack([text_time, latent_time], dim=1).to(words))
        hidden = self.shared(mean.tanh()).tanh()
        prediction = self.latent_head(torch.tanh(latents + hidden[:, None]))
        prediction = prediction.masked_fill(~latent_mask[..., None], math.nan)
        return Denoised(self.text_head(words + hidden[:, None]), prediction)


def denoiser(seed=0, dtype=torch.float32):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return cv.as_denoiser(Sequence().to(dtype))


def rows(number=5, n=4, d=3, seed=0, dtype=torch.float32):
    """Texts, and latents whose kept vectors are the first ones; no two rows alike."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([2, 4, 1, 3, 2, 4])[:number]
    kept = torch.arange(n) < lengths[:, None]
    mask = torch.arange(5) < torch.randint(2, 6, (number, 1), generator=generator)
    tokens = torch.randint(3, 7, (number, 5), generator=generator) * mask
    latents = torch.randn(number, n, d, generator=generator, dtype=dtype)
    return tokens, mask, latents, kept


def padded_with(latents, kept, value):
    return torch.where(kept[..., None], latents.detach(), value)


TOKENS, MASK, Z, KEPT = rows()
HOLES = KEPT.roll(1, 1)  # not only the first ones are kept
BRIDGE = cv.LatentBridge(steps=2, noise=0.1, threshold=0.3, quantile=0.7, norm=1.5)


def teacher(d):
    return cv.Teacher(d.module).denoiser


def seeded():
    return torch.Generator().manual_seed(1)
