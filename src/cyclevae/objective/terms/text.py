"""The base decoder loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

from cyclevae._base import checks
from cyclevae._base.types import Count, Number, Scalar, TextWeighting
from cyclevae.losses.text import Decoding, check_bound_time, decode_noised
from cyclevae.objective.requests import DECODER, Decode, Own, Request
from cyclevae.objective.rows import Arranged, Share
from cyclevae.objective.step import Setting, Step, highest
from cyclevae.objective.term import Term, check_null_rate, with_nulls
from cyclevae.processes.times import UNIFORM, TimePolicy, check_time


@dataclass(frozen=True, kw_only=True, eq=False)
class Text(Term):
    """L2T on pairs: cross-entropy of the masked words, given the latent and the words left.

    Where noise is random words, of all words. Metrics: `text_loss`, and `text_accuracy`, the share
    of these words that the decoder gets right. The count is of masked words, of those to be
    expected where their number is drawn; of all where noise is random words, and of a bound.

    Attributes:
        time: the time of the text, for masks their rate, a number or a `TimePolicy`: 1 hides all
            words, and shares the pass that writes pseudo-texts; less shows the rest, as decoding in
            several passes does.
        null_rate: the share of rows that are not shown their latent, on which guidance stands: see
            `without_condition`. The pass is then shared with none, and `text_accuracy` is that of
            the other rows.
        weighting: the `mean` over words, or the `bound` on `-log p(y | z)`, `1/t` for masks, in the
            mean over the times of a uniform policy: see `l2t_loss`.

    Raises:
        ValueError: an option out of range, a time of 0, at which no word is hidden, a `null_rate`
            of 1, or of a term that weighs 0, or a bound at times that are not uniform.

    Examples:
        >>> Text(time=1.0).passes(0)[0].does
        'L2T of the latent'
    """

    time: Number | TimePolicy = UNIFORM
    null_rate: Number = 0.0
    weighting: TextWeighting = "mean"

    expected_counts: ClassVar[tuple[str, ...]] = ("",)
    renamed: ClassVar[Mapping[str, str]] = {"text_weight": "weight", "base_text_time": "time"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_time("time", self.time)
        check_null_rate(self)
        checks.check_choice("weighting", self.weighting, get_args(TextWeighting))
        if self.weighting == "bound":
            check_bound_time("time", self.time)

    def check(self, setting: Setting) -> None:
        """Weights of a bound are needed where one is asked for."""
        if self.weighting == "bound":
            setting.text_process.check_bound()

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
        """Words of the pairs that count; none where how many does is not known beforehand."""
        share: Number | None = 1.0
        if self.weighting == "mean":
            share = setting.text_process.counted_share(self.time)
        if share is None:
            return {}
        pairs = rows.pick(rows.whole(), self.rows)
        words = rows.words(setting.text_process)[: len(pairs)]
        return {"": (words & pairs[:, None]).sum() * share}

    def depends_on_split(self, *, accumulates: bool) -> str | None:
        """Where the cap moves, each call divides by the words that it masks."""
        moves = isinstance(self.time, TimePolicy) and self.time.average() is None
        if moves and self.weighting == "mean":
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
        """Cross-entropy of what was noised, or the bound."""
        pairs, _ = self.rows.numbers(step.rows.paired, step.rows.paired, marked=False)
        texts = step.rows.need_texts().first(pairs)
        (asked,) = self.passes(step.number)
        null = step.null_rows(self.null_rate, texts.tokens)
        if isinstance(asked, Decode):
            targets, counted = step.text_process.targets(*texts)
            # pseudo-texts of the same pass may be longer than any text
            logits = step.decoded(asked).logits[:, : targets.shape[1]]
            decoded = Decoding(logits, targets, counted)
        else:
            decoded = decode_noised(
                step.without_condition(null),
                texts.tokens,
                step.rows.need_latents()[:pairs],
                texts.mask,
                text_process=step.text_process,
                time=self.time,
                step=step.number,
                generator=step.generator,
                latent_mask=step.rows.kept(self.rows),
            )
        taught = step.text_process.taught(texts.mask)
        if step.rows.has_both is not None:
            whole = step.rows.has_both[:pairs, None]
            decoded, taught = decoded._replace(counted=decoded.counted & whole), taught & whole
        loss, best = decoded.judged(
            step.text_process, taught, weighting=self.weighting, count=step.denominator()
        )
        counted = decoded.counted
        if isinstance(asked, Decode):
            step.met(asked, best, counted)
        shown = counted if null is None else counted & ~null[:, None]
        hits = (best == decoded.targets) & shown
        step.metrics[f"{self.name}_accuracy"] = hits.sum() / shown.sum().clamp(min=1)
        return loss
