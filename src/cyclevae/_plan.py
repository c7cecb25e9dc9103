"""The pass plan: which terms a step runs and what that costs, from seed, step and options alone."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from cyclevae import _checks
from cyclevae._prior import prior_passes, teaches_z_hat
from cyclevae._types import Number
from cyclevae.gradient_policy import GradientPolicy
from cyclevae.options import TERMS, Options
from cyclevae.policies import AnyPolicy, PolicySchedule, all_policies, constant

TEXT_HALF = ("cycle_text",)
LATENT_HALF = ("cycle_latent", "text_marginal", "sleep")
_WHOLE = 1 << 16
Self_ = TypeVar("Self_", bound="Planned")


@dataclass(frozen=True)
class Planned(Options):
    """The options of a `CycleObjective`, and which passes they need."""

    _stages: tuple[tuple["Planned", ...], ...] = field(
        default=(), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        policies = self.text_policy, self.latent_policy
        if any(isinstance(policy, PolicySchedule) for policy in policies):
            # made once: making an objective checks it
            stages = tuple(
                tuple(self._stage(text, latent) for latent in all_policies(self.latent_policy))
                for text in all_policies(self.text_policy)
            )
            object.__setattr__(self, "_stages", stages)

    def at(self: Self_, step: int) -> Self_:
        """The objective of a step, whose policies are those that hold there.

        Examples:
            >>> from cyclevae import CycleObjective
            >>> from cyclevae.testing import toy_denoiser
            >>> objective = CycleObjective(*toy_denoiser(seed=0)[1:], text_policy="alternating")
            >>> [objective.at(step).text_policy.bridge for step in (0, 1, 2)]
            ['detach', 'full', 'detach']
        """
        if not self._stages:
            return self
        text, latent = (_index(policy, step) for policy in (self.text_policy, self.latent_policy))
        return self._stages[text][latent]  # type: ignore[return-value]

    def _stage(self: Self_, text: GradientPolicy, latent: GradientPolicy) -> Self_:
        closed = isinstance(self.latent_policy, PolicySchedule) and latent.bridge == "detach"
        bridge = self.bridge.detached if closed else self.text_bridge
        return replace(self, text_policy=text, latent_policy=latent, text_bridge=bridge)

    def weights(self, step: int) -> dict[str, Number]:
        """The terms that run at a step and what they weigh; the same on every rank.

        Examples:
            >>> from cyclevae import CycleObjective, ramp
            >>> from cyclevae.testing import toy_batch, toy_denoiser
            >>> _, text_process, latent_process = toy_denoiser(seed=0)
            >>> objective = CycleObjective(
            ...     text_process, latent_process, cycle_text_weight=ramp(2.0, warmup_steps=10)
            ... )
            >>> "cycle_text" in objective.weights(9), "cycle_text" in objective.weights(10)
            (False, True)
        """
        weights = {}
        resting = self._resting(step)
        for term in TERMS:
            weight = getattr(self, f"{term}_weight")
            if callable(weight):
                weight = weight(step)
                if not torch.compiler.is_compiling():  # there it is symbolic, as the step is
                    _checks.check_nonnegative(f"{term}_weight({step})", weight)
            if weight > 0 and term not in resting:
                weights[term] = weight
        return weights

    def passes(self, step: int) -> int:
        """The forward passes at a step, of the denoiser and of a teacher.

        Examples:
            >>> from cyclevae import CycleObjective, ramp
            >>> from cyclevae.testing import toy_batch, toy_denoiser
            >>> _, text_process, latent_process = toy_denoiser(seed=0)
            >>> objective = CycleObjective(text_process, latent_process)
            >>> objective.passes(step=0)  # the cycle shares one of the two base passes
            3
        """
        if self._stages:
            return self.at(step).passes(step)
        terms = self.weights(step).keys()
        encodes = bool(terms & {"cycle_text", "prior", "contrastive"})
        own_base = "latent" in terms and not (encodes and self.shares_encoder_pass(terms))
        decodes = bool(terms & {"text", *LATENT_HALF})
        return (
            self.latent_bridge.steps * (encodes + self.bridges_apart(terms))
            + own_base
            + decodes
            + self.decodes_apart(terms)
            - self.joins(terms)
            + ("cycle_text" in terms)
            + (self.bridge.passes - 1) * ("cycle_latent" in terms)
            + prior_passes(self.prior) * ("prior" in terms)
            + len(terms & {"unconditional", "sleep", "text_marginal"})
        )

    def shares_encoder_pass(self, terms: Collection[str]) -> bool:
        """Whether the base encoder loss reads the pass that makes the bridge."""
        # Below full noise the base pass has seen the true latent and must not become a bridge.
        full_noise = self.base_latent_time == self.bridge_time == 1.0
        one_shot = self.latent_bridge.steps == 1
        return (
            full_noise
            and one_shot
            and not ("cycle_text" in terms and bool(constant(self.text_policy).freeze_bridge))
        )

    def teaches_encoder(self, terms: Collection[str]) -> bool:
        """Whether a term beside the text cycle trains the encoder through its latents."""
        return "contrastive" in terms or ("prior" in terms and teaches_z_hat(self.prior))

    def bridges_apart(self, terms: Collection[str]) -> bool:
        """Whether the text cycle freezes what other readers of the same latents must train."""
        frozen = "cycle_text" in terms and bool(constant(self.text_policy).freeze_bridge)
        return frozen and self.teaches_encoder(terms)

    def decodes_apart(self, terms: Collection[str]) -> bool:
        """Whether the base decoder loss cannot read the pass that writes the pseudo-texts.

        Its text is not fully masked, or the latent cycle freezes there what it must train.
        """
        frozen = constant(self.latent_policy).freeze_bridge and (
            "cycle_latent" in terms or "text_marginal" in terms
        )
        writes = any(term in terms for term in LATENT_HALF)
        return "text" in terms and (bool(frozen) or (writes and self.base_text_time != 1.0))

    def joins(self, terms: Collection[str]) -> bool:
        """Whether one pass over twice the rows serves both base terms."""
        return (
            self.join_passes
            and "text" in terms
            and "latent" in terms
            and self.base_text_time == 1.0
            and self.shares_encoder_pass(terms)
            and not self.decodes_apart(terms)
        )

    def cycled(self, paired: int, rows: int, *, marked: bool) -> tuple[int, int]:
        """How many of the pairs and of the other rows the cycles run on.

        Among pairs that are `marked` as lacking a part any may be one without a partner.
        """
        pairs, others = (
            # rounded up, but not because a fraction such as 0.1 is a little more than written
            math.ceil(self.cycle_fraction * n - 1e-9)
            for n in (paired, rows - paired)
        )
        return pairs if self.cycle_pairs or marked else 0, others

    def _resting(self, step: int) -> tuple[str, ...]:
        """The terms of the cycles that do not run at a step."""
        if self.cycle_every > 1:
            if step % self.cycle_every:
                return TEXT_HALF + LATENT_HALF
            step = step // self.cycle_every
        if self.p_dual == 1:
            return ()
        # Spread as evenly as integers can be, so that any window of steps has its share.
        share, phase = round(self.p_dual * _WHOLE), self.seed * 40503 % _WHOLE
        dual_before, dual_now = (((step + k) * share + phase) // _WHOLE for k in (0, 1))
        if dual_now > dual_before:
            return ()
        single = step - dual_before + self.seed
        return TEXT_HALF if single % 2 else LATENT_HALF


def _index(policy: AnyPolicy, step: int) -> int:
    return policy.index(step) if isinstance(policy, PolicySchedule) else 0
