"""The text cycle."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cyclevae._base import checks
from cyclevae._base.types import Count, Number, Scalar
from cyclevae.bridges.latent import NOISED, LatentBridge
from cyclevae.gradient_policy.presets import (
    TEXT_POLICIES,
    TextPolicy,
    named_policy,
    policy_at,
)
from cyclevae.losses.cycle_text import decode_cycled
from cyclevae.losses.text import text_loss
from cyclevae.model.maker import LIVE, Maker, check_maker
from cyclevae.objective.requests import DECODER, Encode, Own, Request
from cyclevae.objective.rows import Arranged
from cyclevae.objective.step import Setting, Step, highest
from cyclevae.objective.term import UnpairedTerm, Weight
from cyclevae.processes.times import TimePolicy, check_time


@dataclass(frozen=True, kw_only=True, eq=False)
class CycleText(UnpairedTerm):
    """T2L2T: cross-entropy of a text given the latent that the encoder makes of it.

    Metrics: `cycle_text_loss`. The count is of words.

    Attributes:
        bridge: how the encoder makes the latent, and what noise crosses with it.
        time: at which the encoder starts from noise, a number or a `TimePolicy`.
        maker: whose encoder makes the latent: see `Maker`.
        policy: who learns: a `GradientPolicy`, a `PolicySchedule` or `stop_gradient`,
            `decoder_isolated`, `full` or `alternating`.
        pairs: run on the texts of pairs too, else only on those without a partner.

    Raises:
        ValueError: an option out of range, a maker whose bridge is to teach; with its process, an
            epsilon bridge that would be ill-conditioned.

    Examples:
        >>> [request.does for request in CycleText().passes(0)]
        ['T2L makes z_hat', 'L2T reads z_hat']
    """

    weight: Weight = 4.0
    bridge: LatentBridge = NOISED
    time: Number | TimePolicy = 1.0
    maker: Maker = LIVE
    policy: TextPolicy = "stop_gradient"

    renamed: ClassVar[Mapping[str, str]] = {
        "cycle_text_weight": "weight",
        "latent_bridge": "bridge",
        "bridge_time": "time",
        "text_policy": "policy",
        "cycle_pairs": "pairs",
        "cycle_every": "every",
        "cycle_fraction": "fraction",
        "p_dual": "weight",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_time("time", self.time)
        checks.check_type("bridge", self.bridge, LatentBridge)
        policy = named_policy("policy", self.policy, TEXT_POLICIES)
        object.__setattr__(self, "policy", policy)
        check_maker(self.maker, policy)

    def encodes(self, step: int) -> Encode:
        """The pass that makes a latent."""
        policy = policy_at(self.policy, step)
        return Encode(
            rows=self.rows,
            bridge=self.bridge,
            time=self.time,
            through=policy.bridge,
            freeze=policy.freeze_bridge,
            maker=self.maker,
        )

    def passes(self, step: int) -> tuple[Request, ...]:
        """The encoder makes a latent, and the decoder reads it."""
        policy = policy_at(self.policy, step)
        reads = Own(does="L2T reads z_hat", roles=DECODER, freeze=policy.freeze)
        return self.encodes(step), reads

    def counts(self, rows: Arranged, setting: Setting) -> dict[str, Count]:
        """Words of the texts that it reads."""
        words = rows.pick(rows.words(setting.text_process), self.rows)
        return {"": (words & self.read(rows, "text")[:, None]).sum()}

    def check(self, setting: Setting) -> None:
        """The bridge must be well-conditioned."""
        setting.latent_process.refuse_ill_conditioned(highest(self.time))

    def check_step(self, step: Step) -> None:
        """Texts are needed, and a bridge that still is well-conditioned."""
        step.rows.need_texts()
        step.latent_process.refuse_ill_conditioned(highest(self.time, step.number))

    def loss(self, step: Step) -> Scalar:
        """Cross-entropy of the texts, given their `z_hat`."""
        asked = self.encodes(step.number)
        z_hat, (tokens, mask) = step.z_hat(asked), step.texts(asked)
        logits, targets, taught = decode_cycled(
            step.denoiser,
            tokens,
            mask,
            **step.processes,
            z_hat=z_hat,
            bridge=self.bridge,
            generator=step.generator,
            policy=policy_at(self.policy, step.number),
            latent_mask=step.latent_mask(asked),
        )
        there = self.there(step.rows, "text")
        counted = taught if there is None else taught & there[:, None]
        return text_loss(logits, targets, counted, count=step.denominator())
