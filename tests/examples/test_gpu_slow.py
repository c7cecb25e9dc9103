"""All that a GPU is needed for, in small on a CPU: each part runs, is bounded, and says so."""

import json
import subprocess
import sys
from pathlib import Path

GPU = Path(__file__).parents[2] / "examples" / "bench" / "gpu.py"


def run(out, *parts):
    command = [sys.executable, str(GPU), "--out", str(out), "--only", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    lines = (out / "gpu.jsonl").read_text().splitlines()
    return done, {(line := json.loads(each))["part"]: line for each in lines}


def test_parts_that_need_cuda_say_so(tmp_path):
    parts = ("syncs", "freeze", "shape")
    done, found = run(tmp_path, *parts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tuple(found) == parts
    assert {line["verdict"] for line in found.values()} == {"no GPU here"}
    assert "the text head alone learns" in found["freeze"]["found"]
    assert "checkpoint_passes: told" in found["shape"]["found"]
