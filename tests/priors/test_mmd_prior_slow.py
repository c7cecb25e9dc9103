"""MMD and SIGReg under `torch.compile`: no graph break, the numbers of eager, one compilation."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cyclevae.priors.mmd import mmd_prior
from cyclevae.priors.sliced import sigreg_prior

pytestmark = pytest.mark.usefixtures("fresh_compiler")


OPTIONS = {
    "default": {},
    "biased imq": {"kernel": "imq", "estimator": "biased"},
    "linear": {"estimator": "linear", "standardize": True},
    "full": {"covariance": torch.diag(torch.tensor([0.5, 1.0, 2.0])), "kernel": "imq"},
    "uneven": {"variance": torch.tensor([0.5, 1.0, 2.0]), "mean": 0.3, "standardize": True},
    "two samples": {"reference": torch.eye(3)},
    "median": {"bandwidth": "median"},
    "two linear samples": {
        "reference": torch.eye(3), "bandwidth": "median", "estimator": "linear",
    },
}  # fmt: skip


def loss_and_gradient(prior, z, **options):
    z = z.clone().requires_grad_()
    torch.manual_seed(0)
    loss = prior(z, **options)
    return loss.detach(), *torch.autograd.grad(loss, z)


def assert_same_as_eager(prior, **options):
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(prior, fullgraph=True, backend=counter)
    for seed in range(2):
        z = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(
            loss_and_gradient(fast, z, **options), loss_and_gradient(prior, z, **options)
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_mmd_prior(options):
    assert_same_as_eager(mmd_prior, **options)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_sigreg_prior(estimator):
    assert_same_as_eager(sigreg_prior, estimator=estimator)
