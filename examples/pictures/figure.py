"""The image of the demo: held-out names drawn, and held-out pictures read, by each run."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

import matplotlib
import torch
from data import UNK
from emoji_data import Pictures
from PIL import Image
from torch import Tensor

import cyclevae as cv

matplotlib.use("Agg")
from matplotlib import pyplot

CREDIT = "pictures: OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0"


def draw(
    path: Path,
    denoisers: Mapping[str, cv.Denoiser],
    read: Mapping[str, Tensor],
    data: Pictures,
    objective: cv.CycleObjective,
    *,
    shown: int,
) -> None:
    """Two panels: names to pictures above, pictures to names below; right names are green.

    The first test rows in a random order, of names whose words training has seen.
    """
    test = data.test
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    known = order[~(test.tokens[order] == UNK).any(dim=1)]
    drawn, named = known[:shown], known[shown : 2 * shown]
    figure = pyplot.figure(figsize=(13, 2 + 1.1 * len(denoisers) + 5), layout="constrained")
    heights = 1.1 * (len(denoisers) + 1) + 0.5, 5.4
    above, below, _ = figure.subfigures(3, 1, height_ratios=(*heights, 0.25))
    _draw_names(above, drawn, denoisers, data, objective)
    _read_pictures(below, named, read, data)
    figure.text(0.995, 0.002, CREDIT, ha="right", va="bottom", fontsize=7, color="gray")
    figure.savefig(path, dpi=110)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the bytes
    pyplot.close(figure)


@torch.inference_mode()
def _draw_names(
    figure: pyplot.Figure,
    rows: Tensor,
    denoisers: Mapping[str, cv.Denoiser],
    data: Pictures,
    objective: cv.CycleObjective,
) -> None:
    test = data.test
    tokens, mask = test.tokens[rows], test.attention_mask[rows]
    lines = {"its own latent (unseen)": test.latents[rows]} | {
        f"{name} draws": cv.encode(
            denoiser, tokens, mask, text_process=objective.text_process,
            latent_process=objective.latent_process,
            generator=torch.Generator().manual_seed(0),
        )
        for name, denoiser in denoisers.items()
    }  # fmt: skip
    axes = figure.subplots(len(lines), len(rows))
    for line, (label, latents) in zip(axes, lines.items(), strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axis, picture in zip(line, data.undo(latents), strict=True):
            axis.imshow(picture, interpolation="bilinear")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, row in zip(axes[0], rows.tolist(), strict=True):
        axis.set_title(fill(test.sentences[row], 14), fontsize=9)
    figure.suptitle("held-out names, drawn")


def _read_pictures(
    figure: pyplot.Figure, rows: Tensor, read: Mapping[str, Tensor], data: Pictures
) -> None:
    test = data.test
    axes = figure.subplots(-(-len(rows) // 2), 2)
    for axis, row in zip(axes.flat, rows.tolist(), strict=False):
        axis.set(xlim=(0, 10), ylim=(len(read) + 1, 0))
        axis.axis("off")
        inset = axis.inset_axes((0.0, 0.0, 0.16, 1.0))
        inset.imshow(data.undo(test.latents[row : row + 1])[0], interpolation="bilinear")
        inset.axis("off")
        mask = test.attention_mask[row]
        names = {name: data.vocabulary.decode(ids[row][mask]) for name, ids in read.items()}
        right = data.vocabulary.decode(test.tokens[row][mask])
        for place, (who, name) in enumerate({"name": right, **names}.items()):
            colour = "#1a7f37" if name == right and place else "#57606a" if place else "black"
            axis.text(2, place + 0.6, f"{who}: {name}", fontsize=7.5, color=colour, va="center")
    figure.suptitle("held-out pictures, read")
