"""A tour in half a minute: `python -m cyclevae`.

A small world of four-word sentences whose latents are noisy codes of their words. Few sentences
come with their latent, many without. The same network learns from the pairs alone, and from the
pairs and the text cycle; both are then tested on pairs that neither has seen.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import cyclevae as cv
from cyclevae._base.table import table
from cyclevae.diagnostics import CycleReport, cycle_report

WORDS = (  # one line a position
    "big blue brave calm cold dark deaf fast gold good gray huge kind late lazy "
    "loud mild old pale poor red shy tall wise",
    "ant ape bat bear bee bird cat cow crab crow deer dog duck fish fox frog "
    "goat hen lion mole owl pig seal wolf",
    "barks begs bites calls crawls dances digs dives eats falls flies hides hums jumps "
    "laughs naps plays rests runs sings sits swims waits walks",
    "again alone always away badly better daily down early first hard here home "
    "inside long more nearby never now often outside soon there well",
)
PAD, MASK, FIRST = 0, 1, 2
VOCABULARY = ["[pad]", "[mask]", *" ".join(WORDS).split()]
CHOICES = len(WORDS[0].split())
LENGTH, DIM = len(WORDS), 32
PAIRS, TEXTS, HELD_OUT = 128, 4096, 512
STEPS, WARMUP, ROWS = 600, 150, 64
READ_ON = """\
This world suits the cycle: its latents hold all of their text. On real sentences it
gains less, and not everywhere: docs/evidence.md. Read on, in the repository of this version:

  docs/idea.md      what the two directions and the two cycles are, in pictures
  docs/denoiser.md  your own model in place of this one; or help(cyclevae.as_denoiser)
  docs/choosing.md  what to switch on, what it costs, what is known to help"""


class Pairs(NamedTuple):
    """Texts and their latents, as the first fields of `cyclevae.Batch`."""

    tokens: Tensor
    attention_mask: Tensor
    latents: Tensor

    def pick(self, rows: Tensor | slice) -> "Pairs":
        """Some of the rows."""
        return Pairs(*(part[rows] for part in self))


class World(NamedTuple):
    """Pairs to learn from, texts without a latent, and pairs to test with."""

    pairs: Pairs
    texts: Tensor
    held_out: Pairs


class Run(NamedTuple):
    """What a network has learned, and how its held-out accuracy rose: `(step, accuracy)`."""

    network: nn.Module
    curve: list[tuple[int, float]]


class Network(nn.Module):
    """Two small perceptrons; as at full noise a latent tells nothing, T2L reads the text alone."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.word = nn.Embedding(len(VOCABULARY), 16)
        self.encoder = nn.Linear(LENGTH * 16, DIM)
        self.decoder = nn.Sequential(
            nn.Linear(DIM, width), nn.GELU(), nn.Linear(width, LENGTH * len(VOCABULARY))
        )

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        *,
        text_time: Tensor,
        latent_time: Tensor,
        attention_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits of the latents and a prediction from the tokens; every text has all positions."""
        logits = self.decoder(latents).unflatten(1, (LENGTH, -1))
        return logits, -self.encoder(self.word(tokens).flatten(1))  # v at full noise is -z


def make_world(seed: int) -> World:
    """A code of each word at each position, mixed, with noise; latents of variance 1."""
    torch.manual_seed(seed)
    codes = torch.randn(LENGTH, CHOICES, DIM // LENGTH)
    mixing = torch.linalg.qr(torch.randn(DIM, DIM)).Q

    def draw(rows: int) -> Pairs:
        chosen = torch.randint(CHOICES, (rows, LENGTH))
        places = torch.arange(LENGTH)
        clean = codes[places, chosen].flatten(1) @ mixing
        latents = (clean + 0.3 * torch.randn(rows, DIM)) / 1.09**0.5
        tokens = FIRST + CHOICES * places + chosen
        return Pairs(tokens, torch.ones_like(tokens), latents)

    texts = draw(TEXTS).tokens
    return World(draw(PAIRS), texts, draw(HELD_OUT))


def train(name: str, world: World, objective: cv.CycleObjective, seed: int) -> Run:
    """Train a network from a given start; the cycle, where there is one, waits for the pairs."""
    torch.manual_seed(seed)
    network, curve = Network(), list[tuple[int, float]]()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.1)
    denoiser = cv.as_denoiser(network)
    for step in range(1, STEPS + 1):
        pairs = world.pairs.pick(torch.randint(PAIRS, (ROWS,)))
        texts = world.texts[torch.randint(TEXTS, (ROWS,))]
        batch = cv.Batch(*pairs, texts, torch.ones_like(texts))
        output = objective(denoiser, batch, step=step)
        optimizer.zero_grad()
        output.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % (STEPS // 24) == 0:
            right = decode(network, objective.text_process, world.held_out) == world.held_out.tokens
            curve.append((step, right.float().mean().item()))
            _progress(f"{name:<16} step {step:>3} of {STEPS}  held-out words {curve[-1][1]:.0%}")
    _progress()
    return Run(network, curve)


@torch.no_grad()
def decode(network: nn.Module, text_process: cv.TextProcess, pairs: Pairs) -> Tensor:
    """The texts `[b, s]` that L2T writes for the latents of pairs."""
    logits = cv.l2t(
        cv.as_denoiser(network), pairs.latents, pairs.attention_mask, text_process=text_process
    )
    return cv.argmax_text(logits, pairs.attention_mask, text_process=text_process)


def _progress(line: str = "") -> None:
    """Rewrite the line of a terminal, and end it where there is nothing more to say."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{line}" if line else "\n")
        sys.stderr.flush()


