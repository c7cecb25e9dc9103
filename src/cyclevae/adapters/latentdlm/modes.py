"""Which mode a step of the host runs in, and how many steps of `cycle_vae` lie before it."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from cyclevae._base import checks

CYCLE = "cycle_vae"
DEFAULT = "multimodal_mdlm"  # the host's default, for which it trains `unconditional`
SINGLE = ("unconditional", "l2t", "t2l")
MODES = (*SINGLE, "random", "sequential", DEFAULT)  # the host's own

_log = logging.getLogger("cyclevae")


def check_loss_type(config: Any) -> str:
    """The mode of a run.

    Raises:
        ValueError: a mode that the host would take for `unconditional` in silence, or one that
            `training.loss_type` contradicts.
    """
    mode = str(getattr(config.loss, "loss_type", DEFAULT))
    check_mode(mode)
    other = getattr(getattr(config, "training", None), "loss_type", None)
    if mode == DEFAULT:
        unread = "" if other is None else f"; nothing reads `training.loss_type`, {other!r}"
        _log.warning("cyclevae: for loss_type %s the host trains unconditional%s", mode, unread)
    elif other is not None and other != mode:
        raise ValueError(
            f"`training.loss_type` is {other!r} and `loss.loss_type` is {mode!r}, which is the one "
            "that counts: make them equal, or remove the first"
        )
    return mode


def check_mode(mode: str) -> None:
    """Refuse what the host would take for `unconditional`.

    Raises:
        ValueError: an unknown mode, with the nearest.
    """
    known = (*MODES, CYCLE)
    if mode not in known:
        raise ValueError(
            f"`loss.loss_type` is {mode!r}, for which the host trains 'unconditional' without a "
            f"word; {checks.nearest(mode, known)}"
        )


def phases_of(config: Any) -> list[Mapping[str, Any]]:
    """The phases of the mode `sequential`, none where there are none.

    Raises:
        ValueError: a phase of a mode that the host does not know, at which it would stop when the
            phase is reached.
    """
    phases = list(getattr(getattr(config, "training", None), "sequential_schedule", None) or [])
    known = (*SINGLE, CYCLE)
    for i, phase in enumerate(phases):
        if phase["type"] not in known:
            raise ValueError(
                f"`training.sequential_schedule[{i}].type` is {phase['type']!r}; "
                f"{checks.nearest(str(phase['type']), known)}"
            )
    return phases


def runs_cycles(mode: str, phases: Iterable[Mapping[str, Any]]) -> bool:
    """Whether some step of a run is one of `cycle_vae`."""
    return mode == CYCLE or (mode == "sequential" and any(p["type"] == CYCLE for p in phases))


def cycles_before(step: int, phases: Iterable[Mapping[str, Any]]) -> int:
    """How many of the steps before this one are of `cycle_vae`, in phases that come around.

    Examples:
        >>> phases = [{"type": "l2t", "steps": 3}, {"type": "cycle_vae", "steps": 2}]
        >>> [cycles_before(step, phases) for step in (2, 3, 4, 5, 8, 9)]
        [0, 0, 1, 2, 2, 3]
    """
    lengths = [(phase["type"], int(phase.get("steps", 1000))) for phase in phases]
    rounds, left = divmod(step, sum(length for _, length in lengths))
    count = rounds * sum(length for mode, length in lengths if mode == CYCLE)
    for mode, length in lengths:
        count += min(left, length) if mode == CYCLE else 0
        left = max(0, left - length)
    return count
