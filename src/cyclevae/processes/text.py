"""The forward process of text: an absorbing mask, and the one home of ids."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.types import AnyTokens, Mask, Time, Tokens

TaughtPadding = Literal["none", "first", "all"]


@dataclass(frozen=True)
class TextProcess:
    """The absorbing text process and the one home of ids.

    Attributes:
        mask_id: the id of the absorbing token, `[MASK]`.
        vocab_size: number of ids, the width of the logits.
        pad_id: the id at padded positions; the mask id where the model has none.
        special_ids: further ids that no pseudo-text may choose (the mask and padding never are).
        start_id: where texts carry a first token (`[CLS]`), it is placed there in pseudo-texts.
        end_id: where texts carry a last token (`[SEP]`).
        end: of a pseudo-text: `placed` puts `end_id` at the end of the length it was given;
            `predicted` lets the decoder choose `end_id`, and the text ends at the first one.
        taught_padding: padded positions that the decoder's losses count, with `pad_id` as their
            token: `none` of them, the `first` after a text, so that the decoder learns to end one,
            or `all`, as trainers do whose sampler writes padding behind a text.

    Raises:
        ValueError: an id outside the vocabulary, or padding to be taught without a `pad_id`.

    Examples:
        >>> import torch
        >>> text = TextProcess(mask_id=2, vocab_size=6, pad_id=0)
        >>> text.fully_masked(torch.tensor([[True, True, False]]))
        tensor([[2, 2, 0]])
    """

    mask_id: int
    vocab_size: int
    pad_id: int | None = None
    special_ids: tuple[int, ...] = ()
    start_id: int | None = None
    end_id: int | None = None
    end: Literal["placed", "predicted"] = "placed"
    taught_padding: TaughtPadding = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "special_ids", tuple(self.special_ids))
        ids = {"mask_id": self.mask_id, "pad_id": self.pad_id}
        ids |= {"start_id": self.start_id, "end_id": self.end_id}
        ids |= {f"special_ids[{i}]": value for i, value in enumerate(self.special_ids)}
        for name, value in ids.items():
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(f"`{name}` must lie in [0, {self.vocab_size}), got {value}")
        checks.check_choice("end", self.end, ("placed", "predicted"))
        if self.end == "predicted" and self.end_id is None:
            raise ValueError("end='predicted' needs the `end_id` at which a text ends")
        checks.check_choice("taught_padding", self.taught_padding, get_args(TaughtPadding))
        if self.taught_padding != "none" and self.pad_id is None:
            raise ValueError(
                f"taught_padding={self.taught_padding!r} needs the `pad_id` that the decoder is to "
                "write"
            )
        if len(self.forbidden_ids) >= self.vocab_size:
            raise ValueError("every id of the vocabulary is forbidden; a pseudo-text needs words")

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "TextProcess":
        """Read the ids off a Hugging Face style tokenizer, by duck typing.

        `[CLS]` and `[SEP]` (or the beginning- and end-of-text tokens) are taken as placed where
        the tokenizer has them.

        Raises:
            ValueError: the tokenizer has no mask token.

        Examples:
            >>> class Tokenizer:  # such as transformers' AutoTokenizer gives
            ...     mask_token_id, pad_token_id, cls_token_id, sep_token_id = 4, 0, 2, 3
            ...     all_special_ids = [0, 1, 2, 3, 4]
            ...     def __len__(self):
            ...         return 100
            >>> TextProcess.from_tokenizer(Tokenizer()).forbidden_ids
            (0, 1, 2, 3, 4)
        """
        mask_id = getattr(tokenizer, "mask_token_id", None)
        if mask_id is None:
            raise ValueError(
                f"`tokenizer` ({type(tokenizer).__name__}) has no mask token; add one, as in "
                'tokenizer.add_special_tokens({"mask_token": "[MASK]"}), and resize the embedding'
            )
        start, end = (
            next((i for n in names if (i := getattr(tokenizer, n, None)) is not None), None)
            for names in (("cls_token_id", "bos_token_id"), ("sep_token_id", "eos_token_id"))
        )
        return cls(
            mask_id=mask_id,
            vocab_size=len(tokenizer),
            pad_id=getattr(tokenizer, "pad_token_id", None),
            special_ids=tuple(sorted(set(getattr(tokenizer, "all_special_ids", ())))),
            start_id=start,
            end_id=end,
        )

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """The ids that no bridge may choose."""
        named = {self.mask_id, self.pad_id, self.start_id, self.end_id, *self.special_ids}
        allowed = {None} if self.end == "placed" else {None, self.end_id}
        return tuple(sorted(i for i in named - allowed if i is not None))

    def forbid(self, logits: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
        """Logits with the forbidden ids at minus infinity."""
        allowed = logits.clone()
        for forbidden in self.forbidden_ids:  # a few slices: an index tensor would be copied over
            allowed[..., forbidden] = -math.inf
        return allowed

    def taught(self, attention_mask: Mask) -> Mask:
        """The positions that the decoder's losses count: the kept ones, and `taught_padding`.

        Examples:
            >>> text = TextProcess(mask_id=2, vocab_size=6, pad_id=0, taught_padding="first")
            >>> text.taught(torch.tensor([[True, True, False, False]]))
            tensor([[ True,  True,  True, False]])
        """
        match self.taught_padding:
            case "none":
                return attention_mask
            case "first":
                return attention_mask | ((~attention_mask).cumsum(dim=1) == 1)
            case "all":
                return torch.ones_like(attention_mask)

    def targets(self, tokens: Tokens, attention_mask: Mask) -> tuple[Tokens, Mask]:
        """What the decoder is to write, and the positions that count."""
        return self.pad(tokens, attention_mask), self.taught(attention_mask)

    def fully_masked(self, attention_mask: Mask) -> Tokens:
        """The text at time 1: the mask id at every taught position, padding elsewhere."""
        tokens = torch.full(attention_mask.shape, self.mask_id, device=attention_mask.device)
        return self.pad(tokens, self.taught(attention_mask))

    def pad(self, tokens: AnyTokens, attention_mask: Mask) -> AnyTokens:
        """Tokens with the padding id where the mask is False."""
        return _put(tokens, ~attention_mask, self.fill_id)

    def mask(
        self,
        tokens: Tokens,
        attention_mask: Mask,
        rate: Time,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tokens, Mask]:
        """Mask each taught token independently with its row's rate.

        Returns:
            The noised tokens `[b, s]`, and which of them were masked.
        """
        draw = torch.rand(
            tokens.shape, dtype=torch.float32, device=tokens.device, generator=generator
        )
        masked = self.taught(attention_mask) & (draw < rate[:, None])
        return self.pad(tokens, attention_mask).masked_fill(masked, self.mask_id), masked

    def frame(self, tokens: AnyTokens, attention_mask: Mask) -> AnyTokens:
        """Place the first and last token of a text, and its padding."""
        tokens = self.pad(tokens, attention_mask)
        for places, token_id in self._placed(attention_mask):
            tokens = _put(tokens, places, token_id)
        return tokens

    def chosen(self, attention_mask: Mask) -> Mask:
        """The kept positions whose word a bridge chooses: all but the placed ones."""
        for places, _ in self._placed(attention_mask):
            attention_mask = attention_mask & ~places
        return attention_mask

    def cut(self, tokens: AnyTokens, attention_mask: Mask) -> tuple[AnyTokens, Mask]:
        """End pseudo-texts at their first predicted end; unchanged where the end is placed.

        A relaxed text ends where the end is its most probable word.
        """
        if self.end == "placed" or self.end_id is None:
            return tokens, attention_mask
        words = tokens.argmax(dim=-1) if tokens.is_floating_point() else tokens
        ends = attention_mask & words.eq(self.end_id)
        attention_mask = attention_mask & (ends.cumsum(dim=1) - ends.long() == 0)
        return self.pad(tokens, attention_mask), attention_mask

    def _placed(self, attention_mask: Mask) -> Iterator[tuple[Mask, int]]:
        """Where tokens are placed, and which."""
        if self.start_id is not None:
            yield attention_mask & (attention_mask.cumsum(1) == 1), self.start_id
        if self.end_id is not None and self.end == "placed":
            yield attention_mask & (attention_mask.flip(1).cumsum(1).flip(1) == 1), self.end_id

    @property
    def fill_id(self) -> int:
        """The id of padding; the mask id where there is none."""
        return self.mask_id if self.pad_id is None else self.pad_id


def _put(tokens: AnyTokens, places: Mask, token_id: int) -> AnyTokens:
    """Tokens with an id at some places: in a relaxed text its one-hot row, which is constant."""
    if not tokens.is_floating_point():
        return tokens.masked_fill(places, token_id)
    one_hot = torch.arange(tokens.shape[-1], device=tokens.device) == token_id
    return torch.where(places[..., None], one_hot.to(tokens.dtype), tokens)
