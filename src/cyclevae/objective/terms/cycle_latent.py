"""The latent cycle."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cyclevae._base import checks
from cyclevae._base.reduce import reduce_latents
from cyclevae._base.types import Count, Number, Scalar
from cyclevae.bridges.text import AnyTextBridge, TextBridge
from cyclevae.gradient_policy.presets import (
    LATENT_POLICIES,
    LatentPolicy,
    PolicySchedule,
    all_policies,
    named_policy,
    policy_at,
)
from cyclevae.losses.cycle_latent import cycle_latent_loss
from cyclevae.losses.latent import AnyDistance, check_distance, count_errors
from cyclevae.model.maker import LIVE, Maker, check_maker
from cyclevae.objective.requests import DECODER, ENCODER, Decode, Own, Request
from cyclevae.objective.rows import Arranged
from cyclevae.objective.step import Setting, Step, highest
from cyclevae.objective.term import UnpairedTerm
from cyclevae.processes.times import TimePolicy, check_time


@dataclass(frozen=True, kw_only=True, eq=False)
class CycleLatent(UnpairedTerm):
    """L2T2L: distance of a latent and of what the encoder makes of the text written for it.

    Metrics: `cycle_latent_loss`. The count is of elements, or of vectors for the cosine.

    Attributes:
        bridge: what text crosses: a `TextBridge`, its name, or a function. In steps of a
            `PolicySchedule` in which nobody learns through it, ids of the same law do.
        time: at which the encoder starts, a number or a `TimePolicy`.
        maker: whose decoder writes the text, and whose encoder chooses among several: see `Maker`.
        show_latent: let the encoder see the noised true latent.
        distance: see `latent_loss`.
        policy: who learns: a `GradientPolicy`, a `PolicySchedule` or `stop_gradient`,
            `encoder_isolated`, `full` or `alternating`.
        pairs: run on the latents of pairs too, else only on those without a partner.

    Raises:
        ValueError: an option out of range, a policy that the bridge or the maker cannot follow;
            with its process, an epsilon prediction that would be ill-conditioned.

    Examples:
        >>> [request.does for request in CycleLatent().passes(0)]
        ['L2T makes y_hat', 'T2L reads y_hat']
    """

    bridge: AnyTextBridge = "categorical"
    time: Number | TimePolicy = 1.0
    show_latent: bool = False
    distance: AnyDistance = "mse"
    maker: Maker = LIVE
    policy: LatentPolicy = "stop_gradient"

    renamed: ClassVar[Mapping[str, str]] = {
        "cycle_latent_weight": "weight",
        "text_bridge": "bridge",
        "bridge_time": "time",
        "show_latent": "show_latent",
        "cycle_latent_distance": "distance",
        "latent_policy": "policy",
        "cycle_pairs": "pairs",
        "cycle_every": "every",
        "cycle_fraction": "fraction",
        "p_dual": "weight",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_time("time", self.time)
        check_distance("distance", self.distance)
        checks.check_type("show_latent", self.show_latent, bool)
        policy = named_policy("policy", self.policy, LATENT_POLICIES)
        object.__setattr__(self, "policy", policy)
        check_maker(self.maker, policy)
        bridge = TextBridge.of(self.bridge)
        if bridge.candidates and self.maker.guidance != 1:
            raise ValueError(
                f"the {str(bridge)!r} bridge chooses by the encoder of its maker, which guidance="
                f"{self.maker.guidance!r} would move too: leave guidance at 1, or use 'unmask'"
            )
        if isinstance(policy, PolicySchedule):
            for each in all_policies(policy):
                (bridge.detached if each.bridge == "detach" else bridge).check_policy(each)
        else:
            bridge.check_policy(policy)

    def bridge_at(self, step: int) -> TextBridge:
        """The bridge of a step."""
        bridge = TextBridge.of(self.bridge)
        closed = policy_at(self.policy, step).bridge == "detach"
        return bridge.detached if closed and isinstance(self.policy, PolicySchedule) else bridge

    def decodes(self, step: int) -> Decode:
        """The pass that writes a text."""
        policy = policy_at(self.policy, step)
        return Decode(
            rows=self.rows,
            through=policy.bridge,
            freeze=policy.freeze_bridge,
            maker=self.maker,
        )

    def passes(self, step: int) -> tuple[Request, ...]:
        """The decoder writes a text, and the encoder reads it."""
        bridge, frozen = self.bridge_at(step), policy_at(self.policy, step).freeze
        reads = Own(does="T2L reads y_hat", roles=ENCODER, freeze=frozen, number=bridge.texts)
        more, picks, judges = (
            Own(does=does, roles=roles, learns=False, number=number)
            for does, roles, number in (
                (self.maker.does("L2T writes on"), DECODER, bridge.more_passes * self.maker.passes),
                (
                    self.maker.does("T2L picks y_hat"),
                    ENCODER,
                    bridge.candidates * self.maker.passes,
                ),
                ("L2T judges y_hat", DECODER, bridge.texts if bridge.marginal_weight else 0),
            )
        )
        return self.decodes(step), *[own for own in (more, picks, reads, judges) if own.number]

    def counts(self, rows: Arranged, setting: Setting) -> dict[str, Count]:
        """Elements of the latents that it reads."""
        read, mask = self.read(rows, "latent"), rows.kept(self.rows)
        return {"": count_errors(rows.latents, read, mask, distance=self.distance)}

    def check(self, setting: Setting) -> None:
        """The latent that is read off must be well-conditioned, and a bound have its weights."""
        check_distance("distance", self.distance, setting.latent_process.shape or ())
        setting.latent_process.refuse_ill_conditioned(highest(self.time))
        if TextBridge.of(self.bridge).marginal_weight:
            setting.text_process.check_bound()

    def check_step(self, step: Step) -> None:
        """Latents are needed, and a prediction that still is well-conditioned."""
        check_distance("distance", self.distance, step.rows.need_latents().shape[1:])
        step.latent_process.refuse_ill_conditioned(highest(self.time, step.number))

    def loss(self, step: Step) -> Scalar:
        """The distance of latents, and of what the encoder makes of their texts."""
        asked, bridge = self.decodes(step.number), self.bridge_at(step.number)
        decoded, mask = step.decoded(asked), step.latent_mask(asked)
        time = step.time(self.time, decoded.latents)
        writes_on = self.maker != LIVE and not bridge.reads_logits_alone
        error = cycle_latent_loss(
            step.denoiser,
            decoded.latents,
            decoded.mask,
            **step.processes,
            y_hat=step.pseudo_text(asked, bridge) if bridge.reads_logits_alone else None,
            logits=None if bridge.reads_logits_alone else decoded.logits,
            bridge=bridge,
            maker=step.made_by(self.maker) if writes_on else None,
            show_latent=self.show_latent,
            time=time,
            generator=step.generator,
            policy=policy_at(self.policy, step.number),
            distance=self.distance,
            reduction="none",
            latent_mask=mask,
        )
        return reduce_latents(
            error,
            reduction="mean",
            rows=self.there(step.rows, "latent"),
            latent_mask=mask,
            count=step.denominator(),
        )
