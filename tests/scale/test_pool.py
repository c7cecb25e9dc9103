"""Counts of a whole optimizer step; over ranks in `test_pool_slow.py`."""

import pytest
import torch

import cyclevae as cv
from cyclevae.testing import join_batches, toy_batch, toy_denoiser

DENOISER, *PROCESSES = toy_denoiser(seed=0)
OBJECTIVE = cv.CycleObjective(*PROCESSES)
BATCHES = [toy_batch(seed=0, rows=3), toy_batch(seed=1, rows=1)]


def test_counts_of_parts_are_those_of_the_joined_batch():
    pooled = cv.pool_counts([OBJECTIVE.counts(batch) for batch in BATCHES])
    expected = OBJECTIVE.counts(join_batches(BATCHES))
    assert pooled.keys() == expected.keys()
    for name, count in expected.items():
        assert pooled[name].shape == ()
        torch.testing.assert_close(pooled[name], count)


def test_one_batch_keeps_its_counts():
    counts = OBJECTIVE.counts(BATCHES[0])
    assert cv.pool_counts([counts]) == counts


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([], "one batch or more, got none"),
        ([{"a": torch.ones(())}, {}], r"one objective, got \['a'"),
    ],
)
def test_counts_that_do_not_go_together_are_refused(counts, words):
    with pytest.raises(ValueError, match=words):
        cv.pool_counts(counts)


@pytest.mark.unhooked
@pytest.mark.parametrize("counts", [{"a": torch.ones(())}, [toy_batch(seed=0)]])
def test_what_are_no_counts_of_batches_is_refused(counts):
    with pytest.raises(TypeError, match=r"must be a list.*pool_counts\(\[objective.counts"):
        cv.pool_counts(counts)
