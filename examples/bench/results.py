"""What was measured: rows, their verdicts, and a table, a file and a picture of them."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {"pass": "#2ca02c", "short": "#d62728", "": "#7f7f7f"}


@dataclass(frozen=True)
class Row:
    """One comparison; `ratio` is ours over theirs, and less is better.

    Attributes:
        benchmark: its name.
        case: sizes and dtypes.
        quantity: `time` in seconds, `peak bytes`, `flops`, or an error.
        against: whose `theirs` is.
        device: `cpu` or `cuda`.
        ours: of this library.
        theirs: of the other.
        ratio: for times the median of the rounds' ratios.
        low: the lower quartile of that; None where a single call tells all.
        high: the upper one.
        target: the largest ratio that passes; None where there is no target.
        limit: of a ratio that falls short: that of the part which no way of ours can save.
    """

    benchmark: str
    case: str
    quantity: str
    against: str
    device: str
    ours: float
    theirs: float
    ratio: float
    low: float | None = None
    high: float | None = None
    target: float | None = None
    limit: float | None = None

    @property
    def verdict(self) -> str:
        """`pass` or `short`, or nothing without a target."""
        if self.target is None:
            return ""
        return "pass" if self.ratio <= self.target else "short"


def line(row: Row) -> str:
    """A row of the table."""
    spread = "" if row.low is None else f" ({row.low:.3g}–{row.high:.3g})"
    cells = (
        row.benchmark,
        row.case,
        row.quantity,
        row.against,
        _shown(row.ours, row.quantity),
        _shown(row.theirs, row.quantity),
        f"{row.ratio:.3g}{spread}",
        "" if row.target is None else f"≤ {row.target:.3g}",
        row.verdict + ("" if row.limit is None else f", limit {row.limit:.3g}"),
    )
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Row]) -> str:
    """All rows in Markdown, those of a device together."""
    head = (
        "| benchmark | case | quantity | against | ours | theirs | ratio (quartiles) | target | |"
    )
    blocks = []
    for device in dict.fromkeys(row.device for row in rows):
        own = [line(row) for row in rows if row.device == device]
        blocks.append("\n".join([f"On {device}:\n", head, "|---" * 9 + "|", *own]))
    return "\n\n".join(blocks)


def machine() -> dict[str, object]:
    """Where the rows come from."""
    found = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def save(rows: Sequence[Row], notes: Sequence[str], about: dict[str, object], path: Path) -> None:
    """Write everything as JSON."""
    found = [{**asdict(row), "verdict": row.verdict} for row in rows]
    path.write_text(json.dumps({"machine": about, "rows": found, "notes": list(notes)}, indent=2))


def plot(rows: Sequence[Row], path: Path) -> None:
    """A bar for each ratio of times or bytes, from 1 on, and a line at its target."""
    rows = [row for row in rows if row.quantity in ("time", "peak bytes")]
    with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none"}):
        figure, axis = pyplot.subplots(
            figsize=(11, 1.2 + 0.27 * len(rows)), layout="constrained", facecolor="white"
        )
        places = range(len(rows))
        axis.barh(
            places,
            [row.ratio - 1 for row in rows],
            left=1,
            height=0.7,
            color=[COLOURS[row.verdict] for row in rows],
        )
        for place, row in zip(places, rows, strict=True):
            axis.text(
                1.01, place, f"{row.ratio:.3g}", transform=axis.get_yaxis_transform(),
                va="center", fontsize=8,
            )  # fmt: skip
            if row.target is not None:
                axis.plot([row.target] * 2, [place - 0.45, place + 0.45], color="black", lw=2)
        axis.axvline(1, color="black", lw=0.8)
        axis.set_xscale("log")
        axis.margins(x=0.05)
        axis.set_yticks(places, [_label(row) for row in rows], fontsize=8)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlabel("ours / theirs, less is better")
        figure.suptitle(
            "thick lines are targets: green passes, red falls short, grey has none", fontsize=9
        )
        axis.grid(axis="x", alpha=0.3)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _label(row: Row) -> str:
    place = "" if row.device == "cpu" else f" ({row.device})"
    return f"{row.benchmark}, {row.case}: {row.quantity} against {row.against}{place}"


def _shown(value: float, quantity: str) -> str:
    match quantity:
        case "time":
            unit, scale = next((u, s) for u, s in _TIMES if value >= s or u == "µs")
            return f"{value / scale:.3g} {unit}"
        case "peak bytes":
            unit, scale = next((u, s) for u, s in _SIZES if value >= s or u == "KiB")
            return f"{value / scale:.3g} {unit}"
        case "flops":
            return f"{value / 1e9:.4g} G"
        case _:
            return f"{value:.2g}"


_TIMES = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
_SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (text.partition(":")[2].strip() for text in lines if text.startswith("model name")),
        platform.machine(),
    )
