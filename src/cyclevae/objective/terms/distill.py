"""T2L learns the latents that the decoder finds among those without a text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from cyclevae._base import checks
from cyclevae._base.reduce import reduce_latents
from cyclevae._base.types import Count, Latents, Number, Rows, Scalar
from cyclevae.gradient_policy.contexts import detach
from cyclevae.losses.channel import Posterior, nearest, weigh
from cyclevae.losses.latent import count_errors, latent_loss
from cyclevae.model.maker import LIVE, Maker
from cyclevae.objective.requests import DECODER, Encode, Own, Request
from cyclevae.objective.rows import Arranged
from cyclevae.objective.step import Setting, Step, highest
from cyclevae.objective.term import UnpairedTerm
from cyclevae.processes.times import TimePolicy, check_time


@dataclass(frozen=True, kw_only=True, eq=False)
class Distill(UnpairedTerm):
    """T2L of texts, towards their channel latents among the batch's latents without a partner.

    Squared error of `z_hat` and `channel_latents`, whose candidates are the unpaired latents of the
    batch. For labels among more latents than a batch holds, make them once by `channel_latents`,
    and train on them as on pairs.

    Metrics: `distill_loss`, and `distill_candidates`, the number of candidates that share the
    weight, `1 / sum_j w_j^2` in the mean over texts: near 1 a label is a single latent. The count
    is of elements.

    Attributes:
        top: how many candidates of each text are weighed, each by a decoder pass without a graph.
        likelihood: what a nat of the decoder weighs; 1 is Bayes' rule.
        variance: of the encoder's error in each dimension: see `channel_latents`.
        time: at which the encoder starts, a number or a `TimePolicy`.
        maker: whose encoder chooses the candidates, and whose decoder weighs them: see `Maker`.
        pairs: run on the texts of pairs too, whose latents are then candidates too.

    Raises:
        ValueError: an option out of range, or a guided maker; with its process, an epsilon
            prediction that would be ill-conditioned; in a step, latents of variable length.

    Reference: a noisy channel, https://arxiv.org/abs/1908.05731.

    Examples:
        >>> [request.does for request in Distill(top=4).passes(0)]
        ['T2L makes z_hat', 'T2L makes z_hat', 'L2T weighs candidates']
    """

    top: int = 8
    likelihood: Number = 1.0
    variance: Number | None = None
    time: Number | TimePolicy = 1.0
    maker: Maker = LIVE

    renamed: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_count("top", self.top)
        checks.check_positive("likelihood", self.likelihood)
        if self.variance is not None:
            checks.check_positive("variance", self.variance)
        check_time("time", self.time)
        checks.check_type("maker", self.maker, Maker)
        if self.maker.guidance != 1:
            raise ValueError(
                f"`maker` is guided by {self.maker.guidance!r}, and guided logits are no "
                "probabilities of a text: leave guidance at 1"
            )

    @property
    def learns(self) -> Encode:
        """The pass that is taught."""
        return Encode(rows=self.rows, time=self.time)

    @property
    def guesses(self) -> Encode:
        """The pass that chooses candidates."""
        return Encode(rows=self.rows, time=self.time, through="detach", maker=self.maker)

    def passes(self, step: int) -> tuple[Request, ...]:
        """The encoder reads texts, and the decoder weighs what they may be of."""
        does = self.maker.does("L2T weighs candidates")
        weighs = Own(does=does, roles=DECODER, learns=False, number=self.top)
        return self.learns, self.guesses, weighs

    def aimed(self, rows: Arranged) -> Rows:
        """Which texts it reads: all that are there, where there is a candidate."""
        return self.read(rows, "text") & self.read(rows, "latent").any()

    def counts(self, rows: Arranged, setting: Setting) -> dict[str, Count]:
        """Elements of the latents of the texts that it reads."""
        return {"": count_errors(rows.latents, self.aimed(rows))}

    def check(self, setting: Setting) -> None:
        """The latent that is read off must be well-conditioned."""
        setting.latent_process.refuse_ill_conditioned(highest(self.time))

    def check_step(self, step: Step) -> None:
        """Texts and candidates are needed, and a prediction that still is well-conditioned."""
        step.rows.need_texts()
        step.latent_process.refuse_ill_conditioned(highest(self.time, step.number))
        if step.rows.latent_mask is not None:
            raise ValueError(
                f"`{step.name}` takes the mean of latents, and these have a mask and so lengths of "
                "their own: leave the term out"
            )
        if not len(self.candidates(step)) and not step.counts:
            raise ValueError(
                f"`{step.name}` looks for latents among those without a partner, and the batch "
                "holds none: give some, or set pairs=True to look among those of pairs too"
            )

    def candidates(self, step: Step) -> Latents:
        """The latents among which it looks."""
        return step.rows.pick(step.rows.need_latents(), self.rows)

    def depends_on_split(self, *, accumulates: bool) -> str | None:
        """Candidates are those of one call."""
        return (
            "it looks for latents among those of one call, which depend on the split; set its "
            "weight to 0 here"
        )

    def loss(self, step: Step) -> Scalar:
        """The error of the encoder's latents against those of the channel."""
        z_hat, aimed = step.z_hat(self.learns), self.aimed(step.rows)
        label, weights = self.label(step)
        share = weights.square().sum(dim=1)
        number = (1 / share.clamp(min=1 / self.top)).where(aimed, 0.0).sum()
        step.metrics[f"{self.name}_candidates"] = number / aimed.sum().clamp(min=1)
        return reduce_latents(
            latent_loss(z_hat, label.to(z_hat), reduction="none"),
            reduction="mean",
            rows=aimed,
            count=step.denominator(),
        )

    def label(self, step: Step) -> Posterior:
        """What the channel finds; 0 where there is no candidate."""
        candidates, there = self.candidates(step), self.read(step.rows, "latent")
        if not len(candidates):  # other ranks have some, so this one runs the passes
            latents = step.rows.need_latents()
            candidates, there = latents.new_zeros(1, *latents.shape[1:]), there.new_zeros(1)
        guess, (tokens, mask) = step.z_hat(self.guesses), step.texts(self.guesses)
        with detach():
            prior = candidates.new_zeros(len(candidates)).masked_fill(~there, -float("inf"))
            places = nearest(guess, candidates, prior, min(self.top, len(candidates)))
            missing = self.top - places.shape[1]
            places = F.pad(places, (0, missing))  # candidates that do not count
            kept = F.pad(prior[places[:, : self.top - missing]], (0, missing), value=-float("inf"))
            return weigh(
                step.made_by(self.maker),
                tokens,
                mask,
                candidates[places],
                kept,
                text_process=step.text_process,
                likelihood=self.likelihood,
                z_hat=None if self.variance is None else guess,
                variance=self.variance or 1.0,
                at_once=1,
                generator=step.generator,
            )
