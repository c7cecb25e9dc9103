"""One training step: which passes run, what they weigh, what is reported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cyclevae import _checks
from cyclevae._describe import describe
from cyclevae._plan import Planned
from cyclevae._prior import reads_teacher
from cyclevae._step import Step
from cyclevae._types import Count, Number, Scalar
from cyclevae.base import AnyDistance
from cyclevae.batch import Batch, arrange, pick_rows
from cyclevae.denoiser import Denoiser
from cyclevae.non_finite import (
    Guarded,
    Verdict,
    finite_terms,
    refuse_compiling,
    refuse_non_finite,
    zero_terms,
)
from cyclevae.options import TERMS
from cyclevae.teacher import Teacher
from cyclevae.times import TimePolicy


class StepOutput(NamedTuple):
    """The result of one step.

    Attributes:
        loss: the weighted sum, with its graph.
        metrics: detached 0-d tensors: each term that ran, unweighted, its weight where it may move,
            and statistics of the latents. A term that did not run is absent.
        skip: with `non_finite="skip"`, whether a term is not finite on some rank, a 0-d bool
            tensor: see `skip_update`.

    Examples:
        >>> output = StepOutput(torch.tensor(1.0), {"text_loss": torch.tensor(1.0)})
        >>> output.metrics["text_loss"]
        tensor(1.)
    """

    loss: Scalar
    metrics: dict[str, Tensor]
    skip: Tensor | None = None


@dataclass(frozen=True)
class CycleObjective(Planned):
    """The whole objective of one step; with the two processes alone it is the recommended recipe.

    `loss = sum of weight * term` over: `text` (L2T on pairs), `latent` (T2L on pairs),
    `unconditional` (both parts noised; unpaired rows train the part they have), `cycle_text`
    (T2L2T) and `cycle_latent` (L2T2L) on unpaired rows or all, `prior` on the encoder's
    latents, `sleep` (T2L of texts that the decoder dreams of real latents), `contrastive` (InfoNCE
    on pairs) and `text_marginal` (the decoder writes probable texts). A weight is a number or a
    function of the step (see `ramp`); a term whose weight is 0 costs no forward pass. By default
    the base terms and the text cycle run, on texts without a partner: three passes, see `passes`.
    Latent terms are means over dimensions, of a size near 1, and weigh 5 beside cross-entropies of
    a token.

    Attributes:
        text_process: the text process.
        latent_process: the latent process.
        text_weight: of the base decoder loss.
        latent_weight: of the base encoder loss.
        unconditional_weight: of the unconditional mode.
        cycle_text_weight: of the text cycle.
        cycle_latent_weight: of the latent cycle.
        prior_weight: of the prior.
        sleep_weight: of `ddvi_sleep_loss`.
        contrastive_weight: of `infonce_loss`.
        text_marginal_weight: of `text_marginal_loss` on relaxed pseudo-texts, in nats per text.
        prior: `moment`, `mmd`, `sigreg`, `learned` or `ddvi` (the wake KL), or a function of the
            latents that returns a scalar.
        prior_options: keyword arguments of that prior, such as `{"mean": 0.5, "variance": 2.0}`.
        pool_prior: take the prior of the joined batch of all ranks: see `pool_rows`.
        contrastive_options: `temperature` and `critic` of `infonce_loss`.
        bridge_time: at which the encoder of both cycles starts from noise, a number or a
            `TimePolicy`.
        base_text_time: the rate at which the base decoder loss masks the text, a number or a
            `TimePolicy`: 1.0 masks all of it and shares the pass that writes pseudo-texts; less
            shows the rest, as decoding in several passes does.
        base_latent_time: of the base encoder loss; 1.0 shares the bridge's pass, None draws
            uniform times up to `bridge_time`; or a `TimePolicy`.
        unconditional_latent_time: of the unconditional mode; stratified uniform if None.
        null_text_rate: the share of pairs whose text is fully masked in the unconditional mode,
            the state that `learned` and `ddvi` read; if None, 0.1 where one of them is the prior,
            else 0.
        latent_distance: of the base encoder loss: see `latent_loss`.
        latent_space: in which it compares: see `t2l_loss`.
        min_snr: its cap of the signal-to-noise ratio: see `t2l_loss`.
        cycle_latent_distance: of the latent cycle.
        text_bridge: of the latent cycle: a `TextBridge`, its name, or a function.
        latent_bridge: how the encoder makes the latents of the text cycle and the prior.
        show_latent: let the encoder of the latent cycle see the noised true latent.
        text_policy: who learns from the text cycle: a `GradientPolicy`, a `PolicySchedule` or
            `stop_gradient`, `decoder_isolated`, `full` or `alternating`.
        latent_policy: who learns from the latent cycle; `encoder_isolated` in place of
            `decoder_isolated`.
        p_dual: the share of steps that run both cycles; the others run one, text and latent in
            turn. The text marginal and the sleep term go with the latent cycle. 0 alternates.
        cycle_every: run the cycles at every so many steps only.
        cycle_pairs: run the cycles on pairs too, else only on texts and latents without a partner.
        cycle_fraction: the share of pairs, and of other rows, that the cycles run on: the first
            ones of a batch, so batches must be in random order.
        join_passes: run both base terms, with the bridges that they share, as one pass over the
            rows of both, on the steps where that is the same computation: quicker where operators
            take longer to launch than to run, else dearer, as both heads then read every row.
        non_finite: what becomes of a step with a term that is NaN or infinite on any rank. `raise`
            an error that names it, which waits for the device; `skip`: say so in
            `StepOutput.skip`; `zero`: the term gets no gradient, on all ranks, and the others keep
            theirs. None looks at nothing. The others cost one collective where there are several
            ranks, in every step, so every rank must run as many. Only `skip` compiles.
        caps: by term, a loss above which it counts as that much and has no gradient, such as
            `{"text": 100.0}`.
        seed: of the steps that `p_dual` chooses, and of draws that ranks must share.

    Raises:
        ValueError: an unknown option, a value out of range, options that do not go together, or an
            epsilon process whose bridge would be ill-conditioned.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> objective = CycleObjective(text_process, latent_process)
        >>> output = objective(denoiser, toy_batch(seed=0), step=0)
        >>> output.loss.backward()
        >>> sorted(output.metrics)[:3]
        ['cycle_text_loss', 'cycle_text_weight', 'latent_loss']
    """

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The denominator of each per-sample mean on this batch, by metric name.

        For gradients that depend neither on the number of ranks nor on the accumulation steps, sum
        these over both, divide by the number of ranks (DDP averages gradients), and give them to
        the objective. Where `base_text_time` is below 1, how many words are masked is drawn, and
        `text_loss` is divided by the number to be expected; if its cap moves, that is left to each
        batch.

        Examples:
            >>> from cyclevae.testing import toy_batch, toy_denoiser
            >>> _, text_process, latent_process = toy_denoiser(seed=0)
            >>> objective = CycleObjective(text_process, latent_process)
            >>> objective.counts(toy_batch(seed=0))["latent_loss"]  # 3 pairs of 4 dimensions
            tensor(12.)
        """
        rows = arrange(batch, self.text_process, self.latent_process)
        like = next((part for part in batch if part is not None), torch.zeros(0))
        zero = torch.zeros((), device=like.device)
        p, texts, latents = rows.paired, rows.texts, rows.latents
        tokens = paired_tokens = base_tokens = cycled_tokens = zero
        has_text, has_latent = rows.present()
        reads_text, reads_latent = rows.to_cycle(self.cycle_pairs).present()
        marked = rows.has_both is not None
        if texts is not None:
            taught = self.text_process.taught(texts.mask) & has_text[:, None]
            tokens, paired_tokens = taught.sum(), taught[:p].sum()
            base_tokens = (taught[:p] & has_latent[:p, None]).sum()
            read = taught & reads_text[:, None]
            cycled_tokens = pick_rows(read, p, *self.cycled(p, len(read), marked=marked)).sum()
        elements = 0 if latents is None else latents[:1].numel()
        width = 1 if latents is None else latents.shape[-1]
        base_latents = (has_text[:p] & has_latent[:p]).sum()
        cycled = pick_rows(reads_latent, p, *self.cycled(p, len(reads_latent), marked=marked)).sum()

        time = self.base_text_time
        rate = time.average() if isinstance(time, TimePolicy) else time

        def errors(distance: AnyDistance) -> int:  # the cosine has one per vector
            return elements // width if distance == "cosine" else elements

        counts = {
            "text_loss": base_tokens * (1.0 if rate is None else rate),
            "latent_loss": base_latents * errors(self.latent_distance),
            # a null rate leaves texts out at random
            "unconditional_text_loss": tokens - self.null_rate * paired_tokens,
            "unconditional_latent_loss": has_latent.sum() * elements,
            "cycle_text_loss": cycled_tokens,
            "cycle_latent_loss": cycled * errors(self.cycle_latent_distance),
            "sleep_loss": cycled * elements,
            "text_marginal_loss": cycled,
        }
        if rate is None:
            del counts["text_loss"]
        if reads_teacher(self.prior):
            counts["prior_loss"] = zero + len(has_text)
        # Tensors of their own, so that each may be summed over ranks in place.
        return {name: zero + count for name, count in counts.items()}

    def describe(self, step: int = 0) -> str:
        """Who learns from what at a step: a line for each pass that a term may teach.

        `frozen` are the roles and patterns that get no gradient from the pass, though gradient may
        flow through them; `learns` are the roles that the pass uses, see `Roles`.

        Examples:
            >>> from cyclevae.testing import toy_denoiser
            >>> objective = CycleObjective(
            ...     *toy_denoiser(seed=0)[1:], text_policy="decoder_isolated"
            ... )
            >>> print(objective.describe())
            term        weight  pass               learns                frozen
            text        1       L2T of the latent  decoder_only, shared  -
            latent      5       T2L of the text    encoder_only, shared  -
            cycle_text  4       T2L makes z_hat    nobody                -
                                L2T reads z_hat    decoder_only          encoder_only, shared
        """
        return describe(self, step)

    def __call__(
        self,
        denoiser: Denoiser,
        batch: Batch,
        *,
        step: int,
        generator: torch.Generator | None = None,
        counts: Mapping[str, Count] | None = None,
        teacher: Denoiser | None = None,
    ) -> StepOutput:
        """Run the passes of a step and weigh their terms.

        Args:
            denoiser: the model.
            batch: pairs and unpaired rows.
            step: the training step, from which weights are computed.
            generator: random state of all draws, on the batch's device.
            counts: global denominators by metric name: see `counts`.
            teacher: a frozen copy of the model, `Teacher(network).denoiser`, which the priors
                `learned` and `ddvi` need.

        Raises:
            ValueError: wrong shapes or values, an unknown count, a direction without rows, or a
                prior without its teacher.
        """
        if self._stages:
            return self.at(step)(
                denoiser, batch, step=step, generator=generator, counts=counts, teacher=teacher
            )
        refuse_compiling(self.non_finite)
        verdicts = {}
        if self.non_finite == "zero":
            denoiser, verdicts = Guarded(denoiser), {term: Verdict() for term in TERMS}
        run = self._run(denoiser, batch, step, generator, counts, teacher, verdicts)
        terms, metrics, skip = self._weighted(run), dict(run.metrics), None
        if self.non_finite is not None:
            finite = finite_terms(terms)
            metrics["non_finite_terms"] = (~finite).sum()
            match self.non_finite:
                case "raise":
                    refuse_non_finite(terms, finite)
                case "skip":
                    skip = ~finite.all()
                case "zero":
                    terms = zero_terms(terms, finite, verdicts)
        loss = torch.stack(list(terms.values())).sum()
        metrics = {name: value.detach() for name, value in {**run.losses, **metrics}.items()}
        for term, weight in run.weights.items():
            if callable(getattr(self, f"{term}_weight")) or term.startswith("cycle"):
                metrics[f"{term}_weight"] = torch.full((), weight, device=loss.device)
        return StepOutput(loss, {"loss": loss.detach(), **metrics}, skip)

    def terms(
        self,
        denoiser: Denoiser,
        batch: Batch,
        *,
        step: int,
        generator: torch.Generator | None = None,
        counts: Mapping[str, Count] | None = None,
        teacher: Denoiser | None = None,
    ) -> dict[str, Tensor]:
        """The weighted terms of a step, each with its graph; their sum is the loss.

        For a look at single terms, as `cyclevae.diagnostics.gradient_ledger` takes. Arguments and
        errors are those of the call.

        Examples:
            >>> from cyclevae.testing import toy_batch, toy_denoiser
            >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
            >>> objective = CycleObjective(text_process, latent_process)
            >>> list(objective.terms(denoiser, toy_batch(seed=0), step=0))
            ['text', 'latent', 'cycle_text']
        """
        objective = self.at(step)
        run = objective._run(denoiser, batch, step, generator, counts, teacher, {})
        return objective._weighted(run)

    def _run(
        self,
        denoiser: Denoiser,
        batch: Batch,
        step: int,
        generator: torch.Generator | None,
        counts: Mapping[str, Count] | None,
        teacher: Denoiser | None,
        verdicts: Mapping[str, Verdict],
    ) -> Step:
        """The passes of a step, run."""
        weights = self.weights(step)
        if not weights:
            raise ValueError(
                f"there is nothing to train on at step {step}: every weight is 0, or only cycles "
                "weigh and `cycle_every` or `p_dual` lets them rest"
            )
        rows = arrange(batch, self.text_process, self.latent_process)
        counts = self._checked_counts(counts)
        run = Step(
            self, denoiser, teacher, rows, weights, step, generator, counts, {}, {}, verdicts
        )
        run.all()
        for term, cap in self.caps.items():
            for name in _LOSSES[term]:
                if name in run.losses:
                    run.losses[name] = run.losses[name].clamp(max=cap)
        return run

    def _weighted(self, run: Step) -> dict[str, Tensor]:
        def weigh(name: str, weight: Number) -> Tensor:
            loss = run.losses[name]
            # a tensor, so that a moving weight is no reason to compile again
            return loss * torch.full((), weight, device=loss.device)

        return {
            term: torch.stack([weigh(name, weight) for name in _LOSSES[term]]).sum()
            for term, weight in run.weights.items()
        }

    def _checked_counts(self, counts: Mapping[str, Count] | None) -> Mapping[str, Count]:
        statistics = () if reads_teacher(self.prior) else ("prior",)
        known = [
            name
            for term in TERMS
            if term not in (*statistics, "contrastive")
            for name in _LOSSES[term]
        ]
        for name in counts or {}:
            if name not in known:
                raise ValueError(f"unknown count {name!r}; {_checks.nearest(name, known)}")
        return counts or {}


