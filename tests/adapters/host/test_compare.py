"""The comparison of modes runs its ablation rows through the host's entry."""

import json
import subprocess
import sys
from pathlib import Path

from launch import environment

COMPARE = Path(__file__).parents[3] / "examples" / "latentdlm" / "compare.py"


def test_the_ablation_of_the_cycles(checkout, data, tmp_path):
    data.write_toy(tmp_path / "data", 200)
    (tmp_path / "data" / "normaliser.safetensors").touch()  # as if the sentences were there
    modes = ["unconditional", "text_cycle", "latent_cycle"]
    command = [sys.executable, str(COMPARE), str(checkout), str(tmp_path)]
    command += ["--steps", "10", "--points", "1", "--batch", "4", "--modes", *modes]
    done = subprocess.run(command, env=environment(checkout), capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads((tmp_path / "latentdlm.json").read_text())
    assert found["latent_parameterization"] == "x0"
    assert list(found["curves"]) == modes
    budgets = [rows[-1]["tflop"] for rows in found["curves"].values()]
    assert max(budgets) < 1.2 * min(budgets)
    for mode, cycle in {"text_cycle": "cycle_text", "latent_cycle": "cycle_latent"}.items():
        log = (tmp_path / mode / "saved/run/training_log.jsonl").read_text().splitlines()
        ran = [name for name in json.loads(log[-1]) if name.startswith("cycle_") and "loss" in name]
        assert ran == [f"{cycle}_loss"]
