"""Run a test's worker on several gloo processes."""

from functools import partial

import torch.distributed as dist

from cyclevae.testing import _processes


def run_ranks(worker, *arguments, world_size=2):
    """Call `worker(rank, *arguments)` in `world_size` processes; a failure in one fails the test.

    The worker must be importable: a function at the top of a module.
    """
    _processes.run_ranks(partial(_call, worker, arguments), world_size, time_limit=240)


def _call(worker, arguments, rank):
    worker(rank, *arguments)


def gather(value):
    """The values of all ranks, in order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
