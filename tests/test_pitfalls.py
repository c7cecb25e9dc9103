"""The pitfalls of docs/pitfalls.md: what the script measures is what the page tells."""

import sys
from pathlib import Path

import pytest
import torch

import cyclevae as cv
from cyclevae.testing import check_denoiser

ROOT = Path(__file__).parents[1]
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


def test_a_network_ignores_padding_and_takes_shorter_texts():
    network = world.Network()
    process = cv.LatentProcess("cosine", prediction="v", shape=(world.DIM,))
    check_denoiser(cv.as_denoiser(network), world.TEXT, process, lengths=(4, 3, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ill-conditioned-bridge", "feedback-loop", "collapse"])
def test_the_sick_run_fails_and_the_cured_one_passes(name, tmp_path, capsys):
    page = ROOT / "docs" / "pitfalls.md"
    pitfalls.main(["--only", name, "--out", str(tmp_path)])
    assert capsys.readouterr().out.rstrip().endswith("| FAIL / ok |")
    assert (tmp_path / f"pitfall-{name}.svg").stat().st_size > 10_000
    assert page.read_text() == PAGE
