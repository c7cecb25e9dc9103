"""Run the cases, and write down what comes out.

`PYTHONPATH=/path/to/version-0.1/src python tests/move/record.py` writes `recorded.json.gz`. A test
replays the cases with `replay` and `replay_ranks`, and compares with `differences`.
"""

import functools
import gzip
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor

import cyclevae as cv
from cyclevae.testing._processes import run_ranks
from move.build import objective_of
from move.cases import LOSSES, SLOTS, TERMS, Case, Network, batch_of, case_named, case_of
from move.draws import OrderFree

FILE = Path(__file__).with_name("recorded.json.gz")
MODES = ("keyed", "seeded")
RANKS = 2
TOLERANCE = 1e-12
SINGLE = 1e-6  # of metrics that are computed in fp32
_TERM = re.compile(rf"(?<!\w)({'|'.join(TERMS)})(?!\w)")
Result = dict[str, Any]


@contextmanager
def double() -> Iterator[None]:
    """In fp64, on one thread."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


# --- one case ---------------------------------------------------------------------------------


def run(case: Case, mode: str, rank: int = 0, jitter: float = 0.0) -> Result:
    """What a case gives; `jitter` moves the weights, relative to their size."""
    with double():
        network, teacher = Network(case.seed), None
        if jitter:
            for parameter in network.parameters():
                parameter.data.mul_(1 + jitter * torch.randn_like(parameter))
        if case.teacher:
            teacher = cv.Teacher(Network(case.seed + 1)).denoiser
        network.poison = case.poison if rank == 0 else None
        objective, batches = objective_of(case), [batch_of(spec) for spec in case.batches[rank]]
        with OrderFree() if mode == "keyed" else nullcontext():
            return _run(case, objective, batches, network, teacher, mode, rank)


def _run(
    case: Case,
    objective: Any,
    batches: Sequence[cv.Batch],
    network: Network,
    teacher: Any,
    mode: str,
    rank: int,
) -> Result:
    denoiser = cv.as_denoiser(network)
    own = [objective.counts(batch) for batch in batches]
    given = {"step": case.step, "teacher": teacher}
    if case.kind in ("accumulated", "ranks"):
        given["counts"] = _summed(own)

    def generator() -> torch.Generator | None:
        seed = 100 * case.seed + rank
        return None if mode == "keyed" else torch.Generator().manual_seed(seed)

    result: Result = {
        "passes": objective.passes(case.step),
        "counts": [{name: _hex(count) for name, count in counts.items()} for counts in own],
    }
    Network.calls = Network.poisoned = 0
    drawing, outputs = generator(), []
    for batch in batches:
        try:
            output = objective(denoiser, batch, generator=drawing, **given)
        except FloatingPointError as error:
            named = sorted(set(_TERM.findall(str(error))))
            return result | {"error": type(error).__name__, "terms": named}
        output.loss.backward()
        outputs.append(output)
    result["calls"] = Network.calls
    result["poisoned"] = Network.poisoned
    result["loss"] = [_hex(output.loss) for output in outputs]
    result["skip"] = [None if output.skip is None else bool(output.skip) for output in outputs]
    result["metrics"] = [
        {name: _hex(value) for name, value in sorted(output.metrics.items())} for output in outputs
    ]
    result["single"] = sorted(
        {n for out in outputs for n, v in out.metrics.items() if v.dtype == torch.float32}
    )
    result["gradients"] = _gradients(network, case.kind == "ranks")
    if case.kind == "plain" and "non_finite" not in case.options:
        terms = (objective.losses if hasattr(objective, "losses") else objective.terms)(
            denoiser, batches[0], generator=generator(), **given
        )
        result["terms"] = {name: _hex(term) for name, term in terms.items()}
    return result


def _summed(counts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Over batches and ranks, divided by the number of ranks, whose gradients are averaged."""
    names = sorted(counts[0])
    if not names:
        return {}
    total = torch.stack([torch.stack([each[name].double() for name in names]) for each in counts])
    total = total.sum(dim=0)
    if dist.is_initialized():
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return dict(zip(names, total.unbind(), strict=True))


