"""The bench: its plain step is the objective, its timing is fair, its verdicts are right."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "examples" / "bench"))
sys.path.append(str(Path(__file__).parents[2] / "examples" / "sentences"))
from calls import bridges, small
from full import TERMS, WEIGHTS
from mmdit_model import MMDiTDenoiser
from plain import plain_step
from results import Row, line, plot, save, table
from setting import Setting
from timing import compare

import cyclevae as cv

BENCH = Path(__file__).parents[2] / "examples" / "bench" / "bench.py"
ROW = Row("text", "small", "time", "theirs", "cpu", 1.0, 2.0, 0.5, 0.4, 0.6, target=0.5)


def network():
    torch.manual_seed(0)
    random.seed(0)  # mmdit draws by it which of its streams a block begins with
    return MMDiTDenoiser(50, 8, length=12, width=32)


def pairs():
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(12) < torch.tensor([[12], [7], [1], [10]])
    tokens = torch.randint(3, 50, mask.shape, generator=generator) * mask
    return cv.Batch(tokens, mask, torch.randn(4, 8, generator=generator))


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def test_the_plain_step_is_the_objective():
    model, batch = network(), pairs()
    objective = cv.CycleObjective(
        cv.TextProcess(mask_id=1, vocab_size=50, pad_id=0),
        cv.LatentProcess("continuous_cosine"),
        TERMS,
    )
    ours = objective(
        cv.as_denoiser(model), batch, step=0, generator=torch.Generator().manual_seed(1)
    )
    loss, metrics = plain_step(model, *batch[:3], 1, WEIGHTS, torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss, ours.loss)
    torch.testing.assert_close(
        gradients(loss, model), gradients(ours.loss, model), rtol=1e-4, atol=1e-5
    )
    for term in WEIGHTS:
        assert metrics[term] == pytest.approx(float(ours.metrics[f"{term}_loss"]), rel=1e-5)


class Clock:
    """A time that passes only where it is said to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        return lambda: setattr(self, "now", self.now + seconds)


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_ratios_are_those_of_the_clock(factor):
    clock = Clock()
    found = compare(clock.wait(factor), clock.wait(1.0), clock=clock, seconds=20.0)
    assert found.ours == pytest.approx(factor) and found.theirs == pytest.approx(1.0)
    assert found[2:] == pytest.approx((factor,) * 3)


def test_a_machine_that_slows_down_leaves_the_ratio():
    clock = Clock()

    def call():  # each takes a hundredth longer than the one before
        clock.now += 0.01 * clock.now + 1.0

    found = compare(call, call, clock=clock, seconds=1e6)
    assert found.ratio == pytest.approx(1.0, abs=0.02)


def test_short_calls_are_repeated_and_both_sides_run_in_every_round():
    clock, order = Clock(), []

    def side(name):
        return lambda: (order.append(name), clock.wait(0.001)())

    compare(side("ours"), side("theirs"), clock=clock, rounds=50, seconds=0.0)
    rounds = order[4:]  # behind the warm-up
    assert len(rounds) == 50 * 4
    for i in range(0, len(rounds), 4):
        assert sorted(rounds[i : i + 4]) == ["ours", "ours", "theirs", "theirs"]
    assert len({tuple(rounds[i : i + 4]) for i in range(0, len(rounds), 4)}) == 2


def test_a_limit_is_measured_of_what_falls_short_alone():
    setting = Setting(torch.device("cpu"))

    def taking(size):
        return lambda: torch.zeros(size).sum()

    given = "step", "case", "theirs", taking(2**20), taking(2**21)
    assert setting.peak(*given, target=0.6, limit=lambda: taking(2**19)).limit is None
    short = setting.peak(*given, target=0.4, limit=lambda: taking(2**19))
    assert short.verdict == "short" and short.limit == pytest.approx(0.25, rel=0.01)
    assert line(short).endswith("| short, limit 0.25 |")


@pytest.mark.parametrize(
    ("ratio", "target", "verdict"),
    [(0.5, 0.5, "pass"), (0.51, 0.5, "short"), (9.0, None, ""), (float("nan"), 1.0, "short")],
)
def test_verdicts(ratio, target, verdict):
    assert replace(ROW, ratio=ratio, target=target).verdict == verdict


def test_what_is_written(tmp_path):
    rows = [ROW, replace(ROW, quantity="peak bytes", ratio=2.0, low=None, high=None, target=None)]
    save(rows, ["a note"], {"cpu": "one"}, tmp_path / "bench.json")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["machine"] == {"cpu": "one"} and found["notes"] == ["a note"]
    assert [row["verdict"] for row in found["rows"]] == ["pass", ""]
    assert "| 0.5 (0.4–0.6) | ≤ 0.5 | pass |" in table(rows)
    for name in ("one.svg", "two.svg"):
        plot(rows, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert "<dc:date>" not in (tmp_path / "one.svg").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", [bridges, small])
def test_both_sides_and_their_limits_run(benchmark, monkeypatch):
    """As no quick run does, which has no targets."""
    limits = []

    def timed(self, name, case, against, ours, theirs, *, limit=None, **_):
        for call in (ours, theirs, *([] if limit is None else [limit()])):
            call()
        limits.append(limit)

    def told(self, *_, limit=None, **options):
        assert limit is None or limit() > 0

    for name, stand_in in (("time", timed), ("peak", timed), ("row", told)):
        monkeypatch.setattr(Setting, name, stand_in)
    list(benchmark(Setting(torch.device("cpu"), quick=True)))
    assert any(limits)


def test_a_quick_run_of_one_benchmark(tmp_path):
    command = [sys.executable, str(BENCH), "--quick", "--only", "text"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {row["benchmark"] for row in found["rows"]} == {"text"}
    assert {row["quantity"] for row in found["rows"]} == {"time", "peak bytes"}
    assert {"cpu", "cores", "threads", "torch", "python"} <= found["machine"].keys()
    assert "| text | bfloat16, 60% padding | time |" in done.stdout
    assert (tmp_path / "bench.svg").exists()
