"""`python -m cyclevae`, as somebody meets it who has just installed the wheel."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cyclevae import __main__ as tour


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(tour, "STEPS", 24)
    monkeypatch.setattr(tour, "WARMUP", 6)


def test_a_short_tour_tells_everything(short, tmp_path, capsys):
    picture = tmp_path / "tour.png"
    assert tour.main(["--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    for part in ("pairs alone", "with the cycle", "cycle report on 512 pairs", "ok    collapse"):
        assert part in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"^  docs/\w+\.md ", out, flags=re.MULTILINE)) == 3


def test_a_picture_that_cannot_be_written_ends_nothing(short, tmp_path, capsys):
    assert tour.main(["--picture", str(tmp_path / "missing" / "tour.png")]) == 0
    assert "no picture: [Errno 2]" in capsys.readouterr().out


def test_progress_is_for_terminals(short, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    tour.main(["--picture", str(tmp_path / "tour.png")])
    assert "step  24 of 24  held-out words" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tour, "train", interrupt)
    assert tour.main([]) == 130
    assert capsys.readouterr().out.endswith("stopped\n")


def test_what_it_says_to_read_is_there():
    root = Path(__file__).parents[2]
    for page in re.findall(r"docs/\w+\.md", tour.READ_ON):
        assert (root / page).is_file(), page


def test_the_cycle_helps_without_matplotlib(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "cyclevae"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    alone, cycle = map(int, re.search(r"all words right +(\d+)% +(\d+)%", done.stdout).groups())
    assert alone < 65 and cycle > 85
    assert "FAIL" not in done.stdout and "pip install matplotlib" in done.stdout
    assert set(os.listdir(tmp_path)) <= {"matplotlib.py", "__pycache__"}
