"""Requests for passes, as values: what a term reads, over which rows, and who learns there.

A term asks with them for passes of the denoiser. Equal ones are one pass over the rows of all who
ask: see `cyclevae.objective.plan`.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeVar

from cyclevae._base.types import Number
from cyclevae.bridges.latent import ONE_SHOT, LatentBridge
from cyclevae.gradient_policy.roles import ROLES
from cyclevae.model.maker import LIVE, Maker
from cyclevae.objective.rows import Share
from cyclevae.processes.times import TimePolicy

Through = Literal["detach", "last", "full"]
ENCODER, DECODER = ("encoder_only", "shared"), ("decoder_only", "shared")
Self_ = TypeVar("Self_", bound="Shared")


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A pass that several terms may read.

    Attributes:
        rows: over which rows.
        through: who learns: `detach` nobody, `full` whoever takes part; `last` is of `Encode`.
        freeze: patterns of the parameters that get no gradient from it: see `freeze`.
        maker: whose pass it is; that of the network as it trains if not given.

    Raises:
        ValueError: another maker, through whom somebody would learn.
    """

    rows: Share
    through: Through = "full"
    freeze: tuple[str, ...] = ()
    maker: Maker = None  # type: ignore[assignment] # dynamo takes no object as a default

    def __post_init__(self) -> None:
        if self.maker is None:
            object.__setattr__(self, "maker", LIVE)
        elif self.maker != LIVE and self.through != "detach":
            raise ValueError(
                f"`maker` is another than the network as it trains, and through={self.through!r} "
                "would have somebody learn from its pass: use through='detach'"
            )

    def same_computation(self, other: "Shared") -> bool:
        """Whether both compute the same, whoever learns from it."""
        return type(self) is type(other) and self.maker == other.maker

    def may_read(self, other: "Shared") -> bool:
        """Whether the pass that `other` asks for gives what this one asks for."""
        if not self.same_computation(other):
            return False
        same = self.gradient == other.gradient and self.freeze == other.freeze
        return same or self.through == "detach"

    def merged(self: Self_, other: "Shared") -> Self_:
        """The same pass over the rows of both."""
        return replace(self, rows=self.rows | other.rows)

    @property
    def gradient(self) -> Through:
        """`through`, where one pass has no last one beside it."""
        return "detach" if self.through == "detach" else "full"

    @property
    def number(self) -> int:
        """How many passes of the denoiser it takes."""
        return self.maker.passes

    @property
    def learns(self) -> bool:
        """Whether anybody does."""
        return self.through != "detach"

    @property
    def joins(self) -> bool:
        """Whether it may run in one pass with one of the other direction."""
        return self.through == "full" and not self.freeze and self.maker == LIVE


@dataclass(frozen=True, kw_only=True)
class Decode(Shared):
    """L2T of latents, from a fully masked text.

    Examples:
        >>> Decode(rows=Share(others=1.0), through="detach").may_read(Decode(rows=Share(1.0)))
        True
    """

    does: str = field(default="L2T makes y_hat", compare=False)
    roles: tuple[str, ...] = field(default=DECODER, compare=False)
    direction: ClassVar[Literal["texts", "latents"]] = "latents"


@dataclass(frozen=True, kw_only=True)
class Encode(Shared):
    """T2L of texts, from noise.

    Attributes:
        bridge: how many passes, and what guards the latent that is read off the last one; one pass
            without guards if not given.
        time: at which the first starts.

    Examples:
        >>> one, three = (
        ...     Encode(rows=Share(1.0), bridge=LatentBridge(steps), through="last")
        ...     for steps in (1, 3)
        ... )
        >>> one.may_read(Encode(rows=Share(1.0))), three.may_read(one), three.number
        (True, False, 3)
    """

    bridge: LatentBridge = None  # type: ignore[assignment] # dynamo takes no object as a default
    time: Number | TimePolicy = 1.0
    does: str = field(default="T2L makes z_hat", compare=False)
    roles: tuple[str, ...] = field(default=ENCODER, compare=False)
    direction: ClassVar[Literal["texts", "latents"]] = "texts"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bridge is None:
            object.__setattr__(self, "bridge", ONE_SHOT)

    def same_computation(self, other: Shared) -> bool:
        """Whether both compute the same; guards do not matter that act on the outcome alone."""
        return (
            isinstance(other, Encode)
            and super().same_computation(other)
            and self.time == other.time
            and self.bridge.same_passes(other.bridge)
        )

    @property
    def gradient(self) -> Through:
        """`through`, where the last of one pass is all of them."""
        return "full" if self.through == "last" and self.bridge.steps == 1 else self.through

    @property
    def number(self) -> int:
        """How many passes of the denoiser it takes."""
        return self.bridge.steps * self.maker.passes

    @property
    def joins(self) -> bool:
        """Whether it may run in one pass with one of the other direction."""
        live = self.gradient == "full" and not self.freeze and self.maker == LIVE
        return live and self.bridge.steps == self.time == 1


@dataclass(frozen=True, kw_only=True)
class Own:
    """Passes that a term runs by itself, and nobody else reads.

    Attributes:
        does: in a few words, for `describe`.
        roles: of the parameters that take part.
        learns: whether they get a gradient.
        freeze: patterns of those that do not.
        number: how many.

    Examples:
        >>> Own(does="T2L of a text with gaps", roles=ENCODER).number
        1
    """

    does: str
    roles: tuple[str, ...] = ROLES
    learns: bool = True
    freeze: tuple[str, ...] = ()
    number: int = 1


Request = Decode | Encode | Own
