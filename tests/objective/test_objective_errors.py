"""What a user of the objective sees: options, steps and phases that are refused, and how."""

import math

import pytest
import torch

import cyclevae as cv
from cyclevae.objective.terms import SHIPPED
from cyclevae.testing import toy_batch
from oracles import Spy
from running import DENOISER, FIVE, LATENT, TEXT, of, run

pytestmark = pytest.mark.unhooked

TOKENS = torch.tensor([[3, 4, 5], [4, 6, 0]])
SIX = toy_batch(seed=0, rows=6)
EPSILON = cv.LatentProcess(prediction="epsilon", shape=(4,))
FULL, CLOSED = cv.GradientPolicy("full"), "stop_gradient"
MOVING = cv.TimePolicy("full", high=lambda step: 2.0)
TEXTS, LATENTS = cv.take_turns(1.0, 2.0)


def cases(**named):
    """`name=(call, words)`; the words must all be in the text."""
    return pytest.mark.parametrize(("call", "words"), list(named.values()), ids=list(named))


def refused(call, words, exception=ValueError):
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    for word in (words,) if isinstance(words, str) else words:
        assert word in str(caught.value), str(caught.value)


# Options that all terms have


@pytest.mark.parametrize("term", SHIPPED)
@pytest.mark.parametrize(
    ("option", "values", "words"),
    [
        ("weight", [-1.0, math.nan, math.inf, "1", None], "`weight` must be a finite number of at"),
        ("cap", [-1.0, math.nan, "1"], "`cap` must be a finite number of at least 0, got "),
        ("cap", [0, 0.0], "`cap` must be above 0, got 0"),
        ("every", [0, -1, 1.5, True, "2", None], "`every` must be an integer of at least 1, got "),
        ("fraction", [0, 0.0, 1.5, -0.5, "1", None, True], "`fraction` must lie in (0, 1], got "),
        ("name", ["my term", "a-b", "2nd", "a.b"], "`name` is part of the names of metrics and mu"),
    ],
)
def test_options_of_every_term(term, option, values, words):
    for value in values:
        refused(lambda value=value: term(**{option: value}), words)


@pytest.mark.parametrize("term", SHIPPED)
def test_options_that_a_term_does_not_have(term):
    """Python's own refusal; of a prior, which takes those of its function, ours."""
    if term is cv.Prior:
        refused(
            lambda: term(wieght=1.0), "unknown option 'wieght' of prior='mmd'; did you mean 'we"
        )
    else:
        refused(lambda: term(wieght=1.0), "unexpected keyword argument 'wieght'", TypeError)


@pytest.mark.parametrize(
    "term",
    [cv.Text, cv.Latent, cv.CycleText, cv.CycleLatent, cv.Prior, cv.Contrastive],
)
def test_times(term):
    for time in (1.5, -0.1, math.nan, True, "1.0", None, {"high": 1.0}, torch.ones(3), len):
        refused(
            lambda time=time: term(time=time),
            f"`time` must lie in [0 (clean), 1 (full noise)] or be a TimePolicy, got {time!r}",
        )
    for time in (0, 0.0, cv.TimePolicy(high=0.0), cv.TimePolicy("uniform", high=0)):
        refused(lambda time=time: term(time=time), "`time` is 0, where nothing is hidden")
    late = of(cv.Latent(), term(name="late", time=cv.TimePolicy(high=lambda step: 1.0 - step)))
    refused(lambda: run(late, step=1), "`time.high(1)` is 0, where nothing is hidden")
    refused(lambda: run(of(term(time=MOVING))), "`high(0)` must lie in [low, 1] = [0, 1 (full noi")


@pytest.mark.parametrize("term", [cv.CycleText, cv.CycleLatent, cv.Sleep, cv.TextMarginal])
def test_pairs(term):
    for value in (1, "yes", None):
        refused(lambda value=value: term(pairs=value), f"`pairs` must be a bool, got {value!r}")


@pytest.mark.parametrize("term", [cv.CycleText, cv.Prior, cv.Contrastive])
def test_latent_bridges(term):
    for value in ("one shot", 2, None, {"steps": 2}):
        words = f"`bridge` must be a LatentBridge, got {value!r}"
        refused(lambda value=value: term(bridge=value), words)


@pytest.mark.parametrize("term", [cv.Prior, cv.Contrastive])
def test_through(term):
    refused(lambda: term(through="ful"), "`through` is 'ful'; did you mean 'full'?")
    refused(lambda: term(through="detach"), "`through` is 'detach'; known are 'full', 'last'")


# Options of one term


