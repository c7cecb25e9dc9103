"""What one training step is given: pairs, and texts and latents that have no partner."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.types import LatentMaskLike, Latents, MaskLike, Rows, Tokens


class Batch(NamedTuple):
    """Pairs, unpaired texts and unpaired latents; each part is optional and has its own size.

    A named tuple, so that DDP, FSDP2 and `torch.compile` see the tensors in it. `of_pairs`,
    `of_texts` and `of_latents` make one, `|` joins the rows of two, and `collate` reads a list.

    Attributes:
        tokens: clean ids of the paired texts `[b, s]`.
        attention_mask: theirs, `[b, s]`, True = keep.
        latents: clean latents of the same rows, `[b, d]`, `[b, n, d]`, `[b, c, h, w]`, ...
        unpaired_tokens: `[b', s']`.
        unpaired_attention_mask: `[b', s']`.
        unpaired_latents: `[b'', ...]`; they carry no length of text.
        pseudo_text_mask: `[b'', s'']`, the lengths of the texts to be written for the unpaired
            latents; drawn from the batch's own texts if not given.
        has_text: bool `[b]`, which of the paired rows really have a text; all if not given. What
            stands in the others, be it NaN, is not looked at: see `Arranged.borrowed`. Slower than
            unpaired parts, but shapes stay the same and no value is read.
        has_latent: bool `[b]`, which of them really have a latent.
        latent_mask: `[b, n]`, True = keep, where latents `[b, n, d]` are of variable length. What
            it does not keep, be it NaN, is not looked at. A row without a latent says by it how
            long a latent the encoder is to write for its text: all of it, if it keeps nothing.
        unpaired_latent_mask: `[b'', n]`, of the unpaired latents.
        unpaired_text_latent_mask: `[b', n]`, of the latents to be written for the unpaired texts,
            such as the mask of these texts where latents are as long as they. With a mask, every
            part that the batch has needs its own, and latents are padded to one `n`.

    Examples:
        >>> import torch
        >>> tokens = torch.tensor([[3, 4, 0]])
        >>> batch = Batch.of_pairs(tokens, tokens > 0, torch.zeros(1, 4))
        >>> batch.unpaired_latents is None
        True
        >>> (batch | Batch.of_latents(torch.ones(2, 4))).unpaired_latents.shape
        torch.Size([2, 4])
    """

    tokens: Tokens | None = None
    attention_mask: MaskLike | None = None
    latents: Latents | None = None
    unpaired_tokens: Tokens | None = None
    unpaired_attention_mask: MaskLike | None = None
    unpaired_latents: Latents | None = None
    pseudo_text_mask: MaskLike | None = None
    has_text: Rows | None = None
    has_latent: Rows | None = None
    latent_mask: LatentMaskLike | None = None
    unpaired_latent_mask: LatentMaskLike | None = None
    unpaired_text_latent_mask: LatentMaskLike | None = None

    @classmethod
    def of_pairs(
        cls,
        tokens: Tokens,
        attention_mask: MaskLike,
        latents: Latents,
        *,
        latent_mask: LatentMaskLike | None = None,
    ) -> "Batch":
        """Texts with their latents."""
        return cls(tokens, attention_mask, latents, latent_mask=latent_mask)

    @classmethod
    def of_texts(
        cls,
        tokens: Tokens,
        attention_mask: MaskLike,
        *,
        latent_mask: LatentMaskLike | None = None,
    ) -> "Batch":
        """Texts without a latent; a mask says how long a latent the encoder is to write."""
        return cls(
            unpaired_tokens=tokens,
            unpaired_attention_mask=attention_mask,
            unpaired_text_latent_mask=latent_mask,
        )

    @classmethod
    def of_latents(
        cls,
        latents: Latents,
        *,
        pseudo_text_mask: MaskLike | None = None,
        latent_mask: LatentMaskLike | None = None,
    ) -> "Batch":
        """Latents without a text."""
        return cls(
            unpaired_latents=latents,
            pseudo_text_mask=pseudo_text_mask,
            unpaired_latent_mask=latent_mask,
        )

    def __or__(self, other: "Batch") -> "Batch":
        """The rows of both: see `join_batches`."""
        return join_batches([self, other])

    def need_pairs(self) -> tuple[Tokens, MaskLike, Latents]:
        """`(tokens, attention_mask, latents)` of the pairs, none of them None.

        Raises:
            ValueError: there are no pairs.
        """
        if self.tokens is None or self.attention_mask is None or self.latents is None:
            raise _lacking("pairs", "tokens", "attention_mask", "latents")
        return self.tokens, self.attention_mask, self.latents

    def need_texts(self) -> tuple[Tokens, MaskLike]:
        """`(tokens, attention_mask)` of the texts without a latent, none of them None.

        Raises:
            ValueError: there are no such texts.
        """
        if self.unpaired_tokens is None or self.unpaired_attention_mask is None:
            raise _lacking("texts", "unpaired_tokens", "unpaired_attention_mask")
        return self.unpaired_tokens, self.unpaired_attention_mask

    def need_latents(self) -> Latents:
        """The latents without a text, not None.

        Raises:
            ValueError: there are no such latents.
        """
        if self.unpaired_latents is None:
            raise _lacking("latents", "unpaired_latents")
        return self.unpaired_latents


def _lacking(rows: str, *names: str) -> ValueError:
    needed = ", ".join(f"`{name}`" for name in names)
    return ValueError(f"this batch holds no {rows}: Batch.of_{rows}(...) sets {needed}")


def join_batches(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of several, in their order, padded to the longest text and latent.

    Where some of them mark what is there and others do not, all of these others is.

    Raises:
        ValueError: lengths for the texts to be written, or for the latents, of some of them alone.

    Examples:
        >>> from cyclevae.testing import toy_batch
        >>> join_batches([toy_batch(seed=0, rows=3), toy_batch(seed=1, rows=2)]).latents.shape
        torch.Size([5, 4])
    """
    batches = _marked_alike(batches)
    parts = {
        name: [part for batch in batches if (part := getattr(batch, name)) is not None]
        for name in Batch._fields
    }
    of_latents = [name for name in parts if name.endswith(("latents", "latent_mask"))]
    masked = any(parts[name] for name in of_latents if name.endswith("mask"))
    longest_latent = max((x.shape[1] for name in of_latents for x in parts[name]), default=0)
    joined = {}
    for name, found in parts.items():
        if name in of_latents:
            longest = longest_latent if masked else None
        else:
            longest = max((x.shape[1] for x in found if x.ndim > 1), default=None)
        if longest is not None:
            found = [_padded(x, longest) for x in found]
        joined[name] = torch.cat(found) if found else None
    return Batch(**joined)


