"""Two networks instead of a shared one, each with an optimizer of its own."""

import task
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import cyclevae as cv


class Output(torch.nn.Module):
    """One of the two outputs of a network: `"latent_prediction"` or `"logits"`."""

    def __init__(self, network: torch.nn.Module, name: str, need: str) -> None:
        super().__init__()
        self.network, self.name, self.need = network, name, need

    def forward(self, tokens: Tensor, latents: Tensor, **state: Tensor) -> Tensor:
        return getattr(self.network(tokens, latents, need=self.need, **state), self.name)


data = task.sentences()
objective = task.make_objective(data)
network = cv.EncoderDecoder(
    encoder=Output(task.make_network(data, seed=0), "latent_prediction", "latents"),
    decoder=Output(task.make_network(data, seed=1), "logits", "logits"),
)
denoiser = cv.as_denoiser(network)
optimizers = [
    torch.optim.AdamW(part.parameters(), task.LEARNING_RATE)
    for part in (network.encoder, network.decoder)
]
print(objective.describe(task.STEPS))  # who learns from what
loader = DataLoader(task.Mixed(data), task.BATCH, shuffle=True)
step = 0
for epoch in range(task.EPOCHS):
    for fields in tqdm(loader, f"epoch {epoch}", leave=False):
        output = objective(denoiser, cv.Batch(**fields), step=step)
        output.loss.backward()
        for optimizer in optimizers:
            if not output.skip:  # None, but for non_finite="skip"
                optimizer.step()
            optimizer.zero_grad()
        step += 1
task.report("two_networks", task.measure(network, data, objective))
