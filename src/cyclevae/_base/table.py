"""Rows of cells as aligned lines for a terminal, and as a table of HTML for a notebook."""

from collections.abc import Sequence
from html import escape


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


def html_table(rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """The same as HTML: the first row is the header."""
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        cells = []
        for i, cell in enumerate(row):
            side = "left" if left or not i else "right"
            cells.append(f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


class Shown(str):
    """A table of text: lines in a terminal, HTML in a notebook."""

    rows: Sequence[Sequence[str]]

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html_table(self.rows, left=True)


def shown(rows: Sequence[Sequence[str]]) -> Shown:
    """Rows that show themselves."""
    lines = Shown(table(rows, left=True))
    lines.rows = rows
    return lines
