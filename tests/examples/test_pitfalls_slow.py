"""The pitfalls of docs/pitfalls.md: what the script measures is what the page tells."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cyclevae as cv
from cyclevae.diagnostics import cycle_report
from cyclevae.testing import check_denoiser

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples" / "pitfalls"))

import world  # noqa: E402

import pitfalls  # noqa: E402

PAGE = (ROOT / "docs" / "pitfalls.md").read_text()


@pytest.mark.parametrize("name", pitfalls.PITFALLS)
def test_each_has_its_picture_and_its_row(name):
    pitfall = pitfalls.PITFALLS[name]
    assert f"images/pitfall-{name}.svg" in PAGE
    assert (ROOT / "docs" / "images" / f"pitfall-{name}.svg").is_file()
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {pitfall.name} |")]
    assert row.endswith("| - |" if pitfall.verdict is None else "| FAIL / ok |")
    assert all(f"{reading}:" in row for reading in pitfall.readings)


def test_the_world_holds_what_it_says():
    pairs = world.make_world(uneven=True).pairs
    assert torch.equal(pairs.mask, pairs.tokens != world.PAD)
    assert set(pairs.mask.sum(1).tolist()) == {1, 2, 3, 4}
    one = world.make_world(carried=1, noise=0.0).held_out
    assert len(one.latents.mul(1e3).round().unique(dim=0)) == world.WORDS
    torch.testing.assert_close(one.latents.var(), torch.tensor(1.0), atol=0.4, rtol=0)
    tokens = world.make_world(twice=True).pairs.tokens
    assert torch.equal(tokens[:, :2], tokens[:, 2:])
    small, other = world.make_world(scale=0.5).pairs, world.make_world(seed=1).pairs
    assert torch.equal(small.latents, 0.5 * world.make_world().pairs.latents)
    assert not torch.equal(small.tokens, other.tokens)


def test_a_network_ignores_padding_and_takes_shorter_texts():
    network = world.Network()
    process = cv.LatentProcess("cosine", prediction="v", shape=(world.DIM,))
    check_denoiser(cv.as_denoiser(network), world.TEXT, process, lengths=(4, 3, 1))


def test_pictures_and_histories_are_the_same_again(tmp_path):
    short = replace(pitfalls.PITFALLS["scale-drift"], steps=20)
    written = []
    for _ in range(2):
        runs = {
            kind: pitfalls.judge(short, kind, seed=0, watch=lambda: None)
            for kind in pitfalls.COLOURS
        }
        assert [len(judged.trained.history) for judged in runs.values()] == [2, 2]
        pitfalls.plot(short, runs, tmp_path / "one.svg")
        written.append((pitfalls.row(short, runs), (tmp_path / "one.svg").read_bytes()))
    assert written[0] == written[1]


def test_the_script_writes_the_table_between_its_marks_only(tmp_path, monkeypatch, capsys):
    page = tmp_path / "pitfalls.md"
    page.write_text("before <!-- table -->old<!-- /table --> after")
    short = {"scale-drift": replace(pitfalls.PITFALLS["scale-drift"], steps=10)}
    monkeypatch.setattr(pitfalls, "PITFALLS", short)
    monkeypatch.setattr(pitfalls, "DOCS", tmp_path)
    out = ["--out", str(tmp_path)]
    for leaving in (["--only", "scale-drift"], ["--seed", "1"]):
        pitfalls.main([*leaving, *out])
        assert page.read_text() == "before <!-- table -->old<!-- /table --> after"
    capsys.readouterr()
    pitfalls.main(out)
    table = capsys.readouterr().out.rstrip()
    assert "| scale drift | `latent_loss` " in table
    assert page.read_text() == f"before <!-- table -->\n\n{table}\n\n<!-- /table --> after"


def test_the_sick_run_fails_and_the_cured_one_passes(tmp_path, capsys, name="collapse"):
    """As `make pitfalls` tries with each of them."""
    page = ROOT / "docs" / "pitfalls.md"
    pitfalls.main(["--only", name, "--out", str(tmp_path)])
    assert capsys.readouterr().out.rstrip().endswith("| FAIL / ok |")
    assert (tmp_path / f"pitfall-{name}.svg").stat().st_size > 10_000
    assert page.read_text() == PAGE


def judged_with(name, **changes):
    """The sick run with another cure than the script's: its verdict, and its report."""
    pitfall = replace(pitfalls.PITFALLS[name], **changes)
    judged = pitfalls.judge(pitfall, "sick", seed=0, watch=lambda: None)
    return pitfalls.said(pitfall, judged), judged.report


def test_other_cures_that_the_page_names():
    *base, cycle = pitfalls.PITFALLS["hidden-code"].sick
    detached = [*base, replace(cycle, policy="stop_gradient")]
    assert judged_with("hidden-code", sick=detached)[0] == "ok"
    assert judged_with("ignored-latent", world={"pairs": 4096, "twice": True})[0] == "ok"
    held = [*pitfalls.PITFALLS["scale-drift"].sick, cv.Prior("moment")]
    said, report = judged_with("scale-drift", sick=held)
    assert said == "ok" and report.cheat.cycle > 0.75
    norm = world.make_world().pairs.latents.norm(dim=1).mean().item()
    said, report = judged_with("scale-drift", bridge=cv.LatentBridge(norm=norm))
    assert said == "ok" and report.cheat.cycle > 0.95


def test_pairs_in_another_order_are_told():
    objective = cv.CycleObjective(world.TEXT, pitfalls.LATENT, [cv.Text(time=1.0), cv.Latent()])
    sound = world.make_world(pairs=4096)
    mixed = sound.pairs._replace(latents=sound.pairs.latents.roll(1, 0))
    trained = world.train(objective, sound._replace(pairs=mixed), steps=600)
    first, last = trained.history[0], trained.history[-1]
    assert last["text_loss"] < first["text_loss"]
    assert last["latent_loss"] < first["latent_loss"]
    report = cycle_report(
        trained.denoiser,
        cv.Batch(*sound.held_out),
        text_process=world.TEXT,
        latent_process=pitfalls.LATENT,
    )
    failing = {verdict.name for verdict in report.verdicts if verdict.ok is False}
    assert {"ignored text", "ignored latent"} <= failing
