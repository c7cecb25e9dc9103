"""Run the training entry of the host, LGDLM, as its users do: a process, a config, a folder.

`examples/latentdlm/launch.py` types the lines and starts the process.
"""

import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.append(str(Path(__file__).parents[3] / "examples" / "latentdlm"))
from launch import IMPORT, PACKAGE, command, edit, environment


@dataclass(frozen=True)
class Run:
    """What a run left behind; `log` has one row per step."""

    returncode: int
    output: str  # stdout and stderr, as they came
    log: list[dict]
    checkpoint: Path  # written after the last step

    def weights(self):
        """The `state_dict` of the trainer, read without the host."""
        saved = torch.load(self.checkpoint, weights_only=False, pickle_module=_Pickle)
        return saved["model_state_dict"]


class _Pickle:
    """The module `pickle`, to which an object of the host is any object."""

    load = pickle.load

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return (
                SimpleNamespace if module.startswith(PACKAGE) else super().find_class(module, name)
            )


def train(
    checkout,
    data,
    folder,
    *,
    steps=4,
    batch=4,
    entry="train_mmdit_stable.py",
    block=None,
    imports=IMPORT,
    overrides=None,
    check=True,
    timeout=300,
):
    """Train a tiny model for `steps` on `data`, a folder of `examples/latentdlm/data.py`.

    `block`: lines to insert before the host loads its data, and `imports` at the top of the file;
    without it the host's own file runs. `overrides`: config keys, new ones too, to plain values.
    With `check`, a run that fails is an error that shows its last lines.
    """
    folder.mkdir(parents=True)
    script = checkout / PACKAGE / entry
    if block is not None:
        edited = edit(script.read_text(encoding="utf-8"), block, imports)
        script = folder / entry
        script.write_text(edited, encoding="utf-8")
    values = config(data, folder, steps, batch) | (overrides or {})
    done = subprocess.run(
        # the default config, `mmdit`, lacks what the code reads
        command(checkout, script, "mmdit_stable", folder / "hydra", values),
        cwd=checkout,
        env=environment(checkout),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        timeout=timeout,
    )
    if check and done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-40:])
        raise AssertionError(f"the host stopped with {done.returncode}:\n{tail}")
    saved = folder / "saved" / "run"
    log = saved / "training_log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return Run(done.returncode, done.stdout, rows, saved / "latest" / "checkpoint.pt")


def config(data, folder, steps, batch):
    """A tiny model for exactly `steps` steps, and no path of the author's left."""
    # Steps follow from rows: the host repeats its files up to `max_samples`, drops a last partial
    # batch, and splits off this part for its validation, one batch here.
    rows = (steps + 1) * batch
    return {
        "data.token_dir": str(data / "tokens" / "train"),
        "data.latent_dir": str(data / "latents" / "train"),
        "data.use_preprocessed": True,
        "data.max_samples": rows,
        "data.val_ratio": (batch + 0.5) / rows,
        "data.num_workers": 1,  # its loader has a timeout, which torch refuses without workers
        "tokenizer.path": str(data / "tokenizer"),
        "model.hidden_size": 64,
        "model.cond_dim": 64,
        "model.n_blocks": 2,
        "model.n_heads": 2,
        "model.max_seq_len": 32,
        "model.latent_dim": 32,
        "training.dtype": "fp32",
        "training.train_batch_size": batch,
        "training.eval_batch_size": batch,
        "training.num_epochs": 1,
        "training.num_train_steps": steps,
        "training.lr_schedule": "constant",  # the others start at 0: a first step without effect
        "training.gradient_accumulation_steps": 1,
        "optimizer.lr": 1e-3,
        "logging.run_name": "run",
        "logging.save_dir": str(folder / "saved"),
        "logging.wandb_dir": str(folder),
        "logging.save_freq": steps,
    }
