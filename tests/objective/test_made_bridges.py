"""Cycles whose first half another makes, and base terms that go without their condition."""

import math

import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.model.denoiser import Denoised
from cyclevae.testing import ToyNetwork, assert_frozen, toy_batch, toy_denoiser
from running import MADE, TEXT, Recorder, of, run, seeded, teacher_of, tower, two_towers

NULLS = (cv.Text(null_rate=0.25), cv.Latent(null_rate=0.25))
TWICE = cv.Maker("teacher", guidance=2.0)
CYCLES = {
    "text": lambda maker: cv.CycleText(maker=maker, bridge=cv.LatentBridge(steps=2)),
    "latent": lambda maker: cv.CycleLatent(maker=maker, bridge=cv.TextBridge("unmask", steps=2)),
    "sleep": lambda maker: cv.Sleep(maker=maker),
}


@pytest.mark.parametrize("name", CYCLES)
def test_a_copy_that_is_equal_makes_the_same(name):
    """As is the average at decay 0, or a network without dropout in evaluation mode."""
    denoiser = toy_denoiser(seed=0)[0]
    teacher = cv.Teacher(denoiser.module, decay=0.0)
    with torch.no_grad():
        for parameter in denoiser.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=seeded(1)))
    before = run(of(CYCLES[name](cv.Maker())), denoiser)
    for by, equal in (("teacher", False), ("evaluated", True), ("updated", True)):
        if by == "updated":
            by, _ = "teacher", teacher.update(denoiser.module)
        objective = of(CYCLES[name](cv.Maker(by)))
        after = run(objective, denoiser, teacher=teacher.denoiser)
        wanted, found = (
            torch.autograd.grad(
                x.loss, list(denoiser.module.parameters()), retain_graph=True, allow_unused=True
            )
            for x in (before, after)
        )
        assert torch.equal(before.loss, after.loss) == equal
        same = [a is b or torch.equal(a, b) for a, b in zip(wanted, found, strict=True)]
        assert all(same) == equal


@pytest.mark.parametrize("name", CYCLES)
def test_the_base_losses_see_no_guidance(name):
    base = {}
    for guidance in (1.0, 2.0, 7.0):
        terms = (*NULLS, CYCLES[name](cv.Maker(guidance=guidance)))
        output = run(of(*terms))
        base[guidance] = [output.metrics[key] for key in ("text_loss", "latent_loss")]
        base[guidance].append(output.metrics[f"{terms[-1].name}_loss"])
    assert base[1.0][:2] == base[2.0][:2] == base[7.0][:2]
    assert len({float(values[2]) for values in base.values()}) == 3


def test_only_the_second_half_learns():
    denoiser = two_towers()
    teacher = teacher_of(denoiser)
    for term, learns, rests in (
        (cv.CycleText(maker=TWICE), "decoder", "encoder"),
        (cv.CycleLatent(maker=TWICE), "encoder", "decoder"),
        (cv.Sleep(maker=cv.Maker("evaluated", guidance=2.0)), "encoder", "decoder"),
    ):
        loss = of(*NULLS, term).losses(denoiser, toy_batch(rows=4), step=0, teacher=teacher)
        grads = torch.autograd.grad(
            loss[term.name], [p for _, p in tower(denoiser, learns)], retain_graph=True
        )
        assert all(g.any() for g in grads)
        assert_frozen(loss[term.name], [p for _, p in tower(denoiser, rests)])
    assert all(p.grad is None for p in teacher.module.parameters())


class Moded(ToyNetwork):
    """With dropout, whose modes are kept."""

    def __init__(self):
        super().__init__(7, 4)
        self.drop, self.modes = nn.Dropout(0.5), []

    def forward(self, tokens, latents, **state):
        self.modes.append((state["need"], self.drop.training))
        return super().forward(tokens, self.drop(latents), **state)


def test_the_maker_is_in_evaluation_mode_and_the_reader_as_it_was():
    network = Moded()
    run(of(cv.CycleText(maker=cv.Maker("evaluated"))), cv.as_denoiser(network))
    assert network.modes == [("latents", False), ("logits", True)]
    assert all(m.training for m in network.modules())


