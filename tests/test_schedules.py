import pytest
from hypothesis import given
from hypothesis import strategies as st

from cyclevae import ramp
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
