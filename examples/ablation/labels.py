"""Pseudo-pairs: a latent for every unpaired text, made once, and what that took."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from baselines import ridge_latents
from batches import texts_of
from data import Regime, Sentences, Split
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cyclevae as cv

Processes = tuple[cv.TextProcess, cv.LatentProcess]
# Found on validation pairs of the seeds 100 and 101, and not tuned since
CHANNEL = {"likelihood": 0.3, "variance": 2.0, "top": 16}
CHANNEL_SHARE = 0.3  # of the label; the encoder has the rest


class Labels(NamedTuple):
    """Latents of the training rows, 0 where none was made, and the FLOPs of making them."""

    latents: Tensor
    flops: float


def by_network(
    network: nn.Module,
    train: Split,
    dealt: Regime,
    processes: Processes,
    seed: int,
    *,
    channel: bool,
) -> Labels:
    """What T2L makes of the texts; with `channel`, drawn to the unpaired latents they may be of."""
    denoiser, generator = cv.as_denoiser(network.eval()), torch.Generator().manual_seed(seed)
    given = dict(zip(("text_process", "latent_process"), processes, strict=True))
    candidates = train.latents[dealt.unpaired_latent]

    def label(tokens: Tensor, mask: Tensor) -> Tensor:
        noise = torch.randn(len(tokens), *train.latents.shape[1:], generator=generator)
        z_hat = cv.encode_text(denoiser, tokens, mask, noise=noise.to(train.latents), **given)
        if not channel:
            return z_hat
        found = cv.channel_latents(
            denoiser, tokens, mask, candidates, z_hat=z_hat, **CHANNEL, **given
        )
        return (1 - CHANNEL_SHARE) * z_hat + CHANNEL_SHARE * found

    return _labelled(train, dealt, label)


def by_ridge(data: Sentences, train: Split, dealt: Regime) -> Labels:
    """What ridge regression on the pairs makes of the texts; its FLOPs are not counted."""
    latents = torch.zeros_like(train.latents)
    found = ridge_latents(data, dealt.paired.cpu(), data.train)[dealt.unpaired_text.cpu()]
    latents[dealt.unpaired_text] = found.to(latents)
    return Labels(latents, 0.0)


@torch.no_grad()
def _labelled(
    train: Split, dealt: Regime, label: Callable[[Tensor, Tensor], Tensor], at_once: int = 256
) -> Labels:
    latents = torch.zeros_like(train.latents)
    with FlopCounterMode(display=False) as counted:
        for rows in dealt.unpaired_text.split(at_once):
            latents[rows] = label(*texts_of(train, rows))
    return Labels(latents, float(counted.get_total_flops()))
