"""Everything that a GPU is needed for, in eight minutes, in the order of its worth.

`make gpu` runs each part in a process of its own that is ended at its limit, and writes what it
found as it comes: a line of JSON in `runs/gpu/gpu.jsonl`, and a table. Without a GPU the same parts
run in small on the CPU, and what needs CUDA says so.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / "sentences")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import cyclevae as cv  # noqa: E402
from cyclevae.diagnostics import step_cost  # noqa: E402
from cyclevae.testing import check_ranks, toy_batch, toy_denoiser  # noqa: E402

MINUTES = 8
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SMALL = {"rows": 2, "length": 8, "width": 32, "depth": 1, "vocab_size": 100, "latent_dim": 8}
GIB = 2**30
Found = tuple[str, str]  # a verdict, and what was found


def syncs() -> Found:
    """A step of the full objective, in which the host may wait for nothing."""
    from steps import Case

    case = Case(DEVICE, **SMALL)
    module = cv.StepModule(cv.as_denoiser(case.network), case.objective)
    run = partial(module, case.batch, 0)
    for _ in range(2):  # what is made once may wait
        run().loss.backward()
    if not CUDA:
        return "no GPU here", "the step runs; whether it waits is seen on CUDA alone"
    torch.cuda.set_sync_debug_mode("error")
    try:
        run().loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "pass", "no wait in forward and backward"


def freeze() -> Found:
    """A policy that freezes, under DDP and autocast: the gradients of the same without DDP."""
    denoiser, *processes = toy_denoiser(seed=0)
    denoiser.network.to(DEVICE)
    cycle = cv.CycleText(policy="decoder_isolated", pairs=True, bridge=cv.LatentBridge())
    module = cv.StepModule(denoiser, cv.CycleObjective(*processes, [cycle]))
    batch = cv.Batch(*[None if x is None else x.to(DEVICE) for x in toy_batch(seed=0)])
    backend = "nccl" if CUDA else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
        plain, wrapped = [
            _gradients(module, wrap, batch) for wrap in (module, DistributedDataParallel(module))
        ]
        dist.destroy_process_group()
    learning = {
        name for name, gradient in wrapped.items() if gradient is not None and gradient.any()
    }
    expected = {name for name in wrapped if name.startswith("network.text_head")}
    for name in expected:
        torch.testing.assert_close(wrapped[name], plain[name])
    if learning != expected:
        return "short", f"{sorted(learning)} learn in place of {sorted(expected)}"
    return "pass" if CUDA else "no GPU here", f"{backend}, bf16: the text head alone learns"


def _gradients(
    module: cv.StepModule, wrapped: torch.nn.Module, batch: cv.Batch
) -> dict[str, torch.Tensor | None]:
    module.zero_grad()
    torch.manual_seed(0)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = wrapped(batch, 0).loss
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters()}


def tests() -> Found:
    """The fast tests with CUDA as the default device, where no value is read."""
    chosen = ["tests"] if CUDA else ["tests/losses/test_base.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--tb=line", *chosen],
        cwd=ROOT,
        env=os.environ | {"CYCLEVAE_DEVICE": DEVICE.type},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    # refusals of values are not to be had there, and some tests draw on the CPU
    kinds = {
        "refuse values": "DID NOT RAISE",
        "mix devices": "same device|device type|'cpu' generator|generator",
    }
    failed = [line for line in lines if line.startswith("FAILED")]
    why = Counter(next((k for k, p in kinds.items() if re.search(p, x)), "others") for x in failed)
    (ROOT / "runs/gpu").mkdir(parents=True, exist_ok=True)
    (ROOT / "runs/gpu/tests.txt").write_text(done.stdout)
    verdict = "no GPU here" if not CUDA else "short" if why["others"] else "pass"
    said = ", ".join(f"{count} {kind}" for kind, count in why.items())
    return (
        verdict,
        f"{lines[-1].strip('= ') if lines else done.stderr[-200:]}; {said or 'none fail'}",
    )


def shape() -> Found:
    """LGDLM's: is its step what was told, and does it fit into 80 GB?"""
    from steps import Case  # whose mmdit the ranks do not need

    size = {"rows": 4, "length": 2048, "width": 1024, "depth": 24} if CUDA else SMALL
    said, fits = [], False
    for name, wrap in (("plain", _as_it_is), ("checkpoint_passes", cv.checkpoint_passes)):
        case = Case(DEVICE, dtype=torch.bfloat16, **size)
        module = cv.StepModule(wrap(cv.as_denoiser(case.network)), case.objective)
        told = step_cost(module, case.batch)
        said.append(f"{name}: told {told.live / GIB:.3g} GiB")
        if not CUDA:
            continue
        try:
            seconds, peak = _measured(lambda m=module, c=case: m(c.batch, 0).loss.backward())
        except torch.OutOfMemoryError:
            said.append("out of memory")
            continue
        finally:
            del case, module
            torch.cuda.empty_cache()
        whole = peak + told.parameters + told.gradients
        fits = fits or whole < 80e9
        said.append(f"found {peak / GIB:.3g}, {seconds:.2f} s, {whole / 1e9:.3g} GB in all")
    return ("pass" if fits else "short") if CUDA else "no GPU here", "; ".join(said)


