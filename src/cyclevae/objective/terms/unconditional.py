"""The unconditional mode."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch.nn.functional as F

from cyclevae._base import checks
from cyclevae._base.types import Count, Number, Scalar, TextWeighting
from cyclevae.losses.latent import check_some_weight, check_weighting, count_errors
from cyclevae.losses.unconditional import unconditional_loss
from cyclevae.objective.requests import Own, Request
from cyclevae.objective.rows import Arranged, Share
from cyclevae.objective.step import Setting, Step, between, highest
from cyclevae.objective.term import Term
from cyclevae.processes.times import (
    UNIFORM,
    LatentWeighting,
    TimePolicy,
    check_time,
    stratified_times,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Unconditional(Term):
    """Denoise both parts at once; a row without a partner trains the part it has.

    See `unconditional_loss`. Metrics: `unconditional_text_loss` and `unconditional_latent_loss`,
    whose sum is weighed. The counts are of words and of elements.

    Attributes:
        latent_time: of the latents, a number or a `TimePolicy`; stratified uniform if None.
        text_weighting: of the text, its `bound`, `1/t` for masks, or the `mean` over masked words
            (all of them where noise is random words).
        null_text_rate: the share of pairs whose text is at full noise, the state that the priors
            `learned` and `ddvi` and guidance read; if None, 0.1 beside one of them, else 0.
        latent_weighting: of latents by their times, `LogitNormal(...)` or a function: see
            `unconditional_loss`.

    Raises:
        ValueError: an option out of range.

    Examples:
        >>> Unconditional(null_text_rate=0.2).passes(0)[0].does
        'both parts noised'
    """

    latent_time: Number | TimePolicy | None = None
    text_weighting: TextWeighting = "bound"
    null_text_rate: Number | None = None
    latent_weighting: LatentWeighting | None = None

    parts: ClassVar[tuple[str, ...]] = ("text", "latent")
    expected_counts: ClassVar[tuple[str, ...]] = ("text",)
    renamed: ClassVar[Mapping[str, str]] = {
        "unconditional_weight": "weight",
        "unconditional_latent_time": "latent_time",
        "null_text_rate": "null_text_rate",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_time is not None:
            check_time("latent_time", self.latent_time)
        checks.check_choice("text_weighting", self.text_weighting, get_args(TextWeighting))
        if self.null_text_rate is not None:
            checks.check_share("null_text_rate", self.null_text_rate)
        check_weighting("latent_weighting", self.latent_weighting)

    @property
    def rows(self) -> Share:
        """All."""
        return Share(self.fraction, self.fraction)

    def passes(self, step: int) -> tuple[Request, ...]:
        """One over the rows of both directions."""
        return (Own(does="both parts noised"),)

    def counts(self, rows: Arranged, setting: Setting) -> dict[str, Count]:
        """Words less those that a null rate leaves out, and elements.

        In a mean, of the words that are expected to count.
        """
        rows = rows.part(self.rows)
        words, latents = rows.words(setting.text_process), rows.present()[1]
        left_out = self._null_rate(setting) * words[: rows.paired].sum()
        share: Number | None = 1
        if self.text_weighting == "mean":
            share = setting.text_process.counted_share(UNIFORM)
        return {
            **({} if share is None else {"text": (words.sum() - left_out) * share}),
            "latent": count_errors(rows.latents, latents, rows.latent_mask),
        }

    def check(self, setting: Setting) -> None:
        """A weight must weigh something at these times, and a bound have its weights."""
        if self.text_weighting == "bound":
            setting.text_process.check_bound()
        if self.latent_weighting is not None:
            times = between(UNIFORM if self.latent_time is None else self.latent_time)
            check_some_weight(
                "latent_weighting", self.latent_weighting, self.latent_weighting(times), times
            )

    def trains_null(self, setting: Setting) -> tuple[str, ...]:
        """Pairs without their text, at a null rate."""
        return ("text",) if self._null_rate(setting) > 0 else ()

    def check_step(self, step: Step) -> None:
        """Texts and latents are needed, paired or not, and times above 0."""
        step.rows.need_texts()
        step.rows.need_latents()
        step.rows.need_lengths()
        if self.latent_time is not None:
            highest(self.latent_time, step.number)

    def loss(self, step: Step) -> dict[str, Scalar]:
        """The two losses of the mode."""
        read = step.rows.part(self.rows)
        paired, rows = read.paired, read.side_by_side(step.generator)
        has_text, rate = rows.has_text, self._null_rate(step.setting)
        if rate > 0:
            device = rows.mask.device
            kept = stratified_times(paired, device=device, generator=step.generator) > rate
            has_text = has_text & F.pad(kept, (0, len(has_text) - paired), value=True)
        time = None if self.latent_time is None else step.time(self.latent_time, rows.tokens)
        text, latent = unconditional_loss(
            step.denoiser,
            step.text_process.pad(rows.tokens, rows.mask),
            rows.latents,
            rows.mask,
            **step.processes,
            has_text=has_text,
            has_latent=rows.has_latent,
            latent_time=time,
            text_weighting=self.text_weighting,
            latent_weighting=self.latent_weighting,
            generator=step.generator,
            latent_mask=rows.latent_mask,
            text_count=step.denominator("text"),
            latent_count=step.denominator("latent"),
        )
        return {"text": text, "latent": latent}

    def _null_rate(self, setting: Setting) -> Number:
        if self.null_text_rate is not None:
            return self.null_text_rate
        return 0.1 if setting.reads_null_text else 0.0
