"""The package as users get it: what an import costs, which way imports point, what is declared."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cyclevae
from oldest import needs_torch_2_6

SRC = Path(cyclevae.__file__).parent
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = {"torch", "einops", "jaxtyping"}
# From the bottom up; a file may import from the layers below its own, and from nothing else here.
LAYERS = (
    {"_types", "roles"},
    {"_selection", "_checks", "_precision", "_table", "_chunks"},
    {"_gate"},
    {"_reduce", "_statistics", "_cross_entropy", "_config", "schedules", "kernels", "pool"},
    {"text_process", "latent_process", "times", "gradient_policy"},
    {"denoiser", "policies"},
    {"text_bridges"},
    {"bridges", "passes", "teacher", "accumulate", "non_finite", "checkpointing"},
    {"batch", "base", "unmasking", "rloo", "latent_bridges", "contrastive"},
    {"unconditional", "text_marginal", "priors"},
    {"cycles", "_prior"},
    {"options"},
    {"_plan"},
    {"_step", "_describe"},
    {"objective"},
    {"phases"},
    {"diagnostics"},
    {"__init__"},
    {"testing", "adapters", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# imported only where they are used
OPTIONAL = {
    "__main__": {"matplotlib"},
    "diagnostics": {"matplotlib"},
    "adapters": {"numpy", "omegaconf"},
}
FILES = sorted(SRC.rglob("*.py"))


# What an import brings


def new_modules(statement):
    """The top-level packages outside the standard library that a statement imports."""
    program = (
        "import json, sys, torch, einops, jaxtyping\n"
        "before = set(sys.modules)\n"
        f"{statement}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [name for name in json.loads(done.stdout) if top(name) not in sys.stdlib_module_names]


def top(module):
    return module.partition(".")[0]


@needs_torch_2_6("torch 2.5 itself imports lazily on our import")
def test_importing_cyclevae_imports_nothing_else():
    modules = new_modules("import cyclevae")
    assert {top(name) for name in modules} == {"cyclevae"}, modules
    assert not {"cyclevae.testing", "cyclevae.adapters", "cyclevae.diagnostics"} & set(modules)
    assert {top(name) for name in new_modules("import cyclevae.diagnostics")} == {"cyclevae"}


def test_the_import_check_can_fail():
    assert new_modules("import cyclevae.testing, _pytest.outcomes")[0].startswith("_pytest")
    assert "cyclevae.testing" in new_modules("import cyclevae.testing")


# Which way imports point


def imported(source):
    """The modules a file imports anywhere, also inside functions: `(names, names in cyclevae)`."""
    outside, inside = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "write imports in full: from cyclevae.x import y"
            names = [node.module]
            if node.module == "cyclevae":  # from cyclevae import _checks
                names = [f"cyclevae.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package != "cyclevae":
                outside.add(package)
            else:  # a re-exported name would be an import of __init__ itself
                inside.add(rest.partition(".")[0] if top(rest) in LEVEL else "__init__")
    return outside, inside


def violations(name, source):
    """What a file of the package imports though it must not."""
    outside, inside = imported(source)
    allowed = CORE | sys.stdlib_module_names | OPTIONAL.get(name, set())
    upward = {other for other in inside if LEVEL[other] >= LEVEL[name] and other != name}
    return sorted((outside - allowed) | upward)


def name_of(path):
    return path.relative_to(SRC).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_downward_only(path):
    name = name_of(path)
    assert name in LEVEL, f"place {name!r} in LAYERS"
    assert not violations(name, path.read_text())


def test_every_layer_exists():
    assert LEVEL.keys() == {name_of(path) for path in FILES}


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("text_process", "from cyclevae.objective import StepModule", ["objective"]),
        ("text_process", "import cyclevae.cycles", ["cycles"]),
        ("text_process", "def f():\n    from cyclevae import denoiser", ["denoiser"]),
        ("text_process", "from cyclevae import TextProcess", ["__init__"]),
        ("objective", "import cyclevae.testing as t", ["testing"]),
        ("objective", "from cyclevae.adapters.latentdlm import with_cycle", ["adapters"]),
        ("objective", "import numpy as np, math", ["numpy"]),
        ("__init__", "from cyclevae.testing import toy_batch", ["testing"]),
        ("cycles", "from cyclevae import _checks\nfrom torch import nn", []),
    ],
)
def test_the_direction_check_can_fail(name, source, found):
    assert violations(name, source) == found


# What no file may hold


def habits_broken(source):
    """Names of what a file does though the house rules forbid it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            found.add("assert")  # vanishes under python -O
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            found.add("__future__")  # jaxtyping reads annotations at run time
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print":
            found.add("print")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_asserts_prints_or_postponed_annotations(path):
    told = {"print"} if path.name == "__main__.py" else set()  # a command line speaks
    assert habits_broken(path.read_text()) <= told


def test_the_habit_check_can_fail():
    source = "from __future__ import annotations\nassert 1\nprint(2)\n"
    assert habits_broken(source) == {"assert", "__future__", "print"}


# What is declared


def test_the_version_has_one_home():
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "src/cyclevae/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.dev\d+)?", cyclevae.__version__)
    for path in FILES:
        assignments = re.findall(r"^__version__\s*=", path.read_text(), flags=re.MULTILINE)
        assert len(assignments) == (path == SRC / "__init__.py"), path
    for installed in importlib.metadata.distributions(name="cyclevae"):  # none, or the one here
        assert installed.version == cyclevae.__version__, "installed before the version changed"


def test_core_dependencies():
    names = [re.match(r"[\w-]+", line)[0] for line in PROJECT["project"]["dependencies"]]
    assert sorted(names) == sorted(CORE)


def test_declared_files_are_there():
    assert (SRC / "py.typed").is_file()  # type checkers read our annotations
    assert "wheel" not in PROJECT["tool"]["hatch"]["build"]["targets"]  # it takes all of SRC
    project = PROJECT["project"]
    for name in (project["readme"], *project["license-files"]):
        assert (ROOT / name).is_file(), name