_LOSSES = {
    "text": ("text_loss",),
    "latent": ("latent_loss",),
    "unconditional": ("unconditional_text_loss", "unconditional_latent_loss"),
    "cycle_text": ("cycle_text_loss",),
    "cycle_latent": ("cycle_latent_loss",),
    "prior": ("prior_loss",),
    "sleep": ("sleep_loss",),
    "contrastive": ("contrastive_loss",),
    "text_marginal": ("text_marginal_loss",),
}


class StepModule(nn.Module):
    """Objective and network as one module: what one wraps in DDP or compiles.

    `forward(batch, step)` runs every pass of a step inside one forward, so that DDP sees a single
    forward and backward however many passes the plan has.

    Args:
        denoiser: the model, made by `as_denoiser`.
        objective: a `CycleObjective`, or the `phases` of one.
        teacher: a `Teacher`, for the priors `learned` and `ddvi`; it is part of the `state_dict`.
            Call `teacher.update(network)` after each optimizer step.

    Raises:
        TypeError: a denoiser without a registered network, or a teacher that is no `Teacher`.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> module = StepModule(denoiser, CycleObjective(text_process, latent_process))
        >>> module(toy_batch(seed=0), step=0).loss.ndim
        0
    """

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Callable[..., StepOutput],
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        network = getattr(denoiser, "network", None)
        if not isinstance(network, nn.Module):
            raise TypeError(
                "StepModule needs a denoiser whose `network` is its torch.nn.Module, so that its "
                f"parameters are registered; got {type(denoiser).__name__}: make it by as_denoiser"
            )
        if teacher is not None and not isinstance(teacher, Teacher):
            raise TypeError(
                f"`teacher` must be a Teacher, got {type(teacher).__name__}; "
                "make it by Teacher(network)"
            )
        self.network = network
        self.denoiser = denoiser
        self.objective = objective
        self.teacher = teacher

    def forward(
        self,
        batch: Batch,
        step: int,
        generator: torch.Generator | None = None,
        counts: Mapping[str, Count] | None = None,
    ) -> StepOutput:
        """One step of the objective."""
        teacher = None if self.teacher is None else self.teacher.denoiser
        return self.objective(
            self.denoiser,
            batch,
            step=step,
            generator=generator,
            counts=counts,
            teacher=teacher,
        )
