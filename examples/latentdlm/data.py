"""Write sentences and their latents as the host `latentDLM_mmdit` (LGDLM) reads them.

    FOLDER/tokenizer           for the host's `tokenizer.path`
    FOLDER/tokens/train        a NAME_tokens.npz per sentence: input_ids, attention_mask
    FOLDER/latents/train       its NAME.npy: float32 [dim], of mean 0 and variance 1
    FOLDER/.../test            held out; the host never sees it (it validates on a part of train)

The sentences, their split and their latents are those of `examples/sentences`; it needs the extra
`demo`, and a minute for the first run:

    python examples/latentdlm/data.py FOLDER --sentences 5000
"""

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import BertTokenizer

EXAMPLES = Path(__file__).resolve().parents[1]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
GRAMMAR = [  # a toy sentence has a word from each column, and may stop after the third
    ["the", "every", "some", "this", "no"],
    ["cat", "dog", "mouse", "bird", "fish"],
    ["sees", "hears", "likes", "finds", "knows"],
    ["old", "young", "small", "grey", "quick"],
    ["foxes", "cows", "hens", "goats", "ducks"],
]


def _load(name: str, path: Path) -> ModuleType:
    """A file as a module of that name: both examples have a `data.py`."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


source = _load("sentences_of_latentdlm", EXAMPLES / "sentences" / "data.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="is created")
    parser.add_argument("--sentences", type=int, help="how many to find (default: all there are)")
    parser.add_argument("--toy", action="store_true", help="of a tiny grammar, in a second")
    parser.add_argument("--dim", type=int, default=32, help="of the latents")
    parser.add_argument("--length", type=int, default=32, help="in tokens; the rest is cut off")
    parser.add_argument("--cache", type=Path, default=EXAMPLES.parent / ".cache" / "sentences")
    options = parser.parse_args()
    shape = {"dim": options.dim, "length": options.length, "progress": True}
    try:
        if options.toy:
            sizes = write_toy(options.folder, options.sentences or 1000, **shape)
        else:
            sizes = write_sentences(options.folder, options.sentences, options.cache, **shape)
    except source.DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.folder}: {sizes['train']} sentences to train on, {sizes['test']} held out")
    return 0


def write_sentences(
    folder: Path,
    sentences: int | None = None,
    cache: Path = EXAMPLES.parent / ".cache" / "sentences",
    *,
    dim: int = 32,
    length: int = 32,
    progress: bool = False,
) -> dict[str, int]:
    """Real sentences; `normaliser.safetensors` leads their latents back to embeddings.

    Returns how many sentences each split has.
    """
    _expect_new(folder)  # before the slow part
    data = source.load_sentences(cache, dim=dim, limit=sentences, progress=progress)
    splits = {
        "train": (data.train.sentences, data.train.latents),
        "test": (data.test.sentences, data.test.latents),
    }
    words = [piece for piece in data.vocabulary.pieces if piece not in SPECIAL]
    write(folder, words, splits, length=length, progress=progress)
    data.normaliser.save(folder / "normaliser.safetensors")
    return {name: len(texts) for name, (texts, _) in splits.items()}


def write_toy(
    folder: Path,
    sentences: int = 200,
    *,
    dim: int = 32,
    length: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, int]:
    """Distinct sentences of `GRAMMAR`; a latent is a random projection of the bag of words.

    No word stands in two columns, so the bag tells the sentence: both directions can be learned,
    and without the slow encoder. A tenth is held out.
    """
    _expect_new(folder)
    lengths = range(3, len(GRAMMAR) + 1)
    every = [row for n in lengths for row in itertools.product(*GRAMMAR[:n])]
    if not 20 <= sentences <= len(every):
        raise source.DemoError(
            f"the toy grammar has {len(every)} sentences, got {sentences}: take 20 to {len(every)}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(every), generator=generator)[:sentences].tolist()
    rows = [every[i] for i in order]
    words = [word for column in GRAMMAR for word in column]
    bags = torch.tensor([[float(word in row) for word in words] for row in rows])
    latents = bags @ torch.randn(len(words), dim, generator=generator)
    held_out = sentences // 10
    train = latents[held_out:]
    latents = (latents - train.mean(0)) / train.std(0)
    texts = [" ".join(row) for row in rows]
    splits = {
        "train": (texts[held_out:], latents[held_out:]),
        "test": (texts[:held_out], latents[:held_out]),
    }
    write(folder, words, splits, length=length, progress=progress)
    return {name: len(texts) for name, (texts, _) in splits.items()}


def write(
    folder: Path,
    words: Sequence[str],
    splits: dict[str, tuple[Sequence[str], Tensor]],
    *,
    length: int,
    progress: bool = False,
) -> None:
    """Write `splits`, name to (sentences, latents [n, dim]), and a tokenizer that knows `words`.

    Every row is padded to `length`: the host stacks rows and never pads them.
    """
    # By dictionary: transformers 5 ignores the words of a `vocab_file`.
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate((*SPECIAL, *words))})
    tokenizer.save_pretrained(folder / "tokenizer")
    for split, (sentences, latents) in splits.items():
        rows = tokenizer(
            list(sentences),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="np",
        )
        tokens, vectors = folder / "tokens" / split, folder / "latents" / split
        tokens.mkdir(parents=True)
        vectors.mkdir(parents=True)
        pairs = zip(rows["input_ids"], rows["attention_mask"], latents.float().numpy(), strict=True)
        bar = tqdm(pairs, f"writing {split}", len(sentences), unit=" rows", disable=not progress)
        for i, (ids, mask, latent) in enumerate(bar):
            np.savez(tokens / f"{i:06}_tokens.npz", input_ids=ids, attention_mask=mask)
            np.save(vectors / f"{i:06}.npy", latent)


def _expect_new(folder: Path) -> None:
    """The host trains on every file of a folder: rows of an earlier run must not stay there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise source.DemoError(f"expected a new or empty folder, got {folder}: choose another")


if __name__ == "__main__":
    sys.exit(main())
