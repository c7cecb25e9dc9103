"""The host's format: what `examples/latentdlm/data.py` writes, read as the host reads it."""

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from oldest import needs_torch_2_6

PATH = Path(__file__).parents[2] / "examples" / "latentdlm" / "data.py"
_spec = importlib.util.spec_from_file_location("latentdlm_data", PATH)
data = importlib.util.module_from_spec(_spec)
sys.modules["latentdlm_data"] = data
_spec.loader.exec_module(data)


def read(folder, split):
    """(ids, mask, latents) of a split, each file of one kind matched to the other by name."""
    ids, masks, latents = [], [], []
    for path in sorted((folder / "tokens" / split).iterdir()):
        row = np.load(path)
        ids.append(row["input_ids"])
        masks.append(row["attention_mask"])
        name = path.name.replace("_tokens.npz", ".npy")
        latents.append(np.load(folder / "latents" / split / name))
    assert len(list((folder / "latents" / split).iterdir())) == len(ids)
    return np.stack(ids), np.stack(masks), np.stack(latents)


def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


def decode(tokenizer, ids):
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    assert data.write_toy(folder, 400) == {"train": 360, "test": 40}
    return folder


def test_rows_have_the_shapes_and_types_of_the_host(toy):
    ids, mask, latents = read(toy, "train")
    assert ids.shape == mask.shape == (360, 32) and ids.dtype == np.int64
    assert latents.shape == (360, 32) and latents.dtype == np.float32
    assert set(np.unique(mask)) == {0, 1}
    assert np.allclose(latents.mean(0), 0, atol=1e-5)
    assert np.allclose(latents.std(0, ddof=1), 1, atol=1e-5)


def test_the_tokenizer_reads_what_was_written(toy):
    tokenizer = tokenizer_of(toy)
    ids, mask, _ = read(toy, "train")
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == list(data.SPECIAL)
    special = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id)
    assert (*special, tokenizer.sep_token_id, tokenizer.mask_token_id) == (0, 1, 2, 3, 4)
    assert ids.max() < len(tokenizer) == 5 + sum(map(len, data.GRAMMAR))
    assert ((ids != 0) == mask).all() and not np.isin(ids, [1, 4]).any()
    assert (ids[:, 0] == 2).all() and ((ids == 3).sum(1) == 1).all()
    for text in decode(tokenizer, ids):
        words = text.split()
        assert 3 <= len(words) <= len(data.GRAMMAR)
        assert all(word in column for word, column in zip(words, data.GRAMMAR, strict=False))


def test_no_sentence_is_in_both_splits_or_twice(toy):
    train, test = (decode(tokenizer_of(toy), read(toy, name)[0]) for name in ("train", "test"))
    assert len({*train, *test}) == len(train) + len(test) == 400


def test_a_toy_latent_tells_the_words_of_held_out_sentences(toy):
    """By a linear map fitted to the other split: both directions have something to learn."""

    def bags(split):
        ids, _, latents = read(toy, split)
        bag = np.stack([(ids == word).any(1) for word in range(5, 30)], axis=1)
        return bag, np.concatenate([latents, np.ones((len(latents), 1))], axis=1)

    bag, latents = bags("train")
    solution = np.linalg.lstsq(latents, bag.astype(float), rcond=None)[0]
    bag, latents = bags("test")
    assert np.abs(latents @ solution - bag).max() < 0.01


def test_a_seed_repeats_the_files_and_another_does_not(toy, tmp_path):
    for seed, same in ((0, True), (1, False)):
        data.write_toy(tmp_path / str(seed), 400, seed=seed)
        pairs = zip(read(toy, "test"), read(tmp_path / str(seed), "test"), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) is same


def test_a_long_sentence_is_cut_and_keeps_its_end(tmp_path):
    splits = {"train": (["a b a b a b", "a"], torch.zeros(2, 3))}
    data.write(tmp_path / "cut", ["a", "b"], splits, length=5)
    ids, mask, _ = read(tmp_path / "cut", "train")
    assert ids.tolist() == [[2, 5, 6, 5, 3], [2, 5, 3, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize("sentences", [19, 100_000])
def test_a_number_of_toy_sentences_that_cannot_be(tmp_path, sentences):
    with pytest.raises(data.source.DemoError, match=rf"got {sentences}: take 20 to 3875"):
        data.write_toy(tmp_path, sentences)


def test_a_folder_with_rows_of_an_earlier_run_is_refused(toy, tmp_path):
    for write in (data.write_toy, data.write_sentences):
        with pytest.raises(data.source.DemoError, match=r"new or empty folder, got .*toy"):
            write(toy)
    data.write_toy(tmp_path, 20)  # empty


def test_real_sentences_keep_their_split_and_their_latents(tmp_path, monkeypatch):
    def encode(sentences, *, progress=False):
        seeds = (hashlib.sha256(text.encode()).digest()[:7] for text in sentences)
        draws = (torch.Generator().manual_seed(int.from_bytes(seed)) for seed in seeds)
        return torch.stack([torch.randn(384, generator=draw) for draw in draws])

    monkeypatch.setattr(data.source, "encode", encode)
    cache, folder = tmp_path / "cache", tmp_path / "real"
    sizes = data.write_sentences(folder, 1000, cache, dim=16, length=40)
    expected = data.source.load_sentences(cache, dim=16, limit=1000, progress=False)
    tokenizer = tokenizer_of(folder)
    for name in ("train", "test"):
        split = getattr(expected, name)
        ids, _, latents = read(folder, name)
        assert sizes[name] == len(ids) == len(split) > 90
        assert np.array_equal(latents, split.latents.numpy())
        assert ids.shape[1] == 40
        # Words that training does not show twice are unknown; most are known.
        assert ((ids == 1).sum() / (ids > 4).sum()) < 0.3
        texts = decode(tokenizer, ids)
        words = [set(text.lower().split()) for text in split.sentences]
        assert all(set(text.split()) & own for text, own in zip(texts, words, strict=True))
    normaliser = data.source.LatentNormaliser.load(folder / "normaliser.safetensors")
    assert torch.equal(normaliser.scale, expected.normaliser.scale)


@needs_torch_2_6("transformers 5 needs torch 2.6")
def test_the_program(tmp_path):
    command = [sys.executable, str(PATH), str(tmp_path / "new"), "--toy", "--sentences", "50"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert done.stdout == f"{tmp_path / 'new'}: 45 sentences to train on, 5 held out\n"
    assert "writing train: 100%" in done.stderr
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: expected a new or empty folder")
