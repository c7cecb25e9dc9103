"""The training step as one writes it without the library: what `bench.py` compares with.

Four passes of the network, which computes both heads each time; the unread output is dropped.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def plain_step(
    network: nn.Module,
    tokens: Tensor,
    mask: Tensor,
    latents: Tensor,
    mask_id: int,
    weights: dict[str, float],
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of base L2T and T2L, both cycles and a moment prior, on pairs.

    The latent head predicts `v`, at full noise `-z`. Pseudo-texts and pseudo-latents are data.
    """
    ones, zeros = latents.new_ones(len(latents)), latents.new_zeros(len(latents))
    masked = tokens.masked_fill(mask, mask_id)

    def run(*inputs: Tensor, **state: Tensor) -> tuple[Tensor, Tensor]:
        output: Any = network(*inputs, **state, attention_mask=mask)
        logits = output.logits  # a network written without the library leaves none unread
        return getattr(logits, "read", lambda: logits)(), output.latent_prediction

    def decode(z: Tensor) -> Tensor:
        return run(masked, z, text_time=ones, latent_time=zeros)[0]

    def encode(text: Tensor) -> Tensor:
        noise = torch.empty_like(latents).normal_(generator=generator)
        return -run(text, noise, text_time=zeros, latent_time=ones)[1].float()

    def cross_entropy(logits: Tensor) -> Tensor:
        targets = tokens.masked_fill(~mask, -100)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    logits = decode(latents)
    y_hat = logits.detach().float().index_fill(2, masked.new_tensor([mask_id]), -math.inf)
    y_hat = torch.where(mask, y_hat.argmax(dim=2), tokens)
    z_cycle, z_hat = encode(y_hat), encode(tokens)
    losses = {
        "text": cross_entropy(logits),
        "latent": F.mse_loss(z_hat, latents),
        "cycle_text": cross_entropy(decode(z_hat.detach())),
        "cycle_latent": F.mse_loss(z_cycle, latents),
        "prior": moments(z_hat),
    }
    loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
    hits = (logits.argmax(dim=2) == tokens)[mask]
    metrics = {
        **{name: value.item() for name, value in losses.items()},
        "text_accuracy": hits.float().mean().item(),
        "latent_norm": latents.norm(dim=1).mean().item(),
        "latent_pred_norm": z_hat.norm(dim=1).mean().item(),
        "latent_pred_variance": z_hat.var(dim=0).mean().item(),
    }
    if not all(map(math.isfinite, metrics.values())):
        raise ValueError(f"a loss is not finite: {metrics}")
    return loss, metrics


def moments(z: Tensor) -> Tensor:
    """`moment_prior(z, estimator="biased")`: means towards 0 and variances towards 1."""
    return z.mean(dim=0).square().sum() + (z.var(dim=0) - 1).square().sum()
