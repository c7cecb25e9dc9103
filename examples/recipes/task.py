"""What all recipes share: real sentences, a small network, the objective and the measure.

A recipe is a training loop. What is not the loop is here, and the same for all of them.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep: kind to shared cores
sys.path.append(str(Path(__file__).resolve().parents[1] / "sentences"))

import torch
from data import MASK, PAD, UNK, Sentences, load_sentences, regime
from evaluate import evaluate
from model import JointTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset

import cyclevae as cv

ROOT = Path(__file__).resolve().parents[2]
PAIRS, ROWS, DIM = 300, 330, 32
BATCH, LEARNING_RATE = 16, 3e-3  # rows of an optimizer step, over all ranks
EPOCHS = int(os.environ.get("CYCLEVAE_EPOCHS", 10))
STEPS = EPOCHS * -(-ROWS // BATCH)  # the last batch of an epoch is smaller


def sentences() -> Sentences:
    """2,000 sentences and their latents; encoded once, then read from `runs/cache`."""
    cache = Path(os.environ.get("CYCLEVAE_CACHE", ROOT / "runs" / "cache"))
    return load_sentences(cache, dim=DIM, limit=2000)


class Mixed(Dataset[dict[str, Tensor]]):
    """Row i is a pair, a text without its latent, and a latent without its text.

    A dict whose keys are the fields of `cyclevae.Batch`: every data loader can stack it.
    """

    def __init__(self, data: Sentences) -> None:
        self.data, self.regime = data.train, regime(data.train, PAIRS)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        pair, text, latent = (
            rows[i % len(rows)]
            for rows in (
                self.regime.paired,
                self.regime.unpaired_text,
                self.regime.unpaired_latent,
            )
        )
        return {
            "tokens": self.data.tokens[pair],
            "attention_mask": self.data.attention_mask[pair],
            "latents": self.data.latents[pair],
            "unpaired_tokens": self.data.tokens[text],
            "unpaired_attention_mask": self.data.attention_mask[text],
            "unpaired_latents": self.data.latents[latent],
        }


class HeldOut(Dataset[dict[str, Tensor]]):
    """Pairs that nothing was trained on, for evaluation while it trains."""

    def __init__(self, data: Sentences) -> None:
        self.data = data.test

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        fields = "tokens", "attention_mask", "latents"
        return {name: getattr(self.data, name)[i] for name in fields}


def as_batch(fields: dict[str, Tensor] | cv.Batch) -> cv.Batch:
    """What a loader yields, whether its collator made a `Batch` or a dict of its fields."""
    return fields if isinstance(fields, cv.Batch) else cv.Batch(**fields)


def make_network(data: Sentences, seed: int = 0) -> nn.Module:
    """The transformer that most recipes train."""
    torch.manual_seed(seed)
    return JointTransformer(**sizes(data), width=64, depth=1, dropout=0.1)


def sizes(data: Sentences) -> dict[str, int]:
    """What a network must know of the data."""
    return {
        "vocab_size": len(data.vocabulary),
        "latent_dim": DIM,
        "length": data.train.tokens.shape[1],
    }


def make_processes(data: Sentences) -> tuple[cv.TextProcess, cv.LatentProcess]:
    """How texts are masked and latents are noised."""
    vocab_size = len(data.vocabulary)
    return (
        cv.TextProcess(mask_id=MASK, vocab_size=vocab_size, pad_id=PAD, special_ids=(UNK,)),
        cv.LatentProcess("cosine", prediction="v", shape=(DIM,)),
    )


def make_objective(data: Sentences) -> cv.CycleObjective:
    """The recommended recipe; the cycle waits for a quarter of the steps."""
    cycle = cv.CycleText(weight=cv.ramp(4.0, warmup_steps=STEPS // 4, ramp_steps=STEPS // 4))
    return cv.CycleObjective(*make_processes(data), [cv.Text(), cv.Latent(), cycle])


def for_evaluation(objective: cv.CycleObjective | cv.Phases) -> cv.CycleObjective:
    """Its base losses: a cycle's falls in bad runs too, and wants rows without a partner."""
    if isinstance(objective, cv.Phases):
        objective = objective.objectives[0]
    base = [term for term in objective.terms if isinstance(term, cv.Text | cv.Latent)]
    return replace(objective, terms=base or objective.terms)


def measure(network: nn.Module, data: Sentences, objective: cv.CycleObjective) -> dict[str, float]:
    """Both directions on held-out pairs."""
    network.eval()
    found = evaluate(
        cv.as_denoiser(network), data.test, objective.text_process, objective.latent_process
    )
    return {name: found[name] for name in ("l2t_ce", "t2l_mse", "t2l_r10")}


def report(recipe: str, result: dict[str, float]) -> None:
    """One line of JSON on standard output, which `run_recipes.py` and the tests read."""
    print(json.dumps({"recipe": recipe, **{key: round(x, 4) for key, x in result.items()}}))
