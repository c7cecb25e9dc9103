"""Latents as generation meets them: drawn from a small diffusion prior, the same for every cell."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cyclevae as cv


class _Denoiser(nn.Module):
    """A residual network from a noised latent and its time to the prediction `v`."""

    def __init__(self, dim: int, width: int = 256) -> None:
        super().__init__()
        self.enter = nn.Linear(dim, width)
        self.time = nn.Sequential(nn.Linear(1, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(),
                          nn.Linear(width, width)) for _ in range(3)
        )  # fmt: skip
        self.leave = nn.Linear(width, dim)

    def forward(self, z: Tensor, time: Tensor) -> Tensor:
        hidden = self.enter(z) + self.time(time[:, None])
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(hidden)


def prior_samples(folder: Path, latents: Tensor, rows: int, process: cv.LatentProcess) -> Tensor:
    """Latents drawn from a prior that was fitted to `latents`; made once, then read."""
    made_of = hashlib.sha256(latents.numpy().tobytes()).hexdigest()[:16]
    path = folder / f"prior-{made_of}-{rows}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        save_file({"latents": sample_prior(latents, rows, process)}, part)
        part.replace(path)
    return load_file(path)["latents"]


def sample_prior(
    latents: Tensor, rows: int, process: cv.LatentProcess, *, steps: int = 1500, ddim: int = 50
) -> Tensor:
    """Fit `p(z)` to some latents and draw from it, `[rows, d]`; seeded, on the CPU."""
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(0)
        network = _Denoiser(latents.shape[1])
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            z = latents[torch.randint(len(latents), (256,))]
            noise, time = torch.randn_like(z), torch.rand(len(z))
            target = process.target(z, noise, time)
            loss = (network(process.noised(z, noise, time), time) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            z = torch.randn(rows, latents.shape[1])
            times = torch.linspace(1, 0, ddim + 1)
            for now, then in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
                t, to = z.new_full((rows,), now), z.new_full((rows,), then)
                z = process.ddim(process.to_x0(network(z, t), z, t), z, t, to)
    return z
