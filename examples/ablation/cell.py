"""One cell of the matrix, in a process of its own: train, measure, write one small JSON."""

import json
import os
import platform
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from batches import batches, data_of
from corpora import CORPORA, first
from data import MASK, PAD, UNK, Sentences, Split
from labels import Labels, by_network, by_ridge
from loop import Trained, Training, fit
from matrix import ROWS, TUNING_SEED, Cell, Tuned
from measure import (
    DECODED,
    Again,
    both_directions,
    decodings,
    measure,
    rounded,
    rounded_each,
)
from row_loss import RowLoss
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sampler import prior_samples
from torch import nn

import cyclevae as cv

LOOKS = 20  # at the validation pairs within the cap


def run(cell: Cell, out: Path, cache: Path, tuned: Tuned, limit: int | None) -> None:
    """Run a cell and write `out/results/<corpus>/<name>.json`; its weights are kept beside."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # cells run side by side, one a core
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    began = time.perf_counter()
    data = CORPORA[cell.corpus].load(cache, limit, cell.pairs, cell.seed)
    trained, row_loss, labels = _trained(cell, data, out, tuned, device)
    result: dict[str, Any] = {
        "cell": asdict(cell),
        "key": cell.key,
        "label": ROWS[cell.row].label,
        "objectives": [objective.to_config() for objective in row_loss.objectives],
        "machine": _machine(device),
        "training": {
            "best_step": trained.best_step,
            "steps": trained.steps,
            "stopped": trained.stopped,
            "flops": trained.flops,
            "passes_per_step": row_loss.passes / trained.steps,
            "seconds": round(trained.seconds, 1),
            "saved_mib": round(trained.saved / 2**20, 1),
            **({} if labels is None else {"label_flops": labels.flops}),
        },
        "validation": {
            key: [round(row[key], 4) for row in trained.history]
            for key in ("step", "flops", "l2t_ce", "t2l_mse", "both")
        },
    }
    if cell.seed == TUNING_SEED:  # the search sees validation pairs only
        result["best"] = min(result["validation"]["both"])
    else:
        weights = {"": trained.weights}
        if ROWS[cell.row].ends == "stop":
            weights["at_cap"] = trained.capped
        for name, kept in weights.items():
            found, each = _measured(cell, data, kept, device, cache)
            result |= {f"{name}_measures".lstrip("_"): found, f"{name}_each".lstrip("_"): each}
        result["directions"] = {
            name: _directions(cell, data, kept, device) for name, kept in trained.directions.items()
        }
        if CORPORA[cell.corpus].confirms:
            result |= _confirming(cell, data, trained.directions, device, cache)
    result["training"]["seconds_with_measuring"] = round(time.perf_counter() - began, 1)
    write(path_of(cell, out), result)


def describe(data: Sentences, path: Path) -> None:
    """What a report must know of a corpus: how many pairs there are, and the words of each test."""
    write(
        path,
        {
            "train": len(data.train),
            "vocabulary": len(data.vocabulary),
            "test_words": data.test.attention_mask.sum(dim=1).tolist(),
        },
    )


def checkpoint(
    cell: Cell, data: Sentences, out: Path
) -> tuple[cv.Denoiser, tuple[cv.TextProcess, cv.LatentProcess]]:
    """The model that a cell has left, and the processes that it was trained with."""
    weights = load_file(_weights(cell, out))
    return _denoiser(cell, data, weights, torch.device("cpu")), _processes(data)


def path_of(cell: Cell, out: Path) -> Path:
    return out / "results" / cell.corpus / f"{cell.name}.json"


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(result, indent=None, separators=(",", ":")) + "\n")
    part.replace(path)


def _processes(data: Sentences) -> tuple[cv.TextProcess, cv.LatentProcess]:
    dim = data.train.latents.shape[1]
    return (
        cv.TextProcess(
            mask_id=MASK, vocab_size=len(data.vocabulary), pad_id=PAD, special_ids=(UNK,)
        ),
        cv.LatentProcess("cosine", prediction="v", shape=(dim,)),
    )


def _network(cell: Cell, data: Sentences, device: torch.device) -> nn.Module:
    torch.manual_seed(cell.seed)
    random.seed(cell.seed)  # a block of mmdit draws its first residual stream
    return CORPORA[cell.corpus].network(data).to(device)


def _trained(
    cell: Cell, data: Sentences, out: Path, tuned: Tuned, device: torch.device
) -> tuple[Trained, RowLoss, Labels | None]:
    row = ROWS[cell.row]
    processes, network = _processes(data), _network(cell, data, device)
    train, dealt = data_of(cell, data)
    train = _to(train, device)
    labels = None
    if (teacher := cell.of_teacher(tuned)) is not None:
        kept = _weights(teacher, out)
        if not kept.exists():
            _trained(teacher, data, out, tuned, device)
        labelling = _network(teacher, data, device)
        labelling.load_state_dict(load_file(kept, device=str(device)))
        labels = by_network(labelling, train, dealt, processes, cell.seed, channel=row.channel)
        labels = Labels(labels.latents, labels.flops + _flops_of(kept))
    elif row.extra == "pseudo_pairs":
        labels = by_ridge(data, train, dealt)
    row_loss = RowLoss(
        row, processes, network, train, cell.seed, None if labels is None else labels.latents
    )
    training = Training(
        cell.learning_rate, cell.weight_decay, cell.cap, LOOKS, ends=row.ends, select=row.select,
        each=CORPORA[cell.corpus].each,
    )  # fmt: skip
    choosing = _to(data.validation, device)
    if cell.validation:
        choosing = first(choosing, cell.validation)
    trained = fit(
        network, row_loss.loss, batches(train, dealt, cell.seed), choosing,
        processes, training, seed=cell.seed, after_step=row_loss.after_step,
    )  # fmt: skip
    _weights(cell, out).parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous().clone() for k, v in trained.weights.items()},
        _weights(cell, out),
        {"flops": str(trained.flops)},
    )
    return trained, row_loss, labels


def _flops_of(weights: Path) -> float:
    """What the training of some weights took."""
    with safe_open(weights, "pt") as file:
        return float(file.metadata()["flops"])


def _measured(
    cell: Cell, data: Sentences, weights: dict[str, torch.Tensor], device: torch.device, cache: Path
) -> tuple[dict[str, float], dict[str, list[float]]]:
    denoiser, held_out = _denoiser(cell, data, weights, device), _to(data.test, device)
    return measure(denoiser, held_out, _processes(data), _again(cell, data, device, cache))


def _again(cell: Cell, data: Sentences, device: torch.device, cache: Path) -> Again | None:
    """What encodes decoded texts again, where there is an encoder of them."""
    if (encode := CORPORA[cell.corpus].encode) is None:
        return None
    seen = data.train.latents[data.fitted_on.latents]
    sampled = prior_samples(cache, seen, DECODED, _processes(data)[1])
    return Again(data, encode, sampled.to(device))


def _confirming(
    cell: Cell,
    data: Sentences,
    directions: dict[str, dict[str, torch.Tensor]],
    device: torch.device,
    cache: Path,
) -> dict[str, Any]:
    """Of the checkpoint of each direction, what the bootstrap draws; of the recipe's, decodings."""
    processes, held_out = _processes(data), _to(data.test, device)
    found: dict[str, Any] = {"directions_each": {}}
    for name in ("text", "latent"):
        denoiser = _denoiser(cell, data, directions[name], device)
        each = both_directions(denoiser, held_out, processes)[1]
        found["directions_each"][name] = rounded_each(each)
        if name == "text" and cell.row == "half":
            again = _again(cell, data, device, cache)
            found["decodings"] = decodings(denoiser, held_out, processes, again)
    return found


def _directions(
    cell: Cell, data: Sentences, weights: dict[str, torch.Tensor], device: torch.device
) -> dict[str, float]:
    """What both directions of a checkpoint are worth on test pairs."""
    denoiser, held_out = _denoiser(cell, data, weights, device), _to(data.test, device)
    return rounded(both_directions(denoiser, held_out, _processes(data))[0])


def _denoiser(
    cell: Cell, data: Sentences, weights: dict[str, torch.Tensor], device: torch.device
) -> cv.Denoiser:
    network = _network(cell, data, device)
    network.load_state_dict(weights)
    return cv.as_denoiser(network.eval())


def _to(split: Split, device: torch.device) -> Split:
    moved = (split.tokens, split.attention_mask, split.latents)
    tokens, mask, latents = (part.to(device) for part in moved)
    return replace(split, tokens=tokens, attention_mask=mask, latents=latents)


def _weights(cell: Cell, out: Path) -> Path:
    return out / "weights" / cell.corpus / f"{cell.name}.safetensors"


def _machine(device: torch.device) -> dict[str, str]:
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cyclevae": cv.__version__,
    }
