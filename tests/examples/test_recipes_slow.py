"""Every recipe of docs/recipes runs as a user runs it, and reaches what the plain loop reaches.

For few epochs: each is a process that imports its framework.
"""

import csv
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import cyclevae as cv

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples" / "recipes"))

import run_recipes  # noqa: E402

RUNS = ROOT / "runs" / "recipes"
# Four times the largest distance between three seeds of the plain loop, by `make recipes`
NOISE = {"l2t_ce": 0.13, "t2l_mse": 0.12}


EPOCHS, STEPS = 3, 63
WAITS = STEPS // 4  # of the cycle, as in task.py


@pytest.fixture(scope="module", autouse=True)
def few_epochs(cache):
    os.environ["CYCLEVAE_EPOCHS"] = str(EPOCHS)
    yield
    del os.environ["CYCLEVAE_EPOCHS"]


def run(recipe, *arguments):
    return run_recipes.result_of(run_recipes.start(recipe, *arguments))


once = functools.cache(run)  # what several tests look at


@pytest.fixture(scope="module")
def plain(few_epochs):
    return once("plain")


def assert_near(result, plain):
    for name, noise in NOISE.items():
        assert abs(result[name] - plain[name]) < noise, (name, result, plain)


HYDRA = [f"epochs={EPOCHS}"] + [
    f"objective.terms.cycle_text.weight.{name}={WAITS}" for name in ("warmup_steps", "ramp_steps")
]


@pytest.mark.parametrize(
    ("recipe", "arguments"), [("lightning_module", []), ("hydra_config", HYDRA), ("trackers", [])]
)
def test_the_same_draws_give_the_same_numbers(recipe, arguments, plain):
    assert once(recipe, *arguments) == plain


@pytest.mark.parametrize("recipe", ["fsdp2", "hf_trainer", "accelerated", "two_networks"])
def test_other_draws_give_the_same_result_within_noise(recipe, plain):
    assert_near(run(recipe), plain)


def test_a_masked_language_model_learns_both_directions(plain):
    """Another network, so other numbers; a latent of no information has MSE 1 and R@10 of 5 %."""
    result = run("masked_lm")
    assert result["t2l_mse"] < 0.95 and result["t2l_r10"] > 0.3
    assert result["l2t_ce"] < plain["l2t_ce"] + 0.4


def test_a_diffusers_transformer_learns_both_directions(plain):
    """Slowly: a velocity of 0 has MSE 2, since it leaves the noise in the latent."""
    result = run("diffusers_transformer")
    assert result["t2l_mse"] < 1.1
    assert result["l2t_ce"] < plain["l2t_ce"] + 0.4


def test_ddp_that_is_killed_goes_on_where_it_was(plain, tmp_path):
    whole = run("ddp")
    assert_near(whole, plain)
    checkpoint = tmp_path / "checkpoint.pt"
    process = run_recipes.start("ddp", str(checkpoint), start_new_session=True)
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(0.5)  # some steps beyond the checkpoint
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    begun = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < begun < STEPS
    assert run("ddp", str(checkpoint)) == whole


def test_lightning_logs_every_term():
    once("lightning_module")
    latest = max(
        (RUNS / "lightning").glob("version_*/metrics.csv"), key=lambda p: p.stat().st_mtime
    )
    with latest.open() as file:
        rows = list(csv.DictReader(file))
    assert {"train/loss", "train/text_loss", "train/cycle_text_loss"} <= rows[0].keys()
    assert rows[0]["train/cycle_text_loss"] == ""  # not yet begun: absent, not 0
    assert float(rows[-1]["train/cycle_text_loss"]) > 0


def test_trackers_hold_every_term():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    once("trackers")
    folder = RUNS / "trackers"
    latest = max(folder.glob("events.*"), key=lambda path: path.stat().st_mtime)
    events = EventAccumulator(str(latest)).Reload()
    terms = {"train/loss", "train/text_loss", "train/cycle_text_loss", "test/l2t_ce"}
    assert terms <= set(events.Tags()["scalars"])
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(0, STEPS, 10))
    assert next(folder.glob("wandb/offline-run-*/run-*.wandb")).stat().st_size > 1000


def test_hydra_overrides_reach_the_objective_and_typos_are_named():
    cycle = "objective.terms.cycle_text"
    run("hydra_config", f"{cycle}.weight.weight=2", "+objective.terms.prior.weight=0.1", "epochs=1")
    written = json.loads((RUNS / "hydra" / "objective.json").read_text())
    weight = {"weight": 2.0, "warmup_steps": 52, "ramp_steps": 52}
    assert written["terms"]["cycle_text"]["weight"] == weight
    read = cv.CycleObjective.from_config(written)
    assert read.weights(1000) == {"text": 1.0, "latent": 5.0, "cycle_text": 2.0, "prior": 0.1}
    with pytest.raises(RuntimeError, match="did you mean 'bridge'"):
        run("hydra_config", f"+{cycle}.brigde.noise=0.5")
