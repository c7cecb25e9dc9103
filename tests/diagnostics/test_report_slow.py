"""The report: each pitfall is called by its name, and a sound model passes."""

import math
import sys
from dataclasses import FrozenInstanceError, replace
from html import escape

import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.diagnostics import (
    CheatTest,
    Treatment,
    cheat_test,
    cycle_report,
    latent_health,
    latent_probe,
    retrieval,
    text_probe,
    verdicts,
)
from cyclevae.model.denoiser import Denoised
from cyclevae.testing import toy_batch, toy_denoiser
from oracles import Spy
from toys import (
    PROCESSES,
    TEXT,
    Toy,
    batch,
    encode,
    hidden,
    private,
    read,
    read_digits,
    read_private,
)

NAMES = [
    "ill-conditioned bridge",
    "decoder at chance",
    "ignored latent",
    "encoder at chance",
    "ignored text",
    "collapse",
    "scale drift",
    "hidden code",
    "feedback loop",
]
CHANCE = ("decoder at chance", "encoder at chance")


def report(denoiser, **options):
    return cycle_report(denoiser, batch(), **{**PROCESSES, **options})


def judged(found):
    """`(failed, unknown)` names."""
    assert [verdict.name for verdict in found.verdicts] == NAMES
    return tuple({v.name for v in found.verdicts if v.ok is ok} for ok in (False, None))


# --- each pitfall -----------------------------------------------------------------------------


def test_a_sound_model_passes():
    found = report(Toy())
    assert judged(found) == (set(), set())
    assert found.latent_error == found.cycle_latent_error == found.latent_loss == 0
    assert found.shuffled_latent_error == pytest.approx(2, abs=0.2)
    assert found.cheat.cycle == found.retrieval.recall == 1


@pytest.mark.parametrize(
    ("toy", "failed", "unknown"),
    [
        # reads z_hat alone: text and latent cycle are perfect, no pair is
        (
            Toy(private, read_private),
            {"feedback loop", "ignored latent", "ignored text", CHANCE[0]},
            set(),
        ),
        (Toy(hidden, read_digits), {"hidden code", "ignored text", CHANCE[1]}, set()),
        (
            Toy(lambda tokens: 0 * encode(tokens)),
            {"collapse", "ignored text", CHANCE[1]},
            {"hidden code", "feedback loop"},
        ),
        (
            Toy(lambda tokens: 1 + 0.01 * encode(tokens)),
            {"collapse", "scale drift", "ignored text", CHANCE[1]},
            {"hidden code", "feedback loop"},
        ),
        (Toy(lambda tokens: encode(tokens) * torch.eye(8)[0]), {"collapse"}, {"hidden code"}),
        (Toy(lambda tokens: 5 * encode(tokens)), {"scale drift"}, set()),
        (Toy(lambda tokens: 0.3 * encode(tokens)), {"scale drift"}, set()),
        (Toy(lambda tokens: encode(tokens) + 0.6), {"scale drift"}, set()),
        (
            Toy(read=lambda z: read(torch.ones_like(z))),
            {"ignored latent", CHANCE[0]},
            {"hidden code", "feedback loop"},
        ),
    ],
    ids=["private", "hidden", "zero", "point", "line", "long", "short", "moved", "deaf"],
)
def test_each_pitfall(toy, failed, unknown):
    assert judged(report(toy)) == (failed, unknown)


def test_the_mean_of_what_a_text_may_mean_is_no_drift():
    """Half of the latents' bits are not told by the text: the best z_hat is 0 there."""
    told = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    tokens = torch.randint(3, 5, (64, 2), generator=torch.Generator().manual_seed(0))
    free = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).sign()
    latents = told * encode(tokens.roll(1, 1)) + (1 - told) * free
    found = cycle_report(
        Toy(lambda tokens: told * encode(tokens.roll(1, 1))),
        cv.Batch(tokens, torch.ones_like(tokens), latents),
        **PROCESSES,
    )
    assert found.z_hat.norm < 0.5 * found.z_hat.target_norm
    assert "scale drift" not in judged(found)[0]


# --- the host's failure -----------------------------------------------------------------------


