"""The ablation as it runs: real sentences, workers, results that are found again, and the page."""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

# first, because other examples have a `data` too
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sentences"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "ablation"))
import decoding
import loop
import sampler
from baselines import baselines
from batches import Drawn
from cell import checkpoint, describe, path_of, write
from corpora import CORPORA, first
from data import Seen, encode
from evidence import blocks, fill
from inner_state import with_inner_state
from matrix import ALL, CONFIRMED, MAP, Cell
from measure import DECODED
from stored import Results
from tables import summary

import ablation
import cyclevae as cv
from cyclevae.testing import toy_batch

ROOT = Path(__file__).parents[2]
LIMIT, CAP = 2000, 2e9
TOO_FAST = 0.3  # stops early, early


def cells():
    for row in ("unimodal", "half", "pseudo", "pseudo_ridge"):
        yield Cell("docstrings", row, 1000, 100, 0, 3e-3, 0.1, CAP)
    for pairs in (300, 1000):
        yield Cell("docstrings", "paired", pairs, 0, 0, 3e-3, 0.1, CAP)
    yield Cell("docstrings", "paired_to_cap", 1000, 0, 0, 3e-3, 0.1, CAP)
    yield Cell("docstrings", "oracle", ALL, 0, 0, TOO_FAST, 0.1, CAP)
    yield Cell("fresh_pictures", "half", 300, 100, 0, 3e-3, 0.1, CAP)