@cases(
    frozen_patterns=(
        lambda: cv.TextMarginal(freeze={}),
        "`freeze` must be a tuple of shell patterns on parameter names such as ('decoder.*',), go",
    ),
    nobody_learns=(
        lambda: of(cv.TextMarginal(freeze=("decoder_only", "shared"))),
        "nobody learns from `text_marginal`, whose options freeze decoder_only, shared: freeze l",
    ),
    latent_distance=(lambda: cv.Latent(distance="l2"), "`distance` is 'l2'"),
    latent_space=(lambda: cv.Latent(space="z"), "`space` is 'z'"),
    min_snr=(lambda: cv.Latent(min_snr=0.0), "`min_snr` must be above 0, got 0"),
    min_snr_at_full_noise=(
        lambda: of(cv.Latent(min_snr=5.0)),
        (
            "`terms`: latent: `min_snr` = 5 weighs times from 1 to 1 with",
            "so that the loss teaches nothing: draw other times, as in time=TimePolicy('unif",
        ),
    ),
    min_snr_of_nothing=(
        lambda: of(cv.Latent(min_snr=1e-9, time=cv.TimePolicy("uniform"))),
        "`min_snr` = 1e-09 weighs times from 0 to 1 with 1.0e-09 at most, so that the loss teach",
    ),
    null_text_rate=(
        lambda: cv.Unconditional(null_text_rate=-0.1),
        "`null_text_rate` must lie in [0, 1], got -0.1",
    ),
    latent_time=(
        lambda: cv.Unconditional(latent_time=1.5),
        "`latent_time` must lie in [0 (clean), 1 (full noise)] or be a TimePolicy, got 1.5",
    ),
    cycle_latent_distance=(
        lambda: cv.CycleLatent(distance="cos"),
        "`distance` is 'cos'; did you mean 'cosine'?",
    ),
    show_latent=(
        lambda: cv.CycleLatent(show_latent="yes"),
        "`show_latent` must be a bool, got 'yes'",
    ),
    text_bridge=(
        lambda: cv.CycleLatent(bridge="argmx"),
        "`bridge` is 'argmx'; did you mean 'argmax'?",
    ),
    dropped_gradient=(
        lambda: cv.CycleLatent(bridge="gumbel"),
        "use GradientPolicy(bridge='full')",
    ),
    no_gradient=(
        lambda: cv.CycleLatent(bridge="argmax", policy=FULL),
        "the 'argmax' bridge is a choice of ids and has no gradient",
    ),
    no_gradient_in_turn=(
        lambda: cv.CycleLatent(policy="alternating"),
        "the 'categorical' bridge is a choice of ids and has no gradient",
    ),
    text_policy=(
        lambda: cv.CycleText(policy="decoder_isolate"),
        "`policy` is 'decoder_isolate'; did you mean 'decoder_isolated'",
    ),
    policy_of_the_other_cycle=(
        lambda: cv.CycleText(policy="encoder_isolated"),
        "`policy` is 'encoder_isolated'; did you mean 'decoder_isolated'",
    ),
    no_policy=(
        lambda: cv.CycleLatent(policy=3),
        "`policy` must be a GradientPolicy, a PolicySchedule or one of 'stop_gradient', 'encoder_",
    ),
    marginal_of_ids=(
        lambda: cv.TextMarginal(bridge="argmax"),
        ("`bridge` must make a relaxed text", "'argmax' makes none", "one such as 'gumbel'"),
    ),
    marginal_of_rewards=(
        lambda: cv.TextMarginal(bridge="rloo"),
        "or the `marginal_weight` of 'rloo' in the latent cycle",
    ),
    temperature=(
        lambda: cv.Contrastive(temperature=0.0),
        "`temperature` must be above 0, got 0",
    ),
    critic=(lambda: cv.Contrastive(critic="cos"), "`critic` is 'cos'; did you mean 'cosine'?"),
    prior=(lambda: cv.Prior("mdd"), "`prior` is 'mdd'; did you mean 'mmd'?"),
    no_prior=(lambda: cv.Prior(None), "`prior` is None; known are 'ddvi', 'learned', 'mmd'"),
    pool=(lambda: cv.Prior(pool=1), "`pool` must be a bool, got 1"),
    prior_option=(
        lambda: cv.Prior("mmd", scale=(1.0,)),
        "unknown option 'scale' of prior='mmd'; did you mean 'scales'?",
    ),
    option_of_another_prior=(
        lambda: cv.Prior("mmd", form="norm"),
        "unknown option 'form' of prior='mmd'",
    ),
    option_of_the_step=(
        lambda: cv.Prior("learned", options={"time": 0.5}),
        "unknown option 'time' of prior='learned'",
    ),
    option_that_is_given=(
        lambda: cv.Prior("learned", options={"teacher": None}),
        "unknown option 'teacher' of prior='learned'",
    ),
    pooled_rows=(
        lambda: cv.Prior("learned", pool=True),
        "`pool` has no effect on prior='learned', which is a mean over rows and no statistic",
    ),
    scales=(
        lambda: of(cv.Prior("mmd", scales=(0.5, -1.0))),
        "`scales` must be a finite number of at least 0, got -1.0",
    ),
    options_at_odds=(
        lambda: of(cv.Prior("moment", form="full_bures")),
        ("`terms`: prior: prior='moment': ", "biased"),
    ),
    moment_of_another_shape=(
        lambda: of(cv.Prior("moment", mean=torch.zeros(3))),
        "`mean` must be a number or have the shape of one latent [4], got [3]",
    ),
    learned_form=(
        lambda: of(cv.Prior("learned", form="score_difference")),
        "give a `posterior_std` above 0",
    ),
    ddvi_range=(
        lambda: of(cv.Prior("ddvi", low=0.9, high=0.1)),
        "`low` and `high` must be times in [0, 1]",
    ),
)
def test_options(call, words):
    refused(call, words)


