"""What the tests in checkouts of CCDD and D-DiT share. `make test-host` runs them."""

import importlib.util
import os
from pathlib import Path
from statistics import mean

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples" / "hosts"
HOSTS = {
    "test_ccdd.py": ("CYCLEVAE_CCDD", "zhouc20/CCDD"),
    "test_dual_diffusion.py": ("CYCLEVAE_DDIT", "zijieli-Jlee/Dual-Diffusion"),
}


def pytest_runtest_setup(item):
    """Skip from here: one line of the report stands for all tests of a host."""
    variable, repository = HOSTS[item.path.name]
    if not os.environ.get(variable):
        pytest.skip(
            f"needs the host: git clone https://github.com/{repository}, "
            f"then make test-host {variable}=/path/to/{repository.partition('/')[2]}"
        )


@pytest.fixture
def checkout(request, monkeypatch):
    """The folder of the host, whose modules can be imported."""
    folder = Path(os.environ[HOSTS[request.path.name][0]]).resolve()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def example():
    """`example(name)` is the module `examples/hosts/name.py`."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"hosts_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def train():
    """`train(step, batch_of, steps)` are metrics of its first and of its last ten steps.

    Those of a term that waits are of its own first ten.
    """

    def run(step, batch_of, steps, lr=3e-3):
        optimizer = torch.optim.AdamW(step.parameters(), lr=lr)
        found = {}
        for number in range(steps):
            optimizer.zero_grad()
            output = step(batch_of(number), step=number)
            output.loss.backward()
            optimizer.step()
            for name, value in output.metrics.items():
                found.setdefault(name, []).append(value.item())
        means = {name: (mean(row[:10]), mean(row[-10:])) for name, row in found.items()}
        print({name: means[name] for name in means if name.endswith("_loss")})  # pytest -s
        return means

    return run
