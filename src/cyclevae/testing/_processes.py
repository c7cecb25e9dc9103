"""One gloo process per rank, where a deadlock is an error and no hang."""

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_SKIPS = "does a rank skip a pass, a collective or an accumulation step that others take?"


def run_ranks(work: Callable[[int], Any], ranks: int, time_limit: float) -> list[Any]:
    """What `work(rank)` returns on each rank: tensors, in containers that `torch.load` knows.

    Raises:
        AssertionError: a rank that raises, dies, or does not finish in time.
    """
    starting = _context()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workers = [
            starting.Process(target=_enter, args=(rank, ranks, folder, work), daemon=True)
            for rank in range(ranks)
        ]
        try:
            for worker in workers:
                worker.start()
            _wait(workers, folder, time_limit)
        finally:
            for worker in workers:
                if worker.pid is not None:
                    worker.kill()
                    worker.join()
        return [torch.load(folder / f"{rank}.done", weights_only=True) for rank in range(ranks)]


def _context() -> Any:
    """How ranks start: off one process that has imported what they need, where there is such."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo", "torch.distributed.fsdp"])
    return context


def _wait(workers: Sequence[BaseProcess], folder: Path, time_limit: float) -> None:
    def missing(what: str) -> list[int]:
        return [rank for rank in range(len(workers)) if not (folder / f"{rank}.{what}").exists()]

    deadline = float("inf")
    while late := missing("done"):
        for rank in late:
            if (code := workers[rank].exitcode) is not None:
                raise AssertionError(f"rank {rank} died with exit code {code}: {_SKIPS}")
        for failed in sorted(folder.glob("*.failed"), key=lambda path: path.stat().st_mtime_ns):
            raise AssertionError(f"rank {failed.stem} failed:\n{failed.read_text()}")
        if deadline == float("inf") and not missing("begun"):
            deadline = time.monotonic() + time_limit
        if time.monotonic() > deadline:
            who = f"rank{'s' * (len(late) > 1)} {', '.join(map(str, late))}"
            raise AssertionError(f"{who} did not finish within {time_limit:g} s: {_SKIPS}")
        time.sleep(0.02)


def _enter(rank: int, ranks: int, folder: Path, work: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    (folder / f"{rank}.begun").touch()
    unfinished, outcome = folder / f"{rank}.part", "done"
    try:
        torch.save(work(rank), unfinished)
    except Exception:
        unfinished.write_text(traceback.format_exc())
        outcome = "failed"
    unfinished.rename(folder / f"{rank}.{outcome}")
    # Until it is ended: a process that leaves would fail those that still wait for it.
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
