"""InfoNCE on pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from cyclevae._base import checks
from cyclevae._base.types import Number, Scalar
from cyclevae.bridges.latent import ONE_SHOT, LatentBridge
from cyclevae.losses.contrastive import Critic, infonce_loss, same_text
from cyclevae.objective.requests import Encode, Request
from cyclevae.objective.rows import Share
from cyclevae.objective.step import Setting, Step, highest
from cyclevae.objective.term import Term
from cyclevae.processes.times import TimePolicy, check_time


@dataclass(frozen=True, kw_only=True, eq=False)
class Contrastive(Term):
    """InfoNCE between encoded texts and their latents: see `infonce_loss`.

    A statistic of the batch, without a count. Metrics: `contrastive_loss`.

    Attributes:
        temperature: of the scores.
        critic: `cosine` or `euclidean`.
        bridge: how the encoder makes the latents.
        time: at which the encoder starts from noise.
        through: `full` teaches all passes of the bridge, `last` the last one alone.

    Raises:
        ValueError: an option out of range; with its process, an ill-conditioned bridge.

    Examples:
        >>> Contrastive(temperature=0.5).counted()
        ()
    """

    temperature: Number = 0.1
    critic: Critic = "cosine"
    bridge: LatentBridge = ONE_SHOT
    time: Number | TimePolicy = 1.0
    through: Literal["last", "full"] = "last"

    renamed: ClassVar[Mapping[str, str]] = {
        "contrastive_weight": "weight",
        "contrastive_options": "temperature` and `critic",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_positive("temperature", self.temperature)
        checks.check_choice("critic", self.critic, get_args(Critic))
        checks.check_type("bridge", self.bridge, LatentBridge)
        check_time("time", self.time)
        checks.check_choice("through", self.through, ("last", "full"))

    @property
    def rows(self) -> Share:
        """Pairs alone."""
        return Share(pairs=self.fraction)

    @property
    def encodes(self) -> Encode:
        """The pass that makes latents."""
        return Encode(rows=self.rows, bridge=self.bridge, time=self.time, through=self.through)

    def passes(self, step: int) -> tuple[Request, ...]:
        """The encoder makes latents."""
        return (self.encodes,)

    def check(self, setting: Setting) -> None:
        """The bridge must be well-conditioned."""
        setting.latent_process.refuse_ill_conditioned(highest(self.time))

    def check_step(self, step: Step) -> None:
        """Pairs to compare are needed, and a bridge that still is well-conditioned."""
        step.rows.need_pairs(self.name, least=2, share=self.fraction)
        step.latent_process.refuse_ill_conditioned(highest(self.time, step.number))

    def loss(self, step: Step) -> Scalar:
        """InfoNCE of the pairs."""
        z_hat, texts = step.z_hat(self.encodes), step.texts(self.encodes)
        there = step.rows.has_both
        return infonce_loss(
            z_hat,
            step.rows.need_latents()[: len(z_hat)],
            temperature=self.temperature,
            critic=self.critic,
            duplicates=same_text(*texts),
            rows=None if there is None else there[: len(z_hat)],
            latent_mask=step.rows.kept(self.rows),
        )
