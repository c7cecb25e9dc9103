"""A term of one's own is a term like any other."""

import json
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

import cyclevae as cv
from cyclevae.diagnostics import gradient_ledger
from cyclevae.objective.term import UnpairedTerm
from cyclevae.testing import ToyNetwork, check_ranks, toy_batch, toy_denoiser
from rank_cases import LATENT as COSINE
from rank_cases import PARTS
from running import DENOISER, FULL, LATENT, Recorder, of, run, seeded

STEPS = [part for batches in PARTS for part in batches]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rhyme(UnpairedTerm):
    """Short latents, and pseudo-texts that say a word often: a loss of each direction."""

    word: int = 6
    bridge: str = "soft"

    parts = ("latent", "word")

    @property
    def encodes(self):
        return cv.Encode(rows=cv.Share(self.fraction, self.fraction))

    @property
    def decodes(self):
        return cv.Decode(rows=self.rows)

    def passes(self, step):
        return self.encodes, self.decodes

    def mine(self, rows):
        """Which rows of each direction it counts."""
        return rows.pick(rows.present()[0], self.encodes.rows), self.read(rows, "latent")

    def counts(self, rows, setting):
        assert setting.text_process.vocab_size == 7
        texts, latents = self.mine(rows)
        return {"latent": texts.sum(), "word": latents.sum()}

    def loss(self, step):
        z_hat = step.z_hat(self.encodes)
        text = step.pseudo_text(self.decodes, cv.TextBridge(self.bridge))
        mask = step.decoded(self.decodes).mask
        step.metrics[f"{self.name}_length"] = z_hat.detach().norm(dim=1).mean()
        said = (text[..., self.word] * mask).sum(dim=1)
        each, losses = (z_hat.square().mean(dim=1), -said), {}
        for part, loss, rows in zip(self.parts, each, self.mine(step.rows), strict=True):
            count = step.denominator(part)
            count = rows.sum().clamp(min=1) if count is None else count
            losses[part] = (loss * rows).sum() / count
        return losses


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistic(cv.Term):
    """Of the batch, so without a count; and broken by choice."""

    factor: float = 1.0

    def passes(self, step):
        return (cv.Encode(rows=cv.Share(1.0, 1.0)),)

    def loss(self, step):
        return self.factor * step.z_hat(*self.passes(step.number)).var(dim=0).sum()


BESIDE = (
    cv.Latent(),
    cv.Prior("mmd"),
    cv.CycleLatent(bridge="soft", policy=FULL),
    cv.Text(time=1.0),
)
RHYME = Rhyme(weight=0.5)


# What it is given


def test_it_reads_passes_and_pseudo_texts_that_others_run(monkeypatch):
    made = []

    def pseudo_text(*arguments, **options):
        made.append(cv.pseudo_text(*arguments, **options))
        return made[-1]

    monkeypatch.setattr("cyclevae.objective.step.pseudo_text", pseudo_text)
    with_it, without = of(*BESIDE, RHYME), of(*BESIDE)
    for objective, recorder in ((without, Recorder()), (with_it, Recorder())):
        metrics = run(objective, recorder).metrics
        assert len(recorder.calls) == objective.passes(0) == 3
    assert len(made) == 2  # one in each of the steps
    z_hat = LATENT.to_x0(
        DENOISER.denoise(*recorder.calls[0][:2], **recorder.calls[0][2]).latent_prediction,
        recorder.calls[0][1],
        torch.ones(8),
    )
    y_hat, _, state = recorder.calls[-1]
    torch.testing.assert_close(metrics["rhyme_latent_loss"], z_hat.square().mean().detach())
    said = (y_hat[..., 6] * state["attention_mask"]).sum() / 4
    torch.testing.assert_close(metrics["rhyme_word_loss"], -said.detach())
    torch.testing.assert_close(metrics["rhyme_length"], z_hat.norm(dim=1).mean().detach())
    assert metrics["rhyme_weight"] == 0.5
    total = sum(
        weight * value
        for name, weight in with_it.weights(0).items()
        for key, value in metrics.items()
        if key.startswith(name) and key.endswith("_loss")
    )
    torch.testing.assert_close(metrics["loss"], total)


