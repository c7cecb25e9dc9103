"""The drawing of imports in `docs/architecture.md` is what its program makes of the code."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = runpy.run_path(str(ROOT / "docs" / "_build" / "imports.py"))


def test_the_drawing_is_that_of_the_code():
    path = ROOT / "docs" / "images" / "imports.svg"
    assert path.read_text() == PROGRAM["picture"](), "run python docs/_build/imports.py"


def test_every_folder_has_a_place():
    drawn = {name for names in PROGRAM["layers"]() for name in names}
    assert drawn == PROGRAM["imports"]().keys()


def test_what_follows_from_others_is_left_out():
    edges = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert PROGRAM["needed"](edges) == [("a", "b"), ("b", "c")]
