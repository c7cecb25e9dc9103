"""What has run in a step, for all terms that read it."""

from typing import Any, NamedTuple

from cyclevae._base.types import AnyTokens, Latents, Mask, Number, Time, Tokens
from cyclevae.bridges.text import TextBridge
from cyclevae.model.unread import AnyLogits
from cyclevae.objective.requests import Decode, Encode


class Decoded(NamedTuple):
    """A decoder pass: what it read, and what it wrote."""

    latents: Latents
    mask: Mask
    logits: AnyLogits


class Ran(NamedTuple):
    """What has run in a step: filled as terms ask for it.

    Attributes:
        passes: by their place in the plan.
        starts: noise and times by what is computed from them.
        lengths: of all texts to be written, once they are drawn.
        z_hats: by pass and guards.
        pseudo_texts: by request and bridge.
        words: the most probable ones that losses of unread logits met, and where, by pass.
    """

    passes: dict[int, Any]
    starts: list[tuple[Encode, Latents, Number | Time]]
    lengths: list[Mask]
    z_hats: list[tuple[int, Any, Latents]]
    pseudo_texts: list[tuple[Decode, TextBridge, AnyTokens]]
    words: dict[int, tuple[Tokens, Mask]]

    @classmethod
    def nothing(cls) -> "Ran":
        """Before the first pass."""
        return cls({}, [], [], [], [], {})
