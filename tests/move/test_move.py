"""Every number that version 0.1 gave for the cases is the number that comes out now."""

import pytest

from move.cases import case_named
from move.record import MODES, differences, load, replay, replay_ranks

RECORDED = load()
OF_RANKS = tuple(name for name in RECORDED if case_named(name).kind == "ranks")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RECORDED)
def test_as_in_version_0_1(name, mode):
    """`keyed` draws the same for a row in whatever order, `seeded` in the order of 0.1."""
    new = replay_ranks(name, mode, OF_RANKS) if name in OF_RANKS else replay(name, mode)
    gaps = differences(case_named(name), RECORDED[name][mode], new)
    assert not gaps, f"{case_named(name)}\n" + "\n".join(gaps)
