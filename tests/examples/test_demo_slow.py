"""The main job as a newcomer runs it: `examples/sentences/demo.py` in a process of its own."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "sentences" / "demo.py"
METRICS = {
    "l2t_ce", "l2t_accuracy", "t2l_mse", "t2l_cosine", "t2l_r1", "t2l_r10",
    "text_cycle_accuracy", "latent_cycle_mse",
}  # fmt: skip


def demo(cache, output, *arguments, **options):
    command = [sys.executable, str(DEMO), "--quick", "--cache", str(cache), "--output", str(output)]
    return subprocess.Popen(
        [*command, "--threads", "1", *arguments],  # as another worker runs beside
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_run_leaves_table_picture_and_checkpoints_and_a_seed_repeats_them(cache, tmp_path):
    summaries = []
    for name in ("one", "two"):
        out = tmp_path / name
        process = demo(cache, out, "--steps", "4", "--seed", "3")
        stdout, stderr = process.communicate(timeout=500)
        assert process.returncode == 0, stderr
        summaries.append((out / "summary.json").read_text())
    assert summaries[0] == summaries[1]
    summary = json.loads(summaries[0])
    assert list(summary) == ["base", "control", "cycle"]
    for run in summary.values():
        assert run.keys() >= METRICS and all(map(math.isfinite, run.values()))
    assert stdout.rstrip().splitlines()[-1].startswith("results: ")
    assert "step" in stderr  # the progress bars
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {row["run"] for row in rows} == set(summary)
    for name in ("base", "control", "cycle", "normaliser"):
        assert (out / f"{name}.safetensors").stat().st_size


def test_the_same_on_the_real_mmdit(cache, tmp_path):
    process = demo(cache, tmp_path, "--steps", "4", "--model", "mmdit")
    _, stderr = process.communicate(timeout=500)
    assert process.returncode == 0, stderr
    assert json.loads((tmp_path / "summary.json").read_text()).keys() == {
        "base",
        "control",
        "cycle",
    }


def test_an_interrupt_leaves_a_readable_partial_result(cache, tmp_path):
    def hear():  # a job in the background of a script is started deaf to SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = demo(cache, tmp_path, "--steps", "400", preexec_fn=hear)
    log = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "interrupted: the results above" in stdout
    assert json.loads((tmp_path / "summary.json").read_text()).keys() == {"base"}


@pytest.mark.parametrize("where", ["output", "cache"])
def test_a_folder_that_cannot_be_written_gets_one_clear_line(cache, tmp_path, where):
    blocked = tmp_path / "a_file"
    blocked.write_text("")
    folders = {"cache": cache, "output": tmp_path / "out"} | {where: blocked / "folder"}
    process = demo(**folders)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    (line,) = stderr.strip().splitlines()
    assert line.startswith("error: ") and "a_file" in line and "folder" in line


def test_a_full_disk_gets_one_clear_line(cache, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    process = demo(cache, tmp_path, "--steps", "4")
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "Traceback" not in stderr and "No space left on device" in stderr.splitlines()[-1]


def test_a_missing_package_is_named(cache, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError(\"No module named 'matplotlib'\")")
    process = demo(cache, tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    (line,) = stderr.strip().splitlines()
    assert "No module named 'matplotlib'" in line and "make demo" in line
