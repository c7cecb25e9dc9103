"""One training step: the terms that run, what they weigh, what is reported."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.table import Shown
from cyclevae._base.types import Count, Number
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.objective.arrange import arrange
from cyclevae.objective.batch import Batch
from cyclevae.objective.checking import (
    check_guidance,
    check_joining,
    check_learners,
    check_step,
    check_terms,
)
from cyclevae.objective.config import dump_objective, load_objective
from cyclevae.objective.output import StepOutput
from cyclevae.objective.plan import Plan, Planned, make_plan
from cyclevae.objective.ran import Ran
from cyclevae.objective.shown import Overview, describe, overview
from cyclevae.objective.step import Setting, Step
from cyclevae.objective.term import Term, same
from cyclevae.objective.terms import SHIPPED, recommended
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.mixed_text import HybridTextProcess, UniformTextProcess
from cyclevae.processes.text import TextProcess
from cyclevae.scale.non_finite import (
    Guarded,
    NonFinite,
    Scale,
    Verdict,
    finite_terms,
    refuse_compiling,
    refuse_non_finite,
    zero_terms,
)


@dataclass(frozen=True, eq=False, repr=False)
class CycleObjective:
    """The whole objective of one step; with the two processes alone it is the recommended recipe.

    `loss = sum of weight * term`. A term is a frozen dataclass with options of its own, and asks
    for passes of the denoiser; equal requests are one pass, so that the recommended recipe, both
    base terms and the text cycle on texts without a partner, takes three. Terms run in their order,
    which is also that of random draws. Those whose weight is 0 at a step cost nothing there.

    Attributes:
        text_process: the text process.
        latent_process: the latent process.
        terms: in their order, ours or one's own: see `Term`. None is the recommended recipe.
        join_passes: run a decoder pass from a fully masked text and an encoder pass from pure noise
            as one pass over the rows of both, on the steps that have both: quicker where operators
            take longer to launch than to run, else dearer, as both heads then read every row.
        non_finite: what becomes of a step with a term that is NaN or infinite on any rank. `raise`
            an error that names it, which waits for the device; `skip`: say so in
            `StepOutput.skip`; `zero`: the term gets no gradient, on all ranks, and the others keep
            theirs. None looks at nothing. The others cost one collective where there are several
            ranks, in every step, so every rank must run as many. Only `skip` compiles.
        seed: of draws that ranks must share.

    Raises:
        ValueError: an unknown option, a value out of range, options that do not go together, two
            terms of one name, or a term that the processes make ill-conditioned.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> objective = CycleObjective(text_process, latent_process)
        >>> output = objective(denoiser, toy_batch(seed=0), step=0)
        >>> output.loss.backward()
        >>> sorted(output.metrics)[:3]
        ['cycle_text_loss', 'cycle_text_weight', 'latent_loss']
        >>> objective  # `later` is empty where a weight stays
        CycleObjective(TextProcess, LatentProcess): 3 terms, 3 passes at step 0
        term        weight  later  pass             costs  learns                frozen
        text        1              L2T of the latent  1      decoder_only, shared  -
        latent      5              T2L of the text    1      encoder_only, shared  -
        cycle_text  4              T2L makes z_hat    0      nobody                -
                                   L2T reads z_hat    1      decoder_only, shared  -
    """

    text_process: TextProcess
    latent_process: LatentProcess
    terms: Sequence[Term] | None = None
    _: KW_ONLY
    join_passes: bool = False
    non_finite: NonFinite | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        terms = recommended() if self.terms is None else tuple(self.terms)
        object.__setattr__(self, "terms", terms)
        checks.check_type("text_process", self.text_process, TextProcess)
        checks.check_type("latent_process", self.latent_process, LatentProcess)
        checks.check_type("join_passes", self.join_passes, bool)
        checks.check_type("seed", self.seed, int)
        if self.non_finite is not None:
            checks.check_choice("non_finite", self.non_finite, get_args(NonFinite))
        check_terms(terms)
        for term in terms:
            try:
                term.check(self.setting)
            except ValueError as error:
                raise ValueError(f"`terms`: {term.name}: {error}") from error
        check_learners(terms)
        check_guidance(terms, self.setting)
        if self.join_passes:
            check_joining(terms, self.non_finite)

    @property
    def setting(self) -> Setting:
        """What all terms share."""
        return Setting(
            self.text_process,
            self.latent_process,
            any(term.reads_teacher() for term in self._terms()),
            any(term.reads_null_text() for term in self._terms()),
            self.seed,
        )

    # The plan

    def weights(self, step: int) -> dict[str, Number]:
        """The terms that run at a step and what they weigh; the same on every rank.

        Examples:
            >>> from cyclevae import CycleText, Latent, ramp
            >>> from cyclevae.testing import toy_denoiser
            >>> late = CycleText(weight=ramp(2.0, warmup_steps=10))
            >>> objective = CycleObjective(*toy_denoiser(seed=0)[1:], [Latent(), late])
            >>> objective.weights(9), objective.weights(10)
            ({'latent': 5.0}, {'latent': 5.0, 'cycle_text': 2.0})
        """
        return {term.name: weight for term, weight in self._running(step)}

    def plan(self, step: int) -> Plan:
        """The passes of a step, from its number and the options alone."""
        planned = []
        for term, weight in self._running(step):
            planned.append(Planned(term.name, weight, term.passes(step)))
        return make_plan(planned, join_passes=self.join_passes)

    def passes(self, step: int) -> int:
        """The forward passes at a step, of the denoiser and of a teacher.

        Examples:
            >>> from cyclevae.testing import toy_denoiser
            >>> objective = CycleObjective(*toy_denoiser(seed=0)[1:])
            >>> objective.passes(step=0)  # the cycle shares one of the two base passes
            3
        """
        return self.plan(step).number

    def describe(self, step: int = 0) -> Shown:
        """Who learns from what at a step: a line for each pass that a term reads or runs.

        A string, that a notebook shows as a table. The objective itself shows all of its terms.

        `frozen` are the roles and patterns that get no gradient from the pass, though gradient may
        flow through them; `learns` are the roles that the pass uses, see `Roles`.

        Examples:
            >>> from cyclevae import CycleText, Latent
            >>> from cyclevae.testing import toy_denoiser
            >>> terms = [Latent(), CycleText(policy="decoder_isolated")]
            >>> print(CycleObjective(*toy_denoiser(seed=0)[1:], terms).describe())
            term        weight  pass             learns                frozen
            latent      5       T2L of the text  encoder_only, shared  -
            cycle_text  4       T2L makes z_hat  nobody                -
                                L2T reads z_hat  decoder_only          encoder_only, shared
        """
        return describe(self.plan(step))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The denominator of each per-sample mean on this batch, by metric name.

        For gradients that depend neither on the number of ranks nor on the accumulation steps, sum
        these over both, divide by the number of ranks (DDP averages gradients), and give them to
        the objective: see `pool_counts`. Where a term draws what it counts, it is the number to be
        expected; if that moves with the step, the name is absent and left to each batch.

        Examples:
            >>> from cyclevae.testing import toy_batch, toy_denoiser
            >>> objective = CycleObjective(*toy_denoiser(seed=0)[1:])
            >>> objective.counts(toy_batch(seed=0))["latent_loss"]  # 3 pairs of 4 dimensions
            tensor(12.)
        """
        rows = arrange(batch, self.text_process, self.latent_process)
        like = next((part for part in batch if part is not None), torch.zeros(0))
        zero = torch.zeros((), device=like.device)
        return {  # tensors of their own, so that each may be summed over ranks in place
            term.metric(part): zero + count
            for term in self._terms()
            for part, count in term.counts(rows, self.setting).items()
        }

    # The step

    @at_the_door
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
            teacher: a frozen copy of the model, `Teacher(network).denoiser`, for terms that read
                one.

        Raises:
            ValueError: wrong shapes or values, an unknown count, a direction without rows, or a
                term without its teacher.
        """
        refuse_compiling(self.non_finite)
        verdicts: dict[str, Verdict] = {}
        scale = Scale()
        if self.non_finite == "zero":
            denoiser = Guarded(denoiser, scale)
            verdicts = {term.name: Verdict(scale) for term in self._terms()}
        run = self._step(denoiser, batch, step, generator, counts, teacher, verdicts)
        with self._judging():
            terms, skip = self._weighted(run), None
        if self.non_finite is not None:
            finite = finite_terms(terms)
            run.metrics["non_finite_terms"] = (~finite).sum()
            match self.non_finite:
                case "raise":
                    refuse_non_finite(terms, finite)
                case "skip":
                    skip = ~finite.all()
                case "zero":
                    terms = zero_terms(terms, finite, verdicts)
        loss = torch.stack(list(terms.values())).sum()
        if self.non_finite == "zero":
            loss = scale.of(loss)
        for name, weight, _ in run.plan.terms:
            run.metrics[f"{name}_weight"] = _number(weight, loss)
        metrics = {
            name: value.detach() if value.is_floating_point() else value.detach().float()
            for name, value in run.metrics.items()
        }
        return StepOutput(loss, {"loss": loss.detach(), **metrics}, skip)

    @at_the_door
    def losses(
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
            >>> list(objective.losses(denoiser, toy_batch(seed=0), step=0))
            ['text', 'latent', 'cycle_text']
        """
        return self._weighted(
            self._step(denoiser, batch, step, generator, counts, teacher, verdicts={})
        )

    def _step(
        self,
        denoiser: Denoiser,
        batch: Batch,
        step: int,
        generator: torch.Generator | None,
        counts: Mapping[str, Count] | None,
        teacher: Denoiser | None,
        verdicts: Mapping[str, Verdict],
    ) -> Step:
        """A step that is known to run to its end, before its first pass."""
        plan = self.plan(step)
        if not plan.terms:
            raise ValueError(
                f"there is nothing to train on at step {step}: every weight is 0, or `every` lets "
                "all terms rest"
            )
        run = Step(
            self.setting,
            "",
            step,
            denoiser,
            teacher,
            arrange(batch, self.text_process, self.latent_process),
            generator,
            self._checked_counts(counts),
            {},
            plan,
            Ran.nothing(),
            verdicts,
        )
        for term, _ in self._running(step):
            term.check_step(run._replace(name=term.name))
        return run._replace(rows=check_step(run, self._terms()).borrowed(self.text_process.null_id))

    def _judging(self) -> AbstractContextManager[object]:
        """From here only the model's outputs are new, which the rule judges and no error stops."""
        if self.non_finite is None or torch.compiler.is_compiling():
            return nullcontext()
        return checks.check_values(False)

    def _weighted(self, run: Step) -> dict[str, Tensor]:
        """Run the terms, and weigh them."""
        weighted = {}
        for number, (term, weight) in enumerate(self._running(run.number), start=1):
            found = term.loss(run._replace(name=term.name))
            run.let_go(number)
            parts = found if isinstance(found, dict) else {"": found}
            shapes = {part: list(loss.shape) for part, loss in parts.items()}
            if sorted(parts) != sorted(term.parts) or any(shapes.values()):
                raise ValueError(
                    f"`{term.name}` must return a scalar, or one for each of its `parts` "
                    f"{term.parts!r}; got shapes {shapes!r}"
                )
            if term.cap is not None:
                parts = {part: loss.clamp(max=float(term.cap)) for part, loss in parts.items()}
            run.metrics.update({term.metric(part): loss for part, loss in parts.items()})
            weighed = [x * _number(weight, x) for x in parts.values()]
            weighted[term.name] = torch.stack(weighed).sum()
        return weighted

    def _terms(self) -> tuple[Term, ...]:
        return tuple(self.terms or ())

    def _running(self, step: int) -> list[tuple[Term, Number]]:
        running = []
        for term in self._terms():  # no comprehension, in which dynamo would look at the step
            if (weight := term.weight_at(step)) > 0:
                running.append((term, weight))
        return running

    def known_counts(self) -> list[str]:
        """The names of the denominators that may be given.

        Examples:
            >>> from cyclevae.testing import toy_denoiser
            >>> CycleObjective(*toy_denoiser(seed=0)[1:]).known_counts()
            ['text_loss', 'latent_loss', 'cycle_text_loss']
        """
        return [term.metric(part) for term in self._terms() for part in term.counted()]

    def _checked_counts(self, counts: Mapping[str, Count] | None) -> Mapping[str, Count]:
        known = self.known_counts()
        for name in counts or {}:
            if name not in known:
                raise ValueError(f"unknown count {name!r}; {checks.nearest(name, known)}")
        return counts or {}

    # As a plain dict

    def to_config(self) -> dict[str, Any]:
        """Every option and the version as a plain dict, for YAML or JSON.

        Raises:
            ValueError: an option that is a function of one's own, by its path.

        Examples:
            >>> from cyclevae.testing import toy_denoiser
            >>> config = CycleObjective(*toy_denoiser(seed=0)[1:]).to_config()
            >>> config["version"], config["terms"]["cycle_text"]["bridge"]["noise"]
            (2, 0.75)
        """
        return dump_objective(self)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        terms: Mapping[str, type[Term]] | None = None,
        processes: Sequence[type] = (),
    ) -> "CycleObjective":
        """The objective that `to_config` wrote; a ramp, a bridge or times are dicts of arguments.

        Any Mapping and Sequence will do, such as those of OmegaConf. What is not said keeps its
        default, and without `terms` the recommended recipe runs. A string that YAML made of a
        number (`1e-1`) is read as one. The processes may be objects already.

        Args:
            config: the options.
            terms: the classes of one's own terms by `Class.kind()`, the name of the class in small
                letters: `OneWord` is `one_word`.
            processes: the classes of one's own processes, and of schedules of latents.

        Raises:
            ValueError: an unknown key, a value of another type, or a missing one, by its path; or
                a configuration of version 1, with the new name of each key.

        Examples:
            >>> from cyclevae.testing import toy_denoiser
            >>> objective = CycleObjective(*toy_denoiser(seed=0)[1:])
            >>> CycleObjective.from_config(objective.to_config()) == objective
            True
        """
        checks.check_type("terms", {} if terms is None else terms, Mapping)
        known = {term.kind(): term for term in SHIPPED} | dict(terms or {})
        kinds = (TextProcess, LatentProcess, UniformTextProcess, HybridTextProcess, *processes)
        return load_objective(cls, config, known, kinds)

    # For people

    def overview(self, step: int = 0) -> Overview:
        """All terms, also those that rest at a step: what the objective shows of itself."""
        kind = f"{type(self.text_process).__name__}, {type(self.latent_process).__name__}"
        return overview(
            f"CycleObjective({kind})", self._terms(), step, join_passes=self.join_passes
        )

    def __repr__(self) -> str:
        return str(self.overview())

    def _repr_html_(self) -> str:
        return self.overview()._repr_html_()

    def __eq__(self, other: object) -> bool:
        return same(self, other)

    def __hash__(self) -> int:
        return hash((type(self), self.seed, tuple([term.name for term in self._terms()])))


def _number(value: Number, like: Tensor) -> Tensor:
    """A tensor, so that a weight that moves is no reason to compile again."""
    return torch.full((), float(value), dtype=like.dtype, device=like.device)
