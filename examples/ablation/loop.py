"""One training run under a cap on its compute, with early stopping and one checkpoint."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal

import torch
from batches import Drawn
from data import DemoError, Split
from evaluate import nats_per_pair
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import cyclevae as cv

StepLoss = Callable[[cv.Denoiser, Drawn, int], Tensor]  # with the number of the step


@dataclass(frozen=True)
class Training:
    """How every cell trains; learning rate and weight decay were searched per row.

    Attributes:
        learning_rate: after a linear warm-up, constant: the average of the weights takes the place
            of a decay, so that a run may stop at any time.
        weight_decay: of AdamW.
        cap: FLOPs that every row may spend.
        looks: at the validation pairs within the cap.
        patience: looks without a better score after which training stops.
        each: whether patience lasts while either half of the score gets better.
        ends: whether the cap ends training, or patience, or what comes first.
        select: the part of the score that counts.
        ema: decay of the averaged weights, which are the ones evaluated and kept.
        warmup: steps.
    """

    learning_rate: float
    weight_decay: float
    cap: float
    looks: int
    patience: int = 6
    each: bool = False
    ends: Literal["both", "cap", "stop"] = "both"
    select: Literal["both", "text", "latent"] = "both"
    ema: float = 0.99
    warmup: int = 50


@dataclass
class Trained:
    """The checkpoints that were kept, what they cost, and how they got there.

    `weights` did best by the part of the score that counts, `capped` within the cap; `directions`
    by each half of it; `saved` is the most bytes that a counted step kept for its backward.
    """

    weights: dict[str, Tensor]
    capped: dict[str, Tensor]
    directions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    best_step: int = 0
    steps: int = 0
    flops: float = 0.0
    saved: int = 0
    seconds: float = 0.0
    stopped: str = "cap"
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    network: nn.Module,
    step_loss: StepLoss,
    batches: Iterator[Drawn],
    held_out: Split,
    processes: tuple[cv.TextProcess, cv.LatentProcess],
    training: Training,
    *,
    seed: int,
    after_step: Callable[[nn.Module], None] = lambda network: None,
) -> Trained:
    """Train a network, and keep the averaged weights that did best on the validation pairs."""
    torch.manual_seed(seed)  # dropout
    optimizer = torch.optim.AdamW(
        network.parameters(), training.learning_rate, weight_decay=training.weight_decay
    )
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(training.ema))
    denoiser, run = cv.as_denoiser(network), Trained({}, {})
    meter, stale = _Meter(), 0
    best = dict.fromkeys(("both", "text", "latent"), float("inf"))
    began = time.perf_counter()
    bar = tqdm(total=round(training.cap / 1e9), unit=" GFLOP", mininterval=5)
    while True:
        drawn = next(batches)
        with meter.measured(drawn.batch):
            loss = step_loss(denoiser, drawn, run.steps)
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * min(1.0, (run.steps + 1) / training.warmup)
        optimizer.step()
        averaged.update_parameters(network)
        after_step(network)
        run.steps += 1
        bar.update(round(meter.flops / 1e9) - bar.n)
        at_cap = meter.flops >= training.cap
        ends_here = at_cap and training.ends != "stop"
        if not ends_here and meter.flops < (len(run.history) + 1) * training.cap / training.looks:
            continue
        row = look(averaged.module, held_out, processes)
        run.history.append(row | {"step": run.steps, "flops": meter.flops, "loss": loss.item()})
        stale += 1
        better = [name for name in best if row[name] < best[name]]
        weights = deepcopy(averaged.module.state_dict()) if better else {}
        for name in better:
            best[name], run.directions[name] = row[name], weights
        if training.each and better:
            stale = 0
        if training.select in better:
            stale, run.best_step, run.weights = 0, run.steps, weights
            if len(run.history) <= training.looks:
                run.capped = weights
        bar.set_postfix(nats=f"{row['both']:.2f}", best=f"{best['both']:.2f}", step=run.steps)
        if ends_here:
            break
        if stale >= training.patience and training.ends != "cap":
            run.stopped = "early"
            break
    bar.close()
    if not run.weights:
        raise DemoError("diverged: every validation score is NaN; lower the learning rate")
    run.flops, run.saved, run.seconds = meter.flops, meter.saved, time.perf_counter() - began
    return run


@torch.inference_mode()
def look(
    network: nn.Module, held_out: Split, processes: tuple[cv.TextProcess, cv.LatentProcess]
) -> dict[str, float]:
    """The score of a checkpoint: `nats_per_pair`, and its two halves."""
    network.eval()
    denoiser, (text_process, latent_process) = cv.as_denoiser(network), processes
    z, mask = held_out.latents, held_out.attention_mask
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    logits = cv.l2t(denoiser, z, mask, text_process=text_process)
    encoded = cv.t2l(
        denoiser, held_out.tokens, mask, text_process=text_process, latent_process=latent_process,
        start="noise", noise=noise,
    )  # fmt: skip
    metrics = {
        "l2t_ce": cv.text_loss(logits, held_out.tokens, mask).item(),
        "t2l_mse": cv.latent_loss(encoded.z_hat(latent_process), z).item(),
    }
    both = nats_per_pair(metrics, held_out)
    return {**metrics, "both": both, "text": metrics["l2t_ce"], "latent": metrics["t2l_mse"]}


class _Meter:
    """FLOPs of forward and backward: every 25th step is counted, the rest go by their places."""

    def __init__(self) -> None:
        self.flops, self.steps, self.rate, self.saved = 0.0, 0, 0.0, 0

    @contextmanager
    def measured(self, batch: cv.Batch) -> Iterator[None]:
        places = sum(t.numel() for t in (batch.tokens, batch.unpaired_tokens) if t is not None)
        if self.steps % 25 == 0:  # counting is slow
            kept: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            counter = FlopCounterMode(display=False)
            with counter, saved_tensors_hooks(note, lambda tensor: tensor):
                yield
            self.rate = counter.get_total_flops() / places
            self.saved = max(self.saved, sum(kept.values()))
        else:
            yield
        self.flops += self.rate * places
        self.steps += 1
