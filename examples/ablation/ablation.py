"""Run the matrix: what do cycles gain, on how many pairs, and against what control?

A cell is one training run, in a process of its own; finished cells are never run again, so an
interrupted matrix goes on where it stopped. Run it with `make ablation`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep: kind to shared cores

import argparse
import json
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from signal import SIG_IGN, SIGINT

for _folder in ("sentences", "pictures"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / _folder))

try:
    from baselines import baselines
    from cell import describe, path_of, run, write
    from corpora import CORPORA
    from data import DemoError
    from matrix import (
        ALL,
        CONFIRMED,
        CONFIRMING_SEEDS,
        MAP,
        PRIMARY,
        REPAIR_SEEDS,
        ROWS,
        Cell,
        confirmation,
        core,
        exploratory,
        glance,
        quick,
        repair,
        search,
        tier_of_map,
    )
    from stored import Results
    from tables import summary
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f'error: the ablation misses a package ({error}): run "make ablation"')

HERE = Path(__file__).resolve().parent
TIERS = {
    "core": core,
    "exploratory": exploratory,
    "glance": glance,
    "map": tier_of_map,
    "confirmation": confirmation,
    "quick": quick,
    "repair": repair,
}
QUICK = 2000  # sentences
TUNED = HERE / "tuned.json"


def main() -> int:
    options = _options()
    try:
        load = partial(CORPORA[options.corpus].load, options.cache, options.limit)
        data = load(PRIMARY, REPAIR_SEEDS[0])  # before the workers
        results = options.out / "results" / options.corpus
        describe(data, results / "corpus.json")
        deals = own_deals(options)
        if deals or options.tier in ("exploratory", "quick"):
            encode = CORPORA[options.corpus].encode
            found = baselines(options.corpus, load if deals else lambda *_: data, encode, **deals)
            write(results / "baselines.json", {"each": found})
        todo = list(cells(options))
        code = run_all(todo, options)
        if options.tier == "search" and code == 0:
            choose(todo, options.out)
        return code
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


def own_deals(options: argparse.Namespace) -> dict[str, Sequence[int]]:
    """The seeds and numbers of pairs of a tier in which each deal fits what it shows."""
    corpus = options.corpus
    if options.tier == "map":
        return {"seeds": REPAIR_SEEDS, "budgets": (*MAP[corpus], ALL)}
    if options.tier == "confirmation":
        return {"seeds": CONFIRMING_SEEDS, "budgets": (CONFIRMED[corpus],)}
    return {"seeds": REPAIR_SEEDS, "budgets": (PRIMARY,)} if options.tier == "repair" else {}


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    cap = CORPORA[options.corpus].cap
    if options.tier == "search":
        return search(options.corpus, cap)
    return TIERS[options.tier](options.corpus, tuned(options.corpus), cap)


def tuned(corpus: str) -> dict[str, dict[str, float]]:
    """What the search found, from the file that is committed; a corpus may have its own rate."""
    found = json.loads(TUNED.read_text())
    rate = CORPORA[corpus].learning_rate
    return {row: point | ({"learning_rate": rate} if rate else {}) for row, point in found.items()}


def choose(searched: Sequence[Cell], out: Path) -> None:
    """Write the best point of each row, by its best joint score on validation pairs."""
    scores = {cell: json.loads(path_of(cell, out).read_text())["best"] for cell in searched}
    best = {}
    for cell in sorted(searched, key=scores.__getitem__, reverse=True):
        best[cell.row] = {"learning_rate": cell.learning_rate, "weight_decay": cell.weight_decay}
    TUNED.write_text(json.dumps(best, indent=2, sort_keys=True) + "\n")
    print(f"wrote {TUNED}")


def run_all(todo: Sequence[Cell], options: argparse.Namespace) -> int:
    """Run the cells that have no result yet, some at a time; 1 if any failed."""
    waiting = [cell for cell in todo if not finished(cell, options.out)]
    print(f"{len(todo)} cells, {len(todo) - len(waiting)} of them finished before")
    bar = tqdm(
        total=sum(ROWS[cell.row].cost for cell in waiting), smoothing=0, dynamic_ncols=True,
        bar_format="{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
    )  # fmt: skip
    failed = 0
    # Workers live on, as what they import takes as long as a tenth of a cell.
    workers = ProcessPoolExecutor(
        options.jobs, multiprocessing.get_context("spawn"), signal.signal, (SIGINT, SIG_IGN)
    )
    try:
        futures = {workers.submit(_work, cell, options): cell for cell in waiting}
        while futures:
            for future in wait(futures, timeout=1, return_when=FIRST_COMPLETED).done:
                cell = futures.pop(future)
                if error := future.result():
                    failed += 1
                    bar.write(f"{cell.name} failed: {error}; see {log_of(cell, options.out)}")
                bar.update(ROWS[cell.row].cost)
                bar.set_postfix_str(f"{len(futures)} cells left, last {cell.name}", refresh=False)
            bar.refresh()
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.kill()
        bar.close()
        print("\nstopped; finished cells are kept, and the same command goes on from here")
        return 130
    except BrokenProcessPool:
        bar.close()
        print("error: a worker was killed (out of memory? try --jobs 1); the same command goes on",
              file=sys.stderr)  # fmt: skip
        return 1
    finally:
        workers.shutdown(wait=False, cancel_futures=True)
    bar.close()
    print(summary(Results(options.out / "results" / options.corpus)))
    return 1 if failed else 0


def _work(cell: Cell, options: argparse.Namespace) -> str:
    """Run a cell in a worker; what went wrong, if anything."""
    log = log_of(cell, options.out)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, redirect_stderr(file):
        try:
            run(cell, options.out, options.cache, tuned(cell.corpus), options.limit)
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
    return ""


def finished(cell: Cell, out: Path) -> bool:
    """Whether the cell's result is there, and of this very configuration."""
    path = path_of(cell, out)
    if not path.exists():
        return False
    if json.loads(path.read_text())["key"] == cell.key:
        return True
    print(f"{path} is of another configuration: the cell runs again", file=sys.stderr)
    return False


def log_of(cell: Cell, out: Path) -> Path:
    return out / "logs" / cell.corpus / f"{cell.name}.log"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tier", choices=("search", *TIERS), default="core")
    parser.add_argument("--corpus", choices=CORPORA, default="docstrings")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--cache", type=Path, default=HERE.parents[1] / ".cache" / "sentences")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at a time")
    options = parser.parse_args()
    options.limit = QUICK if options.tier == "quick" else None
    return options


if __name__ == "__main__":
    sys.exit(main())
