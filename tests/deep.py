"""A toy whose every position is an activation of every block, with dropout by choice."""

import torch
from torch import nn

import cyclevae as cv
from cyclevae.testing import ToyNetwork


class Deep(ToyNetwork):
    def __init__(self, vocab_size=7, latent_dim=4, *, blocks=2, dropout=0.0):
        super().__init__(vocab_size, latent_dim)
        self.shared = nn.ModuleList(
            nn.Sequential(nn.Linear(latent_dim, latent_dim), nn.Tanh(), nn.Dropout(dropout))
            for _ in range(blocks)
        )

    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask, need="both"):
        times = self.times(torch.stack([text_time, latent_time], dim=1).to(latents))
        hidden = cv.embed_tokens(self.word.weight, tokens) + (latents + times)[:, None]
        for block in self.shared:
            hidden = hidden + block(hidden)
        kept = attention_mask[..., None].to(hidden)
        mean = (kept * hidden).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        return cv.Denoised(
            None if need == "latents" else self.text_head(hidden),
            None if need == "logits" else self.latent_head(mean),
        )


def deep(**options):
    torch.manual_seed(0)
    return cv.as_denoiser(Deep(**options))
