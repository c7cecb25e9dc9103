"""Latent health, against float64 loops and scipy, and on latents whose state is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import oracles_diagnostics as oracle
from cyclevae.diagnostics import latent_health, retrieval
from oracles import array, assert_near_mean
from strategies import quick, seeds


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@quick
@given(st.integers(2, 9), st.sampled_from([(1,), (4,), (2, 3)]), seeds, st.booleans())
def test_health(rows, shape, seed, stored):
    z = randn(rows, *shape, seed=seed) * randn(*shape, seed=seed + 1).abs()
    mean, variance = 0.0, 1.0
    if stored:
        mean, variance = randn(*shape, seed=seed + 2), randn(*shape, seed=seed + 3).square() + 0.1
    got = latent_health(z, mean=mean, variance=variance)
    flat = [np.broadcast_to(np.asarray(x), shape).ravel() for x in (mean, variance)]
    expected = oracle.health(array(z.flatten(1)), *flat)
    for name, value in expected.items():
        assert getattr(got, name) == pytest.approx(value, rel=1e-6, abs=1e-7), name


@quick
@given(st.integers(2, 9), st.sampled_from([(3,), (2, 3)]), seeds, st.data())
def test_retrieval(rows, shape, seed, data):
    k = data.draw(st.integers(1, rows))
    z, noise = randn(rows, *shape, seed=seed), randn(rows, *shape, seed=seed + 1)
    z = torch.cat([z, z[: data.draw(st.integers(0, 2))]])  # equal latents, but other queries
    noise = torch.cat([noise, noise.flip(0)])[: len(z)]
    got = retrieval(z + noise, z, k=k)
    expected, counts = oracle.retrieval(*(array(part.flatten(1)) for part in (z + noise, z)), k)
    assert (got.recall, got.never) == (expected["recall"], expected["never"])
    skewness = 0.0 if len(set(counts)) == 1 else stats.skew(counts)
    assert got.hubness == pytest.approx(skewness, abs=1e-12)


def test_the_defaults():
    z, noise = randn(8, 3), randn(8, 3, seed=1)
    assert latent_health(z) == latent_health(z, mean=0.0, variance=1.0)
    assert retrieval(z + noise, z) == retrieval(z + noise, z, k=1)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_effective_rank_of_equal_directions_is_their_number(rank):
    z = torch.zeros(2 * rank, 8).double()
    z[torch.arange(rank), torch.arange(rank)] = 1.0
    z[rank + torch.arange(rank), torch.arange(rank)] = -1.0
    health = latent_health(z + 100)
    assert health.effective_rank == pytest.approx(rank)
    assert health.active == rank


def test_a_constant_has_rank_0():
    for value in (0.0, 1 / 3, -1e6):
        health = latent_health(torch.full((7, 4), value))
        assert (health.effective_rank, health.active, health.scale) == (0.0, 0, 0.0)
        assert health.norm == pytest.approx(2 * abs(value))


def test_rounding_is_no_rank():
    z = (randn(3) / 3).repeat(68, 1)
    assert bool((z - z.mean(dim=0)).any())  # of 1e-17
    assert latent_health(z).effective_rank == 0


def test_the_drift_of_a_batch_on_the_target_is_0_on_average():
    """Where the squares are not cut off at 0: half of all batches show none at all."""
    z = randn(400, 10, 50) + 2
    drifts = [latent_health(batch, mean=2.0).drift for batch in z]
    assert 0.4 < np.mean(np.array(drifts) == 0) < 0.7
    signed = ((z.mean(1) - 2).square() - z.var(1) / 10).mean(1)
    assert_near_mean(signed, 0.0)
    moved = [latent_health(batch, mean=1.0).drift ** 2 for batch in z]
    assert_near_mean(moved, 1.0)


def test_a_dimension_is_active_above_one_percent_of_the_variance():
    wave = torch.tensor([1.0, -1.0, 1.0, -1.0]).double() * math.sqrt(3 / 4)  # of variance 1
    z = wave[:, None] * torch.tensor([0.0999, 0.1001, 1.0])
    assert latent_health(z).active == 2
    assert latent_health(z, variance=1.1).active == 1
    assert latent_health(z, variance=torch.tensor([0.9, 1.1, 200.0])).active == 1


def test_precision_does_not_hide_a_collapse():
    """In fp32 the spread of 1e-6 around 1000 would vanish."""
    z = 1000 + 1e-6 * randn(16, 4)
    health = latent_health(z)
    assert health.scale == pytest.approx(1e-6, rel=0.5) and health.effective_rank > 2


def test_zeros_retrieve_by_chance_and_equal_latents_are_one():
    z = randn(10, 4)
    assert retrieval(torch.zeros_like(z), z).recall == pytest.approx(0.1)
    assert retrieval(torch.zeros_like(z), z).never == pytest.approx(0.9)
    assert retrieval(z.roll(1, 0), z).recall == 0
    half = z[:5].repeat(2, 1)
    assert retrieval(half, half).recall == 1
    assert retrieval(half, half).never == retrieval(half, half).hubness == 0
    z[1] = z[0]  # found by two texts, and no hub
    assert retrieval(z, z, k=1).hubness == retrieval(z, z, k=1).never == 0


def test_no_graph():
    z = randn(4, 3).requires_grad_()
    assert isinstance(latent_health(z).norm, float)
    assert isinstance(retrieval(z, z).recall, float)


Z, TWO = torch.zeros(2, 4), torch.eye(4)[[0, 0, 1]]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: latent_health(Z[:1]), r"`z` needs at least 2 samples .* got shape \[1, 4\]"),
        (lambda: latent_health(Z / 0), "`z` must be finite.*has training diverged"),
        (lambda: latent_health(Z, mean=torch.zeros(3)), r"`mean` must be a number or have .*\[4\]"),
        (lambda: latent_health(Z, variance=0.0), "`variance` must be above 0"),
        (
            lambda: retrieval(Z[:1], Z[:1]),
            r"`z_hat` needs at least 2 rows to compare, got .*larger",
        ),
        (lambda: retrieval(Z, Z[:, :3]), "`z_hat` and `latents` must have equal shapes"),
        (lambda: retrieval(Z, Z / 0), "`latents` must be finite"),
        (
            lambda: retrieval(TWO, TWO, k=3),
            r"`k` must lie in \[1, 2\], the number of different .* got 3",
        ),
        (lambda: retrieval(TWO, TWO, k=0), r"`k` must lie in .* got 0"),
        (lambda: retrieval(Z, Z), "`latents` are equal in all rows, so every text would find"),
    ],
)
@pytest.mark.unhooked
def test_refused(call, expected):
    with pytest.raises(ValueError, match=expected):
        call()
