"""Axes to draw on: one's own, or those of a picture that is saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import IOBase
from os import PathLike
from typing import Any


@contextmanager
def axes_at(where: Any, of: str) -> Iterator[Any]:
    """The axes that are given, or new ones that are saved at a path or into a file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if not isinstance(where, str | PathLike | IOBase):
        yield where
        return
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a picture of {of} needs matplotlib: pip install matplotlib") from error
    figure: Any = Figure(figsize=(6.4, 4.2), layout="constrained")
    yield figure.subplots()
    figure.savefig(where)
