"""What one training step is given: pairs, and texts and latents that have no partner."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from cyclevae import _checks
from cyclevae._reduce import only_present
from cyclevae._types import Latents, Mask, MaskLike, Rows, Tokens
from cyclevae.bridges import draw_lengths
from cyclevae.latent_process import LatentProcess
from cyclevae.text_process import TextProcess


class Batch(NamedTuple):
    """Pairs, unpaired texts and unpaired latents; each part is optional and has its own size.

    A named tuple, so that DDP, FSDP2 and `torch.compile` see the tensors in it.

    Attributes:
        tokens: clean ids of the paired texts `[b, s]`.
        attention_mask: theirs, `[b, s]`, True = keep.
        latents: clean latents of the same rows, `[b, d]` or `[b, n, d]`.
        unpaired_tokens: `[b', s']`.
        unpaired_attention_mask: `[b', s']`.
        unpaired_latents: `[b'', d]` or `[b'', n, d]`; they carry no length.
        pseudo_text_mask: `[b'', s'']`, the lengths of the texts to be written for the unpaired
            latents; drawn from the batch's own texts if not given.
        has_text: bool `[b]`, which of the paired rows really have a text; all if not given. What
            stands in the others, be it NaN, is not looked at: see `Arranged.borrowed`. Slower than
            unpaired parts, but shapes stay the same and no value is read.
        has_latent: bool `[b]`, which of them really have a latent.

    Examples:
        >>> import torch
        >>> tokens = torch.tensor([[3, 4, 0]])
        >>> batch = Batch(tokens, tokens > 0, torch.zeros(1, 4))
        >>> batch.unpaired_latents is None
        True
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


class Arranged(NamedTuple):
    """A checked batch per direction: paired rows first, then unpaired ones.

    Attributes:
        paired: number of paired rows.
        texts: all texts, padded to one length.
        latents: all latents.
        pseudo_text_mask: lengths for the unpaired latents, if given.
        has_text: which of the texts are there; all if None.
        has_latent: which of the latents are.
    """

    paired: int
    texts: Texts | None
    latents: Latents | None
    pseudo_text_mask: Mask | None
    has_text: Rows | None
    has_latent: Rows | None

    @property
    def has_both(self) -> Rows | None:
        """Which of the paired rows have both parts; all if None."""
        if self.has_text is None or self.has_latent is None:
            return None
        return self.has_text[: self.paired] & self.has_latent[: self.paired]

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

    def borrowed(self) -> "Arranged":
        """Rows without a text with that of the next row that has one; batches are in random order.

        So every pass sees texts as they are, and a statistic of encoded texts sees no other: some
        of them twice, with noise of their own. Losses of single rows must leave them out. Where no
        row has a text, one position is kept in each.
        """
        if self.has_text is None or self.texts is None:
            return self
        tokens, mask = self.texts
        rows = torch.arange(len(mask), device=mask.device)
        distance = (rows - rows[:, None]) % max(len(rows), 1)
        source = distance.masked_fill(~self.has_text, len(rows)).argmin(dim=1)
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = mask[source] | (first & ~self.has_text.any())
        return self._replace(texts=Texts(tokens[source], mask))

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

    def need_pairs(self) -> None:
        """An error where there is no pair."""
        if not self.paired:
            raise ValueError(
                "the base losses need at least one pair in a batch, got none; "
                "set `text_weight` and `latent_weight` to 0 to train without pairs"
            )

    def lacks_unpaired(self, *, texts: bool, latents: bool) -> str | None:
        """Of what was asked for, that which every row has a partner of."""
        for asked, name, rows in (
            (texts, "texts", None if self.texts is None else self.texts.tokens),
            (latents, "latents", self.latents),
        ):
            if asked and self.has_both is None and (rows is None or len(rows) == self.paired):
                return name
        return None

    def marked(self) -> "Arranged":
        """The same, marked: all parts are there."""
        has_text, has_latent = self.present()
        return self._replace(has_text=has_text, has_latent=has_latent)

    def lengths_to_decode(self, generator: torch.Generator | None) -> Mask:
        """A mask for each latent: a pair's own, and for unpaired ones that given or drawn."""
        texts, drawn = self.texts, self.pseudo_text_mask
        unpaired = len(self.need_latents()) - self.paired
        if drawn is None:
            none = torch.ones(0, 1, dtype=torch.bool)
            drawn = draw_lengths(
                none if texts is None else texts.mask, unpaired, generator=generator
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
        )


