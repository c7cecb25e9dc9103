"""A small world of texts and latents, a network for it, and its training."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import cyclevae as cv

PAD, MASK, FIRST, WORDS, LENGTH, BLOCK = 0, 1, 2, 8, 4, 4
VOCAB, DIM = FIRST + WORDS, LENGTH * BLOCK
UNPAIRED, HELD_OUT, ROWS = 4096, 512, 64
EVERY = 10  # steps, of which the losses are averaged
TEXT = cv.TextProcess(mask_id=MASK, vocab_size=VOCAB, pad_id=PAD)


class Pairs(NamedTuple):
    """Texts and their latents, as the first fields of `cyclevae.Batch`."""

    tokens: Tensor
    mask: Tensor
    latents: Tensor

    def draw(self, rows: int) -> "Pairs":
        """Some of the rows, with replacement."""
        chosen = torch.randint(len(self.tokens), (rows,))
        return Pairs(*(part[chosen] for part in self))


class World(NamedTuple):
    """Pairs to learn from, rows whose partner is never shown, and pairs to judge by."""

    pairs: Pairs
    unpaired: Pairs
    held_out: Pairs


def make_world(
    *,
    seed: int = 0,
    pairs: int = 256,
    carried: int = LENGTH,
    uneven: bool = False,
    twice: bool = False,
    noise: float = 0.1,
    scale: float = 1.0,
) -> World:
    """Each word at each position has a code of `BLOCK` numbers; a latent is those of its text.

    Args:
        seed: of the codes and the rows.
        pairs: to learn from.
        carried: of how many positions, from the first, the latent holds the word.
        uneven: texts have one to four words; what is missing of a shorter one leaves zeros.
        twice: the second half of a text repeats the first.
        noise: of latents, a standard deviation.
        scale: that latents are multiplied by, noise and all.
    """
    torch.manual_seed(seed)
    codes = torch.randn(LENGTH, WORDS, BLOCK)
    mixing = torch.linalg.qr(torch.randn(DIM, DIM)).Q

    def draw(rows: int) -> Pairs:
        words = torch.randint(WORDS, (rows, LENGTH))
        if twice:
            words = words[:, : LENGTH // 2].repeat(1, 2)
        places = torch.arange(LENGTH)
        lengths = torch.randint(1, LENGTH + 1, (rows, 1)) if uneven else LENGTH
        mask = (places < lengths).expand(rows, LENGTH)
        held = (mask & (places < carried))[..., None]
        clean = (codes[places, words] * held).flatten(1) @ mixing
        latents = (LENGTH / carried) ** 0.5 * clean + noise * torch.randn(rows, DIM)
        return Pairs((words + FIRST).where(mask, PAD), mask, scale * latents)

    return World(draw(pairs), draw(UNPAIRED), draw(HELD_OUT))


class Network(nn.Module):
    """A perceptron for each direction; each reads the words, the latent and both times."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCAB, 16)

        def read(outputs: int) -> nn.Sequential:
            inputs = LENGTH * 17 + DIM + 2
            return nn.Sequential(
                nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
                nn.Linear(width, outputs),
            )  # fmt: skip

        self.decoder, self.encoder = read(LENGTH * VOCAB), read(DIM)

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        *,
        text_time: Tensor,
        latent_time: Tensor,
        attention_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        words = cv.embed_tokens(self.word.weight, tokens)
        keep = attention_mask[..., None].to(words)
        words = torch.cat([words * keep, keep], dim=2)
        spare = LENGTH - words.shape[1]
        words = nn.functional.pad(words, (0, 0, 0, spare)).flatten(1)
        seen = torch.cat([words, latents, text_time[:, None], latent_time[:, None]], dim=1)
        logits = self.decoder(seen).unflatten(1, (LENGTH, VOCAB))[:, : tokens.shape[1]]
        return logits, self.encoder(seen)


class Trained(NamedTuple):
    """A denoiser, its losses averaged over `EVERY` steps, and what made given latents its own."""

    denoiser: cv.Denoiser
    history: list[dict[str, float]]
    embed: nn.Module


def mean(values: Iterable[Tensor]) -> float:
    return torch.stack([*values]).mean().item()


def train(
    objective: cv.CycleObjective,
    world: World,
    *,
    steps: int,
    seed: int = 1,
    true_lengths: bool = False,
    moving_latents: bool = False,
    learning_rate: float = 2e-3,
    watch: Callable[[], object] = lambda: None,
) -> Trained:
    """Train a network.

    Args:
        objective: what it minimises.
        world: what it learns from.
        steps: optimizer steps.
        seed: of the network's start and of all draws.
        true_lengths: tell the pseudo-text of an unpaired latent how long its hidden partner is.
        learning_rate: of AdamW at the start; it falls to 0 in a line.
        moving_latents: latents come from a layer that learns along, and gets their gradient.
        watch: called after each step.
    """
    torch.manual_seed(seed)
    network = Network()
    embed = nn.Linear(DIM, DIM, bias=False) if moving_latents else nn.Identity()
    if moving_latents:
        nn.init.eye_(embed.weight)
    denoiser, history, recent = cv.as_denoiser(network), [], []
    learning = [*network.parameters(), *embed.parameters()]
    optimizer = torch.optim.AdamW(learning, learning_rate, weight_decay=0.05)
    for step in range(steps):
        pairs, texts, latents = (
            part.draw(ROWS) for part in (world.pairs, world.unpaired, world.unpaired)
        )
        batch = cv.Batch(
            *pairs._replace(latents=embed(pairs.latents)),
            *texts[:2],
            embed(latents.latents),
            pseudo_text_mask=latents.mask if true_lengths else None,
        )
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        output = objective(denoiser, batch, step=step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        recent.append(output.metrics)
        if len(recent) == EVERY:
            history.append({name: mean(row[name] for row in recent) for name in recent[0]})
            recent.clear()
        watch()
    network.eval()
    return Trained(denoiser, history, embed)
