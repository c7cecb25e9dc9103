"""The corpora: docstrings, on which everything is tuned, and glosses, which see it once.

`seen` is docstrings again, with everything that is fitted fitted to what a cell may see. So are the
corpora of the map, which differ in their latents and have few pairs to choose by.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data import DemoError, Seen, Sentences, Split, encode, fold, load_sentences, regime_of
from measure import Encoder
from model import JointTransformer
from torch import Tensor, nn

GLOSSES = 12_000
WORDNET = (Path("/usr/share/wordnet"), Path("/usr/local/share/wordnet"))
_GLOSS = re.compile(r"[a-z][a-z0-9 ,'-]*[a-z]")


# From a cache folder and, for a quick run, a limit; for some pairs and a seed that deals them
Load = Callable[[Path, int | None, int, int], Sentences]


@dataclass(frozen=True)
class Corpus:
    """Sentences with their latents, the network for them, and what a cell may spend on them.

    Attributes:
        load: the sentences.
        network: a new one, with weights from torch's random state.
        cap: FLOPs, the same for every row of the matrix.
        learning_rate: of every row; without it what the search found for each.
        encode: sentences to embeddings, to encode again what was decoded; without it, nothing is.
        each: whether a run goes on while either direction gets better, as on the map, where each
            has a checkpoint of its own.
        confirms: whether what a bootstrap draws is kept of these checkpoints, and of decoding.
    """

    load: Load
    network: Callable[[Sentences], nn.Module]
    cap: float
    learning_rate: float | None = None
    encode: Encoder | None = encode
    each: bool = False
    confirms: bool = False


CHOOSING = 100  # validation pairs of a corpus of the map
FRESH = 7  # seed of a split into train, validation and test that nothing was looked at on


def _docstrings(cache: Path, limit: int | None, pairs: int, seed: int) -> Sentences:
    return load_sentences(cache, dim=64, min_count=3, limit=limit)


def shown(clusters: Tensor, pairs: int, seed: int) -> Seen:
    """What a deal shows: its pairs, and the parts that have no partner."""
    dealt = regime_of(clusters, min(pairs or len(clusters), len(clusters)), seed)
    return Seen(
        torch.cat([dealt.paired, dealt.unpaired_text]),
        torch.cat([dealt.paired, dealt.unpaired_latent]),
    )


def _seen(cache: Path, limit: int | None, pairs: int, seed: int, *, split: int = 0) -> Sentences:
    seen = partial(shown, pairs=pairs, seed=seed)
    return load_sentences(cache, dim=64, min_count=3, limit=limit, seen=seen, seed=split)


def few_to_choose_by(data: Sentences) -> Sentences:
    return replace(data, validation=first(data.validation, CHOOSING))


def first(split: Split, rows: int) -> Split:
    """The first rows of a split."""
    return _rows(split, torch.arange(min(rows, len(split))))


def _rows(split: Split, rows: Tensor) -> Split:
    parts = (split.tokens, split.attention_mask, split.latents, split.clusters)
    return Split([split.sentences[i] for i in rows], *(part[rows] for part in parts))


def fresh(load: Load, cache: Path, limit: int | None, pairs: int, seed: int) -> Sentences:
    """Held-out rows in random order, so that the first of them are like the others."""
    data = load(cache, limit, pairs, seed)
    generator = torch.Generator().manual_seed(FRESH)
    held_out = (data.validation, data.test)
    validation, test = (
        _rows(split, torch.randperm(len(split), generator=generator)) for split in held_out
    )
    return few_to_choose_by(replace(data, validation=validation, test=test))


def _sentences(cache: Path, limit: int | None, pairs: int, seed: int) -> Sentences:
    return few_to_choose_by(_seen(cache, limit, pairs, seed))


def _inner(cache: Path, limit: int | None, pairs: int, seed: int) -> Sentences:
    from inner_state import with_inner_state  # with packages that the others do without

    return with_inner_state(_sentences(cache, limit, pairs, seed), cache)


def _pictures(
    cache: Path, limit: int | None, pairs: int, seed: int, *, coded: bool = False, split: int = 0
) -> Sentences:
    from autoencoder import codes
    from emoji_data import load_pictures

    folder = cache.parent / "pictures"
    return load_pictures(
        folder,
        dim=64,
        seed=split,
        seen=partial(shown, pairs=pairs, seed=seed),
        codes=partial(codes, folder=folder) if coded else None,
        progress=False,
    )


def _map_of_pictures(*of: Any, coded: bool) -> Sentences:
    return few_to_choose_by(_pictures(*of, coded=coded))


def _glosses(
    cache: Path, limit: int | None, pairs: int, seed: int, *, split: int = 0, seen: Any = None
) -> Sentences:
    options = {"dim": 32, "min_count": 3, "limit": limit or GLOSSES, "source": glosses}
    return load_sentences(cache, **options, seed=split, seen=seen)


def _seen_glosses(cache: Path, limit: int | None, pairs: int, seed: int) -> Sentences:
    seen = partial(shown, pairs=pairs, seed=seed)
    return _glosses(cache, limit, pairs, seed, split=FRESH, seen=seen)


def glosses(*, max_words: int = 16, limit: int | None = None, progress: bool = False) -> list[str]:
    """Distinct glosses of WordNet 3.0, in a fixed random order, 5 to `max_words` words long."""
    found: dict[str, str] = {}
    for folder in WORDNET:
        for kind in ("noun", "verb", "adj", "adv"):
            if (file := folder / f"data.{kind}").exists():
                for gloss in _definitions(file.read_text(encoding="utf-8")):
                    if 5 <= len(gloss.split()) <= max_words and _GLOSS.fullmatch(gloss):
                        found.setdefault(fold(gloss), gloss)
    if not found:
        raise DemoError(
            f"expected WordNet's data.noun under {' or '.join(map(str, WORDNET))}, got none: "
            "apt-get install wordnet-base"
        )
    kept = sorted(found.values())
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
    return [kept[i] for i in order[:limit]]


def _definitions(data: str) -> Iterator[str]:
    """What stands behind the bar of each line, up to its first semicolon."""
    for line in data.splitlines():
        _, bar, gloss = line.partition(" | ")
        if bar:
            yield gloss.partition(";")[0].strip()


def _joint(data: Sentences) -> nn.Module:
    length, dim = data.train.tokens.shape[1], data.train.latents.shape[1]
    network = JointTransformer(len(data.vocabulary), dim, length=length, depth=1, dropout=0.2)
    return _with_word_frequencies(network, data)


def _mmdit(data: Sentences) -> nn.Module:
    from mmdit_model import JointMMDiT

    length, dim = data.train.tokens.shape[1], data.train.latents.shape[1]
    return _with_word_frequencies(JointMMDiT(len(data.vocabulary), dim, length=length), data)


def _with_word_frequencies(network: nn.Module, data: Sentences) -> nn.Module:
    """Start at the frequencies of words, which every run would spend its first steps on."""
    seen = data.fitted_on.texts
    words = data.train.tokens[seen][data.train.attention_mask[seen]]
    counts = torch.bincount(words, minlength=len(data.vocabulary))
    with torch.no_grad():
        network.text_head.bias.copy_(((counts + 0.5) / (counts + 0.5).sum()).log())
    # A head with a hook is called: logits in memory cost what they did in the stored results, whose
    # rows train for equal FLOPs
    network.text_head.register_forward_hook(lambda head, inputs, logits: None)
    return network


CORPORA = {
    "docstrings": Corpus(_docstrings, _joint, cap=1.5e12),
    "seen": Corpus(_seen, _joint, cap=1.5e12),
    "glosses": Corpus(_glosses, _mmdit, cap=0.75e12, learning_rate=3e-3),
    "sentences": Corpus(_sentences, _joint, cap=1.5e12, encode=None, each=True),
    "inner": Corpus(_inner, _joint, cap=1.5e12, encode=None, each=True),
    "pictures": Corpus(
        partial(_map_of_pictures, coded=False), _joint, cap=0.3e12, encode=None, each=True
    ),
    "autoencoder": Corpus(
        partial(_map_of_pictures, coded=True), _joint, cap=0.3e12, encode=None, each=True
    ),
    "fresh_sentences": Corpus(
        partial(fresh, partial(_seen, split=FRESH)),
        _joint,
        cap=1.5e12,
        each=True,
        confirms=True,
    ),
    "fresh_pictures": Corpus(
        partial(fresh, partial(_pictures, split=FRESH)),
        _joint,
        cap=0.3e12,
        encode=None,
        each=True,
        confirms=True,
    ),
    "fresh_glosses": Corpus(
        partial(fresh, _seen_glosses),
        _mmdit,
        cap=0.75e12,
        learning_rate=3e-3,
        each=True,
        confirms=True,
    ),
}
