"""A plain PyTorch loop: the one that all other recipes are compared with."""

import sys

import task
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import cyclevae as cv

seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
data = task.sentences()
network, objective = task.make_network(data, seed), task.make_objective(data)
denoiser = cv.as_denoiser(network)
loader = DataLoader(task.Mixed(data), task.BATCH, shuffle=True)
optimizer = torch.optim.AdamW(network.parameters(), task.LEARNING_RATE)
step = 0
for epoch in range(task.EPOCHS):
    for fields in tqdm(loader, f"epoch {epoch}", leave=False):
        output = objective(denoiser, cv.Batch(**fields), step=step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        step += 1
task.report("plain", task.measure(network, data, objective))
