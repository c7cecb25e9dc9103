import math

import pytest
import torch

import cyclevae as cv

ESTIMATORS = ("unbiased", "biased")
PRIORS = (cv.moment_prior, cv.mmd_prior)
every_prior = pytest.mark.parametrize("prior", PRIORS)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


# --- invariances ------------------------------------------------------------------------------


@every_prior
@every_estimator
def test_order_of_rows(prior, estimator):
    z = randn(7, 3)
    shuffled = z[torch.randperm(7, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(
        prior(shuffled, estimator=estimator), prior(z, estimator=estimator), rtol=1e-12, atol=1e-12
    )


@every_prior
@every_estimator
def test_a_given_mean_is_a_shift(prior, estimator):
    z, mean = randn(6, 3), randn(3, seed=1)
    options = {"variance": torch.tensor([0.5, 1.0, 4.0]).double(), "estimator": estimator}
    torch.testing.assert_close(prior(z, mean=mean, **options), prior(z - mean, **options))
    torch.testing.assert_close(prior(z, mean=2.0, **options), prior(z - 2, **options))


@every_estimator
def test_a_given_variance_is_a_unit_of_length(estimator):
    z = randn(6, 3)
    options = {"estimator": estimator}
    scaled = cv.mmd_prior(z, variance=4.0, **options)
    torch.testing.assert_close(scaled, cv.mmd_prior(z / 2, **options))
    torch.testing.assert_close(scaled, cv.mmd_prior(z, variance=torch.tensor(4.0), **options))
    each = torch.full((3,), 4.0).double()
    torch.testing.assert_close(scaled, cv.mmd_prior(z, variance=each, **options))
    moment = cv.moment_prior(z, variance=4.0, **options)
    torch.testing.assert_close(moment, cv.moment_prior(z, variance=each, **options))


@every_prior
@every_estimator
def test_a_sample_of_several_vectors_is_one_long_vector(prior, estimator):
    z, mean, variance = randn(5, 3, 2), randn(3, 2, seed=1), randn(3, 2, seed=2).exp()
    options = {"estimator": estimator}
    torch.testing.assert_close(prior(z, **options), prior(z.flatten(1), **options))
    torch.testing.assert_close(
        prior(z, mean=mean, variance=variance, **options),
        prior(z.flatten(1), mean=mean.flatten(), variance=variance.flatten(), **options),
    )


# --- gradients and precision ------------------------------------------------------------------


@every_prior
@every_estimator
def test_gradcheck(prior, estimator):
    z = randn(4, 3).requires_grad_()
    variance = torch.tensor([0.5, 1.0, 4.0]).double()
    assert torch.autograd.gradcheck(
        lambda x: prior(x, mean=0.3, variance=variance, estimator=estimator), z
    )


@every_prior
@every_estimator
@pytest.mark.parametrize(
    "z",
    [torch.zeros(4, 3), torch.full((4, 3), 1e6), randn(4, 3).float() * 1e6, torch.ones(2, 1)],
    ids=["zero", "one point far away", "far apart", "two"],
)
def test_gradient_is_finite(prior, estimator, z):
    z = z.clone().requires_grad_()
    loss = prior(z, estimator=estimator)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@every_prior
def test_a_step_down_the_gradient_helps(prior):
    z = (randn(32, 4) * 0.3 + 1).requires_grad_()
    loss = prior(z)
    (gradient,) = torch.autograd.grad(loss, z)
    assert prior(z.detach() - 0.1 * gradient) < loss


@every_prior
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(prior, dtype):
    z = (randn(6, 3) * 0.5).to(dtype)
    got = prior(z)
    assert got.dtype == torch.float32
    assert torch.equal(got, prior(z.float()))


@every_prior
@every_estimator
def test_autocast_does_not_round(prior, estimator):
    z = randn(16, 8).float()
    outside = prior(z, estimator=estimator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prior(z, estimator=estimator), outside)
    expected = prior(z.double(), estimator=estimator)
    assert float(outside) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


@every_prior
def test_runs_on_meta(prior):
    assert prior(torch.empty(4, 3, device="meta")).shape == ()


# --- refusals ---------------------------------------------------------------------------------


@every_prior
@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_samples(prior, rows):
    expected = rf"`z` needs at least 2 samples .* got shape \[{rows}, 3\]; raise the batch size"
    with pytest.raises(ValueError, match=expected):
        prior(torch.zeros(rows, 3))


@every_prior
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, torch.tensor([1.0, 0.0, 1.0])])
def test_variance_must_be_positive(prior, bad):
    with pytest.raises(
        ValueError, match=r"`variance` must be .*above 0|`variance` must be a finite number"
    ):
        prior(torch.zeros(3, 3), variance=bad)


@every_prior
def test_moments_of_another_shape(prior):
    for name in ("mean", "variance"):
        expected = rf"`{name}` must be a number or have the shape of one latent \[3\], got \[2\]"
        with pytest.raises(ValueError, match=expected):
            prior(torch.zeros(3, 3), **{name: torch.ones(2)})


@every_prior
def test_latents_must_be_finite(prior):
    z = torch.zeros(3, 3)
    z[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"`z` must be finite.*1 of 3 rows \(first: row 1\)"):
        prior(z)
