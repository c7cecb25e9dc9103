"""Two callables side by side in one process."""

import random
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import NamedTuple

import torch

Call = Callable[[], object]
Clock = Callable[[], float]


class Comparison(NamedTuple):
    """Median seconds of a call, and the median and quartiles of the ratios of single rounds."""

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float


def compare(
    ours: Call,
    theirs: Call,
    *,
    seconds: float = 3.0,
    rounds: int = 3,
    clock: Clock = time.perf_counter,
) -> Comparison:
    """Call both in turn, in random order inside a round, for some seconds and at least `rounds`.

    What slows the machine down for longer than a round slows both, and leaves the ratio.
    """
    order, sides, times = random.Random(0), (ours, theirs), ([], [])
    repeats = [_repeats(call, clock) for call in sides]
    end = clock() + seconds
    while len(times[0]) < rounds or (clock() < end and len(times[0]) < 500):
        for side in order.sample((0, 1), 2):
            times[side].append(_time(sides[side], repeats[side], clock))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, ratio, high = quantiles(ratios, n=4, method="inclusive")
    return Comparison(*map(median, times), ratio, low, high)


def clock_of(device: torch.device) -> Clock:
    """A clock that waits until the device has done what it was told."""

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock if device.type == "cuda" else time.perf_counter


def _repeats(call: Call, clock: Clock) -> int:
    """Warm up; how many calls fill two milliseconds."""
    first = _time(call, 1, clock)
    took = first if first > 1 else _time(call, 1, clock)  # what takes seconds needs no warm-up
    return max(1, round(0.002 / max(took, 1e-7)))


def _time(call: Call, repeats: int, clock: Clock) -> float:
    began = clock()
    for _ in range(repeats):
        call()
    return (clock() - began) / repeats
