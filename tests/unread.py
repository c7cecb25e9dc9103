"""The toy of `cyclevae.testing`, whose logits stay unread; of the same parameters."""

import torch

import cyclevae as cv
from cyclevae.testing import ToyNetwork


class UnreadToy(ToyNetwork):
    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask, need="both"):
        words = cv.embed_tokens(self.word.weight, tokens)
        keep = attention_mask.to(words)
        share = keep / keep.sum(dim=1, keepdim=True).clamp(min=1)
        times = torch.stack([text_time, latent_time], dim=1).to(latents)
        mean = (share[..., None] * words).sum(dim=1)
        hidden = self.shared((mean + latents + self.times(times)).tanh()).tanh()
        logits = cv.unread_logits(self.text_head, words + hidden[:, None])
        return cv.Denoised(
            None if need == "latents" else logits,
            None if need == "logits" else self.latent_head(hidden),
        )
