"""What tests of several files share."""

import os
import warnings

import pytest
import torch
from hypothesis import settings

# Fewer examples where people wait: HYPOTHESIS_PROFILE=thorough draws as many as hypothesis would.
# Shapes and dtypes, which is what the hooked run checks, are seen in a few.
settings.register_profile("few", max_examples=5, deadline=None)
settings.register_profile("fast", max_examples=25, deadline=None)
settings.register_profile("thorough", max_examples=100, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

if device := os.environ.get("CYCLEVAE_DEVICE"):  # make gpu: where tests put what they make
    torch.set_default_device(device)

# as modules of doctests, they would be several of one name
collect_ignore = [
    "conftest.py",
    *(f"{part}/conftest.py" for part in ("adapters/host", "examples", "hosts")),
]


def pytest_ignore_collect(collection_path, config):
    """The files of slow tests take seconds to read: only where one is asked for."""
    nobody_asks = "not slow" in config.option.markexpr and collection_path.name.endswith("_slow.py")
    return True if nobody_asks else None


def pytest_collection_modifyitems(config, items):
    """Of the hooked run, which checks shapes and dtypes, the first case of each test alone."""
    if not config.getoption("jaxtyping_packages", None):
        return
    first, more = {}, []
    for item in items:
        if first.setdefault(item.nodeid.partition("[")[0], item) is not item:
            more.append(item)
    config.hook.pytest_deselected(items=more)
    items[:] = first.values()


def pytest_itemcollected(item):
    if item.path.name.endswith("_slow.py"):
        item.add_marker(pytest.mark.slow)


@pytest.fixture
def fresh_compiler():
    """For tests that compile: nothing left of other tests, nor for them."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's imports warn about things of their own
        yield
    torch._dynamo.reset()
