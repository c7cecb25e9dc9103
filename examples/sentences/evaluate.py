"""What a denoiser is worth on held-out pairs, in both directions and round both cycles."""

import torch
import torch.nn.functional as F
from data import Split
from torch import Tensor

import cyclevae as cv


@torch.inference_mode()
def evaluate(
    denoiser: cv.Denoiser,
    held_out: Split,
    text_process: cv.TextProcess,
    latent_process: cv.LatentProcess,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """The metrics of `summary.json` on one split; every call draws the same noise."""
    tokens, mask, z = held_out.tokens, held_out.attention_mask, held_out.latents
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, *z.shape, generator=generator)

    def decode(latents: Tensor) -> Tensor:
        return cv.l2t(denoiser, latents, mask, text_process=text_process)

    def encode(text: Tensor, noise: Tensor) -> Tensor:
        encoded = cv.t2l(
            denoiser, text, mask, text_process=text_process, latent_process=latent_process,
            start="noise", noise=noise,
        )  # fmt: skip
        return encoded.z_hat(latent_process)

    logits, z_hat = decode(z), encode(tokens, noise[0])
    y_hat = cv.argmax_text(logits, mask, text_process=text_process)
    similarity = F.normalize(z_hat.flatten(1), dim=1) @ F.normalize(z.flatten(1), dim=1).T
    rank = (similarity > similarity.diagonal()[:, None]).sum(dim=1)
    metrics = {
        "l2t_ce": cv.text_loss(logits, tokens, mask),
        "l2t_accuracy": _accuracy(logits, tokens, mask),
        "t2l_mse": cv.latent_loss(z_hat, z),
        "t2l_cosine": similarity.diagonal().mean(),
        "t2l_r1": (rank < 1).float().mean(),
        "t2l_r10": (rank < 10).float().mean(),
        "text_cycle_accuracy": _accuracy(decode(z_hat), tokens, mask),
        "latent_cycle_mse": cv.latent_loss(encode(y_hat, noise[1]), z),
    }
    return {name: value.item() for name, value in metrics.items()}


def nats_per_pair(metrics: dict[str, float], held_out: Split) -> float:
    """The score a checkpoint is chosen by: both directions as negative log-likelihoods.

    `-log p(text | z) + ||z - z_hat||^2 / 2`, up to a constant: a latent of unit variance is read as
    Gaussian. Neither cycle enters, so that no run is favoured.
    """
    words = held_out.attention_mask.sum() / len(held_out)
    return metrics["l2t_ce"] * words.item() + metrics["t2l_mse"] * held_out.latents[0].numel() / 2


def _accuracy(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return (logits.argmax(dim=-1) == tokens)[mask].float().mean()
