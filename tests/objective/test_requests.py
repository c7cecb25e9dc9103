"""Requests as values: which of them are one pass, over which rows, and whose noise it is."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cyclevae as cv
from cyclevae.objective.plan import Planned, make_plan
from cyclevae.objective.requests import Decode, Encode, Own
from running import FULL, ONE_SHOT, Recorder, of, run
from strategies import quick

ALL, PAIRS, OTHERS = cv.Share(1.0, 1.0), cv.Share(1.0), cv.Share(others=1.0)
THREE = cv.LatentBridge(steps=3)
UNIFORM = cv.TimePolicy("uniform", high=0.9)


def plan_of(*requests, join_passes=False):
    return make_plan([Planned("term", 1.0, tuple(requests))], join_passes=join_passes)


# Rows

shares = st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.7, 1.0])
some_rows = st.builds(cv.Share, shares, shares, st.none() | shares)


@quick
@given(some_rows, some_rows, st.integers(0, 20), st.integers(0, 20), st.booleans())
def test_the_rows_of_both_are_those_of_the_larger_share(a, b, paired, others, marked):
    def numbers(share):
        return share.numbers(paired, paired + others, marked=marked)

    assert numbers(a | b) == tuple(map(max, numbers(a), numbers(b)))
    assert a | b == b | a and (a | b) | a == a | b


def test_a_small_share_is_rounded_up_but_not_by_a_rounding_error():
    assert cv.Share(0.7, 0.7).numbers(10, 20, marked=False) == (7, 7)
    assert cv.Share(0.01, 0.01).numbers(3, 3, marked=False) == (1, 0)


# Two of them

ENCODE, DECODE = cv.Encode(rows=PAIRS), cv.Decode(rows=PAIRS)
TOGETHER = {
    "other rows": (ENCODE, cv.Encode(rows=OTHERS)),
    "decoders of other rows": (DECODE, cv.Decode(rows=OTHERS)),
    "a bridge of one pass without its guards": (
        ENCODE,
        cv.Encode(rows=ALL, bridge=cv.LatentBridge(noise=0.5, threshold=1.0, norm=2.0)),
    ),
    "the last pass of one": (ENCODE, replace(ENCODE, through="last")),
    "three passes with other noise and norm": (
        cv.Encode(rows=PAIRS, bridge=THREE),
        cv.Encode(rows=ALL, bridge=replace(THREE, noise=0.5, norm=2.0)),
    ),
    "the same times": (replace(ENCODE, time=UNIFORM), replace(ENCODE, time=replace(UNIFORM))),
    "an integer time": (ENCODE, replace(ENCODE, time=1)),
    "who detaches reads what learns": (ENCODE, replace(ENCODE, through="detach")),
    "who detaches reads what is frozen in part": (
        replace(DECODE, freeze=("word.*",)),
        replace(DECODE, through="detach"),
    ),
    "who detaches reads who detaches": (replace(ENCODE, through="detach"),) * 2,
    "other words for it": (ENCODE, replace(ENCODE, does="reads", roles=("shared",))),
}
APART = {
    "a decoder and an encoder": (ENCODE, DECODE),
    "other times": (ENCODE, replace(ENCODE, time=0.9)),
    "times drawn and not": (replace(ENCODE, time=UNIFORM), replace(ENCODE, time=0.9)),
    "other numbers of passes": (ENCODE, replace(ENCODE, bridge=THREE)),
    "a threshold on the way": (
        replace(ENCODE, bridge=THREE),
        replace(ENCODE, bridge=replace(THREE, threshold=1.0)),
    ),
    "the last of three and all three": (
        replace(ENCODE, bridge=THREE),
        replace(ENCODE, bridge=THREE, through="last"),
    ),
    "frozen parts": (ENCODE, replace(ENCODE, freeze=("shared.*",))),
    "other frozen parts": tuple(replace(DECODE, freeze=(p,)) for p in ("word.*", "shared.*")),
    "who detaches at another time": (ENCODE, replace(ENCODE, time=0.5, through="detach")),
}


@pytest.mark.parametrize(("one", "other"), TOGETHER.values(), ids=TOGETHER)
def test_equal_requests_are_one_pass_over_the_rows_of_both(one, other):
    for pair in ((one, other), (other, one)):
        plan = plan_of(*pair)
        (shared,) = plan.shared
        assert shared.rows == one.rows | other.rows
        assert shared.learns == (one.learns or other.learns)
        assert plan.number == one.number == other.number
        assert plan.serving(one) == plan.serving(other) == 0


@pytest.mark.parametrize(("one", "other"), APART.values(), ids=APART)
def test_unequal_requests_stay_apart(one, other):
    for pair in ((one, other), (other, one)):
        plan = plan_of(*pair)
        assert sorted(map(plan.serving, pair)) == [0, 1]
        assert [plan.shared[plan.serving(request)] for request in pair] == list(pair)
        assert plan.number == one.number + other.number


def test_passes_that_compute_the_same_share_their_noise_whoever_learns():
    cycle = cv.CycleText(
        bridge=ONE_SHOT,
        pairs=True,
        time=UNIFORM,
        policy=cv.GradientPolicy("full", (), ("shared.*",)),
    )
    prior, recorder = cv.Prior("mmd", time=UNIFORM), Recorder()
    run(of(cycle, prior), recorder)
    first, second = recorder.encodes
    for one, other in zip(first[:2], second[:2], strict=True):
        assert one.equal(other)
    assert first[2]["latent_time"].equal(second[2]["latent_time"])
    assert len(first[2]["latent_time"].unique()) == 8


# Any number of them

patterns = st.sampled_from([(), ("word.*",), ("shared.*", "word.*")])
decodes = {"rows": some_rows, "through": st.sampled_from(["detach", "full"]), "freeze": patterns}
encodes = decodes | {
    "through": st.sampled_from(["detach", "last", "full"]),
    "time": st.sampled_from([1.0, 0.9, UNIFORM]),
    "bridge": st.sampled_from(
        [ONE_SHOT, cv.LatentBridge(noise=0.5), THREE, replace(THREE, norm=1.0)]
    ),
}
owns = {"does": st.just("runs"), "number": st.integers(1, 3)}
kinds = ((Decode, decodes), (Encode, encodes), (Own, owns))
requests = st.lists(
    st.one_of([st.tuples(st.just(kind), st.fixed_dictionaries(told)) for kind, told in kinds]),
    max_size=8,
)


def made(told):
    """Made in a test, because checks of types draw, which strategies must not."""
    return [kind(**options) for kind, options in told]


def computation(request):
    """What it computes, whoever learns."""
    if isinstance(request, Decode):
        return ("decode",)
    steps = request.bridge.steps
    return ("encode", request.time, steps, request.bridge.threshold if steps > 1 else None)


def who_learns(request):
    last_of_many = request.through == "last" and request.number > 1
    return computation(request), last_of_many, request.freeze


@settings(quick, max_examples=100)
@given(requests)
def test_the_number_of_shared_passes(told):
    """One for each thing that is computed and taught, and for what nobody computes who learns."""
    asked = made(told)
    plan = plan_of(*asked)
    own = [r for r in asked if isinstance(r, Own)]
    shared = [r for r in asked if not isinstance(r, Own)]
    taught = {who_learns(r): r for r in shared if r.learns}
    computed = {computation(r) for r in taught.values()}
    untaught = {computation(r): r for r in shared if not r.learns}
    alone = {key: r for key, r in untaught.items() if key not in computed}
    expected = [*taught.values(), *alone.values()]
    assert len(plan.shared) == len(expected)
    assert plan.number == sum(r.number for r in expected + own)
    for request in shared:
        serving = plan.shared[plan.serving(request)]
        assert computation(serving) == computation(request)
        assert not request.learns or who_learns(serving) == who_learns(request)
        assert serving.rows | request.rows == serving.rows | serving.rows  # holds them all
        assert plan.rows_of(request) | serving.rows == plan.rows_of(request)


@settings(quick, max_examples=100)
@given(requests)
def test_a_pass_that_joins_two_is_one_less(told):
    asked = made(told)
    plan = plan_of(*asked, join_passes=True)

    def may_join(request):
        if isinstance(request, Own) or request.freeze or not request.learns:
            return False
        return isinstance(request, Decode) or computation(request)[1:3] == (1.0, 1)

    joined = {type(r) for r in plan.shared if may_join(r)} == {Decode, Encode}
    assert plan.joined == joined
    assert plan.number == plan_of(*asked).number - joined


def test_the_last_pass_is_that_which_runs_last():
    plan = make_plan(
        [
            Planned("cycle", 1.0, (ENCODE, cv.Own(does="reads"))),
            Planned("prior", 1.0, (cv.Encode(rows=ALL),)),
        ],
        join_passes=False,
    )
    assert plan.last() == cv.Own(does="reads")  # what the prior reads has run
    with pytest.raises(ValueError, match="a plan without passes has no last one"):
        plan_of().last()


def test_a_request_says_what_it_is():
    assert Encode(rows=PAIRS) == Encode(rows=PAIRS, bridge=ONE_SHOT) != Encode(rows=OTHERS)
    assert (ENCODE.number, replace(ENCODE, bridge=THREE).number, DECODE.number) == (1, 3, 1)
    assert ENCODE.joins and not replace(ENCODE, freeze=("word.*",)).joins
    assert not replace(ENCODE, time=0.5).joins and not replace(DECODE, through="detach").joins
    assert cv.CycleText(policy=FULL).encodes(0).through == "full"