def test_alone_it_runs_its_passes_and_is_described():
    objective, recorder = of(RHYME), Recorder()
    run(objective, recorder)
    assert len(recorder.calls) == objective.passes(0) == 2
    assert objective.describe().splitlines() == [
        "term   weight  pass             learns                frozen",
        "rhyme  0.5     T2L makes z_hat  encoder_only, shared  -",
        "               L2T makes y_hat  decoder_only, shared  -",
    ]


def test_a_detached_reader_teaches_nobody():
    @dataclass(frozen=True, kw_only=True, eq=False)
    class Looks(Statistic):
        def passes(self, step):
            return (cv.Encode(rows=cv.Share(1.0, 1.0), through="detach"),)

    looks = of(cv.Latent(), Looks())
    losses = looks.losses(DENOISER, toy_batch(), step=0)
    assert looks.passes(0) == 1 and not losses["looks"].requires_grad
    assert "nobody" in looks.describe().splitlines()[-1]


# When it runs


def test_its_weight_may_move_and_it_may_rest():
    for weight, expected in (
        (cv.ramp(2.0, 3), [0, 0, 0, 2.0, 2.0, 2.0]),
        (lambda step: step / 2, [0, 0.5, 1.0, 1.5, 2.0, 2.5]),
        (cv.take_turns(1.0, 2.0)[1], [0, 2.0, 0, 2.0, 0, 2.0]),
    ):
        other = cv.Latent(weight=cv.take_turns(1.0, 2.0)[0]) if expected[1] == 2 else cv.Latent()
        objective = of(other, replace(RHYME, weight=weight))
        assert [objective.weights(step).get("rhyme", 0) for step in range(6)] == expected
    objective = of(cv.Latent(), replace(RHYME, every=3))
    ran = ["rhyme_word_loss" in run(objective, step=step).metrics for step in range(4)]
    assert ran == [True, False, False, True]
    assert [objective.passes(step) for step in range(4)] == [2, 1, 1, 2]
    bad = of(cv.Latent(), replace(RHYME, weight=lambda step: -1.0))
    with pytest.raises(ValueError, match=r"`rhyme\.weight\(2\)` must be a finite number of at lea"):
        run(bad, step=2)


def test_its_parts_are_capped_and_have_no_gradient_above():
    free, capped = of(RHYME), of(replace(RHYME, cap=1e-6))
    plain, metrics = run(free).metrics, run(capped).metrics
    assert metrics["rhyme_latent_loss"].item() == pytest.approx(1e-6)
    assert metrics["rhyme_word_loss"] == plain["rhyme_word_loss"] < 0
    (gradient,) = torch.autograd.grad(
        run(capped).loss, DENOISER.module.latent_head.weight, allow_unused=True
    )
    assert gradient is None or not gradient.any()


def test_it_may_read_a_fraction_of_the_rows():
    recorder = Recorder()
    run(of(replace(RHYME, fraction=0.5)), recorder)
    assert [len(call[0]) for call in recorder.calls] == [2 + 2, 2]
    counts = of(replace(RHYME, fraction=0.5)).counts(toy_batch(rows=4))
    assert counts == {"rhyme_latent_loss": 4, "rhyme_word_loss": 2}


# Counts, ranks and accumulation


def test_its_counts_are_its_denominators():
    objective, batch = of(RHYME, cv.Latent()), toy_batch(rows=4)
    assert objective.known_counts() == ["rhyme_latent_loss", "rhyme_word_loss", "latent_loss"]
    counts = objective.counts(batch)
    assert counts["rhyme_latent_loss"] == 8 and counts["rhyme_word_loss"] == 4
    one, half = (
        run(objective, batch=batch, counts={n: k * c for n, c in counts.items()}).loss
        for k in (1, 2)
    )
    torch.testing.assert_close(one, 2 * half)
    torch.testing.assert_close(one, run(objective, batch=batch).loss)
    with pytest.raises(ValueError, match="unknown count 'rhyme_loss'; did you mean 'rhyme_word_lo"):
        run(objective, counts={"rhyme_loss": 1})
    assert of(Statistic(), cv.Latent()).known_counts() == ["latent_loss"]


