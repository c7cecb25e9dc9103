"""The recommended recipe beside the one step it is added to, and what a vocabulary costs."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from memory import peak_bytes
from setting import Found, Setting
from steps import Case

import cyclevae as cv

VOCABULARIES = 30522, 126464


def recipe(setting: Setting) -> Found:
    """The recipe's three passes, its cycle on the texts of all pairs, against one L2T step."""
    sizes = [{"rows": 4, "length": 128, "width": 256}, {"rows": 2, "length": 128, "width": 1024}]
    if setting.quick:
        sizes = [{"rows": 2, "length": 8, "width": 32, "vocab_size": 100, "latent_dim": 8}]
    for size in sizes:
        for dtype in setting.dtypes(size["width"], 256):
            for fraction, target in ((1.0, 2.0), (0.5, 1.6)):
                case = Case(setting.device, **size, dtype=dtype, terms=_recommended(fraction))
                name = f"{case.name}, cycle on {fraction:.0%} of the rows"
                calls = case.ours, case.l2t
                rounds = 2 if dtype == torch.bfloat16 else 5
                given = "recipe", name, "one L2T step"
                least = partial(case.products, encoders=1, share=fraction)
                yield setting.time(*given, *calls, target=target, limit=least, rounds=rounds)
                yield setting.peak(*given, *calls)


def _recommended(fraction: float) -> Sequence[cv.Term]:
    """What `CycleObjective` runs if nothing else is said, at a step where its cycle runs."""
    processes = cv.TextProcess(1, 4, pad_id=0), cv.LatentProcess("continuous_cosine")
    terms = cv.CycleObjective(*processes).terms
    return [
        replace(term, pairs=True, fraction=fraction) if isinstance(term, cv.CycleText) else term
        for term in terms
    ]


def growth(setting: Setting) -> Found:
    """What a longer vocabulary adds to the peak for each position: how many logits live at once.

    Differences over the number of rows, so that weights and their gradients fall out.
    """
    rows, length, width = ((2, 4), 8, 32) if setting.quick else ((2, 4), 128, 64)
    peaks = {}
    for v in (100, 400) if setting.quick else VOCABULARIES:
        for n in rows:
            size = {"rows": n, "length": length, "width": width, "depth": 1, "latent_dim": 8}
            case = Case(setting.device, **size, vocab_size=v)
            for name, call in (("ours", case.ours), ("plain", case.plain)):
                call()  # from here on there are gradients
                peaks[name, v, n] = peak_bytes(call, setting.device)
    less, more = sorted({v for _, v, _ in peaks})
    added = (more - less) * (rows[1] - rows[0]) * length * 4

    def logits(name: str) -> float:
        by_rows = (peaks[name, v, rows[1]] - peaks[name, v, rows[0]] for v in (less, more))
        return -sum(size * sign for size, sign in zip(by_rows, (1, -1), strict=True)) / added

    case = f"1 x {width}, {length} tokens a row, v from {less} to {more}"
    found = logits("ours"), logits("plain")
    yield setting.row("growth", case, "logits at the peak", "plain step", *found, target=0.05)
