"""What a step is told to run: its passes, whose turn it is, and which rows it reads."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cyclevae as cv
from cyclevae.testing import assert_learns, toy_batch
from running import (
    DENOISER,
    FIVE,
    FULL,
    LATENT,
    ONE_SHOT,
    TEXT,
    Recorder,
    of,
    run,
    seeded,
    teacher_of,
    tower,
    two_towers,
)
from strategies import quick

CYCLES = ("cycle_text", "cycle_latent")
FROZEN = cv.GradientPolicy("full", ("word.*",), ("shared.*",))
TWO, UNIFORM = cv.LatentBridge(steps=2), cv.TimePolicy("uniform", high=0.9)

MAKERS = [cv.Maker(), cv.Maker("evaluated"), cv.Maker("teacher"), cv.Maker("teacher", 2.0)]

# Objectives of any terms, some of them twice

RELAXED = {
    "bridge": ["gumbel", "soft", cv.TextBridge("rloo", samples=3)],
    "policy": ["full", FROZEN],
}
OPTIONS = {
    cv.Text: [{"time": [1.0, 0.5, UNIFORM], "null_rate": [0.0, 0.3]}],
    cv.Latent: [
        {"time": [1.0, 0.5, UNIFORM], "distance": ["mse", "cosine"], "space": [None, "x0"]}
        | {"null_rate": [0.0, 0.3]}
    ],
    cv.Unconditional: [{"null_text_rate": [None, 0.3], "latent_time": [None, 0.5, UNIFORM]}],
    cv.CycleText: [
        {
            "bridge": [ONE_SHOT, TWO, cv.LatentBridge(noise=0.5, norm=1.0)],
            "time": [1.0, UNIFORM],
            "policy": ["stop_gradient", "decoder_isolated", "full", "alternating", FROZEN],
            "pairs": [False, True],
        },
        {"bridge": [ONE_SHOT, TWO], "maker": MAKERS, "pairs": [False, True]},
    ],
    cv.CycleLatent: [
        {"pairs": [False, True], "time": [1.0, UNIFORM], "show_latent": [False, True], **bridges}
        for bridges in (
            {"bridge": ["argmax"], "policy": ["stop_gradient"], "maker": MAKERS},
            {"bridge": [cv.TextBridge("best", steps=3)], "maker": MAKERS[:3]},
            RELAXED,
            {"bridge": [cv.TextBridge("rloo", marginal_weight=0.1)], "policy": ["alternating"]},
        )
    ],
    cv.Prior: [
        {
            "prior": ["mmd", "moment", "sigreg", "learned", "ddvi"],
            "bridge": [ONE_SHOT, TWO, cv.LatentBridge(threshold=1.0)],
            "time": [1.0, UNIFORM],
            "through": ["last", "full"],
        }
    ],
    cv.Sleep: [{"pairs": [False, True], "maker": MAKERS}],
    cv.Distill: [{"pairs": [False, True], "top": [1, 5], "time": [1.0, UNIFORM]}],
    cv.Contrastive: [{"bridge": [ONE_SHOT, TWO], "through": ["last", "full"]}],
    cv.TextMarginal: [
        {"bridge": ["gumbel", "soft"], "freeze": [(), ("shared.*",)], "pairs": [False, True]}
    ],
}
COMMON = {"weight": [0.5, 1.0, 0.0], "fraction": [1.0, 0.5]}
some_terms = st.lists(
    st.one_of(
        [
            st.tuples(
                st.just(kind),
                st.fixed_dictionaries({k: st.sampled_from(v) for k, v in (told | COMMON).items()}),
            )
            for kind, choices in OPTIONS.items()
            for told in choices
        ]
    ),
    min_size=1,
    max_size=5,
)


def made(told, *, join_passes=False):
    """The objective of what was drawn, with a name for each term."""
    terms = []
    for i, (kind, options) in enumerate(told):
        rest = {"null_rate": 0.0} if "null_rate" in options and not options["weight"] else {}
        terms.append(kind(**{**options, **rest}, name=f"{kind.kind()}_{i}"))
    weights = [1.0] if not any(term.weight for term in terms) else []
    terms[:1] = [replace(terms[0], weight=weight) for weight in weights] or terms[:1]
    guided = any(getattr(term, "maker", cv.Maker()).guidance != 1 for term in terms)
    terms += [cv.Text(null_rate=0.2), cv.Latent(null_rate=0.2)] if guided else []
    try:
        return of(*terms, join_passes=join_passes)
    except ValueError as error:
        assert "`join_passes` has no effect" in str(error)
        return of(*terms)


@settings(quick, max_examples=30)
@given(some_terms, st.integers(0, 1), st.booleans())
@pytest.mark.slow
def test_the_announced_passes_are_those_that_run(told, step, join_passes):
    objective = made(told, join_passes=join_passes)
    model, judge = Recorder(), Recorder(teacher_of(DENOISER))
    metrics = run(objective, model, step=step, teacher=judge).metrics
    ran = [term for term in objective.terms if term.weight]
    asked = [request for term in ran for request in term.passes(step)]
    assert len(model.calls) + len(judge.calls) == objective.passes(step)
    assert objective.passes(step) == objective.plan(step).number <= sum(r.number for r in asked)
    plan = objective.plan(step)
    own = [r.number for r in asked if isinstance(r, cv.Own) and "teacher" in r.does]
    others = [r.number for r in plan.shared if r.maker.by == "teacher"]
    assert len(judge.calls) == sum(own) + sum(others)
    assert bool(judge.calls) == any(term.reads_teacher() for term in ran)
    # a line for each pass, by term
    _, *lines = objective.describe(step).splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == [term.name for term in ran]
    for request, line in zip(asked, lines, strict=True):
        assert request.does in line
    # what ran is reported, and nothing else
    losses = {term.metric(part) for term in ran for part in term.parts}
    weights = {f"{term.name}_weight": term.weight for term in ran}
    assert {name for name in metrics if name.endswith("_loss")} == losses
    assert {n: v.item() for n, v in metrics.items() if n.endswith("_weight")} == weights
    assert objective.weights(step) == {term.name: term.weight for term in ran}


@settings(quick, max_examples=20)
@given(some_terms)
def test_counts_are_the_denominators(told):
    """The own count is the loss, twice the count is half of it, and no other term moves."""
    objective, batch = made(told), toy_batch(rows=4)
    known, counts = objective.known_counts(), objective.counts(batch)
    fixed = {
        term.metric(part)
        for term in objective.terms
        for part in term.counted()
        if part not in term.expected_counts
    }
    assert counts.keys() <= set(known) and fixed <= set(known)
    teacher, losses = teacher_of(DENOISER), []
    for factor in (None, 1, 2):
        given_ = None if factor is None else {n: factor * c for n, c in counts.items()}
        metrics = run(objective, batch=batch, counts=given_, teacher=teacher).metrics
        losses.append({n: v for n, v in metrics.items() if n.endswith("_loss")})
    plain, once, twice = losses
    for name, loss in once.items():
        assert loss.isfinite(), name
        torch.testing.assert_close(twice[name], loss / 2 if name in counts else loss, msg=name)
        if name in fixed or name not in counts:
            torch.testing.assert_close(plain[name], loss, msg=name)


# A term of weight 0, and shared passes

ISOLATED = cv.GradientPolicy("full", freeze_bridge=("shared.*",))
TEXT_TERM, LATENT_CYCLE, LATENT_TERM, TEXT_CYCLE, BOTH = FIVE


@pytest.mark.parametrize(
    ("terms", "passes"),
    [
        (FIVE, 5),
        (FIVE[:4], 4),
        ((TEXT_TERM, LATENT_TERM, LATENT_CYCLE), 3),
        ((TEXT_TERM, LATENT_TERM, TEXT_CYCLE), 3),
        ((TEXT_TERM, LATENT_TERM), 2),
        ((TEXT_TERM, LATENT_TERM, cv.Prior("mmd")), 2),
        ((LATENT_TERM,), 1),
        ((cv.Prior("mmd"),), 1),
        ((*FIVE[:2], cv.Latent(time=UNIFORM), TEXT_CYCLE), 5),
        (FIVE[1:2] + FIVE[3:], 5),
        ((*FIVE[:3], cv.CycleText(weight=cv.ramp(1.0, 3))), 3),
        ((*FIVE[:3], cv.CycleText(weight=0.0)), 3),
        ((*FIVE[:3], cv.CycleText(every=2)), 4),
        ((*FIVE[:3], replace(TEXT_CYCLE, policy=ISOLATED)), 5),
        ((TEXT_TERM, replace(LATENT_CYCLE, bridge="soft", policy=ISOLATED), LATENT_TERM), 4),
    ],
)
def test_terms_share_passes_and_one_of_weight_zero_costs_none(terms, passes):
    recorder, objective = Recorder(), of(*terms)
    run(objective, recorder)
    assert len(recorder.calls) == objective.passes(0) == passes


def test_two_priors_side_by_side_share_one_encoder_pass():
    """And the guards that each of them reads behind are its own."""
    guarded = cv.LatentBridge(norm=1.5)
    first, second = cv.Prior("mmd"), cv.Prior("moment", name="prior_2", bridge=guarded)
    both, recorder = of(cv.Latent(), first, second), Recorder()
    metrics = run(both, recorder).metrics
    assert len(recorder.calls) == both.passes(0) == 1
    z_hat = LATENT.to_x0(
        DENOISER.denoise(*recorder.calls[0][:2], **recorder.calls[0][2]).latent_prediction,
        recorder.calls[0][1],
        torch.ones(8),
    )
    torch.testing.assert_close(metrics["prior_loss"], cv.mmd_prior(z_hat).detach())
    torch.testing.assert_close(
        metrics["prior_2_loss"], cv.moment_prior(guarded.normed(z_hat)).detach()
    )


def test_the_pass_plan_does_not_depend_on_the_batch():
    objective = of(*FIVE)
    paired_only = cv.Batch(*toy_batch()[:3])
    for batch in (toy_batch(), paired_only):
        recorder = Recorder()
        run(objective, recorder, batch)
        assert len(recorder.calls) == 5


# A joined pass


JOINED = {
    "both cycles": (FIVE[:4], 3),
    "bases": ((TEXT_TERM, LATENT_TERM), 1),
    "half of the rows": (
        (
            TEXT_TERM,
            LATENT_TERM,
            replace(TEXT_CYCLE, fraction=0.5),
            cv.Prior("mmd", fraction=0.5),
        ),
        2,
    ),
    "InfoNCE": ((TEXT_TERM, LATENT_CYCLE, LATENT_TERM, cv.Contrastive()), 2),
    "full": (
        (
            TEXT_TERM,
            replace(LATENT_CYCLE, bridge="gumbel", policy=FULL),
            LATENT_TERM,
            replace(TEXT_CYCLE, policy=FULL),
        ),
        3,
    ),
    "frozen bridges beside": (
        (
            TEXT_TERM,
            replace(LATENT_CYCLE, bridge="gumbel", policy=ISOLATED),
            LATENT_TERM,
            replace(TEXT_CYCLE, policy=ISOLATED),
        ),
        5,
    ),
}


@pytest.mark.parametrize("lengths", [1, 5, 9])
@pytest.mark.parametrize(("terms", "passes"), JOINED.values(), ids=JOINED)
def test_a_joined_pass_computes_the_same(monkeypatch, terms, passes, lengths):
    def noise(rows, *args, **kwargs):
        return torch.randn(rows, 4, generator=seeded(rows)).double()

    for module in ("objective.step", "model.passes", "model.both"):
        monkeypatch.setattr(f"cyclevae.{module}.draw_noise", noise)
    denoiser = cv.as_denoiser(cv.testing.toy_denoiser(seed=0)[0].module.double())
    batch = toy_batch(rows=4)
    batch = batch._replace(
        latents=batch.latents.double(),
        unpaired_latents=batch.unpaired_latents.double(),
        pseudo_text_mask=torch.ones(4, lengths, dtype=torch.bool),
    )
    found = []
    for join in (False, True):
        objective = of(*terms, join_passes=join)
        recorder = Recorder(denoiser)
        output = run(objective, recorder, batch)
        grads = torch.autograd.grad(output.loss, list(denoiser.module.parameters()))
        found.append((output.metrics, grads))
        assert len(recorder.calls) == objective.passes(0)
    torch.testing.assert_close(*found)
    assert objective.passes(0) == passes == of(*terms).passes(0) - 1


# Bridges and their passes


@pytest.mark.parametrize(
    ("bridge", "passes"),
    [
        (cv.TextBridge("unmask", steps=3), 3 + 1),
        (cv.TextBridge("best", samples=4, steps=3), 1 + 4 * 2 + 4 + 1),
        (cv.TextBridge("categorical", temperature=0.5), 2),
        (lambda logits, mask, **_: logits.argmax(dim=-1), 2),
    ],
)
def test_text_bridges_and_their_passes(bridge, passes):
    recorder, objective = Recorder(), of(cv.CycleLatent(bridge=bridge))
    run(objective, recorder)
    assert len(recorder.calls) == objective.passes(0) == passes


@pytest.mark.parametrize(
    ("bridge", "passes"),
    [
        ("straight_through", 2),
        ("sampled_straight_through", 2),
        (cv.TextBridge("gumbel", temperature=0.5), 2),
        ("soft", 2),
        (cv.TextBridge("rloo", samples=3), 4),
        (cv.TextBridge("rloo", samples=3, marginal_weight=0.1), 7),
    ],
)
def test_bridges_with_a_gradient_teach_both_towers(bridge, passes):
    denoiser = two_towers()
    recorder = Recorder(denoiser)
    objective = of(cv.CycleLatent(bridge=bridge, policy="full", pairs=True))
    loss = run(objective, recorder).loss
    assert len(recorder.calls) == objective.passes(0) == passes
    assert_learns(loss, tower(denoiser, "encoder") + tower(denoiser, "decoder"))


@pytest.mark.parametrize("guard", [{"norm": 1.5}, {"threshold": 0.1}, {"noise": 0.5}])
def test_the_guards_of_the_latent_bridge_act_in_the_step(guard):
    plain, guarded = Recorder(), Recorder()
    for recorder, bridge in ((plain, ONE_SHOT), (guarded, cv.LatentBridge(**guard))):
        run(of(cv.CycleText(bridge=bridge, pairs=True)), recorder)
    z_hat, crossing = plain.calls[1][1], guarded.calls[1][1]
    assert not torch.equal(z_hat, crossing)
    if "norm" in guard:
        torch.testing.assert_close(crossing.norm(dim=1), torch.full((8,), 1.5))


# Turns, rests and shares


def turns(together, seed=0, **options):
    text, latent = cv.take_turns(2.0, 10.0, together=together, seed=seed)
    return of(
        cv.Latent(), cv.CycleText(weight=text), cv.CycleLatent(weight=latent), seed=seed, **options
    )


@pytest.mark.slow
def test_turns_take_the_steps_between_those_with_both_cycles():
    for together, seed in product((0.0, 0.1, 0.5, 0.75, 1.0), (0, 1, 7)):
        ran = [turns(together, seed).weights(step).keys() & set(CYCLES) for step in range(400)]
        assert abs(sum(len(cycles) == 2 for cycles in ran) - together * 400) <= 1
        singles = [cycle for cycles in ran if len(cycles) == 1 for cycle in cycles]
        assert all(a != b for a, b in pairwise(singles))  # in turn
        assert all(cycles for cycles in ran)
        again = turns(together, seed)
        assert ran == [again.weights(step).keys() & set(CYCLES) for step in range(400)]
    plans = {
        tuple("cycle_text" in turns(0.5, seed).weights(step) for step in range(16))
        for seed in range(8)
    }
    assert len(plans) > 2  # the seed has a say


def test_terms_that_go_together_share_a_turn():
    text, latent = cv.take_turns(2.0, 1.0)
    objective = of(
        cv.Text(),
        cv.Latent(),
        cv.CycleText(weight=text),
        cv.CycleLatent(weight=latent, bridge="soft", policy=FULL),
        cv.Sleep(weight=latent),
        cv.TextMarginal(weight=latent, bridge="soft"),
    )
    texts, latents = objective.weights(0).keys(), objective.weights(1).keys()
    assert texts == {"text", "latent", "cycle_text"}
    assert latents == {"text", "latent", "cycle_latent", "sleep", "text_marginal"}


def test_cycles_on_every_third_step_and_there_in_turn():
    text, latent = cv.take_turns(2.0, 10.0, every=3)
    objective = of(
        TEXT_TERM,
        LATENT_TERM,
        BOTH,
        replace(TEXT_CYCLE, weight=text, every=3),
        replace(LATENT_CYCLE, weight=latent, every=3),
    )
    ran = [sorted(objective.weights(step).keys() & set(CYCLES)) for step in range(8)]
    assert ran == [["cycle_text"], [], [], ["cycle_latent"], [], [], ["cycle_text"], []]
    assert [objective.passes(step) for step in range(4)] == [4, 3, 3, 4]


@pytest.mark.parametrize("prior", [None, cv.Prior("mmd")])
@pytest.mark.parametrize("time", [1.0, UNIFORM])
def test_cycles_on_a_fraction_of_the_batch(prior, time):
    part = of(
        TEXT_TERM,
        replace(LATENT_CYCLE, fraction=0.5),
        cv.Latent(time=time),
        replace(TEXT_CYCLE, fraction=0.5),
        *([] if prior is None else [prior]),
    )
    batch, recorder = toy_batch(rows=5), Recorder()
    metrics = run(part, recorder, batch).metrics
    reads = [len(call[0]) for call in recorder.calls]
    full_texts = 10 if prior else 5 + 3 if time == 1 else 3 + 3
    base = [] if time == 1 else [5]
    # decoder with all pairs and 3 other latents, encoder of 3 + 3, base, bridge, decoder of 3 + 3
    assert reads == [5 + 3, 3 + 3, *base, full_texts, 3 + 3]

    # the values are those of a batch that holds these rows alone
    first = cv.Batch(*(None if value is None else value[:3] for value in batch))
    counts = part.counts(batch)
    assert counts["cycle_text_loss"] == (
        first.attention_mask.sum() + first.unpaired_attention_mask.sum()
    )
    assert counts["cycle_latent_loss"] == 6 * 4 and counts["latent_loss"] == 5 * 4
    alone = cv.cycle_text_loss(
        DENOISER,
        torch.cat([first.tokens, first.unpaired_tokens]),
        torch.cat([first.attention_mask, first.unpaired_attention_mask]),
        z_hat=recorder.calls[-1][1],
        text_process=TEXT,
        latent_process=LATENT,
    )
    torch.testing.assert_close(metrics["cycle_text_loss"], alone.detach())


@pytest.mark.parametrize("term", [TEXT_TERM, cv.Text(), LATENT_TERM, cv.Latent(time=0.5), BOTH])
def test_a_base_term_on_a_fraction_of_the_batch(term):
    """It reads the first rows of each kind, and is that of a batch that holds these alone."""
    batch = toy_batch(rows=4)
    first = cv.Batch(*(None if value is None else value[:2] for value in batch))
    part, recorders = replace(term, fraction=0.5), (Recorder(), Recorder())
    outputs = [
        run(of(each), recorder, rows)
        for each, recorder, rows in zip((part, term), recorders, (batch, first), strict=True)
    ]
    for calls in zip(*(recorder.calls for recorder in recorders), strict=True):
        torch.testing.assert_close(*[[*read, *list(state.values())[:3]] for *read, state in calls])
    torch.testing.assert_close(outputs[0].metrics, outputs[1].metrics)
    counts = of(part).counts(batch), of(term).counts(first)
    torch.testing.assert_close(*counts)


def test_cycles_that_leave_pairs_out_read_the_other_rows_alone():
    batch, recorder = toy_batch(rows=5), Recorder()
    alone = of(
        TEXT_TERM,
        replace(LATENT_CYCLE, pairs=False),
        LATENT_TERM,
        replace(TEXT_CYCLE, pairs=False),
    )
    metrics = run(alone, recorder, batch).metrics
    # decoder of pairs and latents, encoder of 5 pseudo-texts, of pairs and texts, decoder of 5
    assert [len(call[0]) for call in recorder.calls] == [10, 5, 10, 5]
    assert alone.passes(0) == of(*FIVE[:4]).passes(0) == 4
    counts = alone.counts(batch)
    assert counts["cycle_text_loss"] == batch.unpaired_attention_mask.sum()
    assert counts["cycle_latent_loss"] == 5 * 4 and counts["latent_loss"] == 5 * 4
    expected = cv.cycle_text_loss(
        DENOISER,
        batch.unpaired_tokens,
        batch.unpaired_attention_mask,
        z_hat=recorder.calls[-1][1],
        text_process=TEXT,
        latent_process=LATENT,
    )
    torch.testing.assert_close(metrics["cycle_text_loss"], expected.detach())


@pytest.mark.parametrize(
    ("missing", "term"),
    [
        ("unpaired_tokens", "cycle_text"),
        ("unpaired_latents", "cycle_latent"),
        ("unpaired_latents", "sleep"),
        ("unpaired_latents", "text_marginal"),
    ],
)
def test_cycles_that_leave_pairs_out_need_something_else(missing, term):
    terms = cv.CycleText(), cv.CycleLatent(), cv.Sleep(), cv.TextMarginal()
    (mine,) = [each for each in terms if each.name == term]
    gone = {missing: None} | (
        {"unpaired_attention_mask": None} if "tokens" in missing else {"pseudo_text_mask": None}
    )
    batch, recorder = toy_batch()._replace(**gone), Recorder()
    with pytest.raises(ValueError, match=f"`{term}` reads rows without a partner, and the batch h"):
        run(of(TEXT_TERM, mine), recorder, batch)
    assert not recorder.calls
    # a part of a step may lack them: the pass runs, for the sake of other ranks, and counts nothing
    objective = of(TEXT_TERM, mine)
    output = run(objective, recorder, batch, counts=objective.counts(toy_batch()))
    assert output.metrics[f"{term}_loss"] == 0 and len(recorder.calls) == objective.passes(0)
    assert run(of(TEXT_TERM, replace(mine, pairs=True)), batch=batch).loss.isfinite()
