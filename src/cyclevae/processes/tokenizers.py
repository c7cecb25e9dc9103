"""What a tokenizer says of its ids."""

from typing import Any


def mask_of(tokenizer: Any) -> int:
    """The id of the mask."""
    kind = type(tokenizer).__name__
    mask_id: int | None = getattr(tokenizer, "mask_token_id", None)
    if mask_id is None:
        raise ValueError(
            f"`tokenizer` ({kind}) has no mask token; add one, as in "
            'tokenizer.add_special_tokens({"mask_token": "[MASK]"}), and resize the embedding'
        )
    if mask_id == getattr(tokenizer, "unk_token_id", None):
        raise ValueError(
            f"the mask and the unknown token of `tokenizer` ({kind}) are both {mask_id}: add a "
            'mask of its own, as in tokenizer.add_special_tokens({"mask_token": "[MASK]"}), '
            "and resize the embedding"
        )
    return mask_id


def frame_of(tokenizer: Any) -> tuple[int | None, int | None]:
    """The ids that a tokenizer puts in front of a text and behind it."""
    kind, ask = type(tokenizer).__name__, getattr(tokenizer, "encode", None)
    if not callable(ask):
        raise ValueError(
            f"`tokenizer` ({kind}) has no `encode(text, add_special_tokens=...)`, so it cannot be "
            "asked which tokens it adds to a text; write TextProcess(mask_id=..., vocab_size=..., "
            "start_id=..., end_id=...) with what your texts carry"
        )
    framed, bare = (list(ask("a", add_special_tokens=added)) for added in (True, False))
    places = range(len(framed) - len(bare) + 1)
    place = next((i for i in places if framed[i : i + len(bare)] == bare), None)
    if place is None or not bare or place > 1 or len(framed) - place - len(bare) > 1:
        raise ValueError(
            f"`tokenizer` ({kind}) makes {framed} of a text that is {bare} without special tokens: "
            "a text process places one token in front of a text and one behind at most; tokenize "
            "without special tokens, and write TextProcess(mask_id=..., vocab_size=...) yourself"
        )
    behind = framed[place + len(bare) :]
    return framed[0] if place else None, behind[0] if behind else None
