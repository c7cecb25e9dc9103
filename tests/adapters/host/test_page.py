"""The command of the page runs as it stands there."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from launch import PACKAGE, WITH_CYCLE, edit, environment

ROOT = Path(__file__).parents[3]
SMALL = [  # a model and a run that a test can wait for
    *("model.hidden_size=64", "model.cond_dim=64", "model.n_blocks=2", "model.n_heads=2"),
    *("training.dtype=fp32", "training.num_epochs=1", "data.max_samples=24", "data.val_ratio=0.2"),
]


def test_the_command_and_the_first_line(checkout, toy, tmp_path):
    page = (ROOT / "docs" / "latentdlm.md").read_text()
    (command,) = re.findall(r"```\n(python latentDLM_mmdit/train[^`]*)```", page)
    host = tmp_path / "host"
    shutil.copytree(checkout / PACKAGE, host / PACKAGE)
    entry = host / PACKAGE / "train_mmdit_stable.py"
    entry.write_text(edit(entry.read_text(encoding="utf-8"), WITH_CYCLE), encoding="utf-8")
    for place, here in {
        "/path/to/cyclevae": ROOT,
        "=/data": f"={toy}",
        "=/runs": f"={tmp_path / 'runs'}",
    }.items():
        command = command.replace(place, str(here))
    words = shlex.split(command.replace("\\\n", " "))
    done = subprocess.run(
        [sys.executable, *words[1:], *SMALL],
        cwd=host, env=environment(host), capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    said = re.search(r"`(cyclevae: step 0: [^`]*)`", page)[1].replace("\n", " ")
    assert said in done.stdout + done.stderr
    assert (tmp_path / "runs" / "cycle" / "training_log.jsonl").read_text().count("\n") > 1