def arrange(batch: Batch, text_process: TextProcess, latent_process: LatentProcess) -> Arranged:
    """Check a batch and concatenate its rows per direction.

    Raises:
        ValueError: a part without its companion, wrong shapes, or values out of range.
        TypeError: wrong dtypes.
    """
    if (batch.tokens is None) != (batch.latents is None):
        given, missing = "tokens", "latents"
        if batch.tokens is None:
            given, missing = missing, given
        raise ValueError(
            f"`batch.{given}` came without `batch.{missing}`: pairs need both; "
            f"put rows without a partner into `batch.unpaired_{given}`"
        )
    _check_devices(batch)
    batch = _only_present(batch)
    vocab_size, shape = text_process.vocab_size, latent_process.shape
    parts = [
        _texts("", batch.tokens, batch.attention_mask, vocab_size),
        _texts("unpaired_", batch.unpaired_tokens, batch.unpaired_attention_mask, vocab_size),
    ]
    for name in ("latents", "unpaired_latents"):
        if (latents := getattr(batch, name)) is not None:
            _checks.check_latents(f"batch.{name}", latents, shape)
    if batch.tokens is not None and batch.latents is not None:
        _checks.check_rows("batch.tokens", batch.tokens, "batch.latents", batch.latents)
    pseudo_text_mask = batch.pseudo_text_mask
    if pseudo_text_mask is not None:
        if batch.unpaired_latents is None:
            raise ValueError("`batch.pseudo_text_mask` came without `batch.unpaired_latents`")
        _checks.check_rows(
            "batch.pseudo_text_mask",
            pseudo_text_mask,
            "batch.unpaired_latents",
            batch.unpaired_latents,
        )
        pseudo_text_mask = _checks.as_mask(
            "batch.pseudo_text_mask", pseudo_text_mask, pseudo_text_mask.shape
        )
    return Arranged(
        paired=0 if batch.tokens is None else len(batch.tokens),
        texts=_stack_texts([part for part in parts if part is not None], text_process),
        latents=_stack_latents(batch.latents, batch.unpaired_latents),
        pseudo_text_mask=pseudo_text_mask,
        has_text=_stack_rows(batch.has_text, batch.unpaired_tokens),
        has_latent=_stack_rows(batch.has_latent, batch.unpaired_latents),
    )


def _only_present(batch: Batch) -> Batch:
    """The batch with zeros, and no kept token, where a paired row lacks a part."""
    tokens, mask, latents = batch[:3]
    if batch.has_text is None and batch.has_latent is None:
        return batch
    if tokens is None or mask is None or latents is None:
        raise ValueError(
            "`batch.has_text` and `batch.has_latent` say which paired rows lack a part, and the "
            "batch has no pairs"
        )
    everyone = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    has_text = everyone if batch.has_text is None else batch.has_text
    has_latent = everyone if batch.has_latent is None else batch.has_latent
    _checks.check_row_mask("batch.has_text", has_text, tokens)
    _checks.check_row_mask("batch.has_latent", has_latent, latents)
    return batch._replace(
        tokens=only_present(tokens, has_text, 0),
        attention_mask=only_present(mask, has_text, 0),
        latents=only_present(latents, has_latent),
        has_text=has_text,
        has_latent=has_latent,
    )


def _all_if_none(rows: Rows | None, like: Tensor | None) -> Rows:
    if rows is not None:
        return rows
    like = torch.zeros(0) if like is None else like
    return torch.ones(len(like), dtype=torch.bool, device=like.device)


def _stack_rows(paired: Rows | None, unpaired: Tensor | None) -> Bool[Tensor, " all"] | None:
    """Which rows of a direction are there; those without a partner all are."""
    if paired is None or unpaired is None:
        return paired
    return F.pad(paired, (0, len(unpaired)), value=True)


def _check_devices(batch: Batch) -> None:
    devices = {name: part.device for name, part in batch._asdict().items() if part is not None}
    for name, device in devices.items():
        first = next(iter(devices))
        if device != devices[first]:
            raise ValueError(
                f"`batch.{name}` is on {device} and `batch.{first}` on {devices[first]}; "
                "move the whole batch to one device"
            )


def pick_rows(values: Tensor, paired: int, pairs: int, others: int) -> Tensor:
    """The first `pairs` of the `paired` rows, and the first `others` of those after them."""
    if pairs == paired:
        return values[: paired + others]
    return torch.cat([values[:pairs], values[paired : paired + others]])


def stack_masks(*masks: Bool[Tensor, "_ _"]) -> Mask:
    """Masks of different lengths, one below the other."""
    longest = max(mask.shape[1] for mask in masks)
    return torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks])


def _texts(
    prefix: str, tokens: Tensor | None, mask: Tensor | None, vocab_size: int
) -> Texts | None:
    tokens_name, mask_name = f"batch.{prefix}tokens", f"batch.{prefix}attention_mask"
    if tokens is None:
        if mask is not None:
            raise ValueError(f"`{mask_name}` came without `{tokens_name}`")
        return None
    if mask is None:
        raise ValueError(
            f"`{tokens_name}` came without `{mask_name}`: padding must never count; "
            "give torch.ones_like(tokens) where nothing is padded"
        )
    _checks.check_tokens(tokens_name, tokens, vocab_size)
    return Texts(tokens, _checks.as_mask(mask_name, mask, tokens.shape))


def _stack_texts(parts: list[Texts], text_process: TextProcess) -> Texts | None:
    if not parts:
        return None
    mask = stack_masks(*(part.mask for part in parts))
    tokens = [F.pad(part.tokens, (0, mask.shape[1] - part.tokens.shape[1])) for part in parts]
    return Texts(text_process.pad(torch.cat(tokens), mask), mask)


def _stack_latents(paired: Tensor | None, unpaired: Tensor | None) -> Latents | None:
    if paired is None or unpaired is None:
        return unpaired if paired is None else paired
    if paired.shape[1:] != unpaired.shape[1:]:
        raise ValueError(
            "`batch.latents` and `batch.unpaired_latents` must hold latents of one shape, "
            f"got {list(paired.shape[1:])} and {list(unpaired.shape[1:])}"
        )
    return torch.cat([paired, unpaired])
