import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cyclevae.processes.schedules import anneal
from cyclevae.processes.times import TimePolicy, stratified_times
from strategies import quick, seeds

DISTRIBUTIONS = ("full", "uniform", "logit_normal")


def seed(number=0):
    return torch.Generator().manual_seed(number)


# --- stratified times -------------------------------------------------------------------------


@quick
@given(st.integers(1, 300), seeds)
def test_stratified_times_fill_every_stratum(rows, number):
    times = stratified_times(rows, generator=seed(number)).double()
    assert (times >= 0).all() and (times <= 1).all()
    lower = times.sort().values - torch.arange(rows).double() / rows
    assert (lower > -1e-5).all() and (lower < 1 / rows + 1e-5).all()


def test_stratified_times_are_uniform_in_every_row():
    generator = seed()
    times = torch.stack([stratified_times(4, generator=generator) for _ in range(2000)])
    error = 4 * math.sqrt(1 / 12 / 2000)
    assert (times.mean(dim=0) - 0.5).abs().max() < error
    assert (times.var(dim=0) - 1 / 12).abs().max() < 0.01
    assert stats.kstest((times[:, 0] * 4 % 1).numpy(), "uniform").pvalue > 1e-3
    assert torch.corrcoef(times.T)[0, 1] < 0  # two rows never share a stratum


def test_stratified_times_are_reproducible():
    first, again = (stratified_times(5, generator=seed()) for _ in "ab")
    assert torch.equal(first, again)
    assert stratified_times(0).shape == (0,)


# --- a policy ---------------------------------------------------------------------------------


def test_full_is_constant_and_draws_nothing():
    generator = seed()
    before = generator.get_state()
    assert TimePolicy()(3, generator=generator).tolist() == [1.0] * 3
    capped = TimePolicy("full", high=0.75)
    assert capped(2, generator=generator).tolist() == [0.75] * 2
    assert torch.equal(generator.get_state(), before)
    assert TimePolicy() == TimePolicy("full", 0.0, 1.0, True, 0.0, 1.0)
    assert hash(capped) == hash(TimePolicy(high=0.75)) != hash(TimePolicy())


@pytest.mark.parametrize(
    "policy",
    [
        TimePolicy(),
        TimePolicy(high=0.7),
        TimePolicy("uniform", 0.2, 0.9),
        TimePolicy("logit_normal", 0.1, 0.9, mean=0.8, std=1.7),
    ],
    ids=str,
)
def test_the_average_is_that_of_many_draws(policy):
    draws = policy(200_000, generator=torch.Generator().manual_seed(0))
    assert policy.average() == pytest.approx(draws.double().mean().item(), abs=2e-4)
    assert TimePolicy(policy.distribution, high=lambda step: 1.0).average() is None


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.9)])
def test_uniform_times(low, high, stratified):
    policy = TimePolicy("uniform", low=low, high=high, stratified=stratified)
    generator = seed()
    times = torch.cat([policy(4, generator=generator) for _ in range(500)]).double()
    assert stats.kstest(times.numpy(), "uniform", (low, high - low)).pvalue > 1e-3


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5), (-1.0, 1.5)])
def test_logit_normal_times(mean, std, stratified):
    policy = TimePolicy("logit_normal", 0.1, 0.9, stratified=stratified, mean=mean, std=std)
    generator = seed(1)
    times = torch.cat([policy(4, generator=generator) for _ in range(500)]).double()
    normal = torch.logit((times - 0.1) / 0.8).numpy()
    assert stats.kstest(normal, "norm", (mean, std)).pvalue > 1e-3


