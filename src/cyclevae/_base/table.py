"""Rows of cells as aligned lines."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], *, left: bool = False, between: str = "  ") -> str:
    """Lines of aligned columns: the first to the left, the others to the right, or all `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        between.join(
            cell.ljust(width) if left or not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
