"""The text marginal: pseudo-texts that are probable by themselves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cyclevae._base.reduce import reduce_text
from cyclevae._base.types import Count, Scalar
from cyclevae.bridges.text import AnyTextBridge, TextBridge
from cyclevae.gradient_policy.policy import check_are_patterns
from cyclevae.losses.text_marginal import text_marginal_loss
from cyclevae.objective.requests import DECODER, Decode, Own, Request
from cyclevae.objective.rows import Arranged
from cyclevae.objective.step import Setting, Step
from cyclevae.objective.term import UnpairedTerm


@dataclass(frozen=True, kw_only=True, eq=False)
class TextMarginal(UnpairedTerm):
    """Teach the decoder to write texts that are probable: see `text_marginal_loss`, in nats a text.

    It reads the pseudo-texts of a latent cycle with the same bridge and gradient, and writes its
    own without one. Metrics: `text_marginal_loss`. The count is of texts.

    Attributes:
        bridge: a `TextBridge` that makes relaxed texts, its name, or a function.
        freeze: patterns of the parameters that get no gradient from the pass that writes.
        pairs: run on the latents of pairs too, else only on those without a partner.

    Raises:
        ValueError: an option out of range, or a bridge that makes no relaxed text.

    Examples:
        >>> TextMarginal(bridge="soft").passes(0)[0].learns
        True
    """

    bridge: AnyTextBridge = "gumbel"
    freeze: tuple[str, ...] = ()

    renamed: ClassVar[Mapping[str, str]] = {"text_marginal_weight": "weight"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_are_patterns("freeze", self.freeze)
        bridge = TextBridge.of(self.bridge)
        if bridge.differentiable is False:
            raise ValueError(
                f"`bridge` must make a relaxed text, through which the decoder learns, and "
                f"{str(bridge)!r} makes none; use one such as 'gumbel', or the `marginal_weight` "
                "of 'rloo' in the latent cycle"
            )

    def check(self, setting: Setting) -> None:
        """Weights of a bound are needed."""
        setting.text_process.check_bound()

    @property
    def decodes(self) -> Decode:
        """The pass that writes a text."""
        return Decode(rows=self.rows, freeze=self.freeze)

    def passes(self, step: int) -> tuple[Request, ...]:
        """The decoder writes a text, and is asked without the latent how probable it is."""
        return self.decodes, Own(does="L2T judges y_hat", roles=DECODER, learns=False)

    def counts(self, rows: Arranged, setting: Setting) -> dict[str, Count]:
        """The latents that it reads."""
        return {"": self.read(rows, "latent").sum()}

    def check_step(self, step: Step) -> None:
        """Latents are needed."""
        step.rows.need_latents()

    def loss(self, step: Step) -> Scalar:
        """Nats of the pseudo-texts."""
        decoded = step.decoded(self.decodes)
        y_hat = step.pseudo_text(self.decodes, TextBridge.of(self.bridge))
        text, kept = step.text_process.cut(y_hat, decoded.mask)
        nats = text_marginal_loss(
            step.denoiser,
            text,
            kept,
            **step.processes,
            noise=step.noise(decoded.latents),
            generator=step.generator,
            reduction="none",
            latent_mask=step.latent_mask(self.decodes),
        )
        return reduce_text(
            nats,
            step.text_process.taught(kept),
            reduction="nats",
            rows=self.there(step.rows, "latent"),
            count=step.denominator(),
        )
