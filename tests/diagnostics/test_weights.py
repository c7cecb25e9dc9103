"""The picture of weights, by the numbers that it draws."""

import sys

import pytest
from matplotlib.figure import Figure

import cyclevae as cv
from cyclevae.diagnostics import plot_weights
from running import of


def drawn(objective, steps):
    axes = Figure().subplots()
    plot_weights(objective, axes, steps=steps)
    return axes, {line.get_label(): line.get_xydata() for line in axes.lines}


def test_few_steps_are_drawn_as_they_are():
    axes, curves = drawn(of(cv.Text(), cv.CycleText(weight=cv.ramp(4.0, 10, 9))), 40)
    assert curves["text"][:, 1].tolist() == [1.0] * 40
    expected = [0.0] * 10 + [4.0 * k / 10 for k in range(1, 11)] + [4.0] * 20
    assert curves["cycle_text"][:, 1].tolist() == pytest.approx(expected)
    assert axes.get_ylabel() == "weight"


def test_many_steps_are_means_over_windows():
    """A term at every third step weighs a third, a turn of two a half, in any window."""
    text, latent = cv.take_turns(4.0, 1.0)
    axes, curves = drawn(
        of(cv.Text(every=3), cv.Latent(weight=text), cv.Sleep(weight=latent)), 2400
    )
    assert axes.get_ylabel() == "weight, mean of 6 steps"
    for name, mean in {"text": 1 / 3, "latent": 2.0, "sleep": 0.5}.items():
        assert curves[name][:, 1].tolist() == pytest.approx([mean] * 400)
    assert curves["text"][-1, 0] == 2394


def test_phases_are_drawn_too():
    _, curves = drawn(cv.Phases((of(cv.Text()), of(cv.Text(), cv.Latent())), (0, 3)), 5)
    assert curves["latent"][:, 1].tolist() == [0.0] * 3 + [5.0] * 2


def test_a_file_is_written_and_no_step_refused(tmp_path, monkeypatch):
    plot_weights(of(cv.Text()), tmp_path / "weights.svg", steps=3)
    assert "<svg" in (tmp_path / "weights.svg").read_text()
    with pytest.raises(ValueError, match="`steps` must be an integer of at least 1, got 0"):
        plot_weights(of(cv.Text()), tmp_path / "weights.svg", steps=0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="a picture of weights needs matplotlib"):
        plot_weights(of(cv.Text()), tmp_path / "weights.svg", steps=3)