class Network(nn.Module):
    """T2L is linear in the words and can copy `z_t`, though not exactly; L2T is linear.

    Were the copy linear too, Adam would solve T2L to 1e-12, where even a factor of 6e4 is harmless.
    """

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(19, 16)
        self.copy = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
        self.text_head = nn.Linear(8, 2 * 19)

    def forward(self, tokens, latents, **state):
        first, second = self.words(tokens).unbind(dim=1)
        prediction = torch.cat([first[:, :8], second[:, 8:]], dim=1).view(-1, 2, 8).sum(1)
        return Denoised(self.text_head(latents).view(-1, 2, 19), prediction + self.copy(latents))


def trained(prediction, schedule="cosine"):
    """Both base losses, T2L at full noise, until they look healthy."""
    torch.manual_seed(0)
    denoiser = cv.as_denoiser(Network())
    latent_process = cv.LatentProcess(schedule, prediction=prediction)
    optimizer = torch.optim.Adam(denoiser.module.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=400)
    for step in range(400):
        tokens, mask, latents = batch(seed=step)[:3]
        inputs = denoiser, tokens, latents, mask
        loss = cv.l2t_loss(*inputs, text_process=TEXT)
        loss = loss + cv.t2l_loss(*inputs, text_process=TEXT, latent_process=latent_process)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    held_out = batch(rows=256, seed=1000)
    processes = {"text_process": TEXT, "latent_process": latent_process}
    return denoiser, held_out, processes


@pytest.mark.parametrize("schedule", ["cosine", "continuous_cosine"])
def test_an_epsilon_bridge_at_full_noise_is_caught(schedule):
    """Its losses look as healthy as those of the v model below, and nothing crosses."""
    denoiser, held_out, processes = trained("epsilon", schedule)
    with pytest.raises(ValueError, match="max_gain"):
        cv.cycle_text_loss(denoiser, *held_out[:2], noise=held_out.latents, **processes)
    found = cycle_report(denoiser, held_out, **processes)
    assert found.text_loss < 0.1 and found.latent_loss < 0.01
    failed, _ = judged(found)
    assert "ill-conditioned bridge" in failed
    assert found.gain > 6e4 and found.cheat.cycle < 0.3
    assert found.latent_error > 0.9
    assert str(found).splitlines()[-len(NAMES) - 1].startswith("FAIL  ill-conditioned bridge")
    assert "predict `v` or `x0`" in found.verdicts[0].sentence
    assert {v.cure for v in found.verdicts[3:]} <= {"", "mend the bridge first"}


def test_a_v_bridge_trained_alike_passes():
    denoiser, held_out, processes = trained("v")
    found = cycle_report(denoiser, held_out, **processes)
    assert found.text_loss < 0.1 and found.latent_loss < 0.01
    assert judged(found) == (set(), set())
    assert found.cheat.cycle > 0.98 and found.latent_error < 0.01


def test_the_copy_that_looks_perfect():
    """eps_hat = z_t has a loss of 1e-9, decodes to 0, and reads every text alike."""

    class Copy(Toy):
        def denoise(self, tokens, latents, **state):
            output = super().denoise(tokens, latents, **state)
            return output._replace(latent_prediction=latents) if output.logits is None else output

    process = cv.LatentProcess(prediction="epsilon")
    found = report(Copy(), latent_process=process)
    assert found.latent_loss < 1e-8 and found.cheat.pairs == 1
    failed, unknown = judged(found)
    assert failed == {"ill-conditioned bridge", "ignored text", "collapse", CHANCE[1]}
    assert unknown == {"hidden code", "feedback loop"}
    assert found.z_hat.norm < 1e-4 and found.latent_error == pytest.approx(1, abs=0.05)


# --- the numbers ------------------------------------------------------------------------------


def test_the_parts_are_those_of_the_other_functions():
    found = report(Toy())
    tokens, mask, latents = batch()[:3]
    options = PROCESSES
    assert found.text == text_probe(Toy(), tokens, latents, mask, **options)
    assert found.latent.information == pytest.approx(
        latent_probe(Toy(), tokens, latents, mask, samples=8, **options).information, rel=0.2
    )
    alone = cheat_test(Toy(), tokens, latents, mask, **options)
    assert (found.cheat.cycle, found.cheat.pairs) == (alone.cycle, alone.pairs)


