"""Fill the tables of docs/performance.md: `python examples/bench/page.py runs/bench`."""

import json
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "performance.md"
BLOCKS = {
    "step": "blocks x width, batch",
    "recipe": "blocks x width, batch",
    "growth": "",
    "parts": "",
    "variants": "",
}
APART = {"step", "recipe", "growth", "variants"}  # all other benchmarks are parts


def tables(rows: list[dict]) -> dict[str, str]:
    """A table of each block, a line for each case and opponent, a column for each quantity."""
    made = {}
    for block, title in BLOCKS.items():
        own = [
            row
            for row in rows
            if row["benchmark"] == block or (block == "parts" and row["benchmark"] not in APART)
        ]
        quantities = list(dict.fromkeys(row["quantity"] for row in own))
        lines: dict[tuple[str, str], dict[str, str]] = {}
        for row in own:
            case = f"{row['benchmark']}: {row['case']}" if block == "parts" else row["case"]
            lines.setdefault((case, row["against"]), {})[row["quantity"]] = cell(row)
        made[block] = "\n".join(
            [
                f"| {' | '.join([title, 'against', *quantities])} |",
                "|---" * (2 + len(quantities)) + "|",
                *(
                    f"| {' | '.join([*key, *(found.get(name, '') for name in quantities)])} |"
                    for key, found in lines.items()
                ),
            ]
        )
    return made


def cell(row: dict) -> str:
    """The ratio with its quartiles, its target and its verdict."""
    spread = "" if row["low"] is None else f" ({row['low']:.3g}–{row['high']:.3g})"
    judged = "" if row["target"] is None else f" ≤ {row['target']:.3g}: {row['verdict']}"
    least = "" if row["limit"] is None else f", limit {row['limit']:.3g}"
    return f"{row['ratio']:.3g}{spread}{judged}{least}"


def main(run: Path) -> None:
    found = json.loads((run / "bench.json").read_text())
    page = PAGE.read_text()
    for name, table in tables(found["rows"]).items():
        before, _, rest = page.partition(f"<!-- {name} -->")
        _, _, after = rest.partition(f"<!-- /{name} -->")
        page = f"{before}<!-- {name} -->\n\n{table}\n\n<!-- /{name} -->{after}"
    PAGE.write_text(page)
    shutil.copy(run / "bench.svg", DOCS / "images" / "bench.svg")
    verdicts = [row["verdict"] for row in found["rows"]]
    print(f"{verdicts.count('pass')} pass, {verdicts.count('short')} short, {found['machine']}")
    print("\n".join(found["notes"]))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bench"))
