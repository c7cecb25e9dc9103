"""What a checkpoint is worth on held-out pairs; never a cycle's own loss."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from data import Sentences, Split
from torch import Tensor

import cyclevae as cv
from cyclevae.diagnostics import latent_health, retrieval, text_probe

DECODED = 128  # test sentences that are decoded in full and encoded again
STEPS = 8  # passes of a decoding
Encoder = Callable[[list[str]], Tensor]  # sentences to embeddings


SAMPLES, TEMPERATURE = 32, 0.8  # of decoding with the encoder as critic


class Again(NamedTuple):
    """What encoding decoded texts again takes.

    Attributes:
        data: whose vocabulary and normaliser lead from ids back to latents.
        encode: the frozen sentence encoder.
        sampled: latents from the prior, `[DECODED, d]`, the same for every cell.
    """

    data: Sentences
    encode: Encoder
    sampled: Tensor


@torch.no_grad()
def measure(
    denoiser: cv.Denoiser,
    held_out: Split,
    processes: tuple[cv.TextProcess, cv.LatentProcess],
    again: Again | None = None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The measures of a checkpoint, and those of each test sentence that the bootstrap draws.

    Args:
        denoiser: the model, in evaluation mode.
        held_out: the test pairs; all of them are the pool of the retrieval.
        processes: of text and latent.
        again: encodes what was decoded; without it, nothing is decoded.
    """
    text_process, latent_process = processes
    tokens, mask, z = held_out.tokens, held_out.attention_mask, held_out.latents
    metrics, each, z_hat = both_directions(denoiser, held_out, processes)
    if again is not None:
        metrics |= _reencoded(denoiser, held_out, z_hat, text_process, again)
    health = latent_health(z_hat, mean=z.mean(dim=0), variance=z.var(dim=0))
    probe = text_probe(denoiser, tokens, z, mask, text_process=text_process,
                       latent_process=latent_process)  # fmt: skip
    wrong = latent_error_of_another_text(denoiser, held_out, _noise(z), processes)
    metrics |= {
        "hubness": retrieval(z_hat, z, k=10).hubness,
        "never": retrieval(z_hat, z, k=10).never,
        "scale": health.scale,
        "drift": health.drift,
        "effective_rank": health.effective_rank,
        "text_probe_gap": probe.gap,
        "text_probe_information": probe.information,
        "latent_probe_gap": wrong - metrics["t2l_mse"],
    }
    return rounded(metrics), rounded_each(each)


def rounded_each(each: dict[str, Tensor]) -> dict[str, list[float]]:
    digits = {"rank": 0, "t2l_mse": 3, "ce_true": 2, "ce_predicted": 2}
    return {name: [round(v, digits[name]) for v in x.tolist()] for name, x in each.items()}


def _reencoded(
    denoiser: cv.Denoiser,
    held_out: Split,
    z_hat: Tensor,
    text_process: cv.TextProcess,
    again: Again,
) -> dict[str, Tensor]:
    """The cosine of latents and those of the texts that are decoded of them."""
    few, mask = slice(DECODED), held_out.attention_mask
    lengths = mask[torch.arange(DECODED) % len(mask)]  # of the prior's samples
    found = {}
    for name, latents, kept in (
        ("true", held_out.latents[few], mask[few]),
        ("predicted", z_hat[few], mask[few]),
        ("sampled", again.sampled, lengths),
    ):
        texts = decoded(denoiser, latents, kept, again.data, text_process)
        encoded = again.data.normaliser.normalise(again.encode(texts))
        found[f"reencoded_{name}"] = F.cosine_similarity(encoded.to(latents), latents).mean()
    return found


