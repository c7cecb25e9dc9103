"""Draw which folder of the package imports which: python docs/_build/imports.py.

Layers are those of the table in `docs/architecture.md`, imports those of the code. An arrow that
follows from others is left out.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "cyclevae"
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "images" / "imports.svg"
PLACES = {  # in its row; those that are not named are spread evenly
    "adapters": 300,
    "testing": 110,
    "bridges": 160,
    "losses": 160,
}
WIDTH, STEP, BOX = 640, 58, (134, 32)  # of the card, from layer to layer, of a box
STYLE = """
    .card { fill: #ffffff; stroke: #d0d7de } text { fill: #1f2328; font-weight: 600 }
    .box { fill: #eaeef2; stroke: #57606a; stroke-width: 1.5 } .head { fill: #57606a }
    .to { stroke: #57606a; stroke-width: 1.5; fill: none; marker-end: url(#to) }
"""


def layers() -> list[list[str]]:
    """The folders and files of each layer, from the top."""
    rows = re.findall(r"^\| \d+ \| (.+?) \|", PAGE.read_text(), flags=re.MULTILINE)
    return [re.findall(r"`(\w+)`", row) for row in rows]


def imports() -> dict[str, set[str]]:
    """What each folder or file at the top imports of the others."""
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        found.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("cyclevae."):
                found[name].add(str(node.module).split(".")[1])
            elif isinstance(node, ast.ImportFrom) and node.module == "cyclevae":
                inside = {alias.name for alias in node.names if (SOURCE / alias.name).is_dir()}
                found[name] |= inside or {"__init__"}
            elif isinstance(node, ast.Import) and "cyclevae" in {a.name for a in node.names}:
                found[name].add("__init__")
    return {name: others - {name} for name, others in found.items()}


def reached(name: str, edges: dict[str, set[str]]) -> set[str]:
    """All that a folder depends on, by way of others too."""
    return edges[name].union(*(reached(other, edges) for other in edges[name]))


def needed(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that follow from no others."""
    return [
        (name, other)
        for name in sorted(edges)
        for other in sorted(edges[name])
        if not any(other in reached(between, edges) for between in edges[name])
    ]


def picture() -> str:
    """The drawing as SVG."""
    rows, (width, height) = layers(), BOX
    at = {}
    for number, names in enumerate(rows):
        for i, name in enumerate(names):
            x = PLACES.get(name, WIDTH * (i + 0.5) / len(names))
            at[name] = (x, 20 + height / 2 + STEP * number)
    lines = []
    for name, other in needed(imports()):
        (x, y), (to_x, to_y) = at[name], at[other]
        if y == to_y:
            side = width / 2 if to_x > x else -width / 2
            lines.append(f'<path class="to" d="M{x + side:g} {y:g}H{to_x - side:g}"/>')
        else:
            start, end = y + height / 2, to_y - height / 2
            lines.append(f'<path class="to" d="M{x:g} {start:g}L{to_x:g} {end:g}"/>')
    for name, (x, y) in at.items():
        left, top = x - width / 2, y - height / 2
        box = f'x="{left:g}" y="{top:g}" width="{width}" height="{height}" rx="8"'
        lines.append(f'<rect class="box" {box}/>')
        lines.append(f'<text x="{x:g}" y="{y + 5:g}" text-anchor="middle">{name}</text>')
    total = STEP * (len(rows) - 1) + height + 40
    card = f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{total - 2}" rx="10"/>'
    marker = (
        '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
        ' orient="auto"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" '
        f'height="{total}" role="img" aria-labelledby="title" '
        'font-family="system-ui, sans-serif" font-size="14.5">'
    )
    title = '<title id="title">Which folder imports which</title>'
    body = "\n  ".join([title, f"<style>{STYLE}  </style>", marker, card, *lines])
    return f"{head}\n  {body}\n</svg>\n"


if __name__ == "__main__":
    PICTURE.write_text(picture())
