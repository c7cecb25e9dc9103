"""The sentences that these tests train on."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Their folder: encoded once in a run, by whoever comes first, or before: `CYCLEVAE_CACHE`."""
    of_all_workers = tmp_path_factory.getbasetemp().parent / "sentences"
    return Path(os.environ.setdefault("CYCLEVAE_CACHE", str(of_all_workers)))
