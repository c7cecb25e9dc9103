"""Who makes the bridge of a cycle."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from cyclevae._base import checks
from cyclevae._base.types import Number
from cyclevae.gradient_policy.policy import STOP_GRADIENT, GradientPolicy
from cyclevae.gradient_policy.presets import AnyPolicy, all_policies
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.evaluation import evaluated
from cyclevae.model.guidance import guided
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess

By = Literal["live", "evaluated", "teacher"]


@dataclass(frozen=True)
class Maker:
    """Who makes the first half of a cycle, while the network that trains reads it.

    Args:
        by: the network as it trains (`live`), in evaluation mode (`evaluated`), or the averaged
            copy (`teacher`), which always is in evaluation mode and must be given to the step.
        guidance: the scale of classifier-free guidance: see `guided`. Any but 1 takes a second pass
            of each, and wants a base term that trains without the condition: `null_rate`.

    Raises:
        ValueError: an unknown `by`, or a guidance that is not above 0, at which nothing of the
            condition would be left.

    Examples:
        >>> print(Maker(), Maker("teacher", guidance=2.0), sep=" | ")
        as it trains | by the teacher, guided by 2
        >>> Maker("teacher", guidance=2.0).passes
        2
    """

    by: By = "live"
    guidance: Number = 1.0

    def __post_init__(self) -> None:
        checks.check_choice("by", self.by, get_args(By))
        checks.check_positive("guidance", self.guidance)

    @property
    def passes(self) -> int:
        """How many passes of a network one of its own takes."""
        return 1 if self.guidance == 1 else 2

    def denoiser(
        self,
        denoiser: Denoiser,
        teacher: Denoiser | None,
        *,
        text_process: TextProcess,
        latent_process: LatentProcess,
        generator: torch.Generator | None = None,
    ) -> Denoiser:
        """The denoiser that makes the bridge.

        Raises:
            ValueError: no teacher, where it is to be the maker.
        """
        if self.by == "teacher":
            if teacher is None:
                raise ValueError("Maker('teacher') needs a `teacher`, and none was given")
            denoiser = teacher
        elif self.by == "evaluated":
            denoiser = evaluated(denoiser)
        return guided(
            denoiser,
            self.guidance,
            text_process=text_process,
            latent_process=latent_process,
            generator=generator,
        )

    def does(self, what: str) -> str:
        """What a pass does, and who runs it, if that is another than the network as it trains."""
        return what if self == LIVE else f"{what}, {self}"

    def __str__(self) -> str:
        how = {"evaluated": "in evaluation mode", "teacher": "by the teacher"}.get(self.by)
        guidance = f"guided by {self.guidance:g}" if self.passes > 1 else None
        return ", ".join(part for part in (how, guidance) if part) or "as it trains"


LIVE = Maker()


def check_maker(maker: object, policy: AnyPolicy) -> None:
    """Refuse what is no maker, or one whose bridge is to teach, under every policy of a term."""
    checks.check_type("maker", maker, Maker)
    for each in all_policies(policy):
        if maker != LIVE:
            refuse_gradient(f"maker={maker!r}", each)


def check_bridge_maker(
    maker: Denoiser | None, policy: GradientPolicy = STOP_GRADIENT, *, made: str | None
) -> None:
    """Refuse a maker of a bridge that is already made, or that a policy would teach."""
    if maker is None:
        return
    if made is not None:
        raise ValueError(f"`maker` has nothing to make beside a `{made}`: give one of them")
    refuse_gradient("another `maker`", policy)


def refuse_gradient(maker: str, policy: GradientPolicy) -> None:
    """Refuse a policy that would teach whoever makes a bridge, where that is another one."""
    if policy.bridge != "detach":
        raise ValueError(
            f"{maker} makes the bridge, and nobody learns through it, so policy.bridge="
            f"{policy.bridge!r} cannot be followed: use 'detach' (policy='stop_gradient'), or "
            "leave `maker` out"
        )
