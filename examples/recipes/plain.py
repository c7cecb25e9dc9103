"""A plain PyTorch loop: the one that all other recipes are compared with."""

import sys

import task
import torch
from data import Sentences
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import cyclevae as cv


def train(
    network: nn.Module,
    objective: cv.CycleObjective,
    data: Sentences,
    *,
    epochs: int = task.EPOCHS,
    batch: int = task.BATCH,
    learning_rate: float = task.LEARNING_RATE,
) -> None:
    denoiser = cv.as_denoiser(network)
    loader = DataLoader(task.Mixed(data), batch, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate)
    step = 0
    for epoch in range(epochs):
        for fields in tqdm(loader, f"epoch {epoch}", leave=False):
            output = objective(denoiser, cv.Batch(**fields), step=step)
            optimizer.zero_grad()
            output.loss.backward()
            if not output.skip:  # None, but for non_finite="skip"; then it waits for the device
                optimizer.step()
            step += 1


if __name__ == "__main__":
    data = task.sentences()
    network = task.make_network(data, seed=int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    objective = task.make_objective(data)
    train(network, objective, data)
    task.report("plain", task.measure(network, data, objective))
