"""What the tests in a checkout of the host share. `make test-host` runs them."""

import importlib.util
import itertools
import os
import sys
from pathlib import Path

import harness
import pytest

sys.path.append(str(Path(__file__).parents[2]))  # for `counters`
DATA = Path(__file__).parents[3] / "examples" / "latentdlm" / "data.py"
HOW = (
    "needs the host: git clone https://github.com/Joshua-Zhang-Jiaquan/LGDLM, "
    "then make test-host CYCLEVAE_HOST=/path/to/LGDLM"
)


def pytest_runtest_setup():
    """Skip from here: one line of the report stands for all tests of the folder."""
    if not os.environ.get("CYCLEVAE_HOST") or importlib.util.find_spec("hydra") is None:
        pytest.skip(HOW)


@pytest.fixture(scope="session")
def checkout():
    """The folder of the host."""
    folder = Path(os.environ["CYCLEVAE_HOST"]).resolve()
    assert (folder / harness.PACKAGE).is_dir(), f"CYCLEVAE_HOST={folder} has no {harness.PACKAGE}"
    return folder


@pytest.fixture(scope="session")
def data():
    """The module `examples/latentdlm/data.py`."""
    spec = importlib.util.spec_from_file_location("latentdlm_data", DATA)
    sys.modules["latentdlm_data"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy(checkout, data, tmp_path_factory):
    """A folder of toy sentences in the host's format."""
    folder = tmp_path_factory.mktemp("toy")
    data.write_toy(folder)
    return folder


@pytest.fixture
def train(checkout, toy, tmp_path):
    """`harness.train` on the toy sentences, each call in a folder of its own."""
    count = itertools.count()

    def call(**options):
        return harness.train(checkout, toy, tmp_path / f"run{next(count)}", **options)

    return call