def make(*terms):
    """The module of a step with this term, for ranks; importable by their processes."""
    terms = terms or (cv.Latent(), RHYME, cv.CycleLatent(bridge="soft", policy=FULL))
    objective = cv.CycleObjective(cv.TextProcess(2, 7, pad_id=0), COSINE, terms)
    return cv.StepModule(cv.as_denoiser(ToyNetwork(vocab_size=7, latent_dim=4)), objective)


def test_accumulation_leaves_its_gradient_alone():
    check_ranks(make, [STEPS], tolerance=1e-10)
    check_ranks(partial(make, Rhyme(bridge="gumbel")), [STEPS], tolerance=1e-10)


def test_ranks_refuse_what_must_depend_on_the_split():
    with pytest.raises(ValueError, match=r"`statistic`: it is a statistic of one call"):
        check_ranks(partial(make, cv.Latent(), Statistic()), [STEPS])
    with pytest.raises(ValueError, match=r"`rhyme`: fraction=0\.5 takes the first rows of each"):
        check_ranks(partial(make, cv.Latent(), Rhyme(fraction=0.5)), [STEPS])


def test_a_part_that_lacks_rows_counts_nothing_of_them():
    objective, batch = of(RHYME), cv.Batch(*toy_batch(rows=4)[:3])
    with pytest.raises(ValueError, match="`rhyme` reads rows without a partner, and the batch hol"):
        run(objective, batch=batch)
    counts = of(RHYME).counts(toy_batch(rows=4))
    assert run(objective, batch=batch, counts=counts).metrics["rhyme_word_loss"] == 0


# What is not finite


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
@pytest.mark.parametrize("beside", [(cv.Latent(), cv.Prior("mmd")), (cv.Text(), RHYME)])
def test_a_term_that_is_not_finite(factor, beside):
    bad = Statistic(factor=factor)
    weights = list(DENOISER.module.parameters())

    def outcome(*terms, **options):
        output = run(of(*terms, **options))
        return output, torch.autograd.grad(output.loss, weights, materialize_grads=True)

    _, expected = outcome(*beside)
    output, gradients = outcome(*beside, bad, non_finite="zero")
    torch.testing.assert_close(gradients, expected)
    assert output.metrics["non_finite_terms"] == 1 and output.loss.isfinite()
    output, _ = outcome(*beside, bad, non_finite="skip")
    assert output.skip and not outcome(*beside, non_finite="skip")[0].skip
    with pytest.raises(FloatingPointError, match=r"not finite on some rank: statistic \(here"):
        outcome(*beside, bad, non_finite="raise")


# The ledger, and configurations


def test_the_ledger_shows_who_learns_from_it():
    roles = DENOISER.roles.groups(DENOISER.module)
    groups = {role: [p for _, p in named] for role, named in roles.items()}
    for term, head in (
        (Rhyme(), "both"),
        (Statistic(), "encoder_only"),
    ):
        losses = of(cv.Latent(), term).losses(DENOISER, toy_batch(), step=0, generator=seeded())
        ledger = gradient_ledger(losses, groups)
        norms = {role: ledger.norms[role][term.name] for role in groups}
        assert norms["shared"] > 0 and norms["encoder_only"] > 0
        assert (norms["decoder_only"] > 0) == (head == "both")
        assert ("latent", term.name) in ledger.cosines["encoder_only"]


def test_it_survives_a_configuration():
    objective = of(cv.Latent(), replace(RHYME, word=3, every=2), Rhyme(name="second", cap=1.0))
    config = json.loads(json.dumps(objective.to_config()))
    assert config["terms"]["second"]["kind"] == "rhyme"
    assert cv.CycleObjective.from_config(config, terms={"rhyme": Rhyme}) == objective
    other = cv.CycleObjective.from_config(
        {**config, "terms": {"mine": {"word": 4}}}, terms={"mine": Rhyme}
    )
    assert other.terms == (Rhyme(name="mine", word=4),)
    phased = cv.Phases((objective, of(cv.Latent())), (0, 5))
    config = json.loads(json.dumps(phased.to_config()))
    assert cv.Phases.from_config(config, terms={"rhyme": Rhyme}) == phased


