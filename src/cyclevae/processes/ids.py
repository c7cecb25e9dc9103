"""The ids of a text: which are words, which are placed, and what is padding."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.types import AnyTokens, Mask, MaskLike, Rows
from cyclevae.processes.tokenizers import frame_of, mask_of

TaughtPadding = Literal["none", "first", "all"]
Ids = TypeVar("Ids", bound="TextIds")


@dataclass(frozen=True)
class TextIds:
    """The ids of a `TextProcess`, which says what its options are."""

    mask_id: int | None
    vocab_size: int
    pad_id: int | None = None
    special_ids: tuple[int, ...] = ()
    start_id: int | None = None
    end_id: int | None = None
    end: Literal["placed", "predicted"] = "placed"
    taught_padding: TaughtPadding = "none"

    has_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ids = {"mask_id": self.mask_id, "pad_id": self.pad_id}
        ids |= {"start_id": self.start_id, "end_id": self.end_id}
        special = tuple(self.special_ids)
        ids |= {f"special_ids[{i}]": value for i, value in enumerate(special)}
        checks.check_count("vocab_size", self.vocab_size)
        for name, value in ids.items():
            if value is None and name in list(ids)[int(self.has_mask) : 4]:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"`{name}` must be an integer id, got {value!r}; use int(...)")
            if not 0 <= value < self.vocab_size:
                raise ValueError(f"`{name}` must lie in [0, {self.vocab_size}), got {value}")
        for name in ("pad_id", "start_id", "end_id"):
            if self.mask_id is not None and ids[name] == self.mask_id:
                raise ValueError(
                    f"`{name}` and `mask_id` are both {self.mask_id}, so that a masked word could "
                    "not be told from it: give the mask an id of its own"
                    + (", or leave `pad_id` out" if name == "pad_id" else "")
                )
        object.__setattr__(self, "special_ids", special)
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
    def from_tokenizer(cls: type[Ids], tokenizer: Any, **options: Any) -> Ids:
        """Read the ids off a Hugging Face style tokenizer, by duck typing.

        What it adds to a text, such as `[CLS]` and `[SEP]`, is asked of it, and taken as placed: a
        token that it has but does not add, as GPT-2 its end, is none that your texts carry. It must
        have `encode(text, add_special_tokens=...)`. What else there is to say is given by name, as
        `taught_padding`.

        Raises:
            ValueError: no mask token, or one that is also the unknown, padding, first or last one;
                a tokenizer that cannot be asked, or that adds more than one token on a side.

        Examples:
            >>> from cyclevae import TextProcess
            >>> class Tokenizer:  # such as transformers' AutoTokenizer gives
            ...     mask_token_id, pad_token_id, cls_token_id, sep_token_id = 4, 0, 2, 3
            ...     all_special_ids = [0, 1, 2, 3, 4]
            ...     def __len__(self):
            ...         return 100
            ...     def encode(self, text, add_special_tokens=True):
            ...         return [2, 50, 3] if add_special_tokens else [50]
            >>> process = TextProcess.from_tokenizer(Tokenizer())
            >>> process.forbidden_ids, process.start_id, process.end_id
            ((0, 1, 2, 3, 4), 2, 3)
        """
        mask = {"mask_id": mask_of(tokenizer)} if cls.has_mask else {}
        start, end = frame_of(tokenizer)
        read: dict[str, Any] = {
            **mask,
            "vocab_size": len(tokenizer),
            "pad_id": getattr(tokenizer, "pad_token_id", None),
            "special_ids": tuple(sorted(set(getattr(tokenizer, "all_special_ids", ())))),
            "start_id": start,
            "end_id": end,
        }
        return cls(**{**read, **options})

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
            >>> import torch
            >>> from cyclevae import TextProcess
            >>> text = TextProcess(mask_id=2, vocab_size=6, pad_id=0, taught_padding="first")
            >>> text.taught(torch.tensor([[True, True, False, False]]))
            tensor([[ True,  True,  True, False]])
        """
        match self.taught_padding:
            case "none":
                return attention_mask
            case "first":
                behind = _behind(attention_mask)
                return attention_mask | (behind & (behind.cumsum(dim=1) == 1))
            case "all":
                return attention_mask | _behind(attention_mask)

    def as_text(
        self,
        tokens: AnyTokens,
        attention_mask: MaskLike,
        *,
        prefix: str = "",
        rows: Rows | None = None,
        relaxed: bool = False,
    ) -> tuple[Tensor, Mask]:
        """A text at the door: int64 ids, or `relaxed` ones where that is allowed, and a bool mask.

        Raises:
            TypeError: no tensors, or of another kind.
            ValueError: wrong shapes, ids out of range, a mask of other values than 0 and 1, rows
                that keep nothing, or a mask that is True at padding, as far as that can be told:
                where it keeps `pad_id`, or nothing else where that also starts or ends a text.
        """
        name, mask_name = f"{prefix}tokens", f"{prefix}attention_mask"
        known = checks.as_any_tokens if relaxed else checks.as_tokens
        tokens = known(name, tokens, self.vocab_size)
        mask = checks.as_mask(mask_name, attention_mask, tokens.shape[:2])
        checks.check_kept(mask_name, mask, rows)
        if self.pad_id is None or tokens.ndim == 3 or not checks.reads_values(tokens):
            return tokens, mask
        padding = tokens == self.pad_id
        bad = (mask & padding).any(dim=1)
        if self.pad_id in (self.start_id, self.end_id):
            bad = ~(mask & ~padding).any(dim=1) & (~mask & ~padding).any(dim=1)
        if rows is not None:
            bad = bad & rows
        if bool(bad.any()):
            raise ValueError(
                f"`{mask_name}` keeps positions of `{name}` that hold the padding id {self.pad_id},"
                f" in {int(bad.sum())} of {len(bad)} rows (first: row {int(bad.long().argmax())}): "
                "True = keep, so give ~mask where yours is True at padding, and tokens != pad_id "
                "where yours keeps everything; where the padding id also ends texts, say so to the "
                f"text process with end_id={self.pad_id}"
            )
        return tokens, mask

    def targets(self, tokens: AnyTokens, attention_mask: Mask) -> tuple[AnyTokens, Mask]:
        """What the decoder is to write, and the positions that count."""
        return self.pad(tokens, attention_mask), self.taught(attention_mask)

    def pad(self, tokens: AnyTokens, attention_mask: Mask) -> AnyTokens:
        """Tokens with the padding id where the mask is False."""
        return _put(tokens, ~attention_mask, self.fill_id)

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
    def null_id(self) -> int:
        """What stands where nothing does: the mask id, or a word where there is no mask."""
        if self.mask_id is not None:
            return self.mask_id
        return next(i for i in range(self.vocab_size) if i not in self.forbidden_ids)

    @property
    def fill_id(self) -> int:
        """The id of padding; that of no word where there is none."""
        return self.null_id if self.pad_id is None else self.pad_id


def _behind(attention_mask: Mask) -> Mask:
    """The positions after the last kept one."""
    return attention_mask.flip(1).cumsum(dim=1).flip(1) == 0


def _put(tokens: AnyTokens, places: Mask, token_id: int) -> AnyTokens:
    """Tokens with an id at some places: in a relaxed text its one-hot row, which is constant."""
    if not tokens.is_floating_point():
        return tokens.masked_fill(places, token_id)
    one_hot = torch.arange(tokens.shape[-1], device=tokens.device) == token_id
    return torch.where(places[..., None], one_hot.to(tokens.dtype), tokens)
