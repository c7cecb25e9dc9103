"""Which pseudo-text crosses a latent cycle, and how long it is."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from cyclevae._base.checks import (
    as_any_tokens,
    as_mask,
    check_choice,
    check_count,
    check_nonnegative,
    check_positive,
)
from cyclevae._base.draws import seeded
from cyclevae._base.types import AnyTokens, MaskLike, Number
from cyclevae.bridges.words import (
    argmax_text,
    categorical_text,
    check_logits,
    gumbel_text,
    soft_text,
    straight_through_text,
)
from cyclevae.gradient_policy.policy import GradientPolicy
from cyclevae.model.door import at_the_door
from cyclevae.model.unread import AnyLogits, read_logits
from cyclevae.processes.text import TextProcess

Bridge = Literal[
    "argmax",
    "categorical",
    "straight_through",
    "sampled_straight_through",
    "gumbel",
    "soft",
    "unmask",
    "best",
    "rloo",
]
TextFunction = Callable[..., AnyTokens]
_RELAXED = ("straight_through", "sampled_straight_through", "gumbel", "soft")
_READ_BY = {
    "temperature": ("categorical", *_RELAXED, "best", "rloo"),
    "steps": ("unmask", "best"),
    "samples": ("best", "rloo"),
    "marginal_weight": ("rloo",),
}


@dataclass(frozen=True)
class TextBridge:
    """Which pseudo-text crosses a latent cycle, and with which options.

    | name | text | gradient to the decoder |
    |---|---|---|
    | `argmax` | the most probable words | none |
    | `categorical` | sampled words | none |
    | `straight_through` | `argmax`, relaxed | that of the probabilities |
    | `sampled_straight_through` | `categorical`, relaxed | that of the probabilities |
    | `gumbel` | sampled words, relaxed | that of a tempered softmax |
    | `soft` | the probabilities | exact, of a text no encoder was trained on |
    | `unmask` | `argmax` in several passes: `unmask_text` | none |
    | `best` | of `samples` by `unmask_text`, the one whose latent comes nearest | none |
    | `rloo` | `samples` sampled words | unbiased: `rloo_surrogate` |
    | a function | its own | its own |

    A bare name, or a function `(logits, attention_mask, *, text_process, generator)` that returns
    ids `[b, s]` or a relaxed text `[b, s, v]`, may stand wherever a `TextBridge` does. Its text is
    framed and padded by the library.

    Args:
        name: one of the names, or a function.
        temperature: divides the logits; of all but `argmax` and `unmask`. `gumbel` divides the sum
            of logits and noise.
        steps: of `unmask` and `best`, the passes of a text.
        samples: of `best` and `rloo`, the texts drawn per latent; each costs an encoder pass, and
            of `best`, whose encoder passes have no graph, further decoder passes.
        marginal_weight: of `rloo`, the price of a nat of `text_marginal_loss` in the reward, which
            keeps the texts from becoming a private code.

    Raises:
        ValueError: an unknown name, an option out of range, or one that the bridge does not read.

    Examples:
        >>> TextBridge("gumbel", temperature=0.5).differentiable
        True
        >>> TextBridge.of("unmask").has_gradient
        False
    """

    name: Bridge | TextFunction = "argmax"
    temperature: Number = 1.0
    steps: int = 1
    samples: int = 2
    marginal_weight: Number = 0.0

    def __post_init__(self) -> None:
        if not callable(self.name):
            check_choice("bridge", self.name, get_args(Bridge))
        check_positive("temperature", self.temperature)
        check_nonnegative("marginal_weight", self.marginal_weight)
        check_count("steps", self.steps)
        if not (isinstance(self.samples, int) and self.samples >= 2):
            raise ValueError(
                "`samples` must be an integer of at least 2, because a sample is compared with the "
                f"others, got {self.samples!r}"
            )
        for option in fields(self)[1:]:
            value, readers = getattr(self, option.name), _READ_BY[option.name]
            if value != option.default and self.name not in readers:
                raise ValueError(
                    f"the {str(self)!r} bridge does not read `{option.name}`, got {value!r}; "
                    f"it is read by {', '.join(map(repr, readers))}"
                )

    @classmethod
    def of(cls, bridge: "TextBridge | Bridge | TextFunction") -> "TextBridge":
        """The bridge itself, or the one of a bare name or function."""
        return bridge if isinstance(bridge, TextBridge) else cls(bridge)

    @property
    def differentiable(self) -> bool | None:
        """Whether the text is relaxed; None for a function, which shows it by what it returns."""
        return None if callable(self.name) else self.name in _RELAXED

    @property
    def has_gradient(self) -> bool | None:
        """Whether the decoder can learn through it; None for a function."""
        return None if callable(self.name) else self.name in (*_RELAXED, "rloo")

    @property
    def detached(self) -> "TextBridge":
        """The bridge whose ids have the same law, for steps in which nobody learns through it.

        Examples:
            >>> TextBridge("sampled_straight_through", temperature=0.5).detached.name
            'categorical'
        """
        match self.name:
            case "straight_through" | "soft":
                return TextBridge("argmax")
            case "sampled_straight_through" | "rloo":
                return TextBridge("categorical", temperature=self.temperature)
            case "gumbel":  # its temperature is of the gradient alone
                return TextBridge("categorical")
            case _:
                return self

    @property
    def texts(self) -> int:
        """How many pseudo-texts it makes of a latent, each read by an encoder pass.

        Examples:
            >>> TextBridge().texts, TextBridge("rloo", samples=4).texts
            (1, 4)
        """
        return self.samples if self.name == "rloo" else 1

    @property
    def candidates(self) -> int:
        """Among how many texts the encoder chooses, with a pass for each; 0 where it does not.

        Examples:
            >>> TextBridge().candidates, TextBridge("best", samples=4).candidates
            (0, 4)
        """
        return self.samples if self.name == "best" else 0

    @property
    def more_passes(self) -> int:
        """How many passes of the decoder it takes beside the first.

        Examples:
            >>> TextBridge("unmask", steps=4).more_passes, TextBridge("best", steps=4).more_passes
            (3, 6)
        """
        return (self.steps - 1) * max(self.candidates, 1)

    @property
    def reads_logits_alone(self) -> bool:
        """Whether one pass of the decoder is all it needs, as `pseudo_text` takes it."""
        return self.name not in ("unmask", "best", "rloo")

    def check_policy(self, policy: GradientPolicy) -> None:
        """Refuse a policy for the latent cycle that this bridge cannot follow.

        Raises:
            ValueError: a gradient is asked of a choice of ids, or one that is there is dropped.
        """
        if policy.bridge != "detach" and self.has_gradient is False:
            raise ValueError(
                f"the {str(self)!r} bridge is a choice of ids and has no gradient, so the latent "
                f"cycle cannot use policy.bridge={policy.bridge!r}; use 'detach', or one of "
                f"{', '.join(map(repr, (*_RELAXED, 'rloo')))}"
            )
        if policy.bridge == "detach" and self.has_gradient:
            raise ValueError(
                f"the {str(self)!r} bridge has a gradient for the decoder, which policy.bridge="
                "'detach' would drop; use GradientPolicy(bridge='full'), or the bridge 'argmax' or "
                "'categorical'"
            )

    def __str__(self) -> str:
        return self.name if isinstance(self.name, str) else getattr(self.name, "__name__", "given")


AnyTextBridge = TextBridge | Bridge | TextFunction


@at_the_door
def pseudo_text(
    logits: AnyLogits,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    bridge: AnyTextBridge = "argmax",
    generator: torch.Generator | None = None,
) -> AnyTokens:
    """The pseudo-text of a bridge that needs nothing but the logits of one pass.

    Args:
        logits: `[b, s, v]`; unread ones are read for a function, and for relaxed texts.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process.
        bridge: a `TextBridge`, a name or a function; any but `unmask`, `best` and `rloo`.
        generator: random state of the draws.

    Raises:
        ValueError: an unknown bridge, one that needs more than logits, or a function that returned
            something other than a text.

    Examples:
        >>> import torch
        >>> text = TextProcess(mask_id=2, vocab_size=4, pad_id=0)
        >>> logits, mask = torch.eye(4)[None, [3, 1]], torch.tensor([[True, False]])
        >>> pseudo_text(logits, mask, text_process=text)
        tensor([[3, 0]])
        >>> pseudo_text(logits, mask, text_process=text, bridge="soft").shape
        torch.Size([1, 2, 4])
    """
    bridge = TextBridge.of(bridge)
    mask = check_logits(logits, attention_mask, text_process)
    temperature = bridge.temperature
    if callable(bridge.name):
        plain = read_logits(logits)
        text = bridge.name(plain, mask, text_process=text_process, generator=generator)
        text = as_any_tokens(f"{bridge}(...)", text, text_process.vocab_size)
        if text.shape[:2] != mask.shape:
            raise ValueError(
                f"`{bridge}(...)` must have the shape of `attention_mask` {list(mask.shape)}, got "
                f"{list(text.shape)}"
            )
        return text_process.frame(text, mask)
    draw: Callable[..., AnyTokens]
    match bridge.name:
        case "argmax":
            return argmax_text(logits, mask, text_process=text_process)
        case "soft":
            return soft_text(logits, mask, text_process=text_process, temperature=temperature)
        case "categorical":
            draw = categorical_text
        case "straight_through":
            draw = straight_through_text
        case "sampled_straight_through":
            draw = partial(straight_through_text, sample=True)
        case "gumbel":
            draw = gumbel_text
        case _:
            raise ValueError(
                f"the {str(bridge)!r} bridge needs the denoiser beside its logits: "
                "use cycle_latent_loss, or unmask_text"
            )
    return draw(
        logits, mask, text_process=text_process, temperature=temperature, generator=generator
    )


@at_the_door
def draw_lengths(
    attention_mask: MaskLike, rows: int, *, generator: torch.Generator | None = None
) -> Bool[Tensor, "rows s"]:
    """Masks `[rows, s]` for pseudo-texts, drawn with replacement from the batch's own texts.

    An unpaired latent carries no length, and taking that of its hidden partner would leak it.

    Raises:
        ValueError: a batch without texts.

    Examples:
        >>> import torch
        >>> draw_lengths(torch.tensor([[True, True, False]]), 2)
        tensor([[ True,  True, False],
                [ True,  True, False]])
    """
    attention_mask = as_mask("attention_mask", attention_mask)
    if not rows:
        return attention_mask[:0]
    if not len(attention_mask):
        raise ValueError(
            "pseudo-text lengths are drawn from the batch's texts, and it holds none; "
            "give `pseudo_text_mask`"
        )
    index = torch.randint(
        len(attention_mask), (rows,), device=attention_mask.device, **seeded(generator)
    )
    return attention_mask[index]
