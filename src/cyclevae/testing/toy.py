"""A denoiser and a batch of a few numbers, for examples and tests."""

import torch
from torch import Tensor, nn

from cyclevae._base.types import Need
from cyclevae.gradient_policy.roles import Roles
from cyclevae.model.denoiser import Denoised, ModuleDenoiser, as_denoiser, embed_tokens
from cyclevae.objective.batch import Batch
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess


class ToyNetwork(nn.Module):
    """The smallest network that reads both parts in both directions: for examples and tests.

    Examples:
        >>> ToyNetwork(vocab_size=7, latent_dim=4).text_head.out_features
        7
    """

    def __init__(self, vocab_size: int, latent_dim: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, latent_dim)
        self.times = nn.Linear(2, latent_dim)
        self.shared = nn.Linear(latent_dim, latent_dim)
        self.text_head = nn.Linear(latent_dim, vocab_size)
        self.latent_head = nn.Linear(latent_dim, latent_dim)
        self.roles = Roles(encoder_only=("latent_head.*",), decoder_only=("text_head.*",))

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        *,
        text_time: Tensor,
        latent_time: Tensor,
        attention_mask: Tensor,
        need: Need = "both",
    ) -> Denoised:
        """Mix the mean of the words with the latent."""
        words = embed_tokens(self.word.weight, tokens)
        keep = attention_mask.to(words)
        weight = keep / keep.sum(dim=1, keepdim=True).clamp(min=1)
        times = torch.stack([text_time, latent_time], dim=1).to(latents)
        mean = (weight[..., None] * words).sum(dim=1)
        hidden = self.shared((mean + latents + self.times(times)).tanh()).tanh()
        return Denoised(
            logits=None if need == "latents" else self.text_head(words + hidden[:, None]),
            latent_prediction=None if need == "logits" else self.latent_head(hidden),
        )


def toy_denoiser(seed: int = 0) -> tuple[ModuleDenoiser, TextProcess, LatentProcess]:
    """A denoiser of `ToyNetwork`, 7 ids (padding 0, mask 2) and latents of 4 dimensions.

    Examples:
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> latent_process.shape
        (4,)
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = ToyNetwork(vocab_size=7, latent_dim=4)
    text_process = TextProcess(mask_id=2, vocab_size=7, pad_id=0)
    return as_denoiser(network), text_process, LatentProcess(shape=(4,))


def toy_batch(seed: int = 0, rows: int = 3) -> Batch:
    """A batch for `toy_denoiser`, with pairs, unpaired texts and unpaired latents.

    Examples:
        >>> toy_batch(seed=0).unpaired_latents.shape
        torch.Size([3, 4])
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (2, rows, 1), generator=generator)
    mask = torch.arange(5) < lengths
    tokens = torch.randint(3, 7, (2, rows, 5), generator=generator) * mask
    latents = torch.randn(2, rows, 4, generator=generator)
    return Batch(tokens[0], mask[0], latents[0], tokens[1], mask[1], latents[1])
