"""Hook of mkdocs: the index of the API lists every name, from the pages that explain them."""

import re
from pathlib import Path
from typing import Any

PLACE = "<!-- every name -->"


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """A row for each page, in the order of the navigation."""
    if PLACE not in markdown:
        return markdown
    rows = ["| page | names |", "|---|---|"]
    for sibling in page.parent.children:
        if sibling is not page:
            text = Path(sibling.file.abs_src_path).read_text()
            title = re.search("^# (.+)", text)[1]
            names = re.findall(r"^::: (\S+)", text, flags=re.MULTILINE)
            links = ", ".join(f"[`{name.rpartition('.')[2]}`][{name}]" for name in names)
            rows.append(f"| [{title}]({sibling.file.src_uri}) | {links} |")
    return markdown.replace(PLACE, "\n".join(rows))
