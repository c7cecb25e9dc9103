"""Measure the library against the code one would write or call in its place.

Both sides run in turn in one process, so that a busy machine slows both. Run it with `make bench`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep: kind to shared cores

import argparse
import sys
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "sentences"))  # for the network

try:
    import torch
    from calls import bridges, small
    from losses import mmd, text
    from recipe import growth, recipe
    from results import Row, line, machine, plot, save, table
    from setting import Setting
    from steps import compiled, joined, step, variants
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f'error: the bench misses a package ({error}): run "make bench", which installs it')

BENCHMARKS = {
    f.__name__: f
    for f in (step, recipe, growth, variants, text, mmd, bridges, small, joined, compiled)
}
CPU_ONLY, ON_REQUEST = {"small"}, {"compiled"}


def main() -> int:
    options = _options()
    warnings.simplefilter("ignore")  # of the compiler and of other packages
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: cannot make {options.out}: {error.strerror}; choose another with --out")
    about, rows, notes = machine(), [], []
    stopped = False
    try:
        measure(options, rows, notes)
    except KeyboardInterrupt:
        stopped = True
    print("; ".join(f"{name}: {value}" for name, value in about.items()))
    if rows:
        print("\n" + table(rows))
        plot(rows, options.out / "bench.svg")
    for note in notes:
        print(f"\n{note}")
    save(rows, notes, about, options.out / "bench.json")
    found = [row.verdict for row in rows]
    print(
        f"\n{found.count('pass')} pass and {found.count('short')} short of their targets"
        f"{'; stopped before the end' if stopped else ''}; results: {options.out / 'bench.json'}"
    )
    return 130 if stopped else 0


def measure(options: argparse.Namespace, rows: list[Row], notes: list[str]) -> None:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    jobs = [(d, n) for d in devices for n in options.only if d == "cpu" or n not in CPU_ONLY]
    bar = tqdm(jobs, unit="benchmark")
    for device, name in bar:
        bar.set_description(f"{name} on {device}")
        torch.manual_seed(0)
        for found in BENCHMARKS[name](Setting(torch.device(device), options.quick)):
            if isinstance(found, Row):
                rows.append(found)
            else:
                notes.append(found)
            bar.write(line(found) if isinstance(found, Row) else found, file=sys.stderr)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes without targets, a minute")
    parser.add_argument(
        "--only", nargs="+", choices=BENCHMARKS, metavar="NAME",
        default=[name for name in BENCHMARKS if name not in ON_REQUEST],
        help=f"some of {', '.join(BENCHMARKS)} (default: all but {', '.join(ON_REQUEST)})",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