@torch.no_grad()
def decodings(
    denoiser: cv.Denoiser,
    held_out: Split,
    processes: tuple[cv.TextProcess, cv.LatentProcess],
    again: Again | None = None,
) -> dict[str, list[float]]:
    """Of each of the first test rows, what greedy decoding and the encoder's choice are worth.

    The cosine of the latent and that of the text, encoded again; without an encoder at hand, the
    share of words that stand at their place.
    """
    few = slice(DECODED)
    tokens, mask, z = held_out.tokens[few], held_out.attention_mask[few], held_out.latents[few]
    text_process, latent_process = processes
    greedy = cv.decode(denoiser, z, mask, text_process=text_process, steps=STEPS)
    best = cv.best_text(
        denoiser, z, mask, samples=SAMPLES, temperature=TEMPERATURE, steps=STEPS, at_once=4,
        text_process=text_process, latent_process=latent_process,
        generator=torch.Generator(z.device).manual_seed(0),
    ).tokens  # fmt: skip
    found = {}
    for name, written in (("greedy", greedy), ("critic", best)):
        if again is None:
            right = ((written == tokens) & mask).sum(dim=1) / mask.sum(dim=1)
        else:
            texts = [
                again.data.vocabulary.decode(row[kept])
                for row, kept in zip(written, mask, strict=True)
            ]
            encoded = again.data.normaliser.normalise(again.encode(texts))
            right = F.cosine_similarity(encoded.to(z), z)
        found[name] = [round(value, 4) for value in right.tolist()]
    return found


@torch.no_grad()
def both_directions(
    denoiser: cv.Denoiser, held_out: Split, processes: tuple[cv.TextProcess, cv.LatentProcess]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What T2L and L2T are worth, the same of each sentence, and the latents that T2L makes."""
    text_process, latent_process = processes
    tokens, mask, z = held_out.tokens, held_out.attention_mask, held_out.latents
    noise = _noise(z)
    z_hat = cv.encode_text(denoiser, tokens, mask, noise=noise, text_process=text_process,
                           latent_process=latent_process)  # fmt: skip
    similarity = F.normalize(z_hat, dim=1) @ F.normalize(z, dim=1).T
    rank = (similarity > similarity.diagonal()[:, None]).sum(dim=1)
    error = (z_hat - z).square().mean(dim=1)
    each = {"rank": rank.float(), "t2l_mse": error}
    metrics = {
        "t2l_mse": error.mean(),
        "t2l_cosine": similarity.diagonal().mean(),
        "t2l_r1": (rank < 1).float().mean(),
        "t2l_r10": (rank < 10).float().mean(),
    }
    for name, latents in (("true", z), ("predicted", z_hat)):
        logits = cv.l2t(denoiser, latents, mask, text_process=text_process)
        each[f"ce_{name}"] = cv.text_loss(logits, tokens, mask, reduction="none").sum(dim=1)
        metrics[f"l2t_ce_{name}"] = each[f"ce_{name}"].sum() / mask.sum()
        metrics[f"l2t_accuracy_{name}"] = (logits.argmax(dim=-1) == tokens)[mask].float().mean()
    return metrics, each, z_hat


def rounded(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(float(value), 5) for name, value in metrics.items()}


def _noise(z: Tensor) -> Tensor:
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)


def decoded(
    denoiser: cv.Denoiser,
    latents: Tensor,
    mask: Tensor,
    data: Sentences,
    text_process: cv.TextProcess,
) -> list[str]:
    """Sentences of some latents, in `STEPS` passes, the surest words first."""
    ids = cv.unmask_text(denoiser, latents, mask, text_process=text_process, steps=STEPS)
    return [data.vocabulary.decode(row[kept]) for row, kept in zip(ids, mask, strict=True)]


def latent_error_of_another_text(
    denoiser: cv.Denoiser,
    held_out: Split,
    noise: Tensor,
    processes: tuple[cv.TextProcess, cv.LatentProcess],
) -> Tensor:
    """The encoder's squared error when it reads another row's text: what listening is worth."""
    z_hat = cv.encode_text(
        denoiser, held_out.tokens.roll(1, 0), held_out.attention_mask.roll(1, 0), noise=noise,
        text_process=processes[0], latent_process=processes[1],
    )  # fmt: skip
    return (z_hat - held_out.latents).square().mean()
