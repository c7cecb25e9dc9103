"""The sleep term of DDVI."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cyclevae._base import checks
from cyclevae._base.reduce import reduce_latents
from cyclevae._base.types import Count, Scalar
from cyclevae.bridges.text import pseudo_text
from cyclevae.losses.latent import count_errors
from cyclevae.model.maker import LIVE, Maker
from cyclevae.objective.requests import ENCODER, Decode, Own, Request
from cyclevae.objective.rows import Arranged
from cyclevae.objective.step import Setting, Step
from cyclevae.objective.term import UnpairedTerm
from cyclevae.priors.ddvi import ddvi_sleep_loss


@dataclass(frozen=True, kw_only=True, eq=False)
class Sleep(UnpairedTerm):
    """T2L of texts that the decoder dreams of real latents: see `ddvi_sleep_loss`.

    Metrics: `sleep_loss`. The count is of elements.

    Attributes:
        maker: whose decoder dreams: see `Maker`.
        pairs: run on the latents of pairs too, else only on those without a partner.

    Examples:
        >>> Sleep().passes(0)[0].learns
        False
    """

    maker: Maker = LIVE

    renamed: ClassVar[Mapping[str, str]] = {"sleep_weight": "weight"}

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_type("maker", self.maker, Maker)

    @property
    def dreams(self) -> Decode:
        """The pass that dreams."""
        return Decode(rows=self.rows, through="detach", maker=self.maker, does="L2T dreams")

    def passes(self, step: int) -> tuple[Request, ...]:
        """The decoder dreams, and the encoder reads the dream."""
        return self.dreams, Own(does="T2L reads a dreamt text", roles=ENCODER)

    def counts(self, rows: Arranged, setting: Setting) -> dict[str, Count]:
        """Elements of the latents that it reads."""
        read = self.read(rows, "latent")
        return {"": count_errors(rows.latents, read, rows.kept(self.rows))}

    def check_step(self, step: Step) -> None:
        """Latents are needed."""
        step.rows.need_latents()

    def loss(self, step: Step) -> Scalar:
        """The error of denoising the latents, given their dreamt texts."""
        decoded, kept = step.decoded(self.dreams), step.latent_mask(self.dreams)
        dream = pseudo_text(
            decoded.logits,
            decoded.mask,
            text_process=step.text_process,
            bridge="categorical",
            generator=step.generator,
        )
        error = ddvi_sleep_loss(
            step.denoiser,
            decoded.latents,
            decoded.mask,
            **step.processes,
            y_hat=dream,
            generator=step.generator,
            reduction="none",
            latent_mask=kept,
        )
        return reduce_latents(
            error,
            reduction="mean",
            rows=self.there(step.rows, "latent"),
            latent_mask=kept,
            count=step.denominator(),
        )
