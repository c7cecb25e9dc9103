"""What each mode of the host, `latentDLM_mmdit` (LGDLM), buys with equal FLOPs, on real sentences.

    python examples/latentdlm/compare.py HOST FOLDER

runs `train_mmdit_stable.py` of the checkout HOST for l2t, t2l, random and cycle_vae, measures the
kept checkpoints on held-out files, and writes `latentdlm.json` and `latentdlm.svg` to FOLDER. It
needs the extras `demo` and `host`. A run that is complete is not run again. The ablation of the
cycles is `--modes unconditional text_cycle latent_cycle cycle_vae`.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from data import write_sentences
from hydra import compose, initialize_config_dir
from launch import KEEP, PACKAGE, WITH_CYCLE, command, edit, environment, overrides
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import cyclevae as cv
from cyclevae.adapters.latentdlm import with_cycle
from cyclevae.adapters.latentdlm.checkpoints import read_checkpoint
from cyclevae.adapters.latentdlm.host import HostDenoiser, latent_process_of, text_process_of

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).resolve().parent
ENTRY = "train_mmdit_stable.py"
COLOURS = {
    "l2t": "#7f7f7f",
    "t2l": "#2ca02c",
    "random": "#1f77b4",
    "cycle_vae": "#d62728",
    "unconditional": "#8c564b",
    "base": "#17becf",
    "text_cycle": "#9467bd",
    "latent_cycle": "#ff7f0e",
}
MODES = ("l2t", "t2l", "random", "cycle_vae")
CYCLES: dict[str, dict[str, Any]] = {  # loss_type cycle_vae, and what is off
    "cycle_vae": {},
    "base": {"cycle_text_weight": 0.0, "cycle_latent_weight": 0.0},
    "text_cycle": {"cycle_latent_weight": 0.0},
    "latent_cycle": {"cycle_text_weight": 0.0},
}
PARTS = ("unconditional", "l2t", "t2l")  # of which `random` draws one per step, evenly
PANELS = {  # a measure: what it is, and who has not learned it at all
    "ce": ("L2T cross-entropy, nats per token", "t2l"),
    "gap": ("what another row's latents add to it", "t2l"),
    "ce_predicted": ("L2T cross-entropy on T2L's latents", "t2l"),
    "cosine": ("T2L cosine", "l2t"),
}


@dataclass(frozen=True)
class Setup:
    """What the runs share: checkout, folder of data and results, and sizes."""

    host: Path
    folder: Path
    steps: int
    batch: int
    points: int
    seed: int
    parameterization: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host", type=Path, help="the checkout")
    parser.add_argument("folder", type=Path, help="for data, runs and results")
    parser.add_argument("--steps", type=int, default=1000, help="of cycle_vae (default: 1000)")
    parser.add_argument("--batch", type=int, default=16, help="(default: 16)")
    parser.add_argument("--points", type=int, default=4, help="checkpoints per run (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sentences", type=int, help="how many to find (default: all there are)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--modes", nargs="+", choices=list(COLOURS), default=list(MODES))
    parser.add_argument("--parameterization", choices=("x0", "v_param"), default="x0")
    given = parser.parse_args()
    host, folder = given.host.resolve(), given.folder.resolve()
    if not (host / PACKAGE / ENTRY).is_file():
        parser.error(f"expected a checkout of LGDLM, got {host}, which has no {PACKAGE}/{ENTRY}")
    sys.path.insert(0, str(host))
    setup = Setup(
        *(host, folder, given.steps, given.batch, given.points, given.seed),
        parameterization=given.parameterization,
    )
    if not (folder / "data/normaliser.safetensors").exists():  # what is written last
        shutil.rmtree(folder / "data", ignore_errors=True)
        write_sentences(folder / "data", given.sentences, progress=True)

    costs = {mode: _costs(setup, mode) for mode in {*PARTS, "cycle_vae", *given.modes} - {"random"}}
    costs["random"] = Costs(0, *[sum(costs[part].later for part in PARTS) / len(PARTS)] * 2)
    budget = costs["cycle_vae"].until(setup.steps)
    steps = {mode: costs[mode].steps(budget) for mode in given.modes}
    print(f"{budget:.1f} TFLOP each: " + ", ".join(f"{n} steps of {m}" for m, n in steps.items()))
    with ThreadPoolExecutor(given.jobs) as pool:
        places = range(len(steps))
        list(pool.map(lambda mode, place: _train(setup, mode, steps[mode], place), steps, places))
    curves = {}
    for mode in steps:
        trainer = _trainer(setup, mode)
        curves[mode] = [
            {"step": step, "tflop": costs[mode].until(step), **_measure(trainer, path, setup)}
            for step, path in tqdm(_kept(folder / mode), f"measuring {mode}")
        ]
    found = {"cyclevae": cv.__version__, "batch": setup.batch, "seed": setup.seed}
    found |= {"latent_parameterization": setup.parameterization}
    found |= {"train": len(list((folder / "data/tokens/train").iterdir())), "curves": curves}
    (folder / "latentdlm.json").write_text(json.dumps(found, indent=1) + "\n")
    _plot(curves, folder / "latentdlm.svg")
    print(_table(curves))
    return 0


def _values(setup: Setup, mode: str) -> dict[str, Any]:
    """The config of a run, on top of the host's `mmdit_stable.yaml`."""
    loss: dict[str, Any] = {"loss_type": mode, "latent_loss_weight": 0.1}
    if mode in CYCLES:
        loss = OmegaConf.to_container(OmegaConf.load(HERE / "cycle_vae.yaml").loss)
        loss |= CYCLES[mode]
        loss["cycle_warmup_steps"] = loss["cycle_ramp_steps"] = _warm_up(setup)
    return {
        "latent_parameterization": setup.parameterization,
        **{f"loss.{key}": value for key, value in loss.items()},
        "data.token_dir": str(setup.folder / "data/tokens/train"),
        "data.latent_dir": str(setup.folder / "data/latents/train"),
        "data.max_samples": None,  # else validation rows are training rows
        "data.num_workers": 1,
        "tokenizer.path": str(setup.folder / "data/tokenizer"),
        "model.hidden_size": 128,
        "model.cond_dim": 128,
        "model.n_blocks": 2,
        "model.n_heads": 4,
        "model.max_seq_len": 32,
        "model.latent_dim": 32,
        "model.dropout": 0.1,
        "training.seed": setup.seed,
        "training.dtype": "fp32",
        "training.train_batch_size": setup.batch,
        "training.eval_batch_size": setup.batch,
        "training.num_epochs": 1000,  # more than needed: a run stops at its last checkpoint
        "training.lr_schedule": "constant",
        "optimizer.lr": 1e-3,
        "logging.run_name": "run",
        "logging.save_dir": str(setup.folder / mode / "saved"),
        "logging.wandb_dir": str(setup.folder / mode),
    }


