"""The command `check` on a checkpoint that the host itself wrote."""

import shutil
import subprocess
import sys

from launch import environment


def check(checkout, *arguments):
    command = [sys.executable, "-m", "cyclevae.adapters.latentdlm", "check", *map(str, arguments)]
    return subprocess.run(
        command, cwd=checkout, env=environment(checkout), capture_output=True, text=True
    )


def test_an_l2t_checkpoint(train, checkout, toy, tmp_path):
    run = train(steps=200, batch=16, overrides={"loss.loss_type": "l2t", "optimizer.lr": 3e-3})
    hydra = tmp_path / "run0" / "hydra" / ".hydra"
    done = check(checkout, run.checkpoint, "--config", hydra / "config.yaml")
    assert not done.returncode, done.stderr
    print(done.stdout)
    lines = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]
    found = {cells[0]: cells[1] for cells in lines if len(cells) == 4}
    expected = {"base L2T": "yes", "base T2L": "no"}
    expected |= dict.fromkeys(("cycle_text", "cycle_latent", "prior"), "no")
    assert found == {"term": "supported", **expected}
    assert "64 pairs; the model predicts epsilon" in done.stdout
    assert "latent_parameterization: x0" in done.stdout
    assert "cycle_warmup_steps: 5000" in done.stdout

    # where hydra.run.dir is save_dir/run_name, its folder lies above the checkpoint's
    shutil.copytree(hydra, run.checkpoint.parents[1] / ".hydra")
    data = tmp_path / "data"
    for kind in ("tokens", "latents"):
        shutil.copytree(toy / kind / "test", data / kind)
    done = check(checkout, run.checkpoint.parent, "--data", data, "--rows", 8)
    assert not done.returncode, done.stderr
    assert "8 pairs" in done.stdout

    done = check(tmp_path, run.checkpoint, "--config", tmp_path / "none.yaml")
    assert done.returncode == 1
    assert done.stderr.startswith("error: expected a config at")
