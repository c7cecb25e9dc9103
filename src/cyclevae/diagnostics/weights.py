"""A picture of what the terms of an objective weigh over the steps."""

from typing import Any

from cyclevae._base import checks
from cyclevae.diagnostics._drawing import axes_at
from cyclevae.objective.in_turn import Phases
from cyclevae.objective.objective import CycleObjective

POINTS = 400  # of a curve: more than a picture can show


def plot_weights(objective: CycleObjective | Phases, where: Any, *, steps: int) -> None:
    """Draw the weights of all terms over the first steps.

    Of many steps the curves are means over windows of equal length, so that a term that takes
    turns, or runs at every so many steps, is drawn as what it weighs on average.

    Args:
        objective: an objective, or `phases` of one.
        where: a path or a file to save the picture at, or matplotlib axes to draw on.
        steps: how many, from 0.

    Raises:
        ValueError: no step.
        ImportError: matplotlib is not installed.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> from cyclevae import CycleText, Text, ramp
        >>> from cyclevae.testing import toy_denoiser
        >>> late = CycleText(weight=ramp(4.0, warmup_steps=10, ramp_steps=10))
        >>> axes = Figure().subplots()
        >>> plot_weights(CycleObjective(*toy_denoiser()[1:], [Text(), late]), axes, steps=40)
        >>> [line.get_label() for line in axes.lines]
        ['text', 'cycle_text']
    """
    checks.check_count("steps", steps)
    weights = [objective.weights(step) for step in range(steps)]
    names = list(dict.fromkeys(name for at in weights for name in at))
    window = -(-steps // POINTS)
    starts = range(0, steps, window)
    with axes_at(where, "weights") as axes:
        for name in names:
            values = [at.get(name, 0.0) for at in weights]
            pieces = [values[start : start + window] for start in starts]
            axes.plot(starts, [sum(piece) / len(piece) for piece in pieces], label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("weight" if window == 1 else f"weight, mean of {window} steps")
        axes.set_ylim(bottom=0)
        axes.legend()
