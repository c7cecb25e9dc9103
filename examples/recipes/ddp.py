"""DistributedDataParallel, with gradient accumulation, an uneven last batch, and resuming.

torchrun --nproc-per-node 2 examples/recipes/ddp.py [checkpoint]
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import task
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import cyclevae as cv

ACCUMULATE = 2


def main(checkpoint: Path | None) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data = task.sentences()
    network, objective = task.make_network(data), task.make_objective(data)
    module = cv.StepModule(cv.as_denoiser(network), objective)
    ddp = DistributedDataParallel(module)  # one forward a batch, however many passes it has
    optimizer = torch.optim.AdamW(network.parameters(), task.LEARNING_RATE)
    first = 0
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    batches = DataLoader(task.Mixed(data), batch_sampler=rows_of(rank, ranks, first))
    parts = iter(batches)
    for step in tqdm(range(first, task.STEPS), "ddp", disable=rank > 0):
        # All draws of a step follow from its number and the rank: no random state to save.
        torch.manual_seed(step * ranks + rank)
        accumulated = [cv.Batch(**next(parts)) for _ in range(ACCUMULATE)]
        counts = cv.pool_counts([objective.counts(batch) for batch in accumulated])
        optimizer.zero_grad()
        skip = False
        for batch in accumulated:
            with nullcontext() if batch is accumulated[-1] else ddp.no_sync():
                output = ddp(batch, step, counts=counts)
                output.loss.backward()
            skip |= bool(output.skip)  # None, but for non_finite="skip"; ranks agree
        if not skip:
            optimizer.step()
        if checkpoint and rank == 0 and (step + 1) % 20 == 0:
            unfinished = checkpoint.with_suffix(".tmp")
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step + 1}, unfinished)
            os.replace(unfinished, checkpoint)  # whole or not at all
    if rank == 0:
        task.report("ddp", task.measure(network, data, objective))
    dist.destroy_process_group()


def rows_of(rank: int, ranks: int, first: int) -> list[list[int]]:
    """The rows of each batch of a rank, from step `first` on; every rank shuffles alike."""
    batches: list[list[int]] = []
    for epoch in range(task.EPOCHS):
        order = torch.randperm(task.ROWS, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(task.BATCH):
            mine = rows.tensor_split(ranks)[rank]
            batches += [part.tolist() for part in mine.tensor_split(ACCUMULATE)]
    return batches[first * ACCUMULATE :]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
