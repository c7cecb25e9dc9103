"""TensorBoard and Weights & Biases: every term of every tenth step, in one copy from the device."""

import os

import task
import torch
import wandb
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import cyclevae as cv

folder = task.ROOT / "runs" / "recipes" / "trackers"
folder.mkdir(parents=True, exist_ok=True)
os.environ.setdefault("WANDB_MODE", "offline")  # "online" sends; later: wandb sync FOLDER
data = task.sentences()
network, objective = task.make_network(data), task.make_objective(data)
denoiser = cv.as_denoiser(network)
loader = DataLoader(task.Mixed(data), task.BATCH, shuffle=True)
optimizer = torch.optim.AdamW(network.parameters(), task.LEARNING_RATE)
with (
    SummaryWriter(str(folder)) as board,
    wandb.init(project="cyclevae", dir=folder, config=objective.to_config()) as run,
):
    step = 0
    for epoch in range(task.EPOCHS):
        for fields in tqdm(loader, f"epoch {epoch}", leave=False):
            output = objective(denoiser, cv.Batch(**fields), step=step)
            optimizer.zero_grad()
            output.loss.backward()
            if not output.skip:  # None, but for non_finite="skip"
                optimizer.step()
            if step % 10 == 0:
                values = torch.stack(list(output.metrics.values())).tolist()  # the only wait
                logged = {
                    f"train/{name}": value
                    for name, value in zip(output.metrics, values, strict=True)
                }
                for name, value in logged.items():
                    board.add_scalar(name, value, step)
                run.log(logged, step=step)
            step += 1
    result = task.measure(network, data, objective)
    run.summary.update(result)
    for name, value in result.items():
        board.add_scalar(f"test/{name}", value, step)
task.report("trackers", result)
