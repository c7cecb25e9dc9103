"""Run a test's worker on several gloo processes."""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(worker, *arguments, world_size=2):
    """Call `worker(rank, *arguments)` in `world_size` processes; a failure in one fails the test.

    The worker must be importable: a function at the top of a module.
    """
    with tempfile.TemporaryDirectory() as folder:
        init = f"file://{folder}/init"
        mp.spawn(_enter, (worker, world_size, init, arguments), nprocs=world_size)


def _enter(rank, worker, world_size, init, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size)
    try:
        worker(rank, *arguments)
        dist.barrier()  # a rank that left early would abort the collectives of the others
    finally:
        dist.destroy_process_group()


def gather(value):
    """The values of all ranks, in order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
