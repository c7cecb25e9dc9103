"""What the oldest supported torch lacks, skipped by name: see `make test-min`."""

import pytest
import torch


def needs_torch_2_6(reason):
    return pytest.mark.skipif(torch.__version__.startswith("2.5."), reason=reason)
