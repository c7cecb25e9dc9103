"""accelerate: one loop for one process or several, with gradient accumulation.

torchrun --nproc-per-node 2 examples/recipes/accelerated.py (or accelerate launch, on GPUs)
"""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice

import task
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import cyclevae as cv

ACCUMULATE = 2


def main() -> None:
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu)  # its own accumulation would divide what the counts divide
    data = task.sentences()
    network, objective = task.make_network(data), task.make_objective(data)
    part = task.BATCH // accelerator.num_processes // ACCUMULATE
    module, optimizer, loader = accelerator.prepare(
        cv.StepModule(cv.as_denoiser(network), objective),
        torch.optim.AdamW(network.parameters(), task.LEARNING_RATE),
        DataLoader(task.Mixed(data), part, shuffle=True),
    )
    set_seed(0, device_specific=True)  # each rank has noise of its own
    step = 0
    for epoch in range(task.EPOCHS):
        hide = not accelerator.is_main_process
        for batches in steps(tqdm(loader, f"epoch {epoch}", leave=False, disable=hide)):
            counts = cv.pool_counts([objective.counts(batch) for batch in batches])
            skip = False
            for batch in batches:
                last = batch is batches[-1]
                with nullcontext() if last else accelerator.no_sync(module):
                    output = module(batch, step, counts=counts)
                    accelerator.backward(output.loss)
                skip |= bool(output.skip)  # None, but for non_finite="skip"
            if not skip:
                optimizer.step()
            optimizer.zero_grad()
            step += 1
    if accelerator.is_main_process:
        task.report("accelerated", task.measure(network, data, objective))
    accelerator.end_training()


def steps(loader: Iterator[dict[str, Tensor] | cv.Batch]) -> Iterator[list[cv.Batch]]:
    """The batches that one optimizer step accumulates."""
    fields = iter(loader)
    while parts := list(islice(fields, ACCUMULATE)):
        yield [task.as_batch(part) for part in parts]


if __name__ == "__main__":
    main()