def _padded(part: Tensor, length: int) -> Tensor:
    return F.pad(part, (0, 0) * (part.ndim - 2) + (0, length - part.shape[1]))


_MARKS = {  # of the rows of another part, over so many of its dimensions
    "has_text": ("tokens", 1),
    "has_latent": ("latents", 1),
    "latent_mask": ("latents", 2),
    "unpaired_latent_mask": ("unpaired_latents", 2),
}
_LENGTHS = {
    "pseudo_text_mask": "unpaired_latents",
    "unpaired_text_latent_mask": "unpaired_tokens",
}


def _marked_alike(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The same, each with the marks that any of them has: of its rows all, where it had none."""
    for name, part in _LENGTHS.items():
        told = {getattr(b, name) is not None for b in batches if getattr(b, part) is not None}
        if len(told) > 1:
            raise ValueError(
                f"`{name}` is given for some of the batches to be joined, and for others with "
                f"`{part}` it is not: give it for all of them, or for none"
            )
    for name, (part, ndim) in _MARKS.items():
        if any(getattr(batch, name) is not None for batch in batches):
            batches = [
                batch
                if (rows := getattr(batch, part)) is None or getattr(batch, name) is not None
                else batch._replace(
                    **{name: torch.ones(rows.shape[:ndim], dtype=torch.bool, device=rows.device)}
                )
                for batch in batches
            ]
    return batches


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """A batch of single rows, some of which lack a part: the `collate_fn` of a `DataLoader`.

    A row is a mapping with `tokens` `[s]`, `latents` `[...]` or both, as tensors, arrays or lists.
    Texts may have any lengths, and are padded at the end; an `attention_mask` `[s]` says which of
    its tokens a row keeps, all if not given. Rows with both become the pairs, the others those
    without a partner. Latents `[n, d]` may have any lengths too, and a `latent_mask` `[n]`; a text
    without a latent then says by it how long a latent the encoder is to write.

    Raises:
        ValueError: no row, an unknown key, a row without a part, an empty text, wrong shapes, a
            text that does not say how long its latent is to be where others differ in that.

    Examples:
        >>> both = {"tokens": [3, 4], "latents": [0.1, 0.2]}
        >>> batch = collate([both, {"tokens": [5, 6, 3]}, {"tokens": [4]}, {"latents": [0.3, 0.4]}])
        >>> batch.unpaired_tokens
        tensor([[5, 6, 3],
                [4, 0, 0]])
        >>> batch.attention_mask, batch.unpaired_latents
        (tensor([[True, True]]), tensor([[0.3000, 0.4000]]))
    """
    if not rows:
        raise ValueError("`rows` is empty, so there is no batch to make of it")
    batches = [_of_row(f"rows[{place}]", row) for place, row in enumerate(rows)]
    latents = [z for b in batches for z in (b.latents, b.unpaired_latents) if z is not None]
    shapes = {z.shape[1:] for z in latents}
    lengths = len({shape[1:] for shape in shapes}) == 1 and all(z.ndim == 3 for z in latents)
    if len(shapes) > 1 and not lengths:
        raise ValueError(
            "latents of `rows` must have one shape, or as [n, d] differ in n alone, got "
            f"{sorted(map(list, shapes))}"
        )
    if len(shapes) > 1 or any(_latent_mask(batch) is not None for batch in batches):
        batches = [_with_latent_mask(f"rows[{k}]", batch) for k, batch in enumerate(batches)]
    return join_batches(batches)


def _latent_mask(row: Batch) -> LatentMaskLike | None:
    masks = (row.latent_mask, row.unpaired_latent_mask, row.unpaired_text_latent_mask)
    return next((mask for mask in masks if mask is not None), None)


def _with_latent_mask(where: str, row: Batch) -> Batch:
    """A row that says how long its latent is: as it is there, if it said nothing."""
    if _latent_mask(row) is not None:
        return row
    latents = row.unpaired_latents if row.latents is None else row.latents
    if latents is None:
        raise ValueError(
            f"`{where}` is a text beside latents of variable length: give it a `latent_mask` [n] "
            "that says how long a latent the encoder is to write for it"
        )
    name = "latent_mask" if row.unpaired_latents is None else "unpaired_latent_mask"
    mask = torch.ones(latents.shape[:2], dtype=torch.bool, device=latents.device)
    return row._replace(**{name: mask})


def _of_row(where: str, row: Mapping[str, Any]) -> Batch:
    """A batch of one row."""
    checks.check_type(where, row, Mapping)
    known = ("tokens", "attention_mask", "latents", "latent_mask")
    for key in row:
        checks.check_choice(f"a key of {where}", key, known)
    given = {key: torch.as_tensor(part)[None] for key, part in row.items() if part is not None}
    tokens, latents, kept = (given.get(name) for name in ("tokens", "latents", "latent_mask"))
    if kept is not None and (kept.ndim != 2 or (latents is not None and not _fits(kept, latents))):
        raise ValueError(
            f"`{where}['latent_mask']` must be [n] for latents [n, d], got {list(kept.shape[1:])}"
            + ("" if latents is None else f" and {list(latents.shape[1:])}")
        )
    if tokens is None:
        if latents is None or "attention_mask" in given:
            raise ValueError(f"`{where}` must have `tokens`, `latents` or both, got {list(given)}")
        return Batch.of_latents(latents, latent_mask=kept)
    mask = given.get("attention_mask", torch.ones_like(tokens, dtype=torch.bool))
    for name, part in (("tokens", tokens), ("attention_mask", mask)):
        if part.ndim != 2 or not part.numel() or part.shape != tokens.shape:
            raise ValueError(
                f"`{where}[{name!r}]` must be one row of at least one token, got shape "
                f"{list(part.shape[1:])}"
            )
    if latents is None:
        return Batch.of_texts(tokens, mask, latent_mask=kept)
    return Batch.of_pairs(tokens, mask, latents, latent_mask=kept)


def _fits(mask: Tensor, latents: Tensor) -> bool:
    return latents.ndim == 3 and mask.shape == latents.shape[:2]