def test_errors_are_shares_of_the_variance():
    half = Toy(lambda tokens: encode(tokens) + torch.eye(8)[0])
    found = report(half)
    latents = batch().latents
    total = latents.double().var(0, correction=0).sum().item()
    assert found.latent_error == pytest.approx(1 / total, rel=1e-5)
    off = (latents + torch.eye(8)[0]).roll(1, 0) - latents
    rows = off.square().sum(1) / total
    assert found.shuffled_latent_error == pytest.approx(rows.mean().item(), rel=1e-5)
    spread = (rows - 1 / total).std() / math.sqrt(64)
    assert found.latent_gap_error == pytest.approx(spread.item(), rel=1e-4)
    assert found.latent_loss == pytest.approx(1 / 8)
    assert found.text_loss == pytest.approx(found.text.right / 2)  # nats per text of two words


def test_the_latent_cycle_goes_through_the_text_that_is_written():
    wrong = Toy(read=lambda z: read(-z))  # every bit turned
    found = report(wrong)
    latents = batch().latents
    expected = 4 * 8 / latents.double().var(0, correction=0).sum().item()
    assert found.latent_error == 0
    assert found.cycle_latent_error == pytest.approx(expected, rel=1e-5)


def test_stored_statistics():
    found = report(Toy(), mean=1.0, variance=4.0)
    assert found.latents.scale == pytest.approx(0.5, abs=0.01)
    assert found.z_hat.target_norm == pytest.approx(math.sqrt(8 * 5))
    assert "scale drift" in judged(found)[0]
    coarse = report(Toy(), variance=1e4).cheat.treatments[-1]
    assert coarse.name == "grid 1/1" and coarse.cycle < 0.3  # rounded to multiples of 100


def test_latents_of_several_vectors():
    """Read as one vector: the numbers are those of the flat latents."""

    class Tall(Toy):
        def denoise(self, tokens, latents, **state):
            output = super().denoise(tokens, latents.flatten(1), **state)
            if output.latent_prediction is None:
                return output
            return output._replace(latent_prediction=output.latent_prediction.view_as(latents))

    pairs = batch()._replace(latents=batch().latents.view(-1, 2, 4))
    process = cv.LatentProcess(prediction="x0", shape=(2, 4))
    found = cycle_report(Tall(), pairs, text_process=TEXT, latent_process=process)
    assert found == report(Toy())


def test_only_pairs_are_read_and_at_the_stated_cost():
    spy = Spy(Toy())
    pairs = batch()
    more = pairs._replace(
        unpaired_tokens=torch.full((3, 4), 5),
        unpaired_attention_mask=torch.ones(3, 4),
        unpaired_latents=torch.zeros(5, 8),
    )
    cycle_report(spy, more, **PROCESSES)
    assert len(spy.calls) == 35 and all(len(call["latents"]) == 64 for call in spy.calls)
    spy.calls.clear()
    cycle_report(spy, pairs, bridge=cv.LatentBridge(steps=3), samples=1, **PROCESSES)
    assert len(spy.calls) == 35 + 2 * 2 - 9


def test_the_time_and_the_bridge():
    process = cv.LatentProcess(prediction="epsilon")
    spy = Spy(Toy())
    bridge = cv.LatentBridge(steps=2)
    found = report(spy, latent_process=process, bridge=bridge, time=0.9, samples=1)
    assert found.gain == pytest.approx(6.37, abs=0.01) and found.verdicts[0].ok
    assert found.time == 0.9 and found.max_gain == 10
    times = [c["latent_time"].unique() for c in spy.calls if c["need"] == "latents"]
    assert [t.item() for t in times[:5]] == pytest.approx([0.9, 0.45, 0.9, 0.45, 0.9])
    assert (times[5].min() < 0.2) and times[5].max() > 0.9
    spy.calls.clear()
    report(spy, low=0.4, high=0.6, samples=1)
    times = [c["latent_time"] for c in spy.calls if c["need"] == "latents"][3]
    assert times.min() > 0.4 and times.max() < 0.6 and len(times.unique()) > 9
    assert report(Toy(), latent_process=replace(process, max_gain=5.0), time=0.9).verdicts[
        0
    ].ok is (False)
    process = cv.LatentProcess(prediction="v")
    assert report(Toy(), latent_process=process, time=0.5).gain == pytest.approx(0.71, abs=0.01)


