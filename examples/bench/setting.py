"""Where and how large the benchmarks run."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from memory import peak_bytes
from results import Row
from timing import Call, clock_of, compare


@dataclass(frozen=True)
class Setting:
    """What every benchmark is given; the targets are those of the full sizes."""

    device: torch.device
    quick: bool = False

    def row(
        self,
        benchmark: str,
        case: str,
        quantity: str,
        against: str,
        ours: float,
        theirs: float,
        *,
        target: float | None = None,
    ) -> Row:
        """A row whose numbers a single call tells."""
        return Row(
            benchmark, case, quantity, against, self.device.type, ours, theirs, ours / theirs,
            target=None if self.quick else target,
        )  # fmt: skip

    def time(
        self,
        benchmark: str,
        case: str,
        against: str,
        ours: Call,
        theirs: Call,
        *,
        target: float | None = None,
        rounds: int = 3,
    ) -> Row:
        """The times of both, side by side."""
        found = compare(
            ours,
            theirs,
            seconds=0.3 if self.quick else 3.0,
            rounds=rounds,
            clock=clock_of(self.device),
        )
        target = None if self.quick else target
        return Row(benchmark, case, "time", against, self.device.type, *found, target)

    def peak(
        self,
        benchmark: str,
        case: str,
        against: str,
        ours: Call,
        theirs: Call,
        *,
        target: float | None = None,
    ) -> Row:
        """The bytes of both at their peak."""
        peaks = (peak_bytes(call, self.device) for call in (ours, theirs))
        return self.row(benchmark, case, "peak bytes", against, *peaks, target=target)

    def memory(self) -> int:
        """Bytes of the device that a benchmark may take: half of them."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info()[0] // 2
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


Found = Iterator[Row | str]  # rows, and notes on what was not measured
