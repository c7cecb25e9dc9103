"""One training run of the example: the same loop whatever the objective."""

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Regime, Sentences, Split
from evaluate import evaluate, nats_per_pair
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import cyclevae as cv


@dataclass(frozen=True)
class Config:
    """What all runs of a table share."""

    steps: int = 600
    batch: int = 16
    unpaired: int = 24
    learning_rate: float = 4e-3
    weight_decay: float = 0.3
    ema: float = 0.99
    evaluate_every: int = 40
    seed: int = 0


@dataclass
class Run:
    """The best checkpoint of a run, and how it got there."""

    weights: dict[str, Tensor]
    best_step: int
    history: list[dict[str, float]]
    interrupted: bool = False


def train(
    name: str,
    network: nn.Module,
    objective: cv.CycleObjective,
    data: Sentences,
    regime: Regime,
    config: Config,
    *,
    unpaired: bool,
    log: Path,
) -> Run:
    """Train a network and keep the weights that did best on validation pairs.

    Paired batches come from a generator of their own, so they are the same in every run.
    """
    pairs, texts, latents = (
        _batches(data.train, rows, size, seed=3 * config.seed + offset)
        for offset, (rows, size) in enumerate(
            [
                (regime.paired, config.batch),
                (regime.unpaired_text, config.unpaired),
                (regime.unpaired_latent, config.unpaired),
            ]
        )
    )
    optimizer = torch.optim.AdamW(
        network.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1,
        cycle_momentum=False,
    )  # fmt: skip
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    noise = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)  # dropout
    denoiser, run = cv.as_denoiser(network), Run({}, 0, [])
    with tqdm(range(config.steps), desc=f"{name:>7}", unit="step", dynamic_ncols=True) as bar:
        try:
            for step in bar:
                batch = _batch(data.train, next(pairs), next(texts), next(latents))
                if not unpaired:
                    batch = cv.Batch(*batch[:3])
                output = objective(denoiser, batch, step=step, generator=noise)
                optimizer.zero_grad()
                output.loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                averaged.update_parameters(network)
                if (step + 1) % config.evaluate_every == 0 or step + 1 == config.steps:
                    row = _evaluate(averaged.module, objective, data.validation, step + 1, run)
                    losses = {key: value.item() for key, value in output.metrics.items()}
                    with log.open("a") as file:
                        file.write(json.dumps({"run": name, **row, "train": losses}) + "\n")
                    bar.set_postfix(
                        loss=f"{losses['loss']:.2f}",
                        val_ce=f"{row['l2t_ce']:.3f}",
                        val_mse=f"{row['t2l_mse']:.3f}",
                        r1=f"{row['t2l_r1']:.3f}",
                    )
        except KeyboardInterrupt:  # keep what there is: a partial result is a result
            run.interrupted = True
    return run


def _evaluate(
    network: nn.Module, objective: cv.CycleObjective, held_out: Split, step: int, run: Run
) -> dict[str, float]:
    """Add a row to the history, and keep the weights if they are the best so far."""
    network.eval()
    denoiser = cv.as_denoiser(network)
    metrics = evaluate(denoiser, held_out, objective.text_process, objective.latent_process)
    row = {"step": step, "score": nats_per_pair(metrics, held_out), **metrics}
    if row["score"] < min((past["score"] for past in run.history), default=float("inf")):
        run.best_step, run.weights = step, deepcopy(network.state_dict())
    run.history.append(row)
    return row


def _batch(split: Split, pairs: Tensor, texts: Tensor, latents: Tensor) -> cv.Batch:
    return cv.Batch(
        *_texts(split, pairs), split.latents[pairs], *_texts(split, texts), split.latents[latents]
    )


def _batches(split: Split, rows: Tensor, size: int, *, seed: int) -> Iterator[Tensor]:
    """Endless batches of rows in random order, each of sentences about as long: less padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = split.attention_mask.sum(dim=1)
    while True:
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        batches = []
        for pool in shuffled.split(16 * size):
            batches += pool[lengths[pool].argsort(stable=True)].split(size)
        for i in torch.randperm(len(batches), generator=generator):
            yield batches[i]


def _texts(split: Split, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and mask of some rows, cut to the longest of them."""
    mask = split.attention_mask[rows]
    longest = int(mask.sum(dim=1).max())
    return split.tokens[rows, :longest], mask[:, :longest]
