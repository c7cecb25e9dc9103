"""A policy: which parts of a two-pass term learn from it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from cyclevae.gradient_policy.contexts import detach, freeze


@dataclass(frozen=True)
class GradientPolicy:
    """Declares which parts of a two-pass term learn from it.

    A cycle runs one or more passes that make the bridge and one pass behind it. With
    `bridge="detach"` the first passes learn nothing; with `bridge="full"` the gradient flows
    through the bridge into all of them, and with `bridge="last"` into the last one, which costs the
    memory of one pass however many there are. Patterns are those of `freeze`.

    Args:
        bridge: what happens at the bridge, `"detach"`, `"last"` or `"full"`; the last two are the
            same where one pass makes the bridge.
        freeze: patterns of the parameters that are frozen in the pass behind the bridge.
        freeze_bridge: patterns of the parameters that are frozen in the passes that make the
            bridge; only with `bridge="last"` or `"full"`.

    Raises:
        ValueError: if a value is unknown, a pattern is not a string in a tuple, or the policy
            leaves nothing that could learn.

    Reference: stop-gradient at the bridge, as in SimSiam (Chen & He 2021, arXiv:2011.10566).

    Examples:
        >>> GradientPolicy(bridge="full", freeze=("decoder.*",))
        GradientPolicy(bridge='full', freeze=('decoder.*',), freeze_bridge=())
    """

    bridge: Literal["detach", "last", "full"] = "detach"
    freeze: tuple[str, ...] = ()
    freeze_bridge: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bridge not in ("detach", "last", "full"):
            raise ValueError(
                f"`bridge` must be 'detach' (the pass that makes the bridge learns nothing), "
                f"'last' (gradient flows into the last of its passes) or 'full' (gradient flows "
                f"through the bridge), got {self.bridge!r}."
            )
        check_are_patterns("freeze", self.freeze)
        check_are_patterns("freeze_bridge", self.freeze_bridge)
        if self.bridge == "detach" and self.freeze_bridge:
            raise ValueError(
                f"`freeze_bridge`={self.freeze_bridge!r} has no meaning with bridge='detach', "
                f"because that bridge teaches nobody: drop `freeze_bridge` or set bridge='last' or "
                f"'full'."
            )
        if "*" in self.freeze and (self.bridge == "detach" or "*" in self.freeze_bridge):
            raise ValueError(
                f"nothing would learn with bridge={self.bridge!r}, freeze={self.freeze!r} and "
                f"freeze_bridge={self.freeze_bridge!r}: freeze less, or give the term weight zero."
            )

    def bridge_pass(self, denoiser: object, *, last: bool = True) -> AbstractContextManager[object]:
        """The context of a pass that makes the bridge: without a graph, or partly frozen.

        Args:
            denoiser: what `freeze` resolves the patterns against.
            last: whether this is the last pass of the bridge.

        Examples:
            >>> import torch
            >>> encoder = torch.nn.Linear(2, 2)
            >>> with GradientPolicy(bridge="last").bridge_pass(encoder, last=False):
            ...     z_t = encoder(torch.ones(1, 2))
            >>> with GradientPolicy(bridge="last").bridge_pass(encoder):
            ...     z_hat = encoder(z_t)
            >>> z_t.requires_grad, z_hat.requires_grad
            (False, True)
        """
        if self.bridge == "detach" or (self.bridge == "last" and not last):
            return detach()
        return _frozen(denoiser, self.freeze_bridge)

    def reading_pass(self, denoiser: object) -> AbstractContextManager[object]:
        """The context of the pass behind the bridge: partly frozen where the policy says so."""
        return _frozen(denoiser, self.freeze)


def check_are_patterns(name: str, patterns: object) -> None:
    """Refuse what is no tuple of shell patterns."""
    if isinstance(patterns, str):
        raise ValueError(
            f"`{name}` must be a tuple of patterns, got the bare string {patterns!r}: "
            f"write ({patterns!r},)."
        )
    if not isinstance(patterns, tuple) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(
            f"`{name}` must be a tuple of shell patterns on parameter names such as "
            f"('decoder.*',), got {patterns!r}."
        )


STOP_GRADIENT = GradientPolicy()


def _frozen(denoiser: object, patterns: tuple[str, ...]) -> AbstractContextManager[object]:
    return freeze(denoiser, *patterns) if patterns else nullcontext()
