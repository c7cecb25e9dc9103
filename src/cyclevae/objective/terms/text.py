"""The base decoder loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cyclevae._base.types import Count, Number, Scalar
from cyclevae.losses.text import decode_masked, text_loss
from cyclevae.objective.requests import DECODER, Decode, Own, Request
from cyclevae.objective.rows import Arranged, Share
from cyclevae.objective.step import Setting, Step, highest
from cyclevae.objective.term import Term, check_null_rate, with_nulls
from cyclevae.processes.times import UNIFORM, TimePolicy, check_time


@dataclass(frozen=True, kw_only=True, eq=False)
class Text(Term):
    """L2T on pairs: cross-entropy of the masked words, given the latent and the words left.

    Metrics: `text_loss`, and `text_accuracy`, the share of the masked words that the decoder gets
    right. The count is of masked words; where their number is drawn, of those to be expected.

    Attributes:
        time: the rate at which words are masked, a number or a `TimePolicy`: 1 masks all of them,
            and shares the pass that writes pseudo-texts; less shows the rest, as decoding in
            several passes does.
        null_rate: the share of rows that are not shown their latent, on which guidance stands: see
            `without_condition`. The pass is then shared with none, and `text_accuracy` is that of
            the other rows.

    Raises:
        ValueError: an option out of range, a time of 0, at which no word is masked, or a
            `null_rate` of 1, or of a term that weighs 0.

    Examples:
        >>> Text(time=1.0).passes(0)[0].does
        'L2T of the latent'
    """

    time: Number | TimePolicy = UNIFORM
    null_rate: Number = 0.0

    expected_counts: ClassVar[tuple[str, ...]] = ("",)
    renamed: ClassVar[Mapping[str, str]] = {"text_weight": "weight", "base_text_time": "time"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_time("time", self.time)
        check_null_rate(self)

    @property
    def rows(self) -> Share:
        """Pairs alone."""
        return Share(pairs=self.fraction)

    def passes(self, step: int) -> tuple[Request, ...]:
        """The decoder's, shared where the text is fully masked."""
        does = "L2T of the latent"
        if self.time == 1 and not self.null_rate:
            return (Decode(rows=self.rows, does=does),)
        return (Own(does=with_nulls(does, self.null_rate), roles=DECODER),)

    def trains_null(self, setting: Setting) -> tuple[str, ...]:
        """Some rows are not shown their latent, at a null rate."""
        return ("latent",) if self.null_rate else ()

    def counts(self, rows: Arranged, setting: Setting) -> dict[str, Count]:
        """Masked words of the pairs; none where the cap of the rate moves."""
        rate = self.time.average() if isinstance(self.time, TimePolicy) else self.time
        if rate is None:
            return {}
        pairs = rows.pick(rows.whole(), self.rows)
        words = rows.words(setting.text_process)[: len(pairs)]
        return {"": (words & pairs[:, None]).sum() * rate}

    def depends_on_split(self, *, accumulates: bool) -> str | None:
        """Where the cap moves, each call divides by the words that it masks."""
        if isinstance(self.time, TimePolicy) and self.time.average() is None:
            return (
                "`time` has a cap that moves: each call divides by the words that it masks, which "
                "depends on the split; give it a fixed cap here"
            )
        return super().depends_on_split(accumulates=accumulates)

    def check_step(self, step: Step) -> None:
        """Pairs are needed, and words to mask."""
        step.rows.need_pairs(self.name)
        highest(self.time, step.number)

    def loss(self, step: Step) -> Scalar:
        """Cross-entropy of what was masked."""
        pairs, _ = self.rows.numbers(step.rows.paired, step.rows.paired, marked=False)
        texts = step.rows.need_texts().first(pairs)
        (asked,) = self.passes(step.number)
        null = step.null_rows(self.null_rate, texts.tokens)
        if isinstance(asked, Decode):
            targets, taught = step.text_process.targets(*texts)
            # pseudo-texts of the same pass may be longer than any text
            logits = step.decoded(asked).logits[:, : targets.shape[1]]
        else:
            logits, targets, taught = decode_masked(
                step.without_condition(null),
                texts.tokens,
                step.rows.need_latents()[:pairs],
                texts.mask,
                text_process=step.text_process,
                time=self.time,
                step=step.number,
                generator=step.generator,
            )
        if step.rows.has_both is not None:
            taught = taught & step.rows.has_both[:pairs, None]
        best = logits.detach().max(dim=-1).indices  # several times faster than argmax on a CPU
        shown = taught if null is None else taught & ~null[:, None]
        hits = (best == targets) & shown
        step.metrics[f"{self.name}_accuracy"] = hits.sum() / shown.sum().clamp(min=1)
        return text_loss(logits, targets, taught, count=step.denominator())
