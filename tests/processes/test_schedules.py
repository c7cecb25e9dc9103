import pytest
from hypothesis import given
from hypothesis import strategies as st

from cyclevae import ramp
from cyclevae.processes.schedules import Anneal, anneal
from strategies import quick


def oracle(weight, warmup, ramp_steps, step):
    """0 in the warm-up; then `ramp_steps` steps that climb in equal parts to the weight."""
    climbed = min(max(step - warmup + 1, 0), ramp_steps + 1)
    return weight * climbed / (ramp_steps + 1)


@quick
@given(st.floats(0, 1e3), st.integers(0, 20), st.integers(0, 20), st.integers(0, 60))
def test_ramp(weight, warmup, ramp_steps, step):
    value = ramp(weight, warmup, ramp_steps)(step)
    assert value == pytest.approx(oracle(weight, warmup, ramp_steps, step))


def test_ramp_edges():
    weight = ramp(0.5, warmup_steps=10, ramp_steps=4)
    assert [weight(step) for step in (0, 9)] == [0.0, 0.0]
    assert weight(10) > 0
    assert [weight(step) for step in (14, 15, 10**9)] == [0.5] * 3
    assert ramp(2.0)(0) == 2.0
    assert ramp(0.0, 3, 3)(5) == 0.0


@quick
@given(st.integers(0, 20), st.integers(0, 20))
def test_ramp_never_falls(warmup, ramp_steps):
    values = [ramp(1.0, warmup, ramp_steps)(step) for step in range(45)]
    assert values == sorted(values)
    assert values.count(0.0) == warmup


def test_ramp_is_a_value():
    assert ramp(1.0, 2, 3) == ramp(1.0, 2, 3) != ramp(1.0, 2, 4)
    assert hash(ramp(1.0, 2, 3)) == hash(ramp(1.0, 2, 3))


@pytest.mark.parametrize(
    "arguments",
    [
        {"weight": -1.0},
        {"weight": float("nan")},
        {"weight": float("inf")},
        {"weight": 1.0, "warmup_steps": -1},
        {"weight": 1.0, "ramp_steps": -1},
    ],
)
def test_ramp_refuses(arguments):
    name, value = list(arguments.items())[-1]
    expected = f"`{name}` must be a finite number of at least 0, got {value}"
    with pytest.raises(ValueError, match=expected):
        ramp(**arguments)


# --- anneal -----------------------------------------------------------------------------------


@quick
@given(
    st.floats(0, 1e3),
    st.floats(0, 1e3),
    st.integers(0, 20),
    st.integers(1, 20),
    st.integers(0, 60),
)
def test_anneal(start, end, warmup, steps, step):
    """The start until the warm-up ends, then equal parts of the way, then the end."""
    done = min(max(step - warmup, 0), steps)
    expected = start + (end - start) * done / steps
    assert anneal(start, end, warmup, steps)(step) == pytest.approx(expected)


def test_anneal_edges():
    value = anneal(0.3, 0.7, warmup_steps=10, steps=4)
    assert [value(step) for step in (0, 9, 10)] == [0.3] * 3
    assert value(11) == pytest.approx(0.4)
    assert [value(step) for step in (14, 15, 10**9)] == [0.7] * 3  # exactly the end
    assert [anneal(0.1, 0.9)(step) for step in (0, 1, 2)] == [0.1, 0.9, 0.9]
    assert [anneal(0.1, 0.9, 1)(step) for step in (0, 1, 2)] == [0.1, 0.1, 0.9]
    assert anneal(1.0, 0.5, steps=2)(1) == 0.75  # it may fall


@quick
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_anneal_stays_between_its_ends(start, end, step):
    low, high = sorted([start, end])
    assert low * (1 - 1e-12) <= anneal(start, end, 1, 7)(step) <= high * (1 + 1e-12)
    assert anneal(1.0, 1.0, 1, 7)(step) == 1.0


def test_anneal_is_a_value():
    assert anneal(1.0, 2.0, 3, 4) == anneal(1.0, 2.0, 3, 4) != anneal(1.0, 2.0, 3, 5)
    assert hash(anneal(1.0, 2.0)) == hash(anneal(1.0, 2.0, 0, 1))
    assert anneal(1.0, 2.0) == Anneal(1.0, 2.0) == Anneal(1.0, 2.0, 0, 1)


@pytest.mark.parametrize("name", ["start", "end", "warmup_steps", "steps"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
@pytest.mark.unhooked
def test_anneal_refuses(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number of at least 0"):
        anneal(**{"start": 0.0, "end": 1.0, name: value})


def test_anneal_takes_at_least_a_step():
    with pytest.raises(ValueError, match="`steps` must be above 0"):
        anneal(0.0, 1.0, steps=0)
