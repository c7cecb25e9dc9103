"""A small joint transformer of text and latent, read in both directions."""

import torch
from torch import Tensor, nn

from cyclevae import Denoised, embed_tokens, unread_logits


class JointTransformer(nn.Module):
    """Tokens and one latent token attend to each other; each part knows its own time.

    A sentence embedding is close to linear in the bag of its words, so the latent is read from that
    too, through word embeddings of its own: few pairs teach a sum sooner than attention.
    """

    def __init__(
        self,
        vocab_size: int,
        latent_dim: int,
        *,
        length: int,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(length, width)
        self.text_time, self.latent_time = _time_mlp(width), _time_mlp(2 * width)
        self.latent_in = nn.Linear(latent_dim, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            layer, depth, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.text_head = nn.Linear(width, vocab_size)
        self.latent_head = nn.Linear(width, latent_dim)
        self.bag = nn.Embedding(vocab_size, width)
        self.bag_head = nn.Linear(width, latent_dim)
        nn.init.normal_(self.bag.weight, std=0.02)
        nn.init.normal_(self.word.weight, std=width**-0.5)
        nn.init.normal_(self.position.weight, std=0.1)
        self.text_head.weight = self.word.weight  # tied

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
        places = torch.arange(tokens.shape[1], device=tokens.device)
        latents = latents * (1 - latent_time)[:, None]  # full noise tells nothing
        scale, shift = self.latent_time(latent_time[:, None]).chunk(2, dim=1)
        latent = self.latent_in(latents) * (1 + scale) + shift
        text = embed_tokens(self.word.weight, tokens) * self.word.embedding_dim**0.5
        text = text + self.position(places)
        text = text + self.text_time(text_time[:, None])[:, None]
        times = torch.stack([text_time, latent_time], dim=1)
        text, latent = self.attend(text + latent[:, None], latent, times, attention_mask)
        logits = None if need == "latents" else unread_logits(self.text_head, text)
        if need == "logits":
            return Denoised(logits, None)
        keep = attention_mask[..., None]
        words = keep.sum(dim=1).clamp(min=1)
        mean = (text * keep).sum(dim=1) / words
        bag = (embed_tokens(self.bag.weight, tokens) * keep).sum(dim=1) / words.sqrt()
        return Denoised(logits, self.latent_head(latent + mean) + self.bag_head(bag))

    def attend(
        self, text: Tensor, latent: Tensor, times: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Let `text` `[b, length, width]` and `latent` `[b, width]` look at each other."""
        hidden = self.blocks(
            torch.cat([latent[:, None], text], dim=1),
            src_key_padding_mask=nn.functional.pad(~attention_mask, (1, 0)),
        )
        return hidden[:, 1:], hidden[:, 0]


def _time_mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(1, 128), nn.GELU(), nn.Linear(128, width))