def twice(one, other):
    """Two text cycles beside what guidance stands on."""
    return of(*NULLS, cv.CycleText(maker=one), cv.CycleText(name="second", maker=other))


def test_equal_makers_share_a_pass_and_unequal_ones_none():
    assert twice(TWICE, TWICE).passes(0) == 2 + 2 + 2
    assert twice(TWICE, cv.Maker("teacher")).passes(0) == 2 + 2 + 1 + 2
    assert twice(cv.Maker("evaluated"), cv.Maker()).passes(0) == 2 + 1 + 1 + 2
    live = of(cv.Latent(), cv.CycleText(maker=cv.Maker("teacher")))
    assert live.passes(0) == 3  # the base pass is not the teacher's
    assert of(cv.Latent(), cv.CycleText()).passes(0) == 2
    assert of(cv.Latent(null_rate=0.1), cv.CycleText()).passes(0) == 3


def test_each_pass_is_run_by_its_maker_and_described():
    objective, model = of(*MADE), Recorder()
    judge = Recorder(teacher_of(model))
    run(objective, model, teacher=judge)
    assert (len(model.calls), len(judge.calls)) == (2 + 1 + 2 + 1 + 2 + 1, 2 * 2)
    assert objective.passes(0) == 13
    passes = [line[22:68].rstrip() for line in objective.describe().splitlines()]
    assert passes[1:] == [
        "L2T of the latent, 20% without",
        "T2L of the text, 20% without",
        "T2L makes z_hat, by the teacher, guided by 2",
        "L2T reads z_hat",
        "L2T makes y_hat, in evaluation mode",
        "L2T writes on, in evaluation mode",
        "T2L reads y_hat",
        "L2T dreams, guided by 1.5",
        "T2L reads a dreamt text",
    ]


class Perfect:
    """Knows each latent from its first word, and each word from its latent; nothing without."""

    def denoise(self, tokens, latents, *, text_time, latent_time, attention_mask, need):
        if need == "latents":
            known = tokens[:, :1].float().expand(-1, 4)
            return Denoised(None, torch.where(text_time[:, None] == 1, 0.0, known))
        words = torch.arange(7) == latents[:, :1, None].round().long()
        logits = torch.where(words, 50.0, 0.0) * (latent_time[:, None, None] < 1)
        return Denoised(logits.expand(*tokens.shape, 7), None)


@pytest.mark.parametrize("time", [1.0, cv.TimePolicy("uniform")])
def test_a_null_rate_is_the_share_of_rows_that_know_nothing(time):
    """Of 8 rows 2: their error is that of a guess, and that of the others 0."""
    tokens = torch.tensor([[3], [4], [5], [6]] * 2)
    batch = cv.Batch(tokens, tokens > 0, tokens.float().expand(-1, 4).contiguous())
    process = cv.LatentProcess("continuous_cosine", prediction="x0", shape=(4,))
    terms = [cv.Latent(time=time, null_rate=0.25), cv.Text(time=1.0, null_rate=0.25)]
    for seed in range(3):
        torch.manual_seed(seed)
        calls = Recorder(Perfect())
        metrics = cv.CycleObjective(TEXT, process, terms)(calls, batch, step=0).metrics
        encode, decode = (state for _, _, state in calls.calls)
        null = encode["text_time"] == 1
        assert null.sum() == (decode["latent_time"] == 1).sum() == 2
        squares = (tokens[null].float() ** 2).sum() / 8
        assert metrics["latent_loss"] == pytest.approx(squares.item(), rel=1e-5)
        assert metrics["text_loss"] == pytest.approx(math.log(7) / 4, rel=1e-4)
        assert metrics["text_accuracy"] == 1


def test_beside_null_rows_time_1_still_shows_the_encoder_no_latent():
    """A table schedule leaves a little of the latent at its end; the shared pass shows none."""
    process, shown = cv.LatentProcess("cosine", prediction="v", shape=(4,)), []
    for scale in (1.0, 1000.0):
        batch, model = toy_batch(rows=4), Recorder()
        batch = batch._replace(latents=scale * batch.latents)
        terms = [cv.Latent(null_rate=0.1)]
        run(cv.CycleObjective(TEXT, process, terms), model, batch=batch)
        shown.append(model.calls[0][1])
    assert torch.equal(*shown)