def sentences(tokens: Tensor) -> list[str]:
    """Texts `[b, s]` as words."""
    return [" ".join(VOCABULARY[i] for i in row) for row in tokens.tolist()]


def plot(runs: dict[str, Run], report: CycleReport, path: Path) -> None:
    """Both curves, and the report's own picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, accuracies = figure.subplots(1, 2)
    for name, run in runs.items():
        curves.plot(*zip(*run.curve, strict=True), label=name)
    curves.axvline(WARMUP, color="black", linestyle=":", label="the cycle begins")
    curves.set(
        xlabel="step", ylim=(0, 1), title="words decoded from held-out latents: share that is right"
    )
    curves.legend(loc="lower right")
    report.plot(accuracies)
    figure.savefig(path)


def tour(seed: int, picture: Path) -> None:
    """Train twice, and tell."""
    began = time.perf_counter()
    world = make_world(seed)
    text_process = cv.TextProcess(mask_id=MASK, vocab_size=len(VOCABULARY), pad_id=PAD)
    latent_process = cv.LatentProcess("cosine", prediction="v", shape=(DIM,))
    bridge = cv.LatentBridge(noise=0.3)
    pairs = [cv.Text(time=1.0), cv.Latent()]
    cycle = cv.CycleText(weight=cv.ramp(4.0, WARMUP, WARMUP), bridge=bridge)
    objectives = {
        "pairs alone": cv.CycleObjective(text_process, latent_process, pairs),
        "with the cycle": cv.CycleObjective(text_process, latent_process, [*pairs, cycle]),
    }
    print(
        f"cyclevae {cv.__version__}: sentences of {LENGTH} words, {CHOICES} choices for each; "
        f"latents of {DIM} numbers.\n{PAIRS} pairs of text and latent, {TEXTS:,} texts without "
        f"a latent; tested on {HELD_OUT} other pairs.\n"
    )
    runs = {name: train(name, world, each, seed) for name, each in objectives.items()}
    report = cycle_report(
        cv.as_denoiser(runs["with the cycle"].network),
        cv.Batch(*world.held_out),
        text_process=text_process,
        latent_process=latent_process,
        bridge=bridge,
    )
    few = world.held_out.pick(slice(3))
    written = [sentences(decode(run.network, text_process, few)) for run in runs.values()]
    shares = [f"{run.curve[-1][1]:.0%}" for run in runs.values()]
    texts = [["latent of", *runs], *zip(sentences(few.tokens), *written, strict=True)]
    print(table([*texts, ["all words right", *shares]], left=True))
    print(f"\n{report}\n")
    try:
        plot(runs, report, picture)
    except ImportError:
        print("for a picture: pip install matplotlib")
    except OSError as error:
        print(f"no picture: {error}; choose another place by --picture")
    else:
        print(f"picture: {picture.resolve()}")
    print(f"{time.perf_counter() - began:.0f} s\n\n{READ_ON}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m cyclevae", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the world and of both runs")
    parser.add_argument("--picture", type=Path, default=Path("cyclevae-tour.png"))
    options = parser.parse_args(arguments)
    try:
        tour(options.seed, options.picture)
    except KeyboardInterrupt:
        print("\nstopped")
        return 130
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # for matrices as small as these, more only wait for each other
    sys.exit(main())