def test_it_may_stand_in_the_place_of_one_of_ours():
    """A subclass says what is new about it, and no more."""

    @dataclass(frozen=True, kw_only=True, eq=False)
    class Louder(cv.CycleText):
        factor: float = 2.0

        def loss(self, step):
            return self.factor * super().loss(step)

    plain, louder = run(of(cv.CycleText())).metrics, run(of(Louder())).metrics
    torch.testing.assert_close(louder["louder_loss"], 2 * plain["cycle_text_loss"])
    assert Louder.kind() == "louder" and Louder() != cv.CycleText(name="louder")
    assert of(Louder()).passes(0) == 2


# What is refused


class Silent(cv.Term):
    """Says nothing."""


def rhyme(**methods):
    return type("Broken", (Rhyme,), methods)()


ALL = cv.Share(1.0, 1.0)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: rhyme(loss=lambda self, step: torch.ones(3)),
            r"`broken` must return a scalar, or",
        ),
        (
            lambda: rhyme(
                loss=lambda self, step: {"latent": torch.ones(()), "wrod": torch.ones(())}
            ),
            r"one for each of its `parts` \('latent', 'word'\); got shapes {'latent': \[\], 'wrod'",
        ),
        (
            lambda: rhyme(passes=lambda self, step: (self.decodes,)),
            r"a loss reads Encode\(.*, which is no pass of this step, or not of these rows",
        ),
        (
            lambda: rhyme(passes=lambda self, step: (self.decodes, cv.Encode(rows=cv.Share(1.0)))),
            r"not of these rows: name it in the `passes` of its term",
        ),
        (
            lambda: rhyme(
                decodes=cv.Decode(rows=ALL),
                loss=lambda self, step: {
                    "latent": torch.zeros(()),
                    "word": step.pseudo_text(self.decodes, cv.TextBridge("argmax")).sum(),
                },
            ),
            r"the 'argmax' bridge of `broken` returned torch\.int64 ids, which have no gradient",
        ),
        (
            lambda: rhyme(passes=lambda self, step: (replace(self.encodes, freeze=("wrd.*",)),)),
            r"'wrd\.\*' of freeze\(\) matches no parameter",
        ),
    ],
)
def test_a_term_that_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        run(of(cv.Text(), make()))


def test_a_term_must_say_what_it_reads_and_what_it_costs():
    with pytest.raises(NotImplementedError, match="Silent must say in `passes` what it asks for"):
        of(Silent()).passes(0)
    half = type("Half", (Silent,), {"passes": lambda self, step: ()})()
    with pytest.raises(NotImplementedError, match="Half must return its `loss`"):
        run(of(half, cv.Latent()))


def test_a_term_whose_options_no_file_would_hold_is_refused():
    class Undecorated(cv.Text):
        gamma: float = 0.3

    with pytest.raises(TypeError, match=r"Undecorated has no field 'gamma'.*@dataclass"):
        Undecorated()


@pytest.mark.unhooked
def test_a_prior_of_ones_own_must_return_a_scalar_with_a_graph():
    def run_with(function):
        return run(of(cv.Latent(), cv.Prior(function, name="own")))

    for function in (lambda z: z.mean().item(), lambda z: None, lambda z: z.mean(dim=0)):
        with pytest.raises(TypeError, match="the function of `own` must return a tensor without"):
            run_with(function)
    with pytest.warns(match="`own` has no graph, so that nobody learns"):
        assert run_with(lambda z: z.detach().mean()).metrics["own_loss"].isfinite()


def test_what_goes_wrong_before_any_pass():
    """A check of one's own, at construction and at a step, is told with the name of the term."""

    def check(self, setting):
        if setting.text_process.vocab_size <= self.word:
            raise ValueError(f"`word` is {self.word}")

    def check_step(self, step):
        step.rows.need_pairs(step.name, least=9)

    strict = type("Strict", (Rhyme,), {"check": check, "check_step": check_step})
    with pytest.raises(ValueError, match="`terms`: strict: `word` is 9"):
        of(strict(word=9))
    recorder = Recorder(toy_denoiser()[0])
    with pytest.raises(ValueError, match="`strict` needs 9 pairs in a batch or more, got 4"):
        run(of(strict()), recorder)
    assert not recorder.calls
