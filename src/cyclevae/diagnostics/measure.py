"""Every diagnostic on one batch."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.types import Number
from cyclevae.bridges.latent import ONE_SHOT, LatentBridge, encode_text
from cyclevae.bridges.text import pseudo_text
from cyclevae.diagnostics._measuring import measuring, of_kept, seeded, statistics
from cyclevae.diagnostics.chance import chance
from cyclevae.diagnostics.cheat import cheat_test
from cyclevae.diagnostics.health import latent_health, retrieval
from cyclevae.diagnostics.probes import latent_probe, text_probe
from cyclevae.diagnostics.report import CycleReport
from cyclevae.losses.latent import latent_loss, t2l_loss
from cyclevae.losses.text import text_loss
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.passes import l2t
from cyclevae.model.unread import read_logits
from cyclevae.objective.arrange import arrange
from cyclevae.objective.batch import Batch
from cyclevae.priors.samples import Moment
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.noise import draw_noise
from cyclevae.processes.text import TextProcess

READABLE = 0.999  # where the gain at the time is infinite, z_hat is read here


@at_the_door
def cycle_report(
    denoiser: Denoiser,
    batch: Batch,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    bridge: LatentBridge = ONE_SHOT,
    time: Number = 1.0,
    mean: Moment | None = None,
    variance: Moment | None = None,
    low: Number = 0.02,
    high: Number = 0.98,
    samples: int = 4,
    generator: torch.Generator | None = None,
    progress: Callable[[str], object] | None = None,
) -> CycleReport:
    """Is the cycle honest and the latent alive: every diagnostic on the pairs of a batch.

    Runs `text_probe`, `latent_probe`, `cheat_test`, `latent_health` and `retrieval`, and both
    cycles, some 35 passes of the batch, without a graph. A bridge that the library refuses is read
    all the same: the report shows what would cross it. Where its gain is infinite, `z_hat` is read
    at time 0.999. Give held-out pairs, a hundred or more with different texts.

    Args:
        denoiser: the model; run in evaluation mode, if it exposes its `.module`.
        batch: its pairs are read.
        text_process: the text process.
        latent_process: the latent process.
        bridge: of the text cycle; the latent cycle uses its steps and guards too.
        time: at which the encoder starts from noise.
        mean: the stored mean of latents, a number or in the shape of one; the batch's if not given.
        variance: the stored variance.
        low: the lowest time of `latent_probe`.
        high: the highest time of `latent_probe`.
        samples: of `latent_probe`.
        generator: random state of the draws; one of its own, seeded with 0, if not given.
        progress: is told what is measured next, such as `print` or `bar.set_description`.

    Raises:
        ValueError: fewer than 2 pairs, equal latents, wrong shapes or values.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> report = cycle_report(
        ...     denoiser, toy_batch(seed=0, rows=16),
        ...     text_process=text_process, latent_process=latent_process,
        ... )
        >>> print(str(report).splitlines()[0])
        cycle report on 16 pairs, bridge from time 1
    """
    found = arrange(
        Batch(*batch[:3], latent_mask=batch.latent_mask), text_process, latent_process
    )  # the pairs
    if found.paired < 2:
        raise ValueError(
            f"`batch` needs at least 2 pairs to compare, got {found.paired}; give `tokens`, "
            "`attention_mask` and `latents` of the same rows"
        )
    (tokens, mask), latents = found.need_texts(), found.need_latents()
    kept = found.latent_mask
    own_mean, own_variance = statistics(latents, kept)
    target: dict[str, Any] = {
        "mean": own_mean if mean is None else mean,
        "variance": own_variance if variance is None else variance,
    }
    true = latent_health(latents, **target, latent_mask=kept)
    generator = seeded(generator, latents)
    noise = draw_noise(len(latents), latent_process, at=latents, like=latents, generator=generator)
    gain = latent_process.gain(torch.tensor([time], dtype=torch.float64)).item()
    read: dict[str, Any] = {
        "text_process": text_process,
        "latent_process": replace(latent_process, max_gain=sys.float_info.max),
        "bridge": bridge,
        "time": time if math.isfinite(gain) else READABLE,
    }
    pairs = (denoiser, tokens, latents, mask)
    processes: dict[str, Any] = {
        "text_process": text_process,
        "latent_process": latent_process,
    }
    tell = progress or _silent
    tell("cycle report, 1 of 4: both cycles")
    with measuring(denoiser):
        z_hat = encode_text(denoiser, tokens, mask, noise=noise, latent_mask=kept, **read)
        logits = read_logits(
            l2t(
                denoiser,
                latents,
                mask,
                text_process=text_process,
                generator=generator,
                latent_mask=kept,
            )
        )
        y_hat = text_process.cut(pseudo_text(logits, mask, text_process=text_process), mask)
        cycled = encode_text(denoiser, *y_hat, noise=noise, latent_mask=kept, **read)
        checks.check_latents("z_hat", z_hat, cure="has training diverged?")
        checks.check_latents("z_hat of the latent cycle", cycled, cure="has training diverged?")
        _check_finite(logits[mask])
        base = t2l_loss(*pairs, time=time, noise=noise, latent_mask=kept, **processes)

    rows = of_kept(latents, kept).cpu().double()  # the error of the mean
    total = rows.var(dim=0, correction=0).sum() * (len(rows) / found.paired)

    def errors(prediction: torch.Tensor) -> torch.Tensor:
        square = latent_loss(prediction, latents, reduction="none", latent_mask=kept)
        square = square.cpu().double()
        return square.flatten(1).sum(dim=1) / total

    right, shuffled = errors(z_hat), errors(z_hat.roll(1, 0))
    tell("cycle report, 2 of 4: does the decoder read the latent")
    text = text_probe(*pairs, noise=noise, latent_mask=kept, **processes)
    tell("cycle report, 3 of 4: does the encoder read the text")
    latent = latent_probe(
        *pairs,
        low=low,
        high=high,
        samples=samples,
        generator=generator,
        latent_mask=kept,
        **processes,
    )
    tell("cycle report, 4 of 4: does the cycle survive noise and rounding")
    cheat = cheat_test(
        *pairs,
        z_hat=z_hat,
        variance=target["variance"],
        generator=generator,
        latent_mask=kept,
        **read,
    )
    return CycleReport(
        rows=found.paired,
        time=float(time),
        gain=gain,
        max_gain=float(latent_process.max_gain),
        text_loss=text_loss(logits, tokens, mask).item(),
        latent_loss=base.item(),
        latent_error=right.mean().item(),
        shuffled_latent_error=shuffled.mean().item(),
        latent_gap_error=(shuffled - right).std().item() / math.sqrt(found.paired),
        cycle_latent_error=errors(cycled).mean().item(),
        text=text,
        latent=latent,
        cheat=cheat,
        chance=chance(logits, tokens, text_process.chosen(mask), latents),
        z_hat=latent_health(z_hat, **target, latent_mask=kept),
        latents=true,
        retrieval=retrieval(z_hat, latents, latent_mask=kept),
    )


def _silent(doing: str) -> None:
    """Tell nobody."""


def _check_finite(logits: Float[Tensor, "words v"]) -> None:
    """Words may be forbidden by minus infinity; anything else that is no number compares as ok."""
    bad = logits.isnan() | logits.isposinf()
    if bool(bad.any()):
        raise ValueError(
            f"the decoder's logits must be finite, got NaN or infinity in {int(bad.sum())} of "
            f"{bad.numel()}; has training diverged?"
        )
