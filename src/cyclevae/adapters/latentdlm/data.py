"""Rows of the host's datasets that lack a part."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

MARKS = ("has_text", "has_latent")


class Marked(Dataset[dict[str, Any]]):
    """A dataset whose items say which parts they have; `collate_marks` takes it into the batch.

    The missing part must be there in shape, with any values.

    Args:
        dataset: of items as the host's collate takes them.
        has_text: per item; all if not given.
        has_latent: per item; all if not given.

    Raises:
        ValueError: a list of another length.

    Examples:
        >>> marked = Marked([{"input_ids": torch.tensor([3])}], has_latent=[False])
        >>> marked[0]["has_latent"]
        False
    """

    def __init__(
        self,
        dataset: Any,
        *,
        has_text: Sequence[bool] | None = None,
        has_latent: Sequence[bool] | None = None,
    ) -> None:
        self.dataset = dataset
        self.marks = dict(zip(MARKS, (has_text, has_latent), strict=True))
        for name, marks in self.marks.items():
            if marks is not None and len(marks) != len(dataset):
                raise ValueError(f"`{name}` must have {len(dataset)} entries, got {len(marks)}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        marks = {n: True if m is None else bool(m[index]) for n, m in self.marks.items()}
        return {**self.dataset[index], **marks}


def collate_marks(
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """A collate function that keeps the marks of `Marked`, which the host's own would drop.

    Examples:
        >>> collate = collate_marks(torch.utils.data.default_collate)
        >>> items = Marked([{"x": 1}, {"x": 2}], has_text=[True, False])
        >>> collate([items[0], items[1]])["has_text"]
        tensor([ True, False])
    """

    def collated(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(items)
        return {**batch, **{n: torch.tensor([i[n] for i in items]) for n in MARKS}}

    return collated