def _gradients(network: Network, averaged: bool) -> dict[str, list[str] | None]:
    """Of each parameter the norm, the product with numbers of no meaning, and the largest."""
    described: dict[str, list[str] | None] = {}
    for name, parameter in network.named_parameters():
        gradient, there = parameter.grad, torch.tensor(float(parameter.grad is not None))
        if averaged:
            gradient = torch.zeros_like(parameter) if gradient is None else gradient.clone()
            dist.all_reduce(there)
            dist.all_reduce(gradient)
            gradient = gradient / dist.get_world_size()
        if not there or gradient is None:
            described[name] = None
            continue
        flat = gradient.flatten()
        arbitrary = (torch.arange(1, len(flat) + 1) * 0.61803398875).frac() - 0.5
        described[name] = [_hex(x) for x in (flat.norm(), flat @ arbitrary, flat.abs().max())]
    return described


def _hex(value: Tensor) -> str:
    return float(value.detach()).hex()


# --- all of them ------------------------------------------------------------------------------


def replay(name: str, mode: str) -> list[Result]:
    """A case of one process, in a list."""
    return [run(case_named(name), mode)]


@functools.cache
def _joined(names: tuple[str, ...]) -> dict[tuple[str, str], list[Result]] | None:
    try:
        ranks = run_ranks(functools.partial(_work, names), RANKS, time_limit=40)
    except AssertionError:
        return None
    keys = [(name, mode) for name in names for mode in MODES]
    return {key: [rank[i] for rank in ranks] for i, key in enumerate(keys)}


def _work(names: tuple[str, ...], rank: int) -> list[Any]:
    results: list[Any] = []
    for name in names:
        for mode in MODES:
            try:
                results.append(run(case_named(name), mode, rank))
            except Exception as error:
                results.append(f"{type(error).__name__}: {error}")
    return results


def replay_ranks(name: str, mode: str, names: Sequence[str]) -> list[Result]:
    """A case of several processes, which run all of `names` once; alone if that fails."""
    joined = _joined(tuple(names)) or _joined((name,))
    assert joined is not None, "a rank died, hung, or took too long"
    for result in joined[name, mode]:
        assert not isinstance(result, str), result
    return joined[name, mode]


def differences(case: Case, old: Sequence[Result], new: Sequence[Result]) -> list[str]:
    """What is not as it was, rank by rank."""
    found: list[str] = []

    def equal(where: str, before: Any, now: Any) -> None:
        if before != now:
            found.append(f"{where}: {before!r} was, {now!r} is")

    def same(where: str, before: str | None, now: str | None, tolerance: float = TOLERANCE) -> None:
        if before is None or now is None:
            return equal(where, before, now)
        a, b = float.fromhex(before), float.fromhex(now)
        close = a == b or (math.isnan(a) and math.isnan(b))
        if not close and not abs(a - b) <= tolerance * max(1.0, abs(a)):
            found.append(f"{where}: {a!r} was, {b!r} is")

    def same_all(where: str, before: Any, now: Any) -> None:
        for i, (a, b) in enumerate(zip(before, now, strict=True)):
            same(f"{where}[{i}]", a, b)

    for rank, (before, now) in enumerate(zip(old, new, strict=True)):
        at = f"rank {rank}: " if len(old) > 1 else ""
        equal(f"{at}error", before.get("error"), now.get("error"))
        equal(f"{at}passes", before["passes"], now["passes"])
        for i, (a, b) in enumerate(zip(before["counts"], now["counts"], strict=True)):
            for name in sorted(a.keys() & b.keys()):
                same(f"{at}counts[{i}] of {name}", a[name], b[name])
            for term in TERMS:
                for name in LOSSES[term]:
                    if case.weighs(term) and name in a and name not in b:
                        found.append(f"{at}counts[{i}] lacks {name}")
        if "error" in before or "error" in now:
            equal(f"{at}terms", list(before.get("terms", ())), list(now.get("terms", ())))
            continue
        equal(f"{at}calls", before["calls"], now["calls"])
        equal(f"{at}poisoned calls", before["poisoned"], now["poisoned"])
        equal(f"{at}skip", before["skip"], now["skip"])
        same_all(f"{at}loss", before["loss"], now["loss"])
        for i, (a, b) in enumerate(zip(before["metrics"], now["metrics"], strict=True)):
            for name in sorted(a.keys() | b.keys()):
                if name not in a and name.endswith("_weight"):
                    continue
                tolerance = SINGLE if name in before["single"] else TOLERANCE
                same(f"{at}metrics[{i}] {name}", a.get(name), b.get(name), tolerance)
        for name in sorted(before["gradients"].keys() | now["gradients"].keys()):
            a, b = (one["gradients"].get(name, "no such") for one in (before, now))
            if not (isinstance(a, list) and isinstance(b, list)):
                equal(f"{at}gradient of {name}", a, b)
            else:
                same_all(f"{at}gradient of {name}", a, b)
        a, b = before.get("terms"), now.get("terms")
        equal(f"{at}terms", a and sorted(a), b and sorted(b))
        for name in (a or {}).keys() & (b or {}).keys():
            same(f"{at}term {name}", a[name], b[name])
    return found