# Terms that do not go together


@cases(
    nothing=(lambda: of(), "`terms` is empty, so there is nothing to train on; None is the recipe"),
    no_term=(lambda: of("text"), "`terms` must hold instances of Term, got 'text'"),
    a_class=(lambda: of(cv.Text), "got <class 'cyclevae.objective.terms.text.Text'>; write Text()"),
    two_of_one_name=(
        lambda: of(cv.Prior("mmd"), cv.Latent(), cv.Prior("moment")),
        (
            "`terms` holds two of the name 'prior', which their metrics would share",
            "give one a name, as in Prior(name='prior_2')",
        ),
    ),
    a_name_that_another_has=(
        lambda: of(cv.Latent(), cv.Text(name="latent")),
        "`terms` holds two of the name 'latent'",
    ),
    a_turn_that_nobody_takes=(
        lambda: of(cv.Latent(), cv.CycleText(weight=TEXTS)),
        "of the 2 turns that weights take, number 1 is nobody's, and steps would pass without eff",
    ),
    a_turn_of_three=(
        lambda: of(
            *(
                cv.Latent(weight=w, name=f"latent_{i}")
                for i, w in enumerate(cv.take_turns(1.0, 1.0, 1.0)[:2])
            )
        ),
        "of the 3 turns that weights take, number 2 is nobody's",
    ),
    text_process=(
        lambda: cv.CycleObjective(LATENT, LATENT),
        "`text_process` must be a TextProcess, got LatentProcess(",
    ),
    latent_process=(
        lambda: cv.CycleObjective(TEXT, None),
        "`latent_process` must be a LatentProcess, got None",
    ),
    seed=(lambda: of(cv.Text(), seed=0.5), "`seed` must be a int, got 0.5"),
    non_finite=(
        lambda: of(cv.Text(), non_finite="ignore"),
        "`non_finite` is 'ignore'; known are 'raise', 'skip'",
    ),
    join_passes=(
        lambda: of(*FIVE, join_passes="yes"),
        "`join_passes` must be a bool, got 'yes'",
    ),
    joined_terms_cannot_be_told_apart=(
        lambda: of(*FIVE, join_passes=True, non_finite="zero"),
        "use 'skip', or leave the passes apart",
    ),
    joining_the_recipe=(
        lambda: cv.CycleObjective(TEXT, LATENT, join_passes=True),
        (
            "`join_passes` has no effect: it joins a decoder pass from a fully masked text",
            "let the base decoder loss mask all words, with time=1.0, or leave it out",
        ),
    ),
    joining_a_direction=(lambda: of(cv.Latent(), join_passes=True), "`join_passes` has no effect"),
    joining_what_is_frozen=(
        lambda: of(
            cv.Text(time=1.0),
            cv.CycleText(policy=cv.GradientPolicy("full", (), ("shared.*",))),
            join_passes=True,
        ),
        "both learning in all parameters, and these terms never ask for both",
    ),
    joining_below_full_noise=(
        lambda: of(cv.Text(time=1.0), cv.Latent(time=0.9), join_passes=True),
        "`join_passes` has no effect",
    ),
    an_ill_conditioned_bridge=(
        lambda: cv.CycleObjective(TEXT, EPSILON),
        ("`terms`: cycle_text: ", "gain of 6.41"),
    ),
    an_ill_conditioned_space=(
        lambda: cv.CycleObjective(TEXT, EPSILON, [cv.Latent(space="x0")]),
        ("`terms`: latent: ", "gain of 6.41"),
    ),
)
def test_objectives(call, words):
    refused(call, words)


