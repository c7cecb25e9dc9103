"""The base encoder loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from cyclevae._base import checks
from cyclevae._base.reduce import reduce_latents
from cyclevae._base.types import Count, Number, Prediction, Scalar
from cyclevae.losses.latent import (
    AnyDistance,
    check_distance,
    check_some_weight,
    check_weights,
    count_errors,
    encoded_loss,
    row_weights,
    t2l_loss,
)
from cyclevae.model.passes import t2l
from cyclevae.objective.requests import ENCODER, Encode, Own, Request
from cyclevae.objective.rows import Arranged, Share
from cyclevae.objective.step import Setting, Step, between, highest
from cyclevae.objective.term import Term, Weight, check_null_rate, with_nulls
from cyclevae.processes.times import LatentWeighting, TimePolicy, check_time


@dataclass(frozen=True, kw_only=True, eq=False)
class Latent(Term):
    """T2L on pairs: a distance of the encoder's prediction, a mean over elements: see `t2l_loss`.

    It weighs 5 beside cross-entropies of a token. Metrics: `latent_loss`. The count is of
    elements, or of vectors for the cosine.

    Attributes:
        time: of the latents, a number or a `TimePolicy`: 1 shows the encoder nothing but noise, and
            shares the pass of a bridge that starts there.
        distance: `mse`, `cosine`, `normalized_mse`, or a function: see `latent_loss`.
        space: in which predictions are compared; the model's own if None.
        min_snr: a cap of the signal-to-noise ratio: see `min_snr_weight`.
        weighting: a weight by the time instead, `LogitNormal(...)` or a function: see `t2l_loss`.
        null_rate: the share of rows that are not shown their text, on which guidance stands: see
            `without_condition`. The pass is then shared with none.

    Raises:
        ValueError: an option out of range, a `null_rate` of 1, or of a term that weighs 0; with its
            process, a space into which the prediction cannot be converted at these times, or a
            weight that takes all from them.

    Examples:
        >>> Latent().passes(0)[0].does
        'T2L of the text'
    """

    weight: Weight = 5.0
    time: Number | TimePolicy = 1.0
    distance: AnyDistance = "mse"
    space: Prediction | None = None
    min_snr: Number | None = None
    weighting: LatentWeighting | None = None
    null_rate: Number = 0.0

    renamed: ClassVar[Mapping[str, str]] = {
        "latent_weight": "weight",
        "base_latent_time": "time",
        "latent_distance": "distance",
        "latent_space": "space",
        "min_snr": "min_snr",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_time("time", self.time)
        check_distance("distance", self.distance)
        if self.space is not None:
            checks.check_choice("space", self.space, get_args(Prediction))
        check_weights(self.min_snr, self.weighting)
        check_null_rate(self)

    @property
    def rows(self) -> Share:
        """Pairs alone."""
        return Share(pairs=self.fraction)

    def passes(self, step: int) -> tuple[Request, ...]:
        """The encoder's; below full noise it sees the latent, and no bridge may read it."""
        does = "T2L of the text"
        if self.time == 1 and not self.null_rate:
            return (Encode(rows=self.rows, does=does),)
        return (Own(does=with_nulls(does, self.null_rate), roles=ENCODER),)

    def trains_null(self, setting: Setting) -> tuple[str, ...]:
        """Some rows are not shown their text, at a null rate."""
        return ("text",) if self.null_rate else ()

    def counts(self, rows: Arranged, setting: Setting) -> dict[str, Count]:
        """Elements of the pairs."""
        pairs, mask = rows.pick(rows.whole(), self.rows), rows.kept(self.rows)
        return {"": count_errors(rows.latents, pairs, mask, distance=self.distance)}

    def check(self, setting: Setting) -> None:
        """The conversion must be sound at all times that can be told, and weigh something."""
        process = setting.latent_process
        space = self.space or process.prediction
        check_distance("distance", self.distance, process.shape or ())
        process.check_space("space", space)
        times = between(self.time)
        for some in (times[0].item(), times[-1].item(), times):  # numbers are always checked
            process.refuse_ill_conditioned(some, space=space)
        options: dict[str, Any] = {"min_snr": self.min_snr, "weighting": self.weighting}
        weights = row_weights(times, process, space=space, **options)
        if weights is None:
            return
        name = "weighting" if self.min_snr is None else "min_snr"
        check_some_weight(name, options[name], weights, times)

    def check_step(self, step: Step) -> None:
        """Pairs are needed, and times at which the conversion is sound."""
        step.rows.need_pairs(self.name)
        check_distance("distance", self.distance, step.rows.need_latents().shape[1:])
        if isinstance(self.time, TimePolicy) and callable(self.time.high):
            cap = highest(self.time, step.number)
            step.latent_process.refuse_ill_conditioned(cap, space=self._space(step))

    def loss(self, step: Step) -> Scalar:
        """The distance of the prediction and what it should be."""
        pairs, _ = self.rows.numbers(step.rows.paired, step.rows.paired, marked=False)
        latents, mask = step.rows.need_latents()[:pairs], step.rows.kept(self.rows)
        options: dict[str, Any] = {
            "latent_process": step.latent_process,
            "space": self.space,
            "distance": self.distance,
            "min_snr": self.min_snr,
            "weighting": self.weighting,
            "reduction": "none",
        }
        (asked,) = self.passes(step.number)
        null = step.null_rows(self.null_rate, latents)
        if self.time == 1:
            if isinstance(asked, Encode):
                encoded = step.encoded(asked)
            else:
                encoded = t2l(
                    step.without_condition(null),
                    *step.rows.need_texts().first(pairs),
                    **step.processes,
                    start="noise",
                    noise=step.noise(latents),
                )
            # shown no latent: the noise in z_t is what makes it that of these latents
            noise = step.latent_process.noise_in(encoded.z_t, latents, encoded.time)
            encoded = encoded._replace(noise=noise, latent_mask=mask)
            error = encoded_loss(encoded, latents, **options)
        else:
            tokens, attention_mask = step.rows.need_texts().first(pairs)
            error = t2l_loss(
                step.without_condition(null),
                tokens,
                latents,
                attention_mask,
                latent_mask=mask,
                text_process=step.text_process,
                time=self.time,
                step=step.number,
                generator=step.generator,
                **options,
            )
        there = step.rows.has_both
        return reduce_latents(
            error,
            reduction="mean",
            rows=None if there is None else there[:pairs],
            latent_mask=mask,
            count=step.denominator(),
        )

    def _space(self, step: Step) -> Prediction:
        return self.space or step.latent_process.prediction