REFUSED = {
    "guided text cycle": (
        lambda: of(cv.Text(null_rate=0.1), cv.Latent(), cv.CycleText(maker=TWICE)),
        r"`cycle_text` guides its bridge .*without a text.*base encoder loss null_rate=0.1, or the "
        r"unconditional mode a `null_text_rate`, or leave guidance at 1",
    ),
    "guided latent cycle": (
        lambda: of(cv.Text(), cv.Latent(null_rate=0.1), cv.CycleLatent(maker=TWICE)),
        r"`cycle_latent` guides.*without a latent.*base decoder loss null_rate=0.1, or leave",
    ),
    "guided dreams": (lambda: of(cv.Text(), cv.Sleep(maker=TWICE)), "`sleep` guides its bridge"),
    "the unconditional mode has no null latent": (
        lambda: of(cv.Unconditional(null_text_rate=0.1), cv.CycleLatent(maker=TWICE)),
        "without a latent, which no term trains",
    ),
    **{
        f"{policy}, {by}": (
            lambda policy=policy, by=by: cv.CycleText(maker=cv.Maker(by), policy=policy),
            f"maker=Maker.by='{by}'.* makes the bridge, and nobody learns through it.*"
            "use 'detach' .policy='stop_gradient'.",
        )
        for policy in ("full", "alternating")
        for by in ("evaluated", "teacher")
    },
    "rloo": (
        lambda: cv.CycleLatent(maker=cv.Maker("teacher"), bridge="rloo", policy="full"),
        "nobody learns through it",
    ),
    "a bare name": (lambda: cv.CycleText(maker="teacher"), "`maker` must be a Maker"),
    "a denoiser": (lambda: cv.Sleep(maker=toy_denoiser()[0]), "`maker` must be a Maker"),
    "no row is shown anything": (lambda: cv.Text(null_rate=1.0), "`null_rate` = 1 shows no row"),
    "a share": (lambda: cv.Latent(null_rate=1.5), r"`null_rate` must lie in \[0, 1\]"),
    "of no weight": (
        lambda: cv.Latent(null_rate=0.1, weight=0),
        "`null_rate` = 0.1 has nothing to act on in a term that weighs 0",
    ),
    "a request that teaches": (
        lambda: cv.Encode(rows=cv.Share(1.0), maker=TWICE),
        "`maker` is another than the network.*use through='detach'",
    ),
    "phases that open the bridge": (
        lambda: cv.phases(
            of(cv.Latent(), cv.CycleText(maker=cv.Maker("teacher")), cv.CycleLatent()),
            latent_cycle_from=1,
            full_gradient_from=2,
        ),
        "nobody learns through it",
    ),
    "no teacher": (
        lambda: run(of(cv.CycleText(maker=cv.Maker("teacher")))),
        r"bridge of `cycle_text` reads a frozen copy.*Teacher\(network\)",
    ),
    "a teacher that learns": (
        lambda: run(of(cv.CycleText(maker=cv.Maker("teacher"))), teacher=toy_denoiser()[0]),
        "`teacher` must be frozen",
    ),
}


@pytest.mark.unhooked
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_before_a_pass(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_the_unconditional_mode_trains_null_texts_where_guidance_reads_them():
    objective = of(cv.Unconditional(), cv.CycleText(maker=cv.Maker(guidance=2.0)))
    assert objective.setting.reads_null_text
    assert not of(
        cv.Unconditional(), cv.CycleText(maker=cv.Maker("teacher"))
    ).setting.reads_null_text
    with pytest.raises(ValueError, match="without a text, which no term trains"):
        of(cv.Unconditional(null_text_rate=0.0), cv.CycleText(maker=cv.Maker(guidance=2.0)))


@pytest.mark.parametrize("rule", ["raise", "skip", "zero"])
def test_makers_go_with_the_rules_for_steps_that_are_not_finite(rule):
    plain, ruled = (
        run(of(*MADE, non_finite=how), teacher=teacher_of(toy_denoiser()[0]))
        for how in (None, rule)
    )
    torch.testing.assert_close(plain.loss, ruled.loss)