def test_what_is_not_refused():
    """Turns that share every step, or that all have a term; a name for each; passes that join."""
    together = cv.take_turns(1.0, 2.0, together=1.0)
    assert of(cv.Latent(), cv.CycleText(weight=together[0])).weights(1)["cycle_text"] == 1
    assert of(cv.CycleText(weight=TEXTS), cv.CycleLatent(weight=LATENTS))
    assert of(cv.Prior("mmd"), cv.Prior("moment", name="prior_2"))
    alternating = cv.CycleText(policy="alternating")
    assert of(cv.Text(time=1.0), alternating, join_passes=True).passes(1) == 2
    assert of(cv.Latent(min_snr=5.0, time=cv.TimePolicy("uniform")))
    assert cv.CycleObjective(TEXT, EPSILON, [cv.Text(), cv.Latent()])


# Steps


def ids(logits, mask, **_):
    return logits.argmax(dim=-1)


@cases(
    no_teacher=(
        lambda: of(cv.Prior("learned")),
        "prior='learned' reads a frozen copy of the network, and none was given",
    ),
    no_teacher_of_ddvi=(
        lambda: of(cv.Prior("ddvi")),
        "prior='ddvi' reads a frozen copy of the network, and none was given",
    ),
    nothing_runs=(
        lambda: of(cv.CycleText(every=2), cv.CycleLatent(every=2)),
        "there is nothing to train on at step 1: every weight is 0, or `every` lets all terms rest",
    ),
    ids_for_the_marginal=(
        lambda: of(cv.TextMarginal(bridge=ids)),
        "the 'ids' bridge of `text_marginal` returned torch.int64 ids, which have no gradient: ",
    ),
    ids_for_a_gradient=(
        lambda: of(cv.CycleLatent(bridge=ids, policy=FULL)),
        "the 'ids' bridge of `cycle_latent` returned torch.int64 ids",
    ),
    a_weight_that_falls_below_0=(
        lambda: of(cv.Text(weight=lambda step: -0.5)),
        "`text.weight(1)` must be a finite number of at least 0, got -0.5",
    ),
)
def test_steps(call, words):
    objective = call()
    refused(lambda: objective(DENOISER, SIX, step=1), words)


def test_statistics_of_one_row():
    one = toy_batch(seed=0, rows=1)._replace(unpaired_tokens=None, unpaired_attention_mask=None)
    for term, words in (
        (cv.Prior("mmd"), ("`prior` of 1 texts: ", "raise the batch size or give the term wei")),
        (cv.Prior("moment", name="mine"), ("`mine` of 1 texts: ", "at least 2 ")),
        (cv.Contrastive(), "`contrastive` needs 2 pairs in a batch or more, got 1"),
    ):
        spy, objective = Spy(DENOISER), of(cv.Text(), term)
        refused(lambda o=objective, s=spy: o(s, one, step=0), words)
        assert not spy.calls
    refused(
        lambda: cv.moment_prior(torch.zeros(1, 2), form="covariance"),
        "`z` needs at least 2 samples for batch statistics, got shape [1, 2]",
    )


def test_a_teacher_that_learns():
    objective = of(cv.Prior("learned"))
    refused(
        lambda: objective(DENOISER, SIX, step=0, teacher=DENOISER),
        ("`teacher` must be frozen, and its parameter", "use Teacher(network).denoiser"),
    )
    refused(
        lambda: cv.StepModule(DENOISER, objective, DENOISER.module),
        "`teacher` must be a Teacher, got ToyNetwork; make it by Teacher(network)",
        TypeError,
    )


def test_unpaired_texts_below_full_noise():
    for time in (1.0, 0.5):
        refused(
            lambda time=time: cv.t2l(
                Spy(DENOISER),
                TOKENS,
                TOKENS > 0,
                text_process=TEXT,
                latent_process=LATENT,
                time=time,
            ),
            "give either `latents` to be noised or start='noise', got neither",
        )


# Phases


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"latent_cycle_from": 5, "full_gradient_from": 3}, "must be steps in this order"),
        ({"latent_cycle_from": -1}, "`latent_cycle_from` must be an integer of at least 0, got -1"),
        ({"text_bridge": "argmax"}, "'argmax' has none; use 'straight_through'"),
        ({"text_bridge": "agmax"}, "`bridge` is 'agmax'; did you mean 'argmax'?"),
    ],
)
def test_phases(options, words):
    three = {"latent_cycle_from": 1, "full_gradient_from": 2, **options}
    refused(lambda: cv.phases(of(*FIVE), **three), words)


@pytest.mark.parametrize("policy", [FULL, "alternating"])
def test_phases_of_an_open_bridge(policy):
    objective = of(*FIVE[:3], cv.CycleText(policy=policy))
    refused(
        lambda: cv.phases(objective, latent_cycle_from=1, full_gradient_from=2),
        "the policy of `cycle_text` must have bridge='detach' at all steps, got ",
    )
