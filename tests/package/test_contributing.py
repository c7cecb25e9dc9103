"""What CONTRIBUTING.md and the pages for contributors tell people to do can be done."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_package import FILES, LAYERS, SRC, name_of

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```\n(.*?)```", TEXT, re.S) for line in block.splitlines()
]


def test_commands_are_found():
    assert {"make test", "bash .ci/run", "make ci"} <= set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_can_be_given(command):
    program, *arguments = command.split()
    if program == "make":  # what it would do: the target is there, and so is all that it needs
        done = subprocess.run(
            ["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
    elif program == "bash":
        subprocess.run(["bash", "-n", *arguments], cwd=ROOT, check=True)
    elif program.endswith("python"):
        assert arguments[:2] == ["-m", "pytest"]
        selected = [sys.executable, *arguments, "--collect-only", "-q"]
        done = subprocess.run(selected, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "::" in done.stdout, done.stdout
    else:
        assert program == ".venv/bin/ruff"
        assert all((ROOT / path).is_dir() for path in arguments[1:])


def test_every_target_of_the_makefile_says_what_it_does():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.M)[1].split()
    told = re.search(r"^help:\n((?:\t.+\n)+)", makefile, re.M)[1]
    for target in set(targets) - {"help"}:
        short = target.removeprefix("ablation")  # one line for its three
        assert short in told, target
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), target


def table():
    return TEXT.partition("## Where things are")[2].partition("## Habits")[0]


def test_the_table_names_every_file():
    named = set(re.findall(r"\b(\w+)(?:\.py|(?:/\w+)*/)`", table()))
    assert {name_of(path) for path in FILES} <= named


def test_what_the_table_names_is_there():
    folders = [SRC, *(ROOT / "examples").iterdir()]
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", table()):
        places = [ROOT / name, *(folder / name for folder in folders)]
        assert any(place.is_file() for place in places), name
    for name in re.findall(r"`((?:\w+/)+)`", table()):
        assert (SRC / name).is_dir(), name


def test_the_layers_of_the_page_are_those_of_the_test():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", page, re.M)
    assert [int(number) for number, _ in rows] == list(range(len(LAYERS), 0, -1))
    for number, names in rows:
        assert set(re.findall(r"`(\w+)`", names)) == LAYERS[int(number) - 1], number