def test_modes_random_state_and_repetition():
    denoiser, text, latent = toy_denoiser()
    module = denoiser.module
    module.shared = nn.Sequential(module.shared, nn.Dropout(0.5))
    processes = {"text_process": text, "latent_process": latent}
    before = torch.get_rng_state()
    found = [cycle_report(denoiser, toy_batch(rows=8), **processes) for _ in range(2)]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in module.modules())
    assert all(p.grad is None for p in module.parameters())
    seed = torch.Generator().manual_seed(3)
    assert cycle_report(denoiser, toy_batch(rows=8), generator=seed, **processes) != found[0]
    with pytest.raises(FrozenInstanceError):
        found[0].gain = 0.0


# --- table and picture ------------------------------------------------------------------------


def test_the_table():
    text = str(report(Toy()))
    lines = text.splitlines()
    assert lines[0] == "cycle report on 64 pairs, bridge from time 1"
    assert all(line == line.rstrip() for line in lines)
    accuracies = lines[lines.index("accuracy    text cycle  pairs") :][:11]
    assert accuracies[1] == "as it is          100%   100%"
    assert accuracies[-3].startswith("shuffled") and accuracies[-2].startswith("no latent")
    assert accuracies[-1].startswith("guessed")
    assert sum(line.startswith("ok    ") for line in lines) == len(NAMES)
    assert "active of 8            8     8" in lines
    text, latent = lines[lines.index("base losses   text  latent") + 4 :][:2]
    assert len(text.split()) == 4 + 4 and len(latent.split()) == 4 + 5  # with its difference


def test_the_picture(tmp_path):
    report(Toy(hidden, read_digits)).plot(tmp_path / "cheat.png")
    assert (tmp_path / "cheat.png").stat().st_size > 5000
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    report(Toy(hidden, read_digits)).plot(axes)
    assert axes.get_title() == (
        "9 of 9 pitfalls tested on 64 pairs\nfound: encoder at chance, ignored text, hidden code"
    )
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[:2] == ["as it is", "noise 0.03"] and names[-2:] == ["shuffled", "no latent"]
    cycle, pairs = axes.containers
    assert cycle[0].get_width() == pairs[0].get_width() == 1 and cycle[1].get_width() < 0.3
    report(Toy()).plot(axes)
    assert axes.get_title() == "9 of 9 pitfalls tested on 64 pairs\nnone of them found"


def test_a_picture_needs_matplotlib_and_a_notebook_does_without(monkeypatch, tmp_path):
    found = report(Toy(hidden, read_digits))
    html = found._repr_html_()
    assert f"<h4>{found.title}</h4><p>{found.summary}</p>" in html
    assert html.count("<table>") == 6 and html.count("data:image/png;base64,iVBOR") == 1
    for verdict in found.verdicts:
        assert f">{verdict.mark}</td>" in html and escape(verdict.sentence) in html
    found.save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html><meta charset") and page.endswith(html)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        found.plot(tmp_path / "cheat.png")
    without = found._repr_html_()
    assert "<img" not in without and without.count("<table>") == 6


def test_the_title_of_many_findings_stays_in_the_picture():
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6.4, 4.2)).subplots()
    denoiser, text, latent = toy_denoiser()
    lost = cycle_report(denoiser, toy_batch(rows=32), text_process=text, latent_process=latent)
    lost.plot(axes)
    assert len(lost.summary) > 2 * 64
    assert max(map(len, axes.get_title().splitlines())) <= 64


def test_progress_is_told_before_each_part():
    told = []
    with_it = report(Toy(), progress=told.append)
    assert [words[:22] for words in told] == [f"cycle report, {i} of 4: " for i in range(1, 5)]
    assert str(with_it) == str(report(Toy()))


# --- verdicts, at their thresholds ------------------------------------------------------------


