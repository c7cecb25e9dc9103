"""The package as users get it: what an import costs, which way imports point, what is declared."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cyclevae
from cyclevae.objective.terms import SHIPPED
from oldest import needs_torch_2_6

SRC = Path(cyclevae.__file__).parent
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = {"torch", "einops", "jaxtyping"}
# Folders, and files beside them, from the bottom up. A row may import from the rows below its own.
LAYERS = (
    {"_base"},
    {"processes", "gradient_policy"},
    {"model"},
    {"bridges"},
    {"losses"},
    {"priors", "scale"},
    {"objective"},
    {"diagnostics", "recipes", "use"},
    {"testing", "__init__"},
    {"adapters", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# imported only where they are used
OPTIONAL = {
    "__main__": {"matplotlib"},
    "diagnostics": {"matplotlib"},
    "adapters": {"numpy", "omegaconf"},
}
FILES = sorted(SRC.rglob("*.py"))


def name_of(path):
    """The folder of a file, or the file that stands beside the folders."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def module_of(path):
    """`objective.plan`, `priors` for the `__init__` of a folder, `__init__` for the package's."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}
every_file = pytest.mark.parametrize("module", MODULES)


# What an import brings


IMPORTS = [
    "import cyclevae",
    "import cyclevae.diagnostics",
    "import cyclevae.testing, _pytest.outcomes",
]


@pytest.fixture(scope="module")
def brought():
    """The modules outside the standard library that each of `IMPORTS` adds to those before it."""
    program = (
        "import json, sys, torch, einops, jaxtyping\n"
        "before, added = set(sys.modules), []\n"
        f"for statement in {IMPORTS}:\n"
        "    exec(statement)\n"
        "    added.append(sorted(set(sys.modules) - before))\n"
        "    before |= set(sys.modules)\n"
        "print(json.dumps(added))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [
        {name for name in names if top(name) not in sys.stdlib_module_names}
        for names in json.loads(done.stdout)
    ]


def top(module):
    return module.partition(".")[0]


@needs_torch_2_6("torch 2.5 itself imports lazily on our import")
def test_importing_cyclevae_imports_nothing_else(brought):
    library, diagnostics, _ = brought
    assert {top(name) for name in library | diagnostics} == {"cyclevae"}, brought
    assert not {"cyclevae.testing", "cyclevae.adapters", "cyclevae.diagnostics"} & library


def test_the_import_check_can_fail(brought):
    assert {"cyclevae.testing", "_pytest.outcomes"} <= brought[-1]


# Which way imports point


def imported(source):
    """What a file imports anywhere, also inside functions: `(packages, modules of cyclevae)`."""
    outside, inside = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "write imports in full: from cyclevae.x import y"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package != "cyclevae":
                outside.add(package)
                continue
            while rest and rest not in MODULES:  # a name of a module is an import of the module
                rest = rest.rpartition(".")[0]
            inside.add(rest or "__init__")
    return outside, inside


def violations(name, source):
    """What a file of this folder imports though it must not."""
    outside, inside = imported(source)
    allowed = CORE | sys.stdlib_module_names | OPTIONAL.get(name, set())
    upward = {m for m in inside if LEVEL[top(m)] >= LEVEL[name] and top(m) != name}
    return sorted((outside - allowed) | upward)


def circle(sources):
    """Files that import each other in a circle, from `{module: source}`; none if there are none."""
    graph = {module: imported(source)[1] for module, source in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@every_file
def test_imports_point_downward_only(module):
    name = name_of(MODULES[module])
    assert name in LEVEL, f"place {name!r} in LAYERS"
    assert not violations(name, MODULES[module].read_text())


def test_no_imports_go_in_a_circle():
    """Nor between the files of one folder, of which the layers say nothing."""
    assert circle({module: path.read_text() for module, path in MODULES.items()}) == []


def test_every_layer_exists():
    assert LEVEL.keys() == {name_of(path) for path in FILES}
    assert len(LAYERS) <= 10


def users_of(module):
    """The folders whose files import a module; files beside the folders do not count."""
    users = {
        name_of(path)
        for path in FILES
        if path.parent != SRC and module in imported(path.read_text())[1]
    }
    return users - {top(module)}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("_base.")])
@pytest.mark.slow
def test_the_base_holds_what_three_folders_use(module):
    """What fewer use belongs where it is used."""
    assert len(users_of(module)) >= 3


@pytest.mark.slow
def test_the_count_of_users_can_fail():
    assert users_of("bridges.unmasking") <= {"losses", "use"}
    assert users_of("__main__") == set()


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("processes", "from cyclevae.objective.module import StepModule", ["objective.module"]),
        ("processes", "import cyclevae.losses.text", ["losses.text"]),
        ("processes", "def f():\n    from cyclevae.model import passes", ["model.passes"]),
        ("processes", "from cyclevae.gradient_policy import roles", ["gradient_policy.roles"]),
        ("processes", "from cyclevae import TextProcess", ["__init__"]),
        ("priors", "from cyclevae.scale.pool import pool_rows", ["scale.pool"]),
        ("objective", "import cyclevae.testing as t", ["testing"]),
        ("objective", "from cyclevae.adapters.latentdlm import x", ["adapters.latentdlm"]),
        ("objective", "import numpy as np, math", ["numpy"]),
        ("__init__", "from cyclevae.testing import toy_batch", ["testing"]),
        ("losses", "from cyclevae._base import checks\nfrom torch import nn", []),
        ("losses", "from cyclevae.losses.text import text_loss", []),
    ],
)
def test_the_direction_check_can_fail(name, source, found):
    assert violations(name, source) == found


def test_the_circle_check_can_fail():
    first = {"objective.plan": "from cyclevae.objective.term import Term"}
    back = {"objective.term": "def f():\n    from cyclevae.objective import plan"}
    assert circle(first) == []
    assert set(circle(first | back)) == {"objective.plan", "objective.term"}
    inward = {"objective.term": "from cyclevae.objective.terms.prior import Prior"}
    outward = {"objective.terms.prior": "from cyclevae.objective.plan import Plan"}
    assert len(set(circle(first | inward | outward))) == 3


# What has a name


def test_the_public_names_are_all_there_is():
    assert dir(cyclevae) == cyclevae.__all__ == sorted(set(cyclevae.__all__))
    scope = {}
    exec("from cyclevae import *", scope)
    del scope["__builtins__"]
    assert scope == {name: getattr(cyclevae, name) for name in cyclevae.__all__}
    assert reexported("__init__") == set(cyclevae.__all__)


def reexported(module):
    """The names that a file imports at its top."""
    return {
        alias.asname or alias.name
        for node in ast.parse(MODULES[module].read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_no_public_name_is_that_of_a_module():
    """`cyclevae.pool` would be the one or the other, by what was imported before."""
    modules = {part for module in MODULES for part in module.split(".")}
    public = set(cyclevae.__all__).union(
        *[reexported(folder) for folder in ("testing", "diagnostics", "adapters.latentdlm")]
    )
    assert {"phases", "check_ranks", "cycle_report", "with_cycle"} <= public
    assert {"pool", "ranks", "latentdlm", "cycle_text"} <= modules
    assert not public & modules


# Who knows a term

KINDS = {term.kind(): term.__name__ for term in SHIPPED}
WORDS = {"text", "latent"}  # ordinary ones too, as of a direction


def docstrings(tree):
    """The nodes of docstrings, whose examples may name anything."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            yield node.body[0].value