def load() -> dict[str, dict[str, list[Result]]]:
    """What was recorded, by name and mode."""
    return json.loads(gzip.decompress(FILE.read_bytes()))


# --- recording --------------------------------------------------------------------------------


def _sound(case: Case, result: Result) -> str | None:
    """Why a case says little, if it does."""
    if case.poison and "error" not in result and not result["poisoned"]:
        return "no pass is poisoned"
    if case.poison and case.options["non_finite"] == "raise" and "error" not in result:
        return "the poison raises nothing"
    if "error" in result:
        return None if case.poison else "an error without poison"
    if case.poison:
        return None
    numbers = [float.fromhex(x) for g in result["gradients"].values() if g for x in g]
    numbers += [float.fromhex(x) for x in result["loss"]]
    if not all(map(math.isfinite, numbers)):
        return "not finite"
    if max(map(abs, numbers)) > 1e5:
        return "large"
    return None


def _steady(case: Case, mode: str, result: Result) -> str | None:
    """Whether weights that are off by rounding give the same, so that the order of sums may move.

    Ranks run nothing here, and cases with an error or NaN compare as they are.
    """
    torch.manual_seed(0)
    moved = run(case, mode, jitter=2e-16)
    gaps = differences(case, [result], [moved])
    return f"ill-conditioned: {gaps[0]}" if gaps else None


def choose(slot: int) -> tuple[str, dict[str, list[Result]] | None]:
    """The first attempt of a slot that runs, and its results."""
    why: list[str] = []
    for attempt in range(400):
        case = case_of(slot, attempt)
        if case.kind == "ranks":
            try:
                objective_of(case)
            except ValueError as error:
                why.append(str(error))
                continue
            return case.name, None
        try:
            results = {mode: [run(case, mode)] for mode in MODES}
        except (ValueError, TypeError) as error:
            why.append(str(error))
            continue
        for mode in MODES:
            fault = _sound(case, results[mode][0]) or _steady(case, mode, results[mode][0])
            if fault:
                why.append(fault)
                break
        else:
            if attempt:
                print(f"{case.name}: {Counter(text[:90] for text in why).most_common(2)}")
            return case.name, results
    raise SystemExit(f"{SLOTS[slot][0]}: {Counter(why).most_common(5)}")


def choose_ranks(slots: Sequence[int]) -> dict[str, dict[str, list[Result]]]:
    """The same for cases of several processes."""
    attempts, done = dict.fromkeys(slots, 0), {}
    while attempts:
        cases = [case_of(slot, attempt) for slot, attempt in attempts.items()]
        names = tuple(case.name for case in cases)
        joined = _joined(names)
        if joined is None:  # one hangs or dies: find it
            joined = {k: v for name in names for k, v in (_joined((name,)) or {}).items()}
        for slot, case in zip(list(attempts), cases, strict=True):
            results = {mode: joined.get((case.name, mode), ["hangs"]) for mode in MODES}
            faults = [
                each if isinstance(each, str) else _sound(case, each)
                for mode in MODES
                for each in results[mode][:1]
            ] + [each for mode in MODES for each in results[mode][1:] if isinstance(each, str)]
            fault = next((fault for fault in faults if fault), None)
            if fault is None:
                done[case.name] = results
                del attempts[slot]
            else:
                print(f"{case.name}: {fault}")
                attempts[slot] += 1
    return done


