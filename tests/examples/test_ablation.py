"""The ablation: its data is dealt fairly, its statistics are right, its matrix is what it says."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

# first, because other examples have a `data` too
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sentences"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "ablation"))
import confirm
import corpora
import landscape
from baselines import PENALTIES, bags, fit_ridge, ridge_latents
from batches import batches, corrupted, data_of
from bootstrap import Resampled, holm, pair_equivalents
from corpora import CHOOSING, few_to_choose_by, shown
from data import DemoError, Seen, Sentences, Split, regime_of
from labels import by_network
from matrix import (
    ALL,
    CONFIRMED,
    CONFIRMING_SEEDS,
    CORE,
    DECAYS,
    FRESH_SEEDS,
    MAP,
    MAPPED,
    MORE,
    PLAIN,
    PRIMARY,
    REPAIR_SEEDS,
    ROWS,
    SEEDS,
    TUNING_SEED,
    Cell,
    confirmation,
    core,
    exploratory,
    glance,
    quick,
    repair,
    search,
    tier_of_map,
    tuned_as,
)
from row_loss import CROSSING, RowLoss, objectives
from stored import Results
from tables import p_value

import cyclevae as cv
from cyclevae.testing import toy_denoiser

ROOT = Path(__file__).parents[2]
STORED = ROOT / "examples" / "ablation" / "results"
TUNED = json.loads((ROOT / "examples" / "ablation" / "tuned.json").read_text())


def split(rows=400, dim=4):
    torch.manual_seed(0)
    lengths = torch.randint(3, 9, (rows,))
    mask = torch.arange(8) < lengths[:, None]
    tokens = torch.randint(3, 7, (rows, 8)) * mask
    names = [f"sentence {i}" for i in range(rows)]
    return Split(names, tokens, mask, torch.randn(rows, dim), torch.arange(rows))


@pytest.fixture(scope="module")
def data():
    train = split()
    everything = torch.arange(len(train))
    return Sentences(train, train, train, None, None, Seen(everything, everything))


def cell(row, pairs=100, share=100, seed=0):
    return Cell("docstrings", row, pairs, share, seed, 1e-3, 0.1, cap=1e9)


# --- Data --------------------------------------------------------------------------------------


def test_all_rows_of_a_seed_see_the_same_pairs_and_unpaired_rows(data):
    seen = {row: data_of(cell(row), data)[1] for row in (*CORE, "contrastive")}
    for dealt in seen.values():
        for one, other in zip(vars(dealt).values(), vars(seen["half"]).values(), strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(data_of(cell("half", seed=1), data)[1].paired, seen["half"].paired)


def test_pairs_texts_and_latents_are_disjoint_and_share_cuts_the_halves(data):
    whole = data_of(cell("half"), data)[1]
    rows = torch.cat([whole.paired, whole.unpaired_text, whole.unpaired_latent])
    assert len(rows) == len(rows.unique()) == 400
    quarter = data_of(cell("half", share=25), data)[1]
    assert torch.equal(quarter.paired, whole.paired)
    for part, all_of_it in (
        (quarter.unpaired_text, whole.unpaired_text),
        (quarter.unpaired_latent, whole.unpaired_latent),
    ):
        assert len(part) == round(len(all_of_it) / 4) and torch.isin(part, all_of_it).all()


def test_pairs_only_sees_nothing_else_and_an_encoder_makes_every_text_a_pair(data):
    alone = data_of(cell("paired", share=0), data)[1]
    assert len(alone.paired) == 100 and not len(alone.unpaired_text) + len(alone.unpaired_latent)
    encoded = data_of(cell("encoded"), data)[1]
    assert len(encoded.paired) == 250 and not len(encoded.unpaired_text)
    assert len(data_of(cell("oracle", ALL, 0), data)[1].paired) == 400


def test_corrupted_rows_keep_frequencies_lengths_and_norms_and_lose_the_rest():
    train = split()
    texts, latents = torch.arange(100, 250), torch.arange(250, 400)
    spoilt = corrupted(train, texts, latents, seed=0)
    for rows in (torch.arange(100), latents):
        assert torch.equal(spoilt.tokens[rows], train.tokens[rows])
    assert Counter(spoilt.tokens[texts].flatten().tolist()) == Counter(
        train.tokens[texts].flatten().tolist()
    )
    assert torch.equal(spoilt.tokens != 0, train.tokens != 0)
    assert (spoilt.tokens[texts] == train.tokens[texts])[
        train.attention_mask[texts]
    ].float().mean() < 0.5
    assert torch.equal(spoilt.latents[:250], train.latents[:250])
    assert torch.allclose(
        spoilt.latents[250:].norm(dim=1), train.latents[250:].norm(dim=1), rtol=1e-4
    )
    cosine = torch.nn.functional.cosine_similarity(spoilt.latents[250:], train.latents[250:])
    assert cosine.abs().mean() < 0.6


def drawn(data, row, steps, seed=0):
    train, dealt = data_of(cell(row, share=100 * (row != "paired"), seed=seed), data)
    stream = batches(train, dealt, seed, sizes=(4, 4))
    return [next(stream) for _ in range(steps)], dealt


def test_pairs_come_in_the_same_order_whatever_is_unpaired(data):
    (with_others, _), (alone, _) = drawn(data, "half", 40), drawn(data, "paired", 40)
    for one, other in zip(with_others, alone, strict=True):
        assert torch.equal(one.batch.latents, other.batch.latents)
        assert other.batch.unpaired_tokens is None and other.batch.unpaired_latents is None


def test_every_row_comes_round_before_it_repeats(data):
    found, dealt = drawn(data, "half", 48)  # three pools of 16 batches of 4
    seen = Counter(torch.cat([d.texts for d in found]).tolist())
    assert set(seen) == set(dealt.unpaired_text.tolist())
    assert max(seen.values()) - min(seen.values()) <= 1


def test_the_length_of_a_latent_tells_nothing_of_its_hidden_partner(data):
    found, _ = drawn(data, "half", 400)
    lengths = data.train.attention_mask.sum(dim=1).float()
    hidden = torch.stack([lengths[d.latents].mean() for d in found])
    shown = torch.stack([d.batch.attention_mask.sum(dim=1).float().mean() for d in found])
    texts = torch.stack([lengths[d.texts].mean() for d in found])
    assert torch.corrcoef(torch.stack([shown, texts]))[0, 1] > 0.9  # so little is padded
    assert abs(torch.corrcoef(torch.stack([shown, hidden]))[0, 1]) < 0.15


# --- The matrix --------------------------------------------------------------------------------


def test_the_core_is_what_is_preregistered():
    cells = list(core("docstrings", TUNED, 2e12))
    assert len(cells) == len({c.name for c in cells}) == len({c.key for c in cells}) == 170
    for row in CORE:
        found = {(c.pairs, c.share) for c in cells if c.row == row}
        assert found == {(300, 100), (1000, 100), (3000, 100), (1000, 25)}
    assert {c.pairs for c in cells if c.row == "paired"} == {300, 1000, 3000, 6000}
    for seed in SEEDS:
        assert sum(c.seed == seed for c in cells) == 34
    assert len({c.cap for c in cells}) == 1


def test_cells_of_a_row_have_one_cap_but_for_the_control_with_twice_as_much():
    caps = {c.row: c.cap for c in exploratory("docstrings", TUNED, 2.0)}
    assert {row for row, cap in caps.items() if cap != 2.0} == {"unimodal_long"}
    assert caps["unimodal_long"] == 4.0


def test_rows_that_the_search_says_nothing_about_run_with_both_decays():
    cells = list(exploratory("docstrings", TUNED, 1.0))
    assert len(cells) == len({c.name for c in cells})
    decays = {(c.row, c.pairs): set() for c in cells}
    for each in cells:
        decays[each.row, each.pairs].add(each.weight_decay)
    for (row, _), found in decays.items():
        assert found == (
            {TUNED[tuned_as(row)]["weight_decay"]} if ROWS[row].unpaired == "real" else {0.1, 0.5}
        )


@pytest.mark.parametrize(("row", "chosen"), [("half", 0.1), ("l2t_only", 0.5)])
def test_the_weight_decay_that_counts_is_that_of_the_score_its_checkpoint_was_chosen_by(
    tmp_path, row, chosen
):
    (tmp_path / "corpus.json").write_text('{"train": 5, "test_words": [1]}')
    for decay, both, ce in ((0.1, [4.0, 2.0], [3.0]), (0.5, [3.0, 3.0], [2.0])):
        told = replace(cell(row), weight_decay=decay)
        result = {"cell": told.__dict__, "validation": {"both": both, "l2t_ce": ce}}
        (tmp_path / f"{told.name}.json").write_text(json.dumps(result))
    (found,) = Results(tmp_path).cells.values()
    assert [each["cell"]["weight_decay"] for each in found] == [chosen]


def test_the_second_corpus_runs_the_primary_test_on_seeds_that_nothing_was_tuned_on():
    cells = list(glance("glosses", TUNED, 1.0))
    assert {c.seed for c in cells}.isdisjoint({*SEEDS, TUNING_SEED})
    for row in ("paired", "unimodal", "pseudo", "half", "both"):
        found = {(c.seed, c.weight_decay) for c in cells if (c.row, c.pairs) == (row, PRIMARY)}
        assert found == {(seed, decay) for seed in FRESH_SEEDS for decay in (0.1, 0.5)}
    points = {c.pairs for c in cells if c.row == "paired"} | {ALL}
    assert len({c.seed for c in cells if c.row == "oracle"}) == 2 and len(points) == 5


def test_a_teacher_is_trained_before_who_learns_of_it():
    for tier, corpus in ((core, ""), (quick, ""), (glance, ""), *((tier_of_map, c) for c in MAP)):
        cells = list(tier(corpus, TUNED, 2e12))
        for i, each in enumerate(cells):
            if (teacher := each.of_teacher(TUNED)) is not None:
                assert teacher in cells[:i]


def test_the_map_has_every_row_at_every_number_of_pairs_in_one_decay():
    for corpus, budgets in MAP.items():
        cells = list(tier_of_map(corpus, TUNED, 1.0))
        assert {(c.row, c.pairs) for c in cells} == {(r, n) for r in MAPPED for n in budgets}
        assert len({(c.weight_decay, c.learning_rate) for c in cells}) == 1
        assert len(cells) == 2 * len(MAPPED) * len(budgets)


def test_the_map_reads_off_how_many_pairs_a_row_is_worth():
    curve = [(100, 3.0), (1000, 2.0), (3000, 1.5)]
    for own, pairs, times in ((2.0, 100, "10"), (2.5, 1000, "0.32"), (3.5, 1000, "< 0.1"),
                              (1.0, 1000, "> 3"), (2.0, 1000, "1")):  # fmt: skip
        assert landscape.times(curve, pairs, own) == times
    assert landscape.times(curve, 100, None) == ""


def test_the_second_test_is_of_fresh_seeds_and_of_every_row_it_compares():
    for corpus, pairs in CONFIRMED.items():
        found = list(confirmation(corpus, TUNED, 1.0))
        assert {c.seed for c in found} == set(CONFIRMING_SEEDS)
        used = {*SEEDS, *FRESH_SEEDS, *REPAIR_SEEDS, TUNING_SEED}
        assert used.isdisjoint(CONFIRMING_SEEDS)
        rows = {(c.row, c.pairs, c.weight_decay) for c in found}
        assert rows == {(r, pairs, 0.1) for r in ("half", "pseudo_ridge", "unimodal")} | {
            ("paired", n, decay) for n in (pairs, MORE * pairs) for decay in DECAYS
        }
        assert len({c.learning_rate for c in found if c.row != "paired"}) == 1


def confirmed(folder, gain):
    """Stored cells of a corpus, whose recipe is better by `gain` in all that is asked."""
    folder.mkdir(parents=True)
    about = {"train": 3000, "test_words": [2, 4]}
    (folder / "corpus.json").write_text(json.dumps(about))
    random = np.random.default_rng(0)
    for each in confirmation("fresh_pictures", TUNED, 1.0):
        ours = gain if each.row == "half" else 0.0
        # pairs only are better at the larger decay, which validation pairs choose
        ours += 0.5 * (each.row == "paired" and each.weight_decay == 0.5)
        sums = [round(w * (3 - ours) + 0.1 * random.normal(), 2) for w in (2, 4)]
        measures = {"ce_true": sums, "ce_predicted": sums, "t2l_mse": [0.6 - ours, 0.7 - ours]}
        score = {"l2t_ce": [3 - ours], "t2l_mse": [0.7 - ours], "both": [10 - ours]}
        result = {
            "cell": vars(each),
            "validation": score,
            "directions_each": {"text": measures, "latent": measures},
        }
        if each.row == "half":
            greedy = [0.3, 0.4]
            result["decodings"] = {"greedy": greedy, "critic": [x + gain for x in greedy]}
        (folder / f"{each.name}.json").write_text(json.dumps(result))
    return {"fresh_pictures": Results(folder)}


def test_the_second_test_says_what_is_there(tmp_path):
    found = confirmed(tmp_path / "better", 0.7)
    told = confirm.primary(found)
    assert told.count("cycles help") == 4
    decoder, _, encoder, critic = [q.difference.mean() for q in confirm.questions(
        found["fresh_pictures"], 300)]  # fmt: skip
    assert decoder == pytest.approx(-3 * 0.7, abs=0.2)  # of 3 words a row
    assert encoder == pytest.approx(-(0.7 - 0.5))  # against the better decay
    assert critic == pytest.approx(0.7)
    assert "-0.200" in confirm.worth(found)
    assert confirm.primary(confirmed(tmp_path / "worse", -0.7)).count("cycles hurt") == 4


def test_few_pairs_choose_on_the_map(data):
    few = few_to_choose_by(data)
    assert len(few.validation) == CHOOSING < len(data.validation) and few.test is data.test
    assert torch.equal(few.validation.latents, data.validation.latents[:CHOOSING])


def test_fresh_rows_are_held_out_in_an_order_that_says_nothing(data):
    found = [corpora.fresh(lambda *_: data, None, None, 100, seed) for seed in (0, 1)]
    for split in (found[0].validation, found[0].test):
        rows = torch.tensor([int(name.split()[1]) for name in split.sentences])
        assert len(rows.unique()) == len(split) and not torch.equal(rows, rows.sort().values)
        assert torch.equal(split.tokens, data.test.tokens[rows])
        assert torch.equal(split.clusters, rows)
    assert len(found[0].validation) == CHOOSING and len(found[0].test) == len(data.test)
    assert found[0].test.sentences == found[1].test.sentences  # one test for all seeds


def test_a_deal_shows_its_pairs_and_the_parts_without_partner():
    clusters = torch.arange(30)
    seen, dealt = shown(clusters, 10, 0), regime_of(clusters, 10, 0)
    assert set(seen.texts.tolist()) == {*dealt.paired.tolist(), *dealt.unpaired_text.tolist()}
    assert set(seen.latents.tolist()) == {*dealt.paired.tolist(), *dealt.unpaired_latent.tolist()}
    assert len(shown(clusters, ALL, 0).texts) == len(shown(clusters, 300, 0).texts) == 30


def test_the_search_gives_every_row_the_same_points_and_a_seed_of_its_own():
    cells = list(search("docstrings", 2e12))
    points = {
        row: [(c.learning_rate, c.weight_decay) for c in cells if c.row == row] for row in TUNED
    }
    assert len(set(map(tuple, points.values()))) == 1 and len(cells) == 4 * len(TUNED) == 20
    assert {c.seed for c in cells}.isdisjoint(SEEDS)
    assert all((TUNED[r]["learning_rate"], TUNED[r]["weight_decay"]) in points[r] for r in TUNED)


def test_every_row_makes_an_objective_and_is_in_a_tier():
    _, *processes = toy_denoiser(seed=0)
    for name, row in ROWS.items():
        made = objectives(row, tuple(processes))
        assert len(made) == max(1, len(row.modes))
        assert tuned_as(name) in TUNED
    tiers = [c for tier in (core, exploratory, repair) for c in tier("docstrings", TUNED, 1.0)]
    tiers += tier_of_map("pictures", TUNED, 1.0)
    assert {c.row for c in tiers} == set(ROWS)


def test_the_recipe_is_what_the_library_does_by_default():
    _, *processes = toy_denoiser(seed=0)
    (half,) = objectives(ROWS["half"], tuple(processes))
    *base, cycle = half.terms
    later = [*base, replace(cycle, weight=cycle.weight(10_000))]
    assert replace(half, terms=later) == cv.CycleObjective(*processes)


def test_a_key_changes_with_all_that_a_cell_is_told():
    told = cell("half")
    others = (
        replace(told, seed=1),
        replace(told, cap=2e9),
        replace(told, row="unimodal"),
        replace(told, learning_rate=2e-3),
    )
    assert len({told.key, *(other.key for other in others)}) == 5
    assert told.key == cell("half").key


def test_the_committed_results_are_of_what_their_cells_are_told():
    stored = [json.loads(path.read_text()) for path in STORED.glob("*/*-*.json")]
    assert len(stored) == 531
    for result in stored:
        assert result["key"] == Cell(**result["cell"]).key, f"{result['cell']}: run it again"


# --- Losses of a row ---------------------------------------------------------------------------


def toy(row, data):
    denoiser, text_process, latent_process = toy_denoiser(seed=0)
    processes = text_process, latent_process
    train, dealt = data_of(cell(row), data)
    labels = None
    if ROWS[row].extra == "pseudo_pairs":
        channel = ROWS[row].channel
        labels = by_network(denoiser.module, train, dealt, processes, 0, channel=channel).latents
    return denoiser, RowLoss(ROWS[row], processes, denoiser.module, train, 0, labels), dealt


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.slow
def test_every_row_has_a_loss_that_teaches(row, data):
    denoiser, row_loss, _ = toy(row, data)
    found, _ = drawn(data, row if ROWS[row].unpaired != "none" else "paired", 1)
    loss = row_loss.loss(denoiser, found[0], step=600)
    loss.backward()
    assert torch.isfinite(loss) and row_loss.passes >= 1
    row_loss.after_step(denoiser.module)


def test_pseudo_pairs_teach_the_decoder_latents_made_once(data):
    denoiser, row_loss, dealt = toy("pseudo", data)
    rows, made = dealt.unpaired_text[:5], row_loss.labels
    assert (made[dealt.unpaired_text] != 0).all() and (made[dealt.paired] == 0).all()
    tokens, mask = data.train.tokens[rows], data.train.attention_mask[rows]
    expected = row_loss.teach(denoiser, cv.Batch(tokens, mask, made[rows]), step=0).loss
    weight = objectives(ROWS["half"], row_loss_processes())[0].weights(10_000)["cycle_text"]
    logits = cv.l2t(denoiser, made[rows], mask, text_process=row_loss_processes()[0])
    assert expected.item() == pytest.approx(weight * cv.text_loss(logits, tokens, mask).item())


def test_channel_labels_lie_between_the_encoders_and_the_unpaired_latents(data):
    made = {row: toy(row, data)[1].labels for row in ("pseudo_half_both", "channel")}
    texts = toy("channel", data)[2].unpaired_text
    spread = {row: latents[texts].var().item() for row, latents in made.items()}
    assert not torch.equal(*made.values())
    assert spread["channel"] == pytest.approx(spread["pseudo_half_both"], rel=0.5)


def test_distilled_labels_teach_the_encoder_too(data):
    passes = {}
    for row in ("pseudo_half", "pseudo_half_both"):
        denoiser, row_loss, _ = toy(row, data)
        row_loss.loss(denoiser, drawn(data, row, 1)[0][0], step=600)
        passes[row] = row_loss.passes
    assert passes["pseudo_half_both"] == passes["pseudo_half"] + 1


def linear(noise):
    """Sentences whose latents are linear in their words, but for noise; more pairs than words."""
    train = split()
    matrix = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    z = bags(train, 7) @ matrix + noise * torch.randn(train.latents.shape)
    train = replace(train, latents=z)
    return Sentences(train, train, train, range(7), None, None)


def test_ridge_chooses_its_penalty_by_leaving_out_one_pair():
    data, pairs = linear(0.3), torch.arange(60)
    x, z = bags(data.train, 7)[pairs].double(), data.train.latents[pairs].double()

    def error(penalty):  # in a loop, with an intercept that is not penalised
        total = 0.0
        for i in range(60):
            kept = torch.arange(60) != i
            a, b = x[kept] - x[kept].mean(0), z[kept] - z[kept].mean(0)
            weights = torch.linalg.solve(a.T @ a + penalty * torch.eye(7).double(), a.T @ b)
            guess = (x[i] - x[kept].mean(0)) @ weights + z[kept].mean(0)
            total += (guess - z[i]).square().sum().item()
        return total

    found = fit_ridge(data, pairs)
    assert found.penalty == min(PENALTIES.tolist(), key=error)
    a, b = x - x.mean(0), z - z.mean(0)
    weights = torch.linalg.solve(a.T @ a + found.penalty * torch.eye(7).double(), a.T @ b)
    guess = ridge_latents(data, pairs, data.train)[pairs].double()
    torch.testing.assert_close(guess, a @ weights + z.mean(0), rtol=1e-4, atol=1e-5)


def test_ridge_of_more_words_than_pairs_agrees_with_scikit_learn():
    from sklearn.linear_model import RidgeCV

    torch.manual_seed(0)
    train = split()
    train = replace(train, tokens=torch.randint(3, 200, (400, 8)) * train.attention_mask)
    z = bags(train, 200) @ torch.randn(200, 4) + 0.3 * torch.randn(400, 4)
    data = Sentences(replace(train, latents=z), train, train, range(200), None, None)
    for pairs in (torch.arange(100), torch.arange(300)):  # fewer than words, and more
        theirs = RidgeCV(PENALTIES.numpy()).fit(bags(train, 200)[pairs].numpy(), z[pairs].numpy())
        found = fit_ridge(data, pairs)
        assert found.penalty == pytest.approx(theirs.alpha_)
        ours = ridge_latents(data, pairs, train).numpy()
        np.testing.assert_allclose(ours, theirs.predict(bags(train, 200).numpy()), atol=1e-4)


def test_ridge_refuses_an_end_of_its_grid():
    noise = replace(linear(0.0), train=split())  # latents that have nothing to do with the words
    with pytest.raises(DemoError, match="an end of its grid"):
        fit_ridge(noise, torch.arange(60))


def row_loss_processes():
    return toy_denoiser(seed=0)[1:]


def test_the_noise_on_pseudo_latents_is_that_of_the_cycle():
    (half,) = objectives(ROWS["half"], row_loss_processes())
    noise = half.terms[-1].bridge.noise
    assert noise == CROSSING == PLAIN["cycle_text"]["bridge"]["noise"] > 0
    row_loss = RowLoss(ROWS["pseudo"], row_loss_processes(), None, split(), 0)
    noised = row_loss._noised(torch.zeros(200, 100), noise)
    assert noised.std().item() == pytest.approx(noise, rel=0.02)


# --- Statistics --------------------------------------------------------------------------------


def test_the_bootstrap_of_one_seed_is_that_of_a_mean():
    values = np.random.default_rng(1).normal(0.3, 2.0, size=(1, 400))
    found = Resampled.draw(1, 400).mean(values)
    assert found.value == pytest.approx(values.mean())
    spread = values.std() / 20  # the standard error of a mean of 400
    assert found.draws.std() == pytest.approx(spread, rel=0.05)
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.06)


def test_the_bootstrap_draws_seeds_too():
    values = np.repeat(np.arange(5.0)[:, None], 50, axis=1)  # sentences agree, seeds do not
    found = Resampled.draw(5, 50).mean(values)
    assert found.value == 2.0
    assert found.draws.std() == pytest.approx((2.0 / 5) ** 0.5, rel=0.05)  # var 2, mean of 5


def test_words_weigh_sentences():
    words = np.array([1.0, 3.0])
    found = Resampled.draw(2, 2).mean(np.array([[2.0, 3.0], [2.0, 3.0]]), words)
    assert found.value == pytest.approx(10 / 8)
    assert set(found.draws.round(6)) == {2.0, 1.25, 1.0}  # only the first, both, only the second


def test_p_is_small_only_away_from_0():
    random = np.random.default_rng(0)
    far = Resampled.draw(5, 100).mean(random.normal(1.0, 1.0, size=(5, 100)))
    near = Resampled.draw(5, 100).mean(random.normal(0.0, 1.0, size=(5, 100)))
    assert far.p == pytest.approx(1e-4) and far.excludes_zero and near.p > 0.05


def test_no_p_is_written_that_the_bootstrap_cannot_resolve():
    assert p_value(0.0002) == "< 0.001"
    assert p_value(0.001) == "0.0010" and p_value(0.3104) == "0.3104"


def test_holm_on_the_example_of_a_textbook():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("sign", [1, -1])
def test_pair_equivalents_invert_a_logarithmic_curve(sign):
    pairs = np.array([300.0, 1000.0, 3000.0, 11126.0])
    curve = sign * np.log(pairs)[None]
    for n in (300.0, 700.0, 1000.0, 2900.0, 11126.0):
        found = pair_equivalents(pairs, curve, np.array([sign * np.log(n)]))
        assert found[0] == pytest.approx(0.0 if n == 300.0 else n, rel=1e-9)
    beyond = pair_equivalents(pairs, np.repeat(curve, 2, 0), sign * np.log([200.0, 12000.0]))
    assert beyond[0] == 0 and np.isinf(beyond[1])
