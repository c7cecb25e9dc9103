"""Denoisers on the real `mmdit` package, with one latent token.

Reference: https://github.com/lucidrains/mmdit and Esser et al., https://arxiv.org/abs/2403.03206.
"""

import torch
from mmdit.mmdit_generalized_pytorch import MMDiT
from model import JointTransformer
from torch import Tensor, nn

from cyclevae import Denoised, embed_tokens, unread_logits


class MMDiTDenoiser(nn.Module):
    """Two streams with weights of their own, joined by attention; both times modulate both.

    The parts are arranged as in LGDLM.
    """

    def __init__(
        self,
        vocab_size: int,
        latent_dim: int,
        *,
        length: int,
        width: int = 96,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.latent_in = nn.Sequential(
            nn.Linear(latent_dim, 2 * width),
            nn.LayerNorm(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )
        self.times = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = MMDiT(
            depth=depth,
            dim_modalities=(width, width),
            dim_cond=width,
            dim_head=width // heads,
            heads=heads,
            qk_rmsnorm=True,
            num_residual_streams=2,
        )
        self.text_head = nn.Linear(width, vocab_size)
        self.latent_head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, latent_dim)
        )

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        *,
        text_time: Tensor,
        latent_time: Tensor,
        attention_mask: Tensor,
        need: str = "both",
    ) -> Denoised:
        text = embed_tokens(self.word.weight, tokens) + self.position[: tokens.shape[1]]
        latent = self.latent_in(latents)[:, None]
        text, latent = self.blocks(
            modality_tokens=(text, latent),
            modality_masks=(attention_mask, torch.ones_like(attention_mask[:, :1])),
            time_cond=self.times(torch.stack([text_time, latent_time], dim=1)),
        )
        return Denoised(
            logits=None if need == "latents" else unread_logits(self.text_head, text),
            latent_prediction=None if need == "logits" else self.latent_head(latent[:, 0]),
        )


class JointMMDiT(JointTransformer):
    """`JointTransformer`, bag of words and all, with the two streams of an MMDiT in its middle."""

    def __init__(
        self,
        vocab_size: int,
        latent_dim: int,
        *,
        length: int,
        width: int = 128,
        heads: int = 4,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(vocab_size, latent_dim, length=length, width=width, depth=0)
        self.times = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = MMDiT(
            depth=1,
            dim_modalities=(width, width),
            dim_cond=width,
            dim_head=width // heads,
            heads=heads,
            qk_rmsnorm=True,
            num_residual_streams=2,
        )

    def attend(
        self, text: Tensor, latent: Tensor, times: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        text, latent = self.blocks(
            modality_tokens=(text, latent[:, None]),
            modality_masks=(attention_mask, torch.ones_like(attention_mask[:, :1])),
            time_cond=self.times(times),
        )
        return self.dropout(text), latent[:, 0]