@quick
@given(
    st.integers(1, 40),
    st.sampled_from(["uniform", "logit_normal"]),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    seeds,
)
def test_stratified_policies_take_one_time_of_each_part(rows, distribution, ends, number):
    low, high = ends
    draw = {"generator": seed(number)}
    u = TimePolicy(distribution)(rows, **draw).double()  # on the unit interval
    quantile = stats.norm.cdf(torch.logit(u).numpy()) if distribution != "uniform" else u.numpy()
    part = torch.as_tensor(quantile).sort().values * rows - torch.arange(rows)
    assert (part > -1e-3).all() and (part < 1 + 1e-3).all()
    times = TimePolicy(distribution, low=low, high=high)(rows, generator=seed(number)).double()
    torch.testing.assert_close(times, low + (high - low) * u, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stratified", [True, False])
def test_logit_normal_times_are_quantiles_of_the_uniform_ones(stratified):
    u = TimePolicy("uniform", stratified=stratified)(50, generator=seed()).double()
    policy = TimePolicy("logit_normal", mean=0.3, std=0.7, stratified=stratified)
    expected = 1 / (1 + (-(0.3 + 0.7 * torch.from_numpy(stats.norm.ppf(u)))).exp())
    torch.testing.assert_close(
        policy(50, generator=seed()).double(), expected, rtol=1e-4, atol=1e-5
    )


def test_independent_times_share_parts():
    policy = TimePolicy("uniform", stratified=False)
    parts = (policy(16, generator=seed()) * 16).ceil()
    assert len(parts.unique()) < 16


def test_stratified_times_lower_the_variance_of_a_mean():
    spread = {}
    for stratified in (True, False):
        policy, generator = TimePolicy("logit_normal", stratified=stratified), seed()
        means = torch.stack([policy(64, generator=generator).square().mean() for _ in range(300)])
        spread[stratified] = means.var()
    assert spread[True] < 0.05 * spread[False]  # (f(1) - f(0))^2 / 12 n^2 against var f / n


@quick
@given(
    st.sampled_from(["uniform", "logit_normal"]),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    st.booleans(),
    seeds,
)
def test_times_stay_within_their_ends(distribution, ends, stratified, number):
    low, high = ends
    policy = TimePolicy(distribution, low=low, high=high, stratified=stratified)
    times = policy(64, generator=seed(number))
    assert times.dtype == torch.float32
    assert (times >= torch.tensor(low)).all() and (times <= torch.tensor(high)).all()
    assert (policy.lowest(), policy.highest()) == (low, high)


@pytest.mark.parametrize("mean", [-1e3, 0.0, 1e3])
@pytest.mark.parametrize("std", [1e-3, 1.0, 1e3])
def test_logit_normal_times_are_never_clean_nor_full_noise(mean, std):
    for stratified in (True, False):
        policy = TimePolicy("logit_normal", mean=mean, std=std, stratified=stratified)
        times = policy(500, generator=seed())
        assert times.isfinite().all() and (times > 0).all() and (times < 1).all()
    ends = {-1e3: 1e-7, 1e3: 1 - 1e-7}
    if std < 1 and mean in ends:
        torch.testing.assert_close(times, torch.full((500,), ends[mean]), rtol=0, atol=1e-8)


def test_independent_uniform_times_may_be_full_noise_but_not_clean(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(*shape))
    assert TimePolicy("uniform", stratified=False)(2).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize("stratified", [True, False])
def test_times_are_reproducible(distribution, stratified):
    policy = TimePolicy(distribution, stratified=stratified)
    first, again, other = (policy(6, generator=seed(n)) for n in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert policy(0).shape == (0,)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_cap_may_move(distribution):
    policy = TimePolicy(distribution, high=anneal(0.4, 0.8, 10, 20))
    for step, cap in ((0, 0.4), (20, 0.6), (30, 0.8)):
        assert policy.highest(step) == pytest.approx(cap)
        times = policy(200, step=step, generator=seed())
        constant = TimePolicy(distribution, high=cap)(200, generator=seed())
        torch.testing.assert_close(times, constant)
    assert policy.highest() == 0.4
    assert policy.lowest(30) == (0.8 if distribution == "full" else 0.0)
    assert torch.equal(policy(5, generator=seed()), policy(5, step=0, generator=seed()))


def test_the_first_step_is_the_default():
    policy = TimePolicy(high=anneal(0.2, 0.8, steps=3))
    assert policy.highest() == policy.lowest() == 0.2
    torch.testing.assert_close(policy(2), torch.full((2,), 0.2))


def test_the_cap_may_be_any_function_of_the_step():
    policy = TimePolicy("uniform", low=0.25, high=lambda step: 1 / (1 + step))
    assert policy.highest(3) == 0.25  # the end itself is allowed
    assert (policy(4, step=3) == 0.25).all()
    with pytest.raises(ValueError, match=r"`high\(4\)` must lie in \[low, 1\].*\[0.25, 1.*got 0.2"):
        policy(4, step=4)
    with pytest.raises(ValueError, match=r"`high\(0\)` must lie in .* got 1\.5"):
        TimePolicy(high=lambda step: 1.5)(4)


def test_a_moving_cap_is_not_looked_at_under_compile(monkeypatch):
    policy = TimePolicy(high=lambda step: 1.5)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert policy.highest(0) == 1.5


@pytest.mark.parametrize(
    "policy", [TimePolicy(), TimePolicy("logit_normal"), TimePolicy("uniform", stratified=False)]
)
def test_times_on_the_meta_device(policy):
    times = policy(4, device=torch.device("meta"))
    assert times.is_meta and times.shape == (4,)


@pytest.mark.parametrize("stratified", [True, False])
def test_times_are_in_fp32_whatever_the_default(stratified):
    torch.set_default_dtype(torch.float64)
    try:
        times = [TimePolicy("logit_normal", stratified=stratified)(3), TimePolicy()(3)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in times} == {torch.float32}


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"distribution": "unifrm"}, "`distribution` is 'unifrm'; did you mean 'uniform'"),
        ({"distribution": "uniform", "low": -0.1}, r"`low` must lie in \[0 .*, 1 .*\], got -0.1"),
        ({"distribution": "uniform", "low": 1.1}, "`low` must lie in .* got 1.1"),
        ({"distribution": "uniform", "low": math.nan}, "`low` must lie in .* got nan"),
        ({"distribution": "uniform", "low": 0.5, "high": 0.4}, r"`high` must .*\[0\.5, 1 .* 0\.4"),
        ({"high": 1.01}, r"`high` must lie in \[low, 1\] = \[0, 1 .*\], got 1.01"),
        ({"high": -0.01}, "`high` must lie in .* got -0.01"),
        ({"high": math.nan}, "`high` must lie in .* got nan"),
        ({"distribution": "logit_normal", "std": 0.0}, "`std` must be above 0, got 0"),
        ({"distribution": "logit_normal", "std": -1.0}, "`std` must be a finite number"),
        ({"distribution": "logit_normal", "mean": math.inf}, "`mean` must be finite, got inf"),
        ({"low": 0.1}, "`low` = 0.1 has no effect on the distribution 'full': drop it"),
        ({"stratified": False}, "`stratified` = False has no effect on the distribution 'full'"),
        ({"mean": 1.0}, "`mean` = 1.0 has no effect on the distribution 'full'"),
        ({"std": 2.0}, "`std` = 2.0 has no effect on the distribution 'full'"),
        ({"distribution": "uniform", "mean": 1.0}, "`mean` = 1.0 has no effect .* 'uniform'"),
        ({"distribution": "uniform", "std": 2.0}, "`std` = 2.0 has no effect .* 'uniform'"),
    ],
)
@pytest.mark.unhooked
def test_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        TimePolicy(**options)


@pytest.mark.parametrize("ends", [{"low": 0.5, "high": 0.5}, {"low": 1.0}, {"high": 0.0}])
def test_the_ends_may_meet(ends):
    times = TimePolicy("uniform", **ends)(3)
    assert len(times.unique()) == 1
