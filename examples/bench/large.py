"""Networks of the dimensions of LLaDA-8B and Stable Diffusion 3 medium, to be made on `meta`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cyclevae as cv


class LLaDA(nn.Module):
    """LLaDA-8B's trunk, and a latent as one position before the text.

    Reference: Nie et al. 2025, https://arxiv.org/abs/2502.09992, its table of dimensions.
    """

    def __init__(
        self,
        vocab_size: int = 126_464,
        latent_dim: int = 1024,
        *,
        width: int = 4096,
        depth: int = 32,
        heads: int = 32,
        inner: int = 12_288,
    ) -> None:
        super().__init__()
        self.word, self.latent_in = nn.Embedding(vocab_size, width), nn.Linear(latent_dim, width)
        self.times = nn.Linear(2, width)
        self.blocks = nn.ModuleList(LLaDABlock(width, heads, inner) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.text_head = nn.Linear(width, vocab_size, bias=False)
        self.latent_head = nn.Linear(width, latent_dim)

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        *,
        text_time: Tensor,
        latent_time: Tensor,
        attention_mask: Tensor,
        need: str = "both",
    ) -> cv.Denoised:
        times = torch.stack([text_time, latent_time], dim=1).to(latents.dtype)
        latent = (self.latent_in(latents) + self.times(times))[:, None]
        hidden = torch.cat([latent, cv.embed_tokens(self.word.weight, tokens)], dim=1)
        mask = F.pad(attention_mask, (1, 0), value=True)[:, None, None]
        for block in self.blocks:
            hidden = block(hidden, mask)
        hidden = self.norm(hidden)
        return cv.Denoised(
            logits=None if need == "latents" else self.text_head(hidden[:, 1:]),
            latent_prediction=None if need == "logits" else self.latent_head(hidden[:, 0]),
        )


class LLaDABlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.inner_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(hidden)
        q, k, v = (part(x).unflatten(2, (self.heads, -1)) for part in (self.q, self.k, self.v))
        x = attend(rotated(q), rotated(k), v, mask)
        hidden = hidden + self.out(x)
        x = self.inner_norm(hidden)
        return hidden + self.down(F.silu(self.gate(x)) * self.up(x))


class SD3(nn.Module):
    """SD3-medium's joint blocks, with a head for words on its last caption states, as D-DiT.

    T5 and CLIP stay outside, frozen; the caption comes as words of T5's vocabulary, embedded. What
    they cost beside it is not told here.

    Reference: Esser et al. 2024, https://arxiv.org/abs/2403.03206; Li et al. 2024,
    https://arxiv.org/abs/2501.00289.
    """

    def __init__(
        self,
        vocab_size: int = 32_128,
        *,
        channels: int = 16,
        side: int = 128,
        caption_dim: int = 4096,
        width: int = 1536,
        depth: int = 24,
        heads: int = 24,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, caption_dim).requires_grad_(False)
        self.text_in = nn.Linear(caption_dim, width)
        self.patches = nn.Conv2d(channels, width, 2, stride=2)
        self.position = nn.Parameter(torch.zeros((side // 2) ** 2, width), requires_grad=False)
        self.times = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(JointBlock(width, heads) for _ in range(depth))
        self.text_head = nn.Linear(width, vocab_size)
        self.latent_head = nn.Linear(width, 4 * channels)

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        *,
        text_time: Tensor,
        latent_time: Tensor,
        attention_mask: Tensor,
        need: str = "both",
    ) -> cv.Denoised:
        times = self.times(torch.stack([text_time, latent_time], dim=1).to(latents.dtype))
        text = self.text_in(cv.embed_tokens(self.words.weight, tokens))
        image = self.patches(latents).flatten(2).transpose(1, 2) + self.position
        mask = F.pad(attention_mask, (0, image.shape[1]), value=True)[:, None, None]
        for block in self.blocks:
            text, image = block(text, image, F.silu(times), mask)
        if need != "logits":
            side = latents.shape[-1] // 2
            image = self.latent_head(image).transpose(1, 2).unflatten(2, (side, side))
            image = F.pixel_shuffle(image.flatten(1, 1), 2)
        return cv.Denoised(
            logits=None if need == "latents" else self.text_head(text),
            latent_prediction=None if need == "logits" else image,
        )


class JointBlock(nn.Module):
    """Two streams with weights of their own, joined by attention; times modulate both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.times, self.qkv, self.out, self.inner = (
            nn.ModuleList(make() for _ in range(2))
            for make in (
                lambda: nn.Linear(width, 6 * width),
                lambda: nn.Linear(width, 3 * width),
                lambda: nn.Linear(width, width),
                lambda: nn.Sequential(
                    nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
                ),
            )
        )

    def forward(
        self, text: Tensor, image: Tensor, times: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        streams = text, image
        moved = [part(times)[:, None].chunk(6, dim=2) for part in self.times]
        qkv = [
            part(modulated(x, *m[:2])).unflatten(2, (3, self.heads, -1))
            for part, x, m in zip(self.qkv, streams, moved, strict=True)
        ]
        both = attend(*torch.cat(qkv, dim=1).unbind(2), mask)
        halves = both.split([text.shape[1], image.shape[1]], dim=1)
        out = []
        for i, (x, m) in enumerate(zip(streams, moved, strict=True)):
            x = x + m[2] * self.out[i](halves[i])
            out.append(x + m[5] * self.inner[i](modulated(x, *m[3:5])))
        return out[0], out[1]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Of `[b, s, heads, d]`, joined again to `[b, s, w]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions of `[b, s, heads, d]`."""
    half = x.shape[-1] // 2
    rates = 500_000.0 ** -(torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[1], device=x.device)[:, None, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)