@pytest.fixture(scope="module")
def options(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("ablation")
    options = argparse.Namespace(
        out=folder / "out", cache=cache, jobs=2, limit=LIMIT, corpus="docstrings"
    )
    data = CORPORA["docstrings"].load(options.cache, LIMIT, 1000, 0)
    results = options.out / "results" / "docstrings"
    describe(data, results / "corpus.json")
    found = baselines("docstrings", lambda *_: data, encode, seeds=(0,))
    write(results / "baselines.json", {"each": found})
    # Where cells look for it: a prior that has learned little, in place of half a minute for each
    few = partial(sampler.sample_prior, steps=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "sample_prior", few)
        process = cv.LatentProcess("cosine", prediction="v", shape=(64,))
        sampler.prior_samples(cache, data.train.latents[data.fitted_on.latents], DECODED, process)
    assert ablation.run_all(list(cells()), options) == 0
    return options


def test_every_cell_leaves_measures_and_its_configuration(options):
    for cell in cells():
        result = json.loads(path_of(cell, options.out).read_text())
        assert result["cell"] == cell.__dict__ and result["key"] == cell.key
        assert result["objectives"][0]["text_process"]
        assert result["measures"]["l2t_ce_true"] > 0 and len(result["each"]["rank"]) > 100
        assert result["training"]["flops"] > 0
        # there is an encoder at hand of sentences alone
        assert ("reencoded_true" in result["measures"]) == (cell.corpus == "docstrings")
        assert result["directions"].keys() == {"both", "text", "latent"}
        if cell.corpus == "fresh_pictures":
            for name, measures in result["directions_each"].items():
                mean = result["directions"][name]["t2l_mse"]
                assert np.mean(measures["t2l_mse"]) == pytest.approx(mean, abs=1e-3)
            decoded = result["decodings"]
            assert decoded.keys() == {"greedy", "critic"} and len(decoded["critic"]) == DECODED
            assert all(0 <= share <= 1 for share in decoded["greedy"])


def test_a_finished_cell_is_not_run_again_and_a_changed_one_is(options, capsys):
    todo = list(cells())
    before = {cell: path_of(cell, options.out).stat().st_mtime_ns for cell in todo}
    changed = replace(todo[3], cap=2 * CAP)
    assert ablation.run_all([*todo[:3], changed, *todo[4:]], options) == 0
    assert f"{len(todo)} cells, {len(todo) - 1} of them finished before" in capsys.readouterr().out
    for cell in todo:
        moved = path_of(cell, options.out).stat().st_mtime_ns != before[cell]
        assert moved == (cell == todo[3])


@pytest.mark.parametrize(("each", "looks"), [(False, 7), (True, 12)])
def test_patience_lasts_while_either_direction_gets_better(each, looks, monkeypatch):
    """The latent's half is best at the first look, the text's at the sixth."""
    scores = iter([{"both": 1.0 + (n > 0), "latent": 1.0, "text": -min(n, 5)} for n in range(99)])
    monkeypatch.setattr(loop, "look", lambda *_: next(scores))
    network, batch = nn.Linear(4, 4), toy_batch()
    training = loop.Training(1e-3, 0.1, cap=1e9, looks=10**7, each=each, ends="stop")
    run = loop.fit(
        network, lambda *_: network(batch.latents).sum(), repeat(Drawn(batch, None, None)), None,
        (None, None), training, seed=0,
    )  # fmt: skip
    assert len(run.history) == looks and run.stopped == "early"


def test_a_cell_that_fails_is_named_and_the_others_run(options, capsys):
    bad = replace(next(cells()), learning_rate=float("nan"), seed=7)
    good = replace(bad, learning_rate=1e-3)
    assert ablation.run_all([bad, good], options) == 1
    assert f"{bad.name} failed: ValueError" in capsys.readouterr().out
    assert "ValueError" in ablation.log_of(bad, options.out).read_text()
    assert path_of(good, options.out).exists() and not path_of(bad, options.out).exists()


def test_the_page_is_filled_from_the_results(options):
    results = Results(options.out / "results" / "docstrings")
    assert "half cycle" in summary(results)
    parts = blocks(results, None)
    page = fill((ROOT / "docs" / "evidence.md").read_text(), parts)
    assert "1,000 + half cycle" in parts["headline"]
    for name in ("primary", "core", "health", "costs", "baselines", "controls", "secondary"):
        assert f"<!-- {name} -->\n\n{parts[name]}\n\n<!-- /{name} -->" in page
        assert "nan" not in parts[name]


def test_every_way_to_decode_is_measured(options):
    cell = next(cell for cell in cells() if cell.row == "half")
    data = CORPORA["docstrings"].load(options.cache, LIMIT, cell.pairs, cell.seed)
    denoiser, processes = checkpoint(cell, data, options.out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "SAMPLES", (1, 2))
        patch.setattr(decoding, "DECODED", 8)
        found = {one["decoding"]: one for one in decoding.decodings(denoiser, processes, data)}
    itself, nearest = found["the sentence itself"], found["the nearest pair's text"]
    assert itself["words"] == 1  # but for those that are not in the vocabulary
    assert itself["cosine"] == max(one["cosine"] for one in found.values()) > 0.8
    assert nearest["words"] < 1 and nearest["nats"] < found["one sample"]["nats"]
    assert found["of 2 samples, the encoder's choice"]["l2t"] == 15


def test_states_of_the_encoder_replace_the_latents_and_nothing_else(cache, tmp_path):
    data = CORPORA["docstrings"].load(cache, LIMIT, 1000, 0)
    shown = Seen(torch.arange(200), torch.arange(100, 200))
    splits = {name: first(getattr(data, name), 200) for name in ("train", "validation", "test")}
    few = replace(data, **splits, fitted_on=shown)
    found, again = (with_inner_state(few, tmp_path) for _ in range(2))
    for name, split in splits.items():
        other = getattr(found, name)
        assert torch.equal(other.latents, getattr(again, name).latents)
        assert torch.equal(other.tokens, split.tokens) and other.sentences == split.sentences
        assert other.latents.shape == split.latents.shape
    z = found.train.latents[shown.latents]
    assert z.mean(dim=0).abs().max() < 1e-3 and (z.std(dim=0) - 1).abs().max() < 0.02


def test_the_committed_pages_say_what_the_committed_results_do():
    stored = ROOT / "examples" / "ablation" / "results"
    found = {folder.name: Results(folder) for folder in stored.iterdir()}
    mapped = {name: found[name] for name in MAP if name in found}
    confirmed = {name: found[name] for name in CONFIRMED if name in found}
    first_three = (found[name] for name in ("docstrings", "glosses", "seen"))
    parts = blocks(*first_three, mapped, confirmed)
    for path in (ROOT / "docs" / "evidence.md", ROOT / "README.md"):
        page = path.read_text()
        assert any(f"<!-- {name} -->" in page for name in parts)
        assert fill(page, parts) == page, f'{path.name}: run "make evidence"'
