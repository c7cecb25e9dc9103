"""Text bridges: from the decoder's logits to the pseudo-text that crosses a latent cycle.

Neither bridge here has a gradient: the pseudo-text is data to the pass behind it, as in
back-translation.
"""

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from cyclevae._checks import as_mask, check_choice, check_positive
from cyclevae._types import Logits, Mask, MaskLike, Number, Tokens
from cyclevae.text_process import TextProcess

Bridge = Literal["argmax", "categorical"]


def argmax_text(logits: Logits, attention_mask: MaskLike, *, text_process: TextProcess) -> Tokens:
    """The most probable pseudo-text `[b, s]`, without forbidden ids, framed and padded.

    Examples:
        >>> import torch
        >>> text = TextProcess(mask_id=2, vocab_size=4, pad_id=0)
        >>> logits = torch.tensor([[[9.0, 1.0, 9.0, 3.0], [0.0, 2.0, 0.0, 1.0]]])
        >>> argmax_text(logits, torch.tensor([[True, True]]), text_process=text)
        tensor([[3, 1]])
    """
    attention_mask = _checked(logits, attention_mask, text_process)
    choice = text_process.forbid(logits.detach()).argmax(dim=-1)
    return text_process.frame(choice, attention_mask)


def categorical_text(
    logits: Logits,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    temperature: Number = 1.0,
    generator: torch.Generator | None = None,
) -> Tokens:
    """A pseudo-text `[b, s]` sampled from `softmax(logits / temperature)` per position.

    Forbidden ids are never sampled. Uses an exponential race, which needs no host synchronisation.

    Raises:
        ValueError: a temperature that is not a finite number above 0.

    Examples:
        >>> import torch
        >>> text = TextProcess(mask_id=2, vocab_size=4, pad_id=0)
        >>> logits, mask = torch.zeros(1, 5, 4), torch.ones(1, 5, dtype=torch.bool)
        >>> seed = torch.Generator().manual_seed(0)
        >>> categorical_text(logits, mask, text_process=text, generator=seed)
        tensor([[...]])
    """
    check_positive("temperature", temperature)
    attention_mask = _checked(logits, attention_mask, text_process)
    # argmax of p_i / E_i with independent exponentials E_i is a draw from p; taken in log space,
    # no overflow can make a forbidden id win
    allowed = text_process.forbid(logits.detach().float() / temperature)
    race = torch.empty_like(allowed).exponential_(generator=generator)
    return text_process.frame((allowed - race.log()).argmax(dim=-1), attention_mask)


def pseudo_text(
    logits: Logits,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    bridge: Bridge = "argmax",
    temperature: Number = 1.0,
    generator: torch.Generator | None = None,
) -> Tokens:
    """The pseudo-text of the named bridge: `argmax_text` or `categorical_text`.

    Raises:
        ValueError: an unknown bridge.

    Examples:
        >>> import torch
        >>> text = TextProcess(mask_id=2, vocab_size=4, pad_id=0)
        >>> logits, mask = torch.eye(4)[None, [3, 1]], torch.tensor([[True, False]])
        >>> pseudo_text(logits, mask, text_process=text)
        tensor([[3, 0]])
    """
    check_choice("bridge", bridge, ("argmax", "categorical"))
    if bridge == "argmax":
        return argmax_text(logits, attention_mask, text_process=text_process)
    return categorical_text(
        logits,
        attention_mask,
        text_process=text_process,
        temperature=temperature,
        generator=generator,
    )


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
    attention_mask = as_mask("attention_mask", attention_mask, attention_mask.shape)
    if not rows:
        return attention_mask[:0]
    if not len(attention_mask):
        raise ValueError(
            "pseudo-text lengths are drawn from the batch's texts, and it holds none; "
            "give `pseudo_text_mask`"
        )
    index = torch.randint(
        len(attention_mask), (rows,), device=attention_mask.device, generator=generator
    )
    return attention_mask[index]


def _checked(logits: Logits, attention_mask: MaskLike, text_process: TextProcess) -> Mask:
    if logits.shape[-1] != text_process.vocab_size:
        raise ValueError(
            f"`logits` must have width text_process.vocab_size = {text_process.vocab_size}, "
            f"got {list(logits.shape)}"
        )
    return as_mask("attention_mask", attention_mask, logits.shape[:2])
