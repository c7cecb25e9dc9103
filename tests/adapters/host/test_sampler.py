"""How long are the texts of the host's own sampler, after each `text_loss_padding`?"""

import json
import subprocess
import sys

import numpy as np
import pytest
from launch import PACKAGE, WITH_CYCLE, environment

LENGTH = 16  # to which the sampler writes; the toy sentences have 3 to 5 words between two marks
DECODER = {  # base L2T alone
    "latent_loss_weight": 0.0,
    "cycle_text_weight": 0.0,
    "cycle_latent_weight": 0.0,
}


@pytest.mark.parametrize(
    (
        "padding",
        "least",
        "most",
    ),  # of the true lengths, after little training; a fork samples otherwise
    [("host", 0.6, 1.7), ("first", 1.7, 2.7), ("exclude", 1.9, 3.3)],
)
def test_lengths_of_its_texts(train, checkout, toy, tmp_path, padding, least, most):
    loss = {"loss_type": "cycle_vae", "text_loss_padding": padding, **DECODER}
    values = {f"loss.{key}": value for key, value in loss.items()}
    values |= {"latent_parameterization": "v_param", "optimizer.lr": 3e-3}
    run = train(block=WITH_CYCLE, overrides=values, steps=300, batch=16)
    command = [
        sys.executable, str(checkout / PACKAGE / "sample_l2t_fixed.py"),
        "--checkpoint", str(run.checkpoint),
        "--config", str(tmp_path / "run0" / "hydra" / ".hydra" / "config.yaml"),
        "--npy_dir", str(toy / "latents" / "test"),
        "--num_samples", "20", "--batch_size", "20",
        "--steps", str(LENGTH), "--seq_len", str(LENGTH),
        "--output_dir", str(tmp_path / "written"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=checkout, env=environment(checkout), capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    texts = json.loads((tmp_path / "written" / "results.json").read_text())["texts"]
    words = np.array([len(text.split()) for text in texts])
    rows = [np.load(path) for path in sorted((toy / "tokens" / "test").iterdir())]
    true = np.array([row["attention_mask"].sum() - 2 for row in rows])
    print(f"\n{padding}: {words.mean():.1f} words, where the sentences have {true.mean():.1f}")
    assert least < words.mean() / true.mean() < most, texts
