"""The rows of a batch per direction: checked, padded to one length, paired ones first."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from cyclevae._base.types import LatentMask, Latents, Mask, Number, Rows, Tokens
from cyclevae.bridges.text import draw_lengths
from cyclevae.processes.text import TextProcess


@dataclass(frozen=True)
class Share:
    """Which rows of a direction: the first ones, as shares of the pairs and of the others.

    Attributes:
        pairs: the share of the pairs.
        others: the share of the rows without a partner.
        marked: the share of the pairs where some are marked as lacking a part, so that any may be
            one without a partner; as `pairs` if None.

    Examples:
        >>> Share(pairs=1.0).numbers(paired=4, rows=10, marked=False)
        (4, 0)
        >>> (Share(pairs=1.0) | Share(others=0.5)).numbers(paired=4, rows=10, marked=False)
        (4, 3)
    """

    pairs: Number = 0.0
    others: Number = 0.0
    marked: Number | None = None

    def numbers(self, paired: int, rows: int, *, marked: bool) -> tuple[int, int]:
        """How many of the pairs, and of the other rows."""
        return _of(self._of_pairs(marked), paired), _of(self.others, rows - paired)

    def within(self, other: "Share") -> bool:
        """Whether the other has all of these rows."""
        return (
            self.pairs <= other.pairs
            and self.others <= other.others
            and self._of_pairs(True) <= other._of_pairs(True)
        )

    def _of_pairs(self, marked: bool) -> Number:
        return self.marked if marked and self.marked is not None else self.pairs

    def __or__(self, other: "Share") -> "Share":
        """The rows of both."""
        return Share(
            max(self.pairs, other.pairs),
            max(self.others, other.others),
            max(self._of_pairs(True), other._of_pairs(True)),
        )


def _of(share: Number, number: int) -> int:
    """A share of a number of rows, rounded up."""
    if share in (0, 1):  # in which case symbolic sizes stay simple
        return number if share else 0
    return math.ceil(share * number - 1e-9)  # as 0.1 is a little more than written


class Texts(NamedTuple):
    """Rows of text: ids `[b, s]` and a bool mask."""

    tokens: Tokens
    mask: Mask

    def first(self, rows: int) -> "Texts":
        """The first rows."""
        return Texts(self.tokens[:rows], self.mask[:rows])

    def pick(self, paired: int, pairs: int, others: int) -> "Texts":
        """The first pairs and the first others: see `pick_rows`."""
        return Texts(*(pick_rows(part, paired, pairs, others) for part in self))


class SideBySide(NamedTuple):
    """Rows that have a text, a latent or both."""

    tokens: Tokens
    latents: Latents
    mask: Mask
    has_text: Rows
    has_latent: Rows
    latent_mask: LatentMask | None


class Arranged(NamedTuple):
    """A checked batch per direction: paired rows first, then unpaired ones.

    Attributes:
        paired: number of paired rows.
        texts: all texts, padded to one length.
        latents: all latents.
        pseudo_text_mask: lengths for the unpaired latents, if given.
        has_text: which of the texts are there; all if None.
        has_latent: which of the latents are.
        latent_mask: what is kept of the latents; all if None.
        text_latent_mask: what is kept of the latents that the encoder writes of the texts.
    """

    paired: int
    texts: Texts | None
    latents: Latents | None
    pseudo_text_mask: Mask | None
    has_text: Rows | None
    has_latent: Rows | None
    latent_mask: LatentMask | None = None
    text_latent_mask: LatentMask | None = None

    @property
    def has_both(self) -> Rows | None:
        """Which of the paired rows have both parts; all if None."""
        if self.has_text is None or self.has_latent is None:
            return None
        return self.has_text[: self.paired] & self.has_latent[: self.paired]

    def numbers(self, share: Share, direction: Tensor) -> tuple[int, int]:
        """How many pairs, and others, a share means of all texts or latents."""
        return share.numbers(self.paired, len(direction), marked=self.has_both is not None)

    def pick(self, values: Tensor, share: Share) -> Tensor:
        """Those of all texts or latents that a share means."""
        return pick_rows(values, self.paired, *self.numbers(share, values))

    def kept(self, share: Share) -> LatentMask | None:
        """What is kept of the latents that a share means; all if None."""
        return None if self.latent_mask is None else self.pick(self.latent_mask, share)

    def part(self, share: Share) -> "Arranged":
        """The same of a share of the rows, in both directions."""
        if share.pairs == share.others == 1:
            return self
        texts, latents, lengths = self.texts, self.latents, self.pseudo_text_mask
        rest = (self.has_text, self.has_latent, self.latent_mask, self.text_latent_mask)
        parts = [None if x is None else self.pick(x, share) for x in rest]
        return Arranged(
            share.numbers(self.paired, self.paired, marked=False)[0],
            None if texts is None else Texts(*(self.pick(part, share) for part in texts)),
            None if latents is None else self.pick(latents, share),
            None if lengths is None else lengths[: self._others(share, lengths)],
            *parts,
        )

    def _others(self, share: Share, values: Tensor) -> int:
        return share.numbers(0, len(values), marked=False)[1]

    def words(self, text_process: TextProcess) -> Mask:
        """The positions that the decoder's losses count, of the texts that are there."""
        if self.texts is None:
            return torch.zeros(0, 1, dtype=torch.bool)
        return text_process.taught(self.texts.mask) & self.present()[0][:, None]

    def whole(self) -> Rows:
        """Which of the paired rows have both parts."""
        both = self.has_both
        if both is not None:
            return both
        like = None if self.latents is None else self.latents[: self.paired]
        return _all_if_none(None, like)

    def present(self) -> tuple[Bool[Tensor, " texts"], Bool[Tensor, " latents"]]:
        """Which of the texts and of the latents are there."""
        texts = None if self.texts is None else self.texts.tokens
        return _all_if_none(self.has_text, texts), _all_if_none(self.has_latent, self.latents)

    def to_cycle(self, pairs: bool) -> "Arranged":
        """The same, but marked with what cycles read: whole pairs only if asked for."""
        if pairs or self.has_text is None or self.has_latent is None:
            return self
        whole = self.has_text[: self.paired] & self.has_latent[: self.paired]
        has_text, has_latent = (
            rows & ~F.pad(whole, (0, len(rows) - self.paired))
            for rows in (self.has_text, self.has_latent)
        )
        return self._replace(has_text=has_text, has_latent=has_latent)

    def borrowed(self, nothing: int) -> "Arranged":
        """Rows without a text with that of the next row that has one; batches are in random order.

        So every pass sees texts as they are, and a statistic of encoded texts sees no other: some
        of them twice, with noise of their own. Losses of single rows must leave them out. Where no
        row has a text, the id `nothing` is kept in one position of each.
        """
        if self.has_text is None or self.texts is None or not len(self.has_text):
            return self
        tokens, mask = self.texts
        rows = torch.arange(len(mask), device=mask.device)
        distance = (rows - rows[:, None]) % len(rows)
        source = distance.masked_fill(~self.has_text, len(rows)).argmin(dim=1)
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        none = first & ~self.has_text.any()
        tokens = tokens[source].masked_fill(none, nothing)
        masks = self.text_latent_mask
        return self._replace(
            texts=Texts(tokens, mask[source] | none),
            text_latent_mask=None if masks is None else masks[source],
        )

    def need_texts(self) -> Texts:
        """All texts, or an error where there is none."""
        if self.texts is None:
            raise ValueError("this step encodes texts, and the batch holds none")
        return self.texts

    def need_latents(self) -> Latents:
        """All latents, or an error where there is none."""
        if self.latents is None:
            raise ValueError("this step decodes latents, and the batch holds none")
        return self.latents

    def need_pairs(self, term: str, least: int = 1, share: Number = 1) -> None:
        """An error where there are fewer pairs than a term needs, in the share that it reads."""
        pairs = _of(share, self.paired)
        if pairs < least:
            raise ValueError(
                f"`{term}` needs {least} pair{'s' * (least > 1)} in a batch or more, got "
                f"{pairs}; give it weight 0, or leave it out, to train without"
            )

    def need_lengths(self) -> None:
        """An error where lengths are to be drawn from texts, and there is none."""
        texts = () if self.texts is None else self.texts.tokens
        if self.pseudo_text_mask is None and not len(texts):
            draw_lengths(_no_texts(), len(self.need_latents()) - self.paired)

    def all_of(self, direction: Literal["texts", "latents"]) -> Tensor:
        """All rows of a direction, or an error where there is none."""
        return self.need_texts().tokens if direction == "texts" else self.need_latents()

    def marked(self) -> "Arranged":
        """The same, marked: all parts are there."""
        has_text, has_latent = self.present()
        return self._replace(has_text=has_text, has_latent=has_latent)

    def lengths_to_decode(self, generator: torch.Generator | None) -> Mask:
        """A mask for each latent: a pair's own, and for unpaired ones that given or drawn."""
        texts, drawn = self.texts, self.pseudo_text_mask
        unpaired = len(self.need_latents()) - self.paired
        if drawn is None:
            drawn = draw_lengths(
                _no_texts() if texts is None else texts.mask, unpaired, generator=generator
            )
        return drawn if texts is None else stack_masks(texts.mask[: self.paired], drawn)

    def side_by_side(self, generator: torch.Generator | None) -> "SideBySide":
        """Pairs, texts without a latent, and latents without a text, each with room for both."""
        texts, latents, p = self.need_texts(), self.need_latents(), self.paired
        alone, extra = len(texts.tokens) - p, len(latents) - p
        mask = stack_masks(texts.mask, self.lengths_to_decode(generator)[p:])
        has_text, has_latent = self.present()
        blank = latents.new_zeros(alone, *latents.shape[1:])
        return SideBySide(
            F.pad(texts.tokens, (0, mask.shape[1] - texts.tokens.shape[1], 0, extra)),
            torch.cat([latents[:p], blank, latents[p:]]),
            mask,
            F.pad(has_text, (0, extra)),
            torch.cat([has_latent[:p], has_latent.new_zeros(alone), has_latent[p:]]),
            self._masks_side_by_side(),
        )

    def _masks_side_by_side(self) -> LatentMask | None:
        texts, latents, p = self.text_latent_mask, self.latent_mask, self.paired
        if texts is None or latents is None:
            return None
        return torch.cat([latents[:p], texts[p:], latents[p:]])


def pick_rows(values: Tensor, paired: int, pairs: int, others: int) -> Tensor:
    """The first `pairs` of the `paired` rows, and the first `others` of those after them."""
    if pairs == paired:
        return values[: paired + others]
    return torch.cat([values[:pairs], values[paired : paired + others]])


def stack_masks(*masks: Bool[Tensor, "_ _"]) -> Mask:
    """Masks of different lengths, one below the other."""
    longest = max(mask.shape[1] for mask in masks)
    return torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks])


def _no_texts() -> Mask:
    return torch.ones(0, 1, dtype=torch.bool)


def _all_if_none(rows: Rows | None, like: Tensor | None) -> Rows:
    if rows is not None:
        return rows
    like = torch.zeros(0) if like is None else like
    return torch.ones(len(like), dtype=torch.bool, device=like.device)