def _as_it_is(denoiser: cv.Denoiser) -> cv.Denoiser:
    return denoiser


def _measured(call: Callable[[], None]) -> tuple[float, int]:
    """Seconds, and bytes at the peak above those before, of the second call."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() - before


def ranks() -> Found:
    """Two ranks on the CPU, as one GPU has no two of NCCL: the gradient of one process."""
    check_ranks(_step, [[cv.Batch(*toy_batch(seed, 3)[:5])] for seed in (0, 1)])
    return "pass", "two gloo processes agree with one"


def _step() -> cv.StepModule:
    denoiser, *processes = toy_denoiser(seed=0)
    return cv.StepModule(denoiser, cv.CycleObjective(*processes))


def bench() -> Found:
    """Losses and steps against other code; Liger and cut-cross-entropy where installed."""
    out = ROOT / "runs/gpu/bench"
    command = [sys.executable, str(ROOT / "examples/bench/bench.py"), "--out", str(out), "--only"]
    names = ["text", "bridges", "mmd", "step"] if CUDA else ["text", "--quick"]
    done = subprocess.run([*command, *names], capture_output=True, text=True)
    if done.returncode:
        return "failed", done.stderr.strip()[-300:]
    rows = json.loads((out / "bench.json").read_text())["rows"]
    on = [row for row in rows if row["device"] == DEVICE.type]
    found = Counter(row["verdict"] for row in on)
    said = f"{len(on)} rows on {DEVICE.type}, {found['pass']} pass, {found['short']} short; {out}"
    return ("short" if found["short"] else "pass") if CUDA else "no GPU here", said


PARTS = {  # by their worth, with the seconds that each may take
    syncs: 40,
    freeze: 40,
    tests: 150,
    shape: 90,
    ranks: 60,
    bench: 100,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu")
    parser.add_argument("--inside", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:  # the process of a part
        part = next(part for part in PARTS if part.__name__ == options.inside)
        print(json.dumps(part()))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if CUDA else "no GPU here, so all parts in small"
    lines, end = [("part", "verdict", "seconds", "found")], time.monotonic() + 60 * MINUTES
    print(machine, flush=True)
    with (options.out / "gpu.jsonl").open("w") as file:
        for part, limit in PARTS.items():
            if part.__name__ in options.only:
                began = time.monotonic()
                verdict, found = _bounded(part.__name__, min(limit, end - began))
                seconds = round(time.monotonic() - began, 1)
                lines.append((part.__name__, verdict, f"{seconds}", found))
                result = dict(zip(lines[0], (part.__name__, verdict, seconds, found), strict=True))
                file.write(json.dumps({"machine": machine, **result}) + "\n")
                file.flush()
                print(": ".join([part.__name__, verdict, found]), flush=True)
    print()
    for part, verdict, seconds, found in lines:
        print(f"{part:8} {verdict:12} {seconds:>7}  {found}")
    return int(any(line[1] in ("failed", "too long") for line in lines))


def _bounded(name: str, seconds: float) -> Found:
    """A part in a process of its own, which is ended with all that it started."""
    if seconds <= 0:
        return "too long", "no time was left"
    command = [sys.executable, __file__, "--inside", name]
    process: Any = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return "too long", f"ended after {seconds:.0f} s"
    if process.returncode:
        return "failed", (stderr.strip().splitlines() or ["without a word"])[-1]
    verdict, found = json.loads(stdout.splitlines()[-1])
    return verdict, found


if __name__ == "__main__":
    sys.exit(main())
