"""Decoding with the cycle as critic: what K sampled texts give, of which the encoder chooses.

Reads the weights that `make ablation-repair` leaves, and writes `results/seen/decoding.json`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "sentences"))

import torch
import torch.nn.functional as F
from cell import checkpoint, write
from corpora import CORPORA
from data import Sentences, Split, encode
from matrix import PRIMARY, Cell
from measure import DECODED, STEPS, TEMPERATURE
from stored import Results, keys_of
from torch import Tensor
from tqdm import tqdm

import cyclevae as cv

CORPUS, ROWS = "seen", ("paired", "half")
SAMPLES = (1, 2, 4, 8, 16, 32)
Processes = dict[str, cv.TextProcess | cv.LatentProcess]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/sentences"))
    parser.add_argument("--limit", type=int, help="of the sentences, as the runs had it")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order
    results = Results(options.out / "results" / CORPUS)
    cells = [Cell(**run["cell"]) for key in keys_of(PRIMARY, *ROWS) for run in results.of(key)]
    found = []
    for cell in tqdm(cells, "decoding", unit="checkpoint"):
        data = CORPORA[CORPUS].load(options.cache, options.limit, cell.pairs, cell.seed)
        given = checkpoint(cell, data, options.out)
        found += [{"row": cell.row, "seed": cell.seed, **one} for one in decodings(*given, data)]
    write(options.out / "results" / CORPUS / "decoding.json", {"each": found})
    print(json.dumps(found[-1]))


@torch.no_grad()
def decodings(
    denoiser: cv.Denoiser,
    processes: tuple[cv.TextProcess, cv.LatentProcess],
    data: Sentences,
) -> Iterator[dict[str, float | str]]:
    """The measures of every way to decode, of test sentences that no other figure decodes."""
    test = rows_of(data.test, slice(DECODED, 2 * DECODED))
    given: Processes = dict(zip(("text_process", "latent_process"), processes, strict=True))
    fluency = bigrams(data)
    for name, l2t, t2l, write_texts in ways(denoiser, test, data, given):
        tokens, mask = write_texts()
        words = [data.vocabulary.decode(row[kept]) for row, kept in zip(tokens, mask, strict=True)]
        again = data.normaliser.normalise(encode(words))
        yield {
            "decoding": name,
            "l2t": l2t,
            "t2l": t2l,
            "cosine": round(F.cosine_similarity(again, test.latents).mean().item(), 4),
            "words": round(exact(tokens, test), 4),
            "nats": round(fluency(tokens, mask), 3),
        }


def ways(
    denoiser: cv.Denoiser, test: Split, data: Sentences, given: Processes
) -> Iterator[tuple[str, int, int, Callable[[], tuple[Tensor, Tensor]]]]:
    """Ways to decode: their names, the passes of a text in both directions, and how they go."""
    z, mask, text = test.latents, test.attention_mask, {"text_process": given["text_process"]}

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def unmasked(steps: int, **options: object) -> Tensor:
        return cv.unmask_text(denoiser, z, mask, steps=steps, **text, **options)

    def best(samples: int) -> tuple[Tensor, Tensor]:
        found = cv.best_text(
            denoiser, z, mask, samples=samples, temperature=TEMPERATURE, steps=STEPS,
            at_once=1, generator=seeded(), **given,
        )  # fmt: skip
        return found.tokens, found.attention_mask

    def surest(samples: int) -> tuple[Tensor, Tensor]:
        """Of as many samples that which the decoder itself finds the most probable, in one pass."""
        logits, generator = cv.l2t(denoiser, z, mask, **text), seeded()
        texts = [unmasked(STEPS, temperature=TEMPERATURE, generator=generator)
                 for _ in range(samples)]  # fmt: skip
        nats = [cv.text_loss(logits, each, mask, reduction="none").sum(dim=1) for each in texts]
        chosen = torch.stack(nats).argmin(dim=0)
        return torch.stack(texts)[chosen, torch.arange(len(z))], mask

    def nearest() -> tuple[Tensor, Tensor]:
        texts, latents = data.fitted_on
        pairs = rows_of(data.train, texts[torch.isin(texts, latents)])
        place = torch.cdist(z, pairs.latents).argmin(dim=1)
        return pairs.tokens[place], pairs.attention_mask[place]

    yield "the sentence itself", 0, 0, lambda: (test.tokens, mask)
    yield "the nearest pair's text", 0, 0, nearest
    yield "all words at once", 1, 0, lambda: (unmasked(1), mask)
    yield f"the surest words first, {STEPS} passes", STEPS, 0, lambda: (unmasked(STEPS), mask)
    most = SAMPLES[-1]
    yield (
        f"of {most} samples, the decoder's choice",
        1 + most * (STEPS - 1),
        0,
        lambda: surest(most),
    )
    for k in SAMPLES:
        name = "one sample" if k == 1 else f"of {k} samples, the encoder's choice"
        judged = k if k > 1 else 0
        yield name, 1 + k * (STEPS - 1), judged, lambda k=k: best(k)


def rows_of(split: Split, rows: slice | Tensor) -> Split:
    """Some rows of a split, without their sentences."""
    tokens, mask, latents = (
        part[rows] for part in (split.tokens, split.attention_mask, split.latents)
    )
    return Split([], tokens, mask, latents, split.clusters[rows])


def exact(tokens: Tensor, test: Split) -> float:
    """The share of the words of a text that stand at their place."""
    length = min(tokens.shape[1], test.tokens.shape[1])
    hits = (tokens[:, :length] == test.tokens[:, :length]) & test.attention_mask[:, :length]
    return (hits.sum() / test.attention_mask.sum()).item()


def bigrams(data: Sentences) -> Callable[[Tensor, Tensor], float]:
    """Nats a word by a model that has only seen words and pairs of words of the training texts.

    `-log((1 - l) p(w) + l c(v, w) / c(v))` with `l = 0.7`, words by their counts plus 1.
    """
    texts = rows_of(data.train, data.fitted_on.texts)
    tokens, mask = texts.tokens, texts.attention_mask
    size = len(data.vocabulary)
    words = torch.bincount(tokens[mask], minlength=size) + 1.0
    follows = mask[:, 1:] & mask[:, :-1]
    pairs = (tokens[:, :-1] * size + tokens[:, 1:])[follows]
    counts = torch.bincount(pairs, minlength=size * size).view(size, size).float()

    def nats(tokens: Tensor, mask: Tensor) -> float:
        inside = mask[:, 1:] & mask[:, :-1]
        before, word = tokens[:, :-1][inside], tokens[:, 1:][inside]
        seen = counts[before, word] / counts[before].sum(dim=1).clamp(min=1)
        return -(0.3 * words[word] / words.sum() + 0.7 * seen).log().mean().item()

    return nats


if __name__ == "__main__":
    main()
