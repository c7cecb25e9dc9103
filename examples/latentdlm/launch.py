"""The training entry of the host, LGDLM, with the lines that a user types, as a process.

The checkout is only read: the edited entry is a copy.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent

import cyclevae

PACKAGE = "latentDLM_mmdit"
IMPORT = "from cyclevae.adapters.latentdlm import with_cycle"
WITH_CYCLE = "trainer = with_cycle(trainer)"
BEFORE = "# ---------------- Data ----------------"  # the trainer is built or resumed, not compiled
# The host overwrites its checkpoint: each is copied to a folder of its step. The random state is
# what it writes last. `main` would take an assignment for a local name.
KEEP = """
def keep(path, rank, save=save_rng_state):
    import shutil
    save(path, rank)
    shutil.copytree(path, f"{path}-{state.step}")
globals()["save_rng_state"] = keep
"""


def edit(source: str, block: str, imports: str = IMPORT) -> str:
    """The entry file with `imports` at its top and `block` where the trainer is ready."""
    lines = source.splitlines(keepends=True)
    places = [i for i, line in enumerate(lines) if BEFORE in line]
    if len(places) != 1:
        raise ValueError(f"expected one line with {BEFORE!r} in the entry, got {len(places)}")
    margin = lines[places[0]][: -len(lines[places[0]].lstrip())]
    lines.insert(places[0], indent(block, margin) + "\n")
    return imports + "\n" + "".join(lines)


def command(
    checkout: Path, script: Path, config: str, hydra: Path, values: Mapping[str, object]
) -> list[str]:
    """The command that runs `script` on a config of the host's folder, with `values` on top."""
    # Beside a copy Hydra finds no configs.
    folder = ["--config-path", str(checkout / PACKAGE / "configs"), "--config-name", config]
    return [
        sys.executable,
        str(script),
        *folder,
        *overrides({"hydra.run.dir": str(hydra)} | values),
    ]


def overrides(values: Mapping[str, object]) -> list[str]:
    """Config keys to plain values, in the grammar of Hydra."""
    # Not every fork has every key, and the config takes no new ones: ++ sets or adds.
    return [
        f"{'' if key.startswith('hydra.') else '++'}{key}={_literal(value)}"
        for key, value in values.items()
    ]


def _literal(value: object) -> str:
    """JSON, but for keys without quotes."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def environment(checkout: Path) -> dict[str, str]:
    """One thread of the CPU, no network, no file in the checkout, and this cyclevae."""
    paths = [checkout, Path(cyclevae.__file__).parents[1]]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",  # the host prints signs that an ASCII terminal cannot
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HYDRA_FULL_ERROR": "1",
    }
