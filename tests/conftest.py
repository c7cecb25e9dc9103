"""What tests of several files share."""

import warnings

import pytest
import torch


@pytest.fixture
def fresh_compiler():
    """For tests that compile: nothing left of other tests, nor for them."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's imports warn about things of their own
        yield
    torch._dynamo.reset()