def _train(setup: Setup, mode: str, steps: int, place: int) -> None:
    """Run the host's entry for exactly `steps`, in `folder/mode`."""
    here, every = setup.folder / mode, steps // setup.points
    last = every * setup.points
    values = _values(setup, mode) | {"logging.save_freq": every}
    asked = json.dumps(values | {"steps": last}, indent=1)
    if (done := here / "done.json").exists() and done.read_text() == asked:
        return
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    stop = f"    if state.step >= {last}: raise SystemExit\n"
    block = f"{WITH_CYCLE}\n" + KEEP.replace("globals()", stop + "globals()")
    source = (setup.host / PACKAGE / ENTRY).read_text(encoding="utf-8")
    (here / ENTRY).write_text(edit(source, block), encoding="utf-8")
    log = here / "saved/run/training_log.jsonl"
    with (
        open(here / "output.txt", "wb") as output,
        tqdm(total=last, desc=f"training {mode}", position=place) as bar,
    ):
        process = subprocess.Popen(
            command(setup.host, here / ENTRY, "mmdit_stable", here / "hydra", values),
            cwd=setup.host,
            env=environment(setup.host),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            time.sleep(1)
            if log.exists():
                bar.update(log.read_bytes().count(b"\n") - bar.n)
    if process.returncode:
        tail = "\n".join((here / "output.txt").read_text(encoding="utf-8").splitlines()[-20:])
        raise SystemExit(f"the host stopped with {process.returncode}:\n{tail}")
    done.write_text(asked)


def _trainer(setup: Setup, mode: str) -> Any:
    """The host's own trainer of a run, in this process."""
    from latentDLM_mmdit.diffusion_process import MaskedDiffusion
    from latentDLM_mmdit.improved_trainer_stable import MultimodalDiffusionTrainer_new
    from latentDLM_mmdit.modeling_mmdit import get_tokenizer
    from latentDLM_mmdit.models.multimodal_mmdit import MultimodalMMDiT

    with initialize_config_dir(str(setup.host / PACKAGE / "configs"), version_base=None):
        config = compose("mmdit_stable", overrides(_values(setup, mode)))
    with redirect_stdout(io.StringIO()):  # the host prints as it goes
        tokenizer = get_tokenizer(config)
        return MultimodalDiffusionTrainer_new(
            model=MultimodalMMDiT(config.model, len(tokenizer), config.model.latent_dim, 0),
            tokenizer=tokenizer,
            text_noise_schedule=MaskedDiffusion(tokenizer),
            dtype=torch.float32,
            config=config,
        )


class Costs(NamedTuple):
    """TFLOP of a step, forward and backward, which rise when the cycles begin."""

    warm_up: int
    first: float
    later: float

    def until(self, step: int) -> float:
        return self.first * min(step, self.warm_up) + self.later * max(0, step - self.warm_up)

    def steps(self, budget: float) -> int:
        """How many a budget pays for."""
        return round(self.warm_up + (budget - self.until(self.warm_up)) / self.later)


def _costs(setup: Setup, mode: str) -> Costs:
    warm_up = _warm_up(setup) if mode in CYCLES else 0
    trainer = with_cycle(_trainer(setup, mode))
    length, dim = trainer.config.model.max_seq_len, trainer.config.model.latent_dim
    batch = {
        "input_ids": torch.full((setup.batch, length), 5),
        "attention_mask": torch.ones(setup.batch, length),
        "latent": torch.ones(setup.batch, dim),
    }
    found = []
    for step in (0, warm_up + 1):
        with FlopCounterMode(display=False) as count, redirect_stdout(io.StringIO()):
            trainer(batch, step=step)[0].backward()
        found.append(count.get_total_flops() / 1e12)
    return Costs(warm_up, *found)


def _warm_up(setup: Setup) -> int:
    return setup.steps // 5


def _kept(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run by step."""
    paths = folder.glob("saved/run/latest-*")
    return sorted((int(path.name.removeprefix("latest-")), path) for path in paths)


@torch.inference_mode()
def _measure(trainer: Any, checkpoint: Path, setup: Setup) -> dict[str, float]:
    """L2T on true, on another row's and on T2L's latents, and T2L, of the files held out.

    The host's own T2L trains no length, so `z_hat` is also read at the mean length of latents.
    """
    trainer.load_state_dict(read_checkpoint(checkpoint)["model_state_dict"])
    trainer.eval()
    denoiser, process = HostDenoiser(trainer.model), latent_process_of(trainer, 10.0)
    texts = text_process_of(trainer, "all")
    ids, mask, latents = _held_out(setup.folder / "data")

    def cross_entropy(z: torch.Tensor) -> float:
        return cv.text_loss(cv.l2t(denoiser, z, mask, text_process=texts), ids, mask).item()

    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    encoded = cv.t2l(
        denoiser, ids, mask, text_process=texts, latent_process=process, start="noise", noise=noise
    )
    z_hat = encoded.z_hat(process)
    scaled = F.normalize(z_hat, dim=1) * latents.norm(dim=1).mean()
    ce, shuffled = cross_entropy(latents), cross_entropy(latents.roll(1, 0))
    return {
        "ce": ce,
        "ce_shuffled": shuffled,
        "gap": shuffled - ce,
        "ce_predicted": cross_entropy(scaled),
        "ce_predicted_unscaled": cross_entropy(z_hat),
        "cosine": F.cosine_similarity(z_hat, latents).mean().item(),
        "length": (z_hat.norm(dim=1).mean() / latents.norm(dim=1).mean()).item(),
    }


@cache
def _held_out(data: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, kept positions and latents of the test files."""
    names = sorted(path.stem for path in (data / "latents/test").iterdir())
    rows = [np.load(data / f"tokens/test/{name}_tokens.npz") for name in names]
    latents = [np.load(data / f"latents/test/{name}.npy") for name in names]
    ids, mask = (np.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask"))
    return torch.from_numpy(ids), torch.from_numpy(mask).bool(), torch.from_numpy(np.stack(latents))


def _plot(curves: Mapping[str, Iterable[Mapping[str, float]]], path: Path) -> None:
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(15, 3.6), layout="constrained")
    for axis, (key, (title, missing)) in zip(axes, PANELS.items(), strict=True):
        for mode, rows in curves.items():
            if mode != missing:
                x, y = zip(*((row["tflop"], row[key]) for row in rows), strict=True)
                axis.plot(x, y, "o-", markersize=3, label=mode, color=COLOURS[mode])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("TFLOP")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _table(curves: Mapping[str, list[dict[str, float]]]) -> str:
    """The last checkpoint of each run, in Markdown."""
    keys = list(next(iter(curves.values()))[-1])
    lines = ["| | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for mode, rows in curves.items():
        lines.append(f"| {mode} | " + " | ".join(f"{rows[-1][key]:.4g}" for key in keys) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
