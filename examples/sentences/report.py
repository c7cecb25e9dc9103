"""What the example shows at its end: a table, decoded sentences, a picture."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import torch
from data import UNK, Sentences
from torch import Tensor
from train import Run

import cyclevae as cv

matplotlib.use("Agg")
from matplotlib import pyplot

ROWS = {
    "l2t_ce": ("L2T cross-entropy, nats per token", "low", ".3f"),
    "l2t_accuracy": ("L2T token accuracy", "high", ".3f"),
    "t2l_mse": ("T2L mean squared error", "low", ".3f"),
    "t2l_cosine": ("T2L cosine", "high", ".3f"),
    "t2l_r1": ("T2L retrieval R@1 of {pool}", "high", ".3f"),
    "t2l_r10": ("T2L retrieval R@10 of {pool}", "high", ".3f"),
    "text_cycle_accuracy": ("text cycle: L2T accuracy on T2L's latents", "high", ".3f"),
    "latent_cycle_mse": ("latent cycle: T2L error on L2T's texts", "low", ".3f"),
    "best_step": ("best validation step", "", ".0f"),
}


def table(
    summary: Mapping[str, Mapping[str, float]],
    *,
    pool: int,
    rows: Mapping[str, tuple[str, str, str]] = ROWS,
) -> str:
    """The runs side by side on held-out pairs; `*` marks the best of a row."""
    width = max(len(label) for label, *_ in rows.values()) + 16
    lines = [f"{'on held-out pairs':<{width}}" + "".join(f"{run:>11}" for run in summary)]
    for key, (label, better, form) in rows.items():
        values = [run[key] for run in summary.values()]
        best = {"low": min, "high": max}.get(better, lambda _: None)(values)
        cells = [f"{value:{form}}{'*' if value == best else ' '}" for value in values]
        note = f" ({better} is good)" if better else ""
        lines.append(
            f"{label.format(pool=pool) + note:<{width}}" + "".join(f"{c:>11}" for c in cells)
        )
    return "\n".join(lines)


def sentences_table(
    denoisers: Mapping[str, cv.Denoiser], data: Sentences, text_process: cv.TextProcess
) -> str:
    """Five held-out sentences decoded from their latents; their lengths are given."""
    test, lines = data.test, ["held-out sentences, decoded from their latents and lengths"]
    lengths = test.attention_mask.sum(dim=1)
    plain = ~(test.tokens == UNK).any(dim=1) & (lengths >= 7) & (lengths <= 14)
    rows = plain.nonzero().flatten()[:5]
    mask, latents = test.attention_mask[rows], test.latents[rows]
    decoded = {
        name: unmask(denoiser, latents, mask, text_process) for name, denoiser in denoisers.items()
    }
    for i, row in enumerate(rows.tolist()):
        lines.append(f"  {'true':>7}: {data.vocabulary.decode(test.tokens[row][mask[i]])}")
        lines += [
            f"  {name:>7}: {data.vocabulary.decode(tokens[i][mask[i]])}"
            for name, tokens in decoded.items()
        ]
    return "\n".join(lines)


@torch.inference_mode()
def unmask(
    denoiser: cv.Denoiser, latents: Tensor, mask: Tensor, text_process: cv.TextProcess
) -> Tensor:
    """Decode in as many passes as there are tokens, the most certain token first.

    No word piece is used twice: so small a model would repeat its most certain one.

    Reference: mask-predict, https://arxiv.org/abs/1904.09324.
    """
    tokens, clean = text_process.fully_masked(mask), torch.zeros(len(mask))
    for _ in range(int(mask.sum(dim=1).max())):
        left = (tokens == text_process.mask_id) & mask
        logits = denoiser.denoise(
            tokens,
            latents,
            text_time=left.sum(dim=1) / mask.sum(dim=1),
            latent_time=clean,
            attention_mask=mask,
            need="logits",
        ).logits
        used = torch.zeros_like(logits[:, 0], dtype=torch.bool).scatter(1, tokens, True)
        logits = text_process.forbid(logits).masked_fill(used[:, None], -1e9)
        certainty, choice = logits.softmax(dim=-1).max(dim=-1)
        surest = certainty.masked_fill(~left, -1.0).argmax(dim=1, keepdim=True)
        chosen = left & torch.zeros_like(left).scatter(1, surest, True)
        tokens = torch.where(chosen, choice, tokens)
    return tokens


def plot(runs: Mapping[str, Run], path: Path) -> None:
    """Validation curves of all runs; a dot marks the checkpoint that was kept."""
    colours = {"base": "#7f7f7f", "control": "#1f77b4", "cycle": "#d62728"}
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    keys = ("l2t_ce", "t2l_mse", "t2l_r1", "text_cycle_accuracy")
    for axis, key in zip(axes.flat, keys, strict=True):
        for name, run in runs.items():
            steps = [row["step"] for row in run.history]
            values = [row[key] for row in run.history]
            axis.plot(steps, values, label=name, color=colours[name])
            kept = steps.index(run.best_step)
            axis.plot(steps[kept], values[kept], "o", color=colours[name])
        label, better, _ = ROWS[key]
        axis.set_title(f"{label.format(pool='the pool')} ({better} is good)", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle("validation pairs; dots are the checkpoints kept")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
