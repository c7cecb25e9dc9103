"""The documentation runs, covers every public name, and links to what exists."""

import ast
import inspect
import re
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import cyclevae
import cyclevae.diagnostics
import cyclevae.testing

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples" / "recipes"))
UNSHIPPED = [ROOT / "docs" / "images" / "pictures.png"]  # in an sdist: see pyproject.toml
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
OPEN = re.compile(r"( *)```python\s*(.*)")
INCLUDED = re.compile(r'--8<-- "(.+)"')  # a whole file, by pymdownx.snippets


def blocks(text):
    """`(line of the fence, what follows it, code)` of each Python block of a page."""
    found, lines = [], text.splitlines()
    number = 0
    while number < len(lines):
        if opening := OPEN.fullmatch(lines[number]):
            indent, options = opening.groups()
            end = lines.index(f"{indent}```", number + 1)
            code = dedent("\n".join(lines[number + 1 : end]))
            if not INCLUDED.fullmatch(code):
                found.append((number + 1, options, code))
            number = end
        number += 1
    return found


def execute(name, text):
    """Run the blocks of a page in one namespace; lines in a traceback are those of the page."""
    namespace = {"__name__": "docs"}
    torch.manual_seed(0)
    for line, options, code in blocks(text):
        program = compile("\n" * line + code, name, "exec")
        if options != 'title="sketch"':
            exec(program, namespace)
    return namespace


def name_of(path):
    return path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/")


every_page = pytest.mark.parametrize("path", PAGES, ids=name_of)


@pytest.mark.slow
@every_page
def test_the_code_of_a_page_runs(path):
    with torch.random.fork_rng([]):
        execute(str(path), path.read_text())


def test_the_gain_table_is_what_its_code_prints(capsys):
    text = (ROOT / "docs" / "losses.md").read_text()
    execute("losses.md", text)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert all(row in text.splitlines() for row in rows), rows


def test_few_blocks_are_sketches():
    options = [options for path in PAGES for _, options, _ in blocks(path.read_text())]
    assert set(options) <= {"", 'title="sketch"'}
    assert options.count('title="sketch"') <= 2


def test_files_that_pages_include_are_there_and_run_as_recipes():
    from run_recipes import RECIPES

    included = {ROOT / file for path in PAGES for file in INCLUDED.findall(path.read_text())}
    assert all(path.is_file() for path in included), included
    recipes = {ROOT / "examples" / "recipes" / f"{name.split()[0]}.py" for name in RECIPES}
    hosts = set((ROOT / "examples" / "hosts").glob("*.py"))  # of which tests run
    config = {path for path in included if path.suffix == ".yaml"}
    assert included - config == recipes | hosts | {ROOT / "examples" / "recipes" / "task.py"}


PAGE = """\
Text.

```python
x = 1
```

- a list

    ```python
    x += 1
    ```

```python title="sketch"
x = 100
```

```python
x += 1
assert x == 0
```
"""


def test_failures_point_to_their_line():
    with pytest.raises(AssertionError) as failure:
        execute("page.md", PAGE)
    where = failure.tb
    while where.tb_next:
        where = where.tb_next
    assert (where.tb_frame.f_code.co_filename, where.tb_lineno) == ("page.md", 19)
    assert execute("page.md", PAGE.replace("x == 0", "x == 3"))["x"] == 3


# Coverage of the public names


def public_names():
    """`__all__`, and what the other public packages re-export, as in `from x import y as y`."""
    names = {f"cyclevae.{name}": getattr(cyclevae, name) for name in cyclevae.__all__}
    return names | {
        f"{package.__name__}.{alias.asname}": getattr(package, alias.asname)
        for package in (cyclevae.testing, cyclevae.diagnostics)
        for node in ast.parse(Path(package.__file__).read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }


PUBLIC = public_names()


def test_public_names_are_found():
    assert len(PUBLIC) > 30
    expected = {"freeze", "testing.check_denoiser", "diagnostics.cycle_report"}
    assert {f"cyclevae.{name}" for name in expected} <= PUBLIC.keys()


def test_every_public_name_has_one_entry():
    """Under one of its names, where it has two, as `gradient_ledger` of `testing`."""
    pages = [path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.md"))]
    listed = [name for page in pages for name in re.findall(r"^::: (\S+)", page, re.MULTILINE)]
    assert len(set(listed)) == len(listed)
    entries = {}
    for name, thing in PUBLIC.items():
        entries.setdefault(id(thing), []).append(name)
    wrong = [names for names in entries.values() if len(set(names) & set(listed)) != 1]
    assert not wrong


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring_with_an_example(name):
    docstring = inspect.getdoc(PUBLIC[name]) or ""
    assert re.search(r"^Examples:\n    >>> ", docstring, flags=re.MULTILINE), docstring


def test_tests_that_a_page_names_are_in_their_file():
    page = (ROOT / "docs" / "gradient-policy.md").read_text()
    rows = re.findall(r"^\|.*\| `([\w/]+\.py)` \| (.*) \|$", page, flags=re.MULTILINE)
    assert len(rows) > 20
    for file, names in rows:
        source = (ROOT / "tests" / file).read_text()
        for name in re.findall(r"`(test_\w+)`", names):
            assert f"\ndef {name}(" in source, (file, name)


@pytest.mark.parametrize("path", PAGES[:-1], ids=name_of)
def test_a_page_begins_with_who_needs_it(path):
    registered = "preregistration"  # which stays as it was
    opening = r"# .+\n\n\*Who needs this:\* [^\n]+\.\n\n"
    assert re.match(opening, path.read_text()) or path.stem == registered


@every_page
def test_links_between_pages_lead_somewhere(path):
    """`mkdocs build --strict` checks this too, and anchors; this needs no mkdocs."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        shipped = (ROOT / ".git").exists() or path.parent / target not in UNSHIPPED
        if not target.startswith("https://") and shipped:
            assert (path.parent / target).is_file(), target
