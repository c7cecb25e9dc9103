"""Where and how large the benchmarks run."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

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
        limit: Callable[[], float] | None = None,
    ) -> Row:
        """A row whose numbers a single call tells; if short, beside the ratio that `limit` is."""
        row = Row(
            benchmark, case, quantity, against, self.device.type, ours, theirs, ours / theirs,
            target=None if self.quick else target,
        )  # fmt: skip
        return row if limit is None or row.verdict != "short" else replace(row, limit=limit())

    def time(
        self,
        benchmark: str,
        case: str,
        against: str,
        ours: Call,
        theirs: Call,
        *,
        target: float | None = None,
        limit: Callable[[], Call] | None = None,
        rounds: int = 3,
    ) -> Row:
        """The times of both, side by side; if short, of what `limit` makes: ours cannot save it."""
        found = compare(
            ours,
            theirs,
            seconds=0.3 if self.quick else 3.0,
            rounds=rounds,
            clock=clock_of(self.device),
        )
        target = None if self.quick else target
        row = Row(benchmark, case, "time", against, self.device.type, *found, target)
        if limit is None or row.verdict != "short":
            return row
        least = compare(limit(), theirs, rounds=rounds, clock=clock_of(self.device)).ratio
        return replace(row, limit=least)

    def peak(
        self,
        benchmark: str,
        case: str,
        against: str,
        ours: Call,
        theirs: Call,
        *,
        target: float | None = None,
        limit: Callable[[], Call] | None = None,
    ) -> Row:
        """The bytes of both at their peak; of what `limit` makes, as in `time`, if short."""
        peaks = [peak_bytes(call, self.device) for call in (ours, theirs)]

        def least() -> float:
            return peak_bytes(limit(), self.device) / peaks[1]

        given = benchmark, case, "peak bytes", against
        return self.row(*given, *peaks, target=target, limit=limit and least)

    def dtypes(self, width: int, widest: int) -> tuple[torch.dtype, ...]:
        """Single and half precision; the former alone where a wide step takes minutes in the other.

        As on a CPU without units for bf16, whose times tell nothing of machines that have them.
        """
        both = torch.float32, torch.bfloat16
        if width <= widest or self.device.type != "cpu":
            return both
        single, half = (torch.randn(512, 512).to(dtype) for dtype in both)
        ratio = compare(lambda: half @ half, lambda: single @ single, seconds=0.3).ratio
        return both[: 1 if ratio > 2 else 2]

    def memory(self) -> int:
        """Bytes of the device that a benchmark may take: half of them."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info()[0] // 2
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


Found = Iterator[Row | str]  # rows, and notes on what was not measured