def test_a_gap_within_two_errors_is_unknown():
    assert verdicts.ignored_latent(1.0, 0.49, 10.0).ok is True
    unsure = verdicts.ignored_latent(1.0, 0.51, 10.0)
    assert unsure.ok is None and "+- 0.51 of 10 nats; give more rows" in unsure.sentence
    assert verdicts.ignored_latent(0.1, 0.001, 10.0).ok is False  # sure, and next to nothing
    assert verdicts.ignored_latent(-1.0, 9.0, 10.0).ok is False
    assert verdicts.ignored_text(0.5, 0.1, 0.5, 1.0).ok is True
    assert verdicts.ignored_text(0.5, 0.3, 0.5, 1.0).ok is None
    assert verdicts.ignored_text(0.0, 0.0, 1.0, 1.0).ok is False


def test_what_a_small_change_may_cost():
    def judge(after, size=0.1, cycle=0.9):
        treatment = Treatment("noise", size, after, 0.5)
        return verdicts.hidden_code(CheatTest(cycle, 1.0, 0.1, 0.0, (treatment,))).ok

    assert judge(0.51) is True and judge(0.49) is False  # half of what is above the floor of .1
    assert judge(0.0, size=0.2) is None
    assert judge(0.0, cycle=0.14) is None


def test_the_worst_of_the_small_changes_is_told():
    small = (Treatment("noise 0.01", 0.01, 0.8, 0.9), Treatment("noise 0.1", 0.1, 0.7, 0.85))
    found = verdicts.hidden_code(CheatTest(0.9, 1.0, 0.1, 0.0, small))
    assert found.measured == (
        "the cycle's accuracy of 90% is 70% after noise 0.1 (true latents: 100%, then 85%), and "
        "10% without the latent"
    )
    same = [treatment._replace(cycle=0.9) for treatment in small]
    assert "90% is 90% after noise 0.1 " in (
        verdicts.hidden_code(CheatTest(0.9, 1.0, 0.1, 0.0, tuple(same))).measured
    )


@pytest.mark.parametrize(
    ("changes", "ok"),
    [
        ({}, True),
        ({"scale": 0.11, "effective_rank": 2.1, "active": 2, "never": 0.79}, True),
        ({"scale": 0.09}, False),
        ({"effective_rank": 1.9}, False),
        ({"active": 1}, False),
        ({"never": 0.81}, False),
    ],
)
def test_what_counts_as_collapse(changes, ok):
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    true = latent_health(z)._replace(effective_rank=8.0, active=8)
    found = retrieval(z, z)
    found = found._replace(never=changes.get("never", found.never))
    own = {name: value for name, value in changes.items() if name != "never"}
    verdict = verdicts.collapse(true._replace(**own), true, found)
    assert verdict.ok is ok and bool(verdict.cure) is not ok


def test_how_much_better_than_pairs_a_cycle_may_be():
    def judge(cycle, pairs, latent_error, cycle_latent_error):
        cheat = CheatTest(cycle, pairs, 0.1, 0.1, ())
        return verdicts.feedback_loop(cheat, latent_error, cycle_latent_error).ok

    assert judge(0.8, 0.71, 0.3, 0.21) is True
    assert judge(0.8, 0.69, 0.3, 0.3) is False
    assert judge(0.8, 0.8, 0.3, 0.19) is False
    assert judge(0.12, 0.9, 0.3, 0.95) is None
    assert judge(0.12, 0.0, 2.0, 0.95) is None


PAIRS = batch(rows=2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (cv.Batch(), "`batch` needs at least 2 pairs to compare, got 0; give `tokens`"),
        (batch(rows=1), "`batch` needs at least 2 pairs to compare, got 1"),
        (PAIRS._replace(latents=None), "`batch.tokens` came without `batch.latents`"),
        (PAIRS._replace(latents=torch.ones(2, 8)), "`latents` are equal in all rows"),
        (PAIRS._replace(tokens=PAIRS.tokens + 99), "`batch.tokens` must hold ids"),
    ],
)
@pytest.mark.unhooked
def test_refused(given, expected):
    with pytest.raises(ValueError, match=expected):
        cycle_report(Toy(), given, **PROCESSES)


@pytest.mark.unhooked
def test_a_model_that_diverged_is_named():
    with pytest.raises(ValueError, match=r"`z_hat` must be finite.*has training diverged"):
        report(Toy(lambda tokens: encode(tokens) / 0))
