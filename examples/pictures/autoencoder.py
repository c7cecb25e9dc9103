"""A small autoencoder of pictures: latents `[c, h, w]` that no linear map makes of the pixels."""

import hashlib
import os
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CHANNELS = 4  # of a latent of 4 x 4 places
STEPS, BATCH = 1500, 64


class Autoencoder(nn.Module):
    """Pictures `[b, 3, 32, 32]` to latents `[b, 4, 4, 4]` and back."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(4 * width, CHANNELS, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, 4 * width, 3, 1, 1), nn.SiLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, pictures: Tensor) -> Tensor:
        return self.decoder(self.encoder(pictures))


def codes(pictures: Tensor, rows: Tensor, folder: Path) -> Tensor:
    """Latents of all pictures `[n, 32, 32, 3]`, flat, `[n, 64]`, of what was trained on some rows.

    Trained once for the same rows, on the CPU and seeded, then read from `folder`.
    """
    x = rearrange(pictures, "n h w c -> n c h w").contiguous()
    made_of = Path(__file__).read_bytes() + x.numpy().tobytes() + rows.numpy().tobytes()
    path = folder / f"codes-{hashlib.sha256(made_of).hexdigest()[:16]}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        save_file({"codes": _encoded(_trained(x[rows]), x)}, part)
        part.replace(path)
    return load_file(path)["codes"]


def _trained(x: Tensor) -> Autoencoder:
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(0)
        network = Autoencoder()
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
        for _ in range(STEPS):
            batch = x[torch.randint(len(x), (BATCH,))]
            loss = (network(batch) - batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def _encoded(network: Autoencoder, x: Tensor) -> Tensor:
    return torch.cat([network.encoder(part) for part in x.split(256)]).flatten(1)