def coverage(names: Sequence[str], put: Callable[[str], None] = print) -> None:
    """How many cases there are of each kind, term, and option."""
    tables: dict[str, Counter[str]] = {}

    def count(table: str, entry: object) -> None:
        tables.setdefault(table, Counter())[str(entry)] += 1

    def bare(value: Any) -> str:
        name = getattr(value, "name", value)
        return getattr(name, "__name__", str(name))

    for case in map(case_named, names):
        o = case.options
        count("kind", case.kind)
        for term in TERMS:
            if case.weighs(term):
                count("term", term)
        if "text_bridge" in o:
            count("text bridge", bare(o["text_bridge"]))
        if "latent_bridge" in o:
            bridge = o["latent_bridge"]
            count("latent bridge", f"steps {bridge.steps}")
            for name in ("noise", "threshold", "norm"):
                if getattr(bridge, name):
                    count("latent bridge", name)
        if "prior" in o:
            form = o["prior_options"].get("form")
            count("prior", bare(o["prior"]) + (f" {form}" if form else ""))
            count("prior", "pooled" if o.get("pool_prior") else "of each rank")
        for name in ("text_policy", "latent_policy"):
            if name in o:
                policy = o[name]
                label = policy if isinstance(policy, str) else type(policy).__name__
                count(name, label)
                parts = getattr(policy, "policies", (policy,))
                for part in ("freeze", "freeze_bridge"):
                    if any(getattr(one, part, ()) for one in parts):
                        count(name, part)
                if any(getattr(one, "bridge", "") == "last" for one in parts):
                    count(name, "last")
        count("rule", f"{o.get('non_finite')}{', ' + case.poison if case.poison else ''}")
        count("process", case.latent["prediction"])
        count("process", case.latent["schedule"])
        count("process", f"latents {case.latent['shape']}")
        for name in case.text:
            count("process", name)
        specs = [spec for specs in case.batches for spec in specs]
        count("batch", f"marked {specs[0].marked}")
        if any(spec.texts or spec.latents for spec in specs):
            count("batch", "with unpaired rows")
        if not specs[0].pairs:
            count("batch", "without pairs")
        for name in (
            "join_passes",
            "show_latent",
            "cycle_every",
            "p_dual",
            "cycle_fraction",
            "caps",
            "min_snr",
            "null_text_rate",
            "unconditional_latent_time",
            "contrastive_options",
        ):
            if o.get(name):
                count("option", name)
        for name in ("bridge_time", "base_text_time", "base_latent_time"):
            if name in o:
                label = o[name] if isinstance(o[name], float | None) else type(o[name]).__name__
                count("time", f"{name} {label}")
        if any(callable(o.get(f"{term}_weight")) for term in TERMS):
            count("option", "ramp")
        for name in ("latent_distance", "cycle_latent_distance"):
            if name in o:
                count("distance", bare(o[name]))
    for table, entries in tables.items():
        put(f"{table}: " + ", ".join(f"{name} {n}" for name, n in sorted(entries.items())))


def main() -> None:
    """Choose the cases, run them, and write."""
    print(f"cyclevae {cv.__version__} of {cv.__file__}")
    began, recorded, of_ranks = time.monotonic(), {}, []
    for slot, (_, kind, _) in enumerate(SLOTS):
        if kind == "ranks":
            of_ranks.append(slot)
            continue
        name, results = choose(slot)
        recorded[name] = results
    recorded |= choose_ranks(of_ranks)
    for results in recorded.values():  # results with JSON's types
        assert results is not None
    text = json.dumps(recorded, sort_keys=True, separators=(",", ":"))
    FILE.write_bytes(gzip.compress(text.encode(), mtime=0))
    coverage(list(recorded))
    size = FILE.stat().st_size / 1e6
    print(f"{len(recorded)} cases, {size:.2f} MB, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    from move.record import main as as_module  # so that spawned ranks find its functions

    as_module()
