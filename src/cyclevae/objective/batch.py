"""What one training step is given: pairs, and texts and latents that have no partner."""

from typing import NamedTuple

from cyclevae._base.types import LatentMaskLike, Latents, MaskLike, Rows, Tokens


class Batch(NamedTuple):
    """Pairs, unpaired texts and unpaired latents; each part is optional and has its own size.

    A named tuple, so that DDP, FSDP2 and `torch.compile` see the tensors in it.

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
    latent_mask: LatentMaskLike | None = None
    unpaired_latent_mask: LatentMaskLike | None = None
    unpaired_text_latent_mask: LatentMaskLike | None = None
