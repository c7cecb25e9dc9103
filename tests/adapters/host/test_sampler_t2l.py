"""What the host's own T2L samplers return, after training in each parameterisation."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from launch import PACKAGE, WITH_CYCLE, environment


@pytest.mark.parametrize("sampler", ["sample_t2l_fixed.py", "samplet2l.py"])
@pytest.mark.parametrize(("parameterization", "sign"), [("x0", 1), ("v_param", -1)])
def test_latents_of_held_out_texts(train, checkout, toy, tmp_path, parameterization, sign, sampler):
    """Of one step, as trained: they take the prediction for the latent, right for x0 alone."""
    from transformers import AutoTokenizer

    loss = {"loss_type": "cycle_vae", "cycle_text_weight": 0.0, "cycle_latent_weight": 0.0}
    loss |= {"text_loss_weight": 0.0, "latent_loss_weight": 1.0, "base_loss": "corrected"}
    values = {f"loss.{key}": value for key, value in loss.items()}
    values |= {"latent_parameterization": parameterization, "optimizer.lr": 3e-3}
    run = train(block=WITH_CYCLE, overrides=values, steps=200, batch=16)
    tokenizer = AutoTokenizer.from_pretrained(toy / "tokenizer", local_files_only=True)
    paths = sorted((toy / "tokens" / "test").iterdir())
    ids = np.stack([np.load(path)["input_ids"] for path in paths])
    latents = [np.load(toy / "latents/test" / p.name.replace("_tokens.npz", ".npy")) for p in paths]
    (tmp_path / "texts.txt").write_text(
        "\n".join(tokenizer.batch_decode(ids, skip_special_tokens=True)) + "\n"
    )
    command = [
        sys.executable, str(checkout / PACKAGE / sampler),
        "--checkpoint", str(run.checkpoint),
        "--config", str(tmp_path / "run0" / "hydra" / ".hydra" / "config.yaml"),
        "--text_file", str(tmp_path / "texts.txt"),
        "--num_samples", str(len(paths)), "--batch_size", str(len(paths)),
        "--steps", "1", "--max_length", "32", "--output_dir", str(tmp_path / "written"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=checkout, env=environment(checkout), capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    written = torch.load(tmp_path / "written" / "all_latents.pt")
    cosine = torch.cosine_similarity(written, torch.from_numpy(np.stack(latents))).mean().item()
    print(f"\n{sampler}, {parameterization}: cosine {cosine:.3f}")
    assert sign * cosine > 0.5
