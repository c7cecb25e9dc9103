"""The host as it is: what the tests of the adapter stand on."""

import math

import launch
import pytest
import torch

MODES = ["l2t", "t2l", "unconditional"]


def snapshot(folder):
    files = [path for path in folder.rglob("*") if ".git" not in path.parts and path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


def assert_trained(run, steps):
    assert [row["step"] for row in run.log] == list(range(steps))
    assert all(math.isfinite(row["loss"]) for row in run.log)
    assert run.checkpoint.is_file()


@pytest.mark.parametrize(("mode", "dtype"), [*((mode, "fp32") for mode in MODES), ("t2l", "bf16")])
def test_it_trains(train, mode, dtype):
    run = train(overrides={"loss.loss_type": mode, "training.dtype": dtype})
    assert_trained(run, 4)
    assert (
        f"device=cpu and dtype=torch.{'bfloat16' if dtype == 'bf16' else 'float32'}" in run.output
    )


def test_the_other_trainer_file_trains(train):
    assert_trained(train(entry="train_mmdit.py", overrides={"loss.loss_type": "t2l"}), 4)


def test_it_learns_the_toy_sentences(train):
    """Else no test could tell a trained model from one that stands still."""
    run = train(steps=60, batch=16, overrides={"loss.loss_type": "l2t", "optimizer.lr": 3e-3})
    losses = [row["text_loss"] for row in run.log]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), losses


def test_a_run_repeats(train):
    first, second = (train(overrides={"loss.loss_type": "unconditional"}) for _ in range(2))
    assert first.log == second.log
    ours, theirs = first.weights(), second.weights()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_its_own_validation_runs(train):
    run = train(overrides={"loss.loss_type": "l2t", "logging.eval_freq": 2})
    assert_trained(run, 4)
    assert "Eval" in run.output


# The harness


def test_an_edit_runs_and_leaves_the_checkout_alone(train, checkout):
    before = snapshot(checkout)
    block = "assert config.training.resume is None\nprint('EDITED', type(trainer).__name__, nan)"
    run = train(steps=1, block=block, imports="from math import nan")
    assert "EDITED MultimodalDiffusionTrainer_new nan" in run.output
    assert_trained(run, 1)
    assert snapshot(checkout) == before


def test_an_edit_that_changes_nothing_trains_the_same(train):
    assert train(steps=2).log == train(steps=2, block="trainer = trainer", imports="").log


def test_new_keys_reach_the_config(train):
    values = {"a_number": 1e-7, "a_list": [1, "two: {3}"], "nothing": None, "a_dict": {"b": [True]}}
    block = f"print('LOSS', {{key: config.loss[key] for key in {list(values)}}})"
    overrides = {f"loss.{key}": value for key, value in values.items()}
    run = train(steps=1, block=block, imports="", overrides=overrides)
    assert f"LOSS {values}" in run.output


def test_a_failure_shows_the_last_lines(train):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        train(block="1 / 0", imports="")
    assert train(block="1 / 0", imports="", check=False).returncode == 1


def test_every_entry_has_one_place_for_the_edit(checkout):
    for entry in ("train_mmdit.py", "train_mmdit_stable.py"):
        source = (checkout / launch.PACKAGE / entry).read_text(encoding="utf-8")
        edited = launch.edit(source, launch.WITH_CYCLE)
        compile(edited, entry, "exec")
        added = [line for line in edited.splitlines() if line not in source.splitlines()]
        assert added == [launch.IMPORT, "    " + launch.WITH_CYCLE]
        assert edited.index("# ---------------- Optional comp") > edited.index(
            "with_cycle(trainer)"
        )
