"""Sentences whose latents are a state inside their encoder, which is less linear in the words."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import torch
from data import LatentNormaliser, Sentences, Split, sentence_encoder
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

LAYER = 4  # of 6: the state of the last token, [SEP], after it, the least linear of them


def with_inner_state(data: Sentences, folder: Path) -> Sentences:
    """The same sentences, their latents fitted to what a deal shows as the embeddings are."""
    splits = {name: getattr(data, name) for name in ("train", "validation", "test")}
    states = _cached([s for split in splits.values() for s in split.sentences], folder)
    each = dict(zip(splits, states.split([len(split) for split in splits.values()]), strict=True))
    dim = data.train.latents.shape[1]
    normaliser = LatentNormaliser.fit(each["train"][data.fitted_on.latents], dim)

    def of(name: str) -> Split:
        return replace(splits[name], latents=normaliser.normalise(each[name]))

    return replace(data, **{name: of(name) for name in splits}, normaliser=normaliser)


def _cached(sentences: list[str], folder: Path) -> Tensor:
    made_of = hashlib.sha256(repr([LAYER, sentences]).encode()).hexdigest()[:16]
    path = folder / f"states-{made_of}.safetensors"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        save_file({"states": _states(sentences)}, part)
        part.replace(path)
    return load_file(path)["states"]


@torch.inference_mode()
def _states(sentences: list[str], at_once: int = 64) -> Tensor:
    """`[n, 384]`, made in about a minute."""
    encoder = sentence_encoder()
    layers = encoder[0].auto_model
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    found = torch.empty(len(sentences), layers.config.hidden_size)
    for first in tqdm(range(0, len(order), at_once), "inner states", unit="batch", leave=False):
        rows = order[first : first + at_once]
        read = encoder.tokenizer([sentences[i] for i in rows], return_tensors="pt", padding=True)
        states = layers(**read, output_hidden_states=True).hidden_states[LAYER]
        last = read["attention_mask"].sum(dim=1) - 1
        found[rows] = states[torch.arange(len(rows)), last]
    return found
