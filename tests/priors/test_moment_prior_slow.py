"""Every form of the moment prior compiles to one graph, for any number of rows."""

from functools import partial
from typing import get_args

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cyclevae.priors.moment import MomentForm, moment_prior
from oracles_moment import MULTIVARIATE

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("form", get_args(MomentForm))
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("full", [False, True], ids=["variance", "covariance"])
def test_compiles(form, estimator, full):
    if (form, estimator) == ("full_bures", "unbiased") or (full and form not in MULTIVARIATE):
        pytest.skip("refused")
    options = {"covariance": torch.eye(3) + 0.5} if full else {"variance": 2.0}
    prior = partial(moment_prior, form=form, mean=0.1, estimator=estimator, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda z: prior(z), fullgraph=True, backend=counter)
    for rows in (6, 7, 8):
        generator = torch.Generator().manual_seed(rows)
        z = torch.randn(rows, 3, generator=generator, requires_grad=True)
        got, expected = compiled(z), prior(z)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, z), torch.autograd.grad(expected, z))
    assert counter.frame_count == 2  # a graph for 6 rows, and one for all others
