"""A report on a cycle: its numbers, a verdict for each pitfall, a table and a picture."""

import math
import os
from base64 import b64encode
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any

from cyclevae._base.table import html_table, table
from cyclevae.diagnostics import verdicts
from cyclevae.diagnostics._drawing import axes_at
from cyclevae.diagnostics.chance import Chance
from cyclevae.diagnostics.cheat import CheatTest
from cyclevae.diagnostics.health import LatentHealth, Retrieval
from cyclevae.diagnostics.probes import Probe
from cyclevae.diagnostics.verdicts import Verdict

WIDE = 64  # letters of a line above a picture


@dataclass(frozen=True)
class CycleReport:
    """What `cycle_report` measured; `str` of it is a table, `plot` draws it,
    and a notebook shows both.

    Errors of latents are squared distances as shares of the latents' variance: 0 is perfect, 1 what
    their mean achieves.

    Attributes:
        rows: pairs in the batch.
        time: at which the bridge starts.
        gain: by which reading `z_hat` multiplies the error of the prediction.
        max_gain: above which the library refuses to.
        text_loss: the base loss of L2T, per token.
        latent_loss: the base loss of T2L at `time`, in the space of the prediction.
        latent_error: of `z_hat` from its own text.
        shuffled_latent_error: of `z_hat` from another row's text.
        latent_gap_error: standard error of the difference of these two.
        cycle_latent_error: of the latent cycle, through the text that the decoder writes.
        text: the probe of L2T.
        latent: the probe of T2L.
        cheat: accuracies of the text cycle and on pairs.
        chance: the decoder on pairs beside what can be guessed without their latents.
        z_hat: health of the encoder's latents, against the stored statistics.
        latents: health of the true ones.
        retrieval: of the true latents by `z_hat`.

    Examples:
        >>> from cyclevae.diagnostics import cycle_report
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> report = cycle_report(
        ...     denoiser, toy_batch(seed=0, rows=16),
        ...     text_process=text_process, latent_process=latent_process,
        ... )
        >>> {verdict.name: verdict.ok for verdict in report.verdicts}["ill-conditioned bridge"]
        True
    """

    rows: int
    time: float
    gain: float
    max_gain: float
    text_loss: float
    latent_loss: float
    latent_error: float
    shuffled_latent_error: float
    latent_gap_error: float
    cycle_latent_error: float
    text: Probe
    latent: Probe
    cheat: CheatTest
    chance: Chance
    z_hat: LatentHealth
    latents: LatentHealth
    retrieval: Retrieval

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One for each pitfall, by the rules of thumb in `cyclevae.diagnostics.verdicts`."""
        right, shuffled = self.latent_error, self.shuffled_latent_error
        bridge = verdicts.ill_conditioned_bridge(self.gain, self.max_gain)
        of_z_hat = [
            verdicts.encoder_at_chance(right, self.retrieval, self.chance.alike, self.rows),
            verdicts.ignored_text(shuffled - right, self.latent_gap_error, right, shuffled),
            verdicts.collapse(self.z_hat, self.latents, self.retrieval),
            verdicts.scale_drift(self.z_hat, right),
            verdicts.hidden_code(self.cheat),
            verdicts.feedback_loop(self.cheat, right, self.cycle_latent_error),
        ]
        if not bridge.ok:
            of_z_hat = [v._replace(cure=v.cure and "mend the bridge first") for v in of_z_hat]
        of_latents = (
            verdicts.decoder_at_chance(self.chance),
            verdicts.ignored_latent(self.text.gap, self.text.gap_error, self.text.shuffled),
        )
        return (bridge, *of_latents, *of_z_hat)

    @property
    def summary(self) -> str:
        """What was tested, what failed, and what this batch could not tell."""
        found = self.verdicts
        failed = [verdict.name for verdict in found if verdict.ok is False]
        unknown = [verdict.name for verdict in found if verdict.ok is None]
        tested = f"{len(found) - len(unknown)} of {len(found)} pitfalls tested on {self.rows} pairs"
        said = f"found: {', '.join(failed)}" if failed else "none of them found"
        return "; ".join([tested, said, *([f"not judged: {', '.join(unknown)}"] * bool(unknown))])

    @property
    def title(self) -> str:
        """What was looked at; what was found is in `summary`."""
        return f"cycle report on {self.rows} pairs, bridge from time {self.time:g}"

    def __str__(self) -> str:
        tables = map(table, self._tables())
        judged = "\n".join([*map(str, self.verdicts), self.summary])
        return "\n\n".join([self.title, *tables, judged])

    def _repr_html_(self) -> str:
        """For a notebook: verdicts, the picture where matplotlib is installed, and all tables."""
        rows = [["", "pitfall", "measured"]]
        rows += [[verdict.mark, verdict.name, verdict.sentence] for verdict in self.verdicts]
        picture = BytesIO()
        try:
            self.plot(picture)
        except ImportError:
            shown = ""
        else:
            shown = f'<img alt="{escape(self.summary)}" src="data:image/png;base64,'
            shown += b64encode(picture.getvalue()).decode() + '">'
        tables = "".join(map(html_table, self._tables()))
        return (
            f"<h4>{escape(self.title)}</h4><p>{escape(self.summary)}</p>"
            f"{html_table(rows, left=True)}{shown}"
            f"<details><summary>numbers</summary>{tables}</details>"
        )

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write what a notebook shows to a file that a browser opens, the picture inside."""
        head = f'<!doctype html><meta charset="utf-8"><title>{escape(self.title)}</title>'
        Path(path).write_text(head + self._repr_html_(), encoding="utf-8")

    def _tables(self) -> list[list[list[str]]]:
        width = len(self.latents.mean)
        probes = {"L2T, nats per text": self.text, "T2L, nats per latent": self.latent}
        health = (self.z_hat, self.latents)
        return [
            [["base losses", "text", "latent"], ["", _g(self.text_loss), _g(self.latent_loss)]],
            [["given", "right", "shuffled", "nothing", "information", "difference"]]
            + [
                [
                    name,
                    *map(_g, (p.right, p.shuffled, p.empty, p.information)),
                    "" if p.difference is None else _g(p.difference),
                ]
                for name, p in probes.items()
            ],
            [
                ["error of z_hat", "right", "shuffled", "latent cycle"],
                [
                    "share of variance",
                    _g(self.latent_error),
                    _g(self.shuffled_latent_error),
                    _g(self.cycle_latent_error),
                ],
            ],
            [
                ["accuracy", "text cycle", "pairs"],
                *map(list, self._accuracies(_percent)),
                ["guessed", "", _percent(self.chance.guess)],
            ],
            [
                ["latents", "z_hat", "true"],
                ["length", *(_g(h.norm) for h in health)],
                ["spread", *(_g(h.scale) for h in health)],
                ["drift of the mean", *(_g(h.drift) for h in health)],
                ["effective rank", *(_g(h.effective_rank) for h in health)],
                [f"active of {width}", *(str(h.active) for h in health)],
                ["recall at 1", _percent(self.retrieval.recall), ""],
                ["never retrieved", _percent(self.retrieval.never), ""],
                ["hubness", _g(self.retrieval.hubness), ""],
            ],
        ]

    def plot(self, where: Any) -> None:
        """Draw the accuracies of the text cycle beside those on pairs.

        Args:
            where: a path or a file to save the picture at, or matplotlib axes to draw on.

        Raises:
            ImportError: matplotlib is not installed.
        """
        names, cycle, pairs = zip(*self._accuracies(float), strict=True)
        places = range(len(names))
        with axes_at(where, "a report") as axes:
            axes.barh([y - 0.2 for y in places], cycle, height=0.4, label="text cycle")
            axes.barh([y + 0.2 for y in places], pairs, height=0.4, label="true latents")
            axes.axvline(self.cheat.floor, color="black", linestyle=":", label="without the latent")
            axes.set_yticks(places, names)
            axes.invert_yaxis()
            axes.set_xlim(0, 1)
            axes.set_xlabel("accuracy of the decoded text")
            lines = [fill(part, WIDE) for part in self.summary.split("; ")]
            axes.set_title("\n".join(lines), fontsize="medium")
            axes.legend(loc="lower right")  # where the bars are short

    def _accuracies(self, show: Any) -> list[tuple[str, Any, Any]]:
        """Name, text cycle and pairs of each way in which the latents were treated."""
        cheat = self.cheat
        return [
            ("as it is", show(cheat.cycle), show(cheat.pairs)),
            *((t.name, show(t.cycle), show(t.pairs)) for t in cheat.treatments),
            ("shuffled", show(cheat.shuffled), show(math.nan)),
            ("no latent", show(cheat.chance), show(math.nan)),
        ]


def _g(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0%}"
