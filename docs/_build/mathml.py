"""Hook of mkdocs: the thin space that LaTeX puts behind the name of a function."""

import re

FUNCTION = re.compile(r"(<mi>(?:log|exp|arg)</mi>)(?!<mo stretchy=\"false\">\(|</m|<msup><mo)")


def on_page_content(html: str, **_: object) -> str:
    """In `log p`, but not in `log(x)`; MathML knows `log` as a name like any other."""
    return FUNCTION.sub(r'\1<mspace width="0.167em"></mspace>', html)