def named_in(kind, words):
    """Whether a string names a term: its class, its name, or a metric of it."""
    if kind == words and kind not in WORDS:
        return True
    patterns = [rf"\b{KINDS[kind]}\(", rf"\b{kind}_(loss|weight|count)\b"]
    if "_" in kind:
        patterns += [rf"\b{KINDS[kind]}\b", rf"\b{kind}\b"]
    return any(re.search(pattern, words) for pattern in patterns)


def terms_named(source):
    """The terms that a source names outside docstrings, by class, by file or in a string."""
    tree = ast.parse(source)
    told = set(docstrings(tree))
    classes, files, strings = set(), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            classes.add(node.id)
        elif isinstance(node, ast.Attribute):
            classes.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            classes |= {alias.name for alias in node.names}
            files |= imported(ast.unparse(node))[1]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in told:
            strings.append(node.value)
    return {
        kind
        for kind, name in KINDS.items()
        if name in classes
        or f"objective.terms.{kind}" in files
        or any(named_in(kind, words) for words in strings)
    }


@pytest.mark.parametrize(
    "module", [m for m in MODULES if top(m) == "objective" and m != "objective.terms"]
)
def test_a_term_is_known_to_its_own_file_alone(module):
    assert terms_named(MODULES[module].read_text()) <= {module.removeprefix("objective.terms.")}


def test_every_term_has_a_file_of_its_name():
    folder = "objective.terms."
    assert {folder + kind for kind in KINDS} == {m for m in MODULES if m.startswith(folder)}
    assert {"cycle_text", "prior", "text"} <= KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_knows_every_term(kind):
    assert terms_named(f"x = {KINDS[kind]}()") == {kind}
    assert terms_named(f"raise ValueError('such as {KINDS[kind]}()')") == {kind}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import cyclevae as cv\ncv.CycleText", {"cycle_text"}),
        ("from cyclevae.objective.terms.text import *", {"text"}),
        ("from cyclevae.objective.terms import Prior as P", {"prior"}),
        ("def f(options):\n    'Doc.'\n    return options.get('prior', 'mmd')", {"prior"}),
        ("x = f'the {y} of cycle_latent'", {"cycle_latent"}),
        ("'text_loss' in metrics or 'latent_weight' in weights", {"text", "latent"}),
        ("def f():\n    'Like CycleText().\\n\\n    >>> Latent()'", set()),
        ("direction: Literal['text', 'latent'] = 'text'  # CycleText", set()),
        ("raise ValueError('a text needs a latent, and a prior not')", set()),
    ],
)
def test_the_search_for_terms_can_fail(source, found):
    assert terms_named(source) == found


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


@every_file
def test_no_asserts_prints_or_postponed_annotations(module):
    told = {"print"} if module.endswith("__main__") else set()  # a command line speaks
    assert habits_broken(MODULES[module].read_text()) <= told


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
