"""Roles, the policies by name, policies that change with the step, and the table of who learns."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.bridges.text import TextBridge
from cyclevae.gradient_policy.presets import TEXT_POLICIES, policy_at
from cyclevae.testing import ToyNetwork, check_denoiser, toy_batch, toy_denoiser

DENOISER, TEXT, LATENT = toy_denoiser(seed=0)
FULL = cv.GradientPolicy("full")
BASE = (cv.Text(time=1.0), cv.Latent(), cv.Unconditional())


def objective(*terms):
    return cv.CycleObjective(TEXT, LATENT, terms)


def text_cycle(policy="stop_gradient"):
    return cv.CycleText(bridge=cv.LatentBridge(), pairs=True, policy=policy)


def latent_cycle(policy="stop_gradient", bridge="argmax"):
    return cv.CycleLatent(bridge=bridge, pairs=True, policy=policy)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = ToyNetwork(7, 4), ToyNetwork(7, 4)
        self.roles = cv.Roles(("encoder.*",), ("decoder.*",))

    def forward(self, tokens, latents, *, need="both", **state):
        return cv.Denoised(
            self.decoder(tokens, latents, need="logits", **state).logits,
            self.encoder(tokens, latents, need="latents", **state).latent_prediction,
        )


def learners(denoiser, objective, step=0):
    """The roles that a loss reaches, by autograd."""
    loss = objective(denoiser, toy_batch(seed=0), step=step).loss
    reached = set()
    for role, named in denoiser.roles.groups(denoiser.module).items():
        parameters = [parameter for _, parameter in named]
        if not parameters:
            continue
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        if any(g is not None and bool(g.any()) for g in gradients):
            reached.add(role)
    return reached


# --- roles ------------------------------------------------------------------------------------


def test_groups_by_role():
    groups = DENOISER.roles.groups(DENOISER.module)
    assert {role: {name.split(".")[0] for name, _ in named} for role, named in groups.items()} == {
        "encoder_only": {"latent_head"},
        "decoder_only": {"text_head"},
        "shared": {"word", "times", "shared"},
    }
    assert sum(map(len, groups.values())) == len(list(DENOISER.module.parameters()))


def test_a_tied_parameter_is_where_any_of_its_names_is():
    network = ToyNetwork(7, 4)
    network.word.weight = network.text_head.weight
    groups = network.roles.groups(network)
    assert "word.weight" in [name for name, _ in groups["decoder_only"]]
    denoiser = cv.as_denoiser(network)
    with cv.freeze(denoiser, "shared"):
        assert network.word.weight is network.text_head.weight
        assert isinstance(network.word.weight, nn.Parameter)
        assert not isinstance(network.shared.weight, nn.Parameter)


def test_two_networks_have_the_roles_of_their_names():
    pair = cv.EncoderDecoder(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = cv.as_denoiser(pair).roles.groups(pair)
    assert not groups["shared"] and len(groups["encoder_only"]) == 2
    both = nn.Linear(2, 2)
    assert cv.as_denoiser(cv.EncoderDecoder(both, both)).roles is None


def test_roles_may_be_given_or_belong_to_the_network():
    roles = cv.Roles(("latent_head.*",), ("text_head.*", "word.*"))
    assert cv.as_denoiser(DENOISER.module, roles=roles).roles is roles
    assert DENOISER.roles is DENOISER.module.roles


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("encoder", "decoder", "message"),
    [
        (("latnt_head.*",), (), "'latnt_head.*' of the role 'encoder_only' matches no parameter; "),
        ((), ("*.nothing",), "nearest: '"),
        (("*head*",), ("text_head.*",), "'text_head.weight' is both encoder_only and decoder_only"),
        ("latent_head.*", (), r"`encoder_only` must be a tuple of shell patterns .* got 'latent"),
        ((), (1,), r"`decoder_only` must be a tuple of shell patterns .* got \(1,\)"),
    ],
)
def test_bad_roles(encoder, decoder, message):
    with pytest.raises(ValueError, match=message):
        cv.as_denoiser(DENOISER.module, roles=cv.Roles(encoder, decoder))


def test_a_role_that_nobody_named():
    class Bare:
        module = DENOISER.module

    with pytest.raises(ValueError, match=r"'shared' is a role, .* as_denoiser\(network, roles="):
        cv.freeze(Bare(), "shared").__enter__()
    pair = cv.as_denoiser(cv.EncoderDecoder(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="the roles 'shared', which hold no parameters"):
        cv.freeze(pair, "shared").__enter__()


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (cv.Roles(("word.*",), ()), "call 'word.weight' encoder_only, but L2T passes use them too"),
        (cv.Roles((), ("shared.*",)), "'shared.weight', 'shared.bias' decoder_only, but T2L"),
    ],
)
def test_the_dry_run_finds_roles_that_are_not_true(roles, message):
    check_denoiser(DENOISER, TEXT, LATENT)
    with pytest.raises(AssertionError, match=message):
        check_denoiser(cv.as_denoiser(DENOISER.module, roles=roles), TEXT, LATENT)


# --- policies by name -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: DENOISER, lambda: cv.as_denoiser(Towers())])
def test_isolated_teaches_nothing_but_the_named_side(make):
    denoiser = make()
    text, latent = text_cycle("decoder_isolated"), latent_cycle("encoder_isolated")
    assert learners(denoiser, objective(text)) == {"decoder_only"}
    assert learners(denoiser, objective(latent)) == {"encoder_only"}


def test_stop_gradient_is_the_default_and_shared_weights_learn():
    for cycle in (cv.CycleText, cv.CycleLatent):
        assert cycle() == cycle(policy="stop_gradient") == cycle(policy=cv.GradientPolicy())
    assert learners(DENOISER, objective(cv.CycleText())) == {"decoder_only", "shared"}
    assert learners(DENOISER, objective(cv.CycleLatent())) == {"encoder_only", "shared"}


def test_full_teaches_all():
    for cycle in (text_cycle("full"), latent_cycle("full", "soft")):
        assert learners(DENOISER, objective(cycle)) == {"encoder_only", "decoder_only", "shared"}


def test_alternating_teaches_one_side_and_then_the_other():
    text, latent = text_cycle("alternating"), latent_cycle("alternating", "gumbel")
    assert [learners(DENOISER, objective(text), step) for step in range(3)] == [
        {"decoder_only", "shared"},
        {"encoder_only", "shared"},
        {"decoder_only", "shared"},
    ]
    assert [learners(DENOISER, objective(latent), step) for step in range(2)] == [
        {"encoder_only", "shared"},
        {"decoder_only", "shared"},
    ]
    assert latent.bridge_at(0) == TextBridge("categorical")  # nobody learns through it
    assert latent.bridge_at(1) == TextBridge("gumbel")


@pytest.mark.unhooked
@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("make", "policy", "message"),
    [
        (text_cycle, "decoder_isolate", "`policy` is .*; did you mean 'decoder_isolated'"),
        (text_cycle, "encoder_isolated", "did you mean 'decoder_isolated'"),
        (latent_cycle, 3, "`policy` must be a GradientPolicy, a PolicySchedule or one of 'stop"),
        (latent_cycle, "full", "the 'argmax' bridge is a choice of ids"),
        (latent_cycle, "alternating", "the 'argmax' bridge is a choice of ids"),
    ],
)
def test_policies_that_are_refused(make, policy, message):
    with pytest.raises(ValueError, match=message):
        make(policy)


def test_the_detached_twin_has_the_same_law():
    twins = {
        "straight_through": "argmax",
        "soft": "argmax",
        "sampled_straight_through": "categorical",
        "gumbel": "categorical",
        "rloo": "categorical",
        "unmask": "unmask",
        "argmax": "argmax",
    }
    for name, twin in twins.items():
        assert TextBridge(name).detached.name == twin
    assert TextBridge("rloo", temperature=0.5).detached.temperature == 0.5
    assert TextBridge("gumbel", temperature=0.5).detached.temperature == 1.0


# --- policies that change with the step -------------------------------------------------------


def test_a_schedule_of_the_bridge():
    opening = cv.PolicySchedule(
        (cv.GradientPolicy(), cv.GradientPolicy("last"), FULL), starts=(0, 2, 4)
    )
    term = text_cycle(opening)
    assert [term.encodes(step).through for step in (0, 1, 2, 3, 4, 99)] == [
        *["detach"] * 2,
        *["last"] * 2,
        *["full"] * 2,
    ]
    assert learners(DENOISER, objective(term), 1) == {"decoder_only", "shared"}
    assert learners(DENOISER, objective(term), 2) == {"encoder_only", "decoder_only", "shared"}
    config = json.loads(json.dumps(objective(term).to_config()))
    (again,) = cv.CycleObjective.from_config(config).terms
    assert again == term and policy_at(again.policy, 3).bridge == "last"


def test_the_plan_follows_the_schedule():
    """A frozen bridge needs a pass of its own, at the steps that freeze it."""
    frozen = cv.GradientPolicy("full", freeze_bridge=("shared",))
    turns = cv.PolicySchedule((cv.GradientPolicy(), frozen), (0, 1), period=2)
    run = objective(*BASE, text_cycle(turns), latent_cycle())
    assert [run.passes(step) for step in range(3)] == [5, 6, 5]


def test_a_name_is_no_policy_of_a_step():
    assert policy_at(TEXT_POLICIES["alternating"], 1).bridge == "full"
    assert policy_at(FULL, 1) is FULL
    with pytest.raises(TypeError, match="'alternating' is a name; look it up by named_policy"):
        policy_at("alternating", 0)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), ()), "`starts` must be one step for each of the 0 policies, ascending from 0"),
        (((FULL,), (1,)), r"ascending from 0, got \(1,\)"),
        (((FULL, FULL), (0, 0)), r"ascending from 0, got \(0, 0\)"),
        (((FULL,), (0, 1)), "for each of the 1 policies"),
        ((("full",), (0,)), "`policies` must hold GradientPolicy, got 'full'"),
        (((FULL, FULL), (0, 5), 5), "`period` must be above the last start"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        cv.PolicySchedule(*arguments)


# --- the table --------------------------------------------------------------------------------


def parsed(table):
    """The roles that learn, by term, of the last column but one."""
    lines = table.splitlines()
    start, end = lines[0].index("learns"), lines[0].index("frozen")
    found, term = {}, None
    for line in lines[1:]:
        term = line.split()[0] if not line.startswith(" ") else term
        cell = line[start:end].strip()
        roles = set() if cell == "nobody" else set(cell.split(", "))
        found[term] = found.get(term, set()) | roles
    return found


TABLES = {
    "recommended": (*BASE, text_cycle(), latent_cycle()),
    "isolated": (*BASE, text_cycle("decoder_isolated"), latent_cycle("encoder_isolated")),
    "full": (*BASE, text_cycle("full"), latent_cycle("full", "straight_through")),
    "one pass of the text cycle": (
        *BASE,
        text_cycle(cv.GradientPolicy("full", ("decoder_only", "shared"), ("shared",))),
        latent_cycle(),
    ),
    "everything": (
        *BASE,
        text_cycle(),
        latent_cycle("full", "soft"),
        cv.Prior("mmd"),
        cv.Contrastive(),
        cv.Sleep(pairs=True),
        cv.TextMarginal(bridge="soft", pairs=True),
    ),
}


@pytest.mark.parametrize("terms", TABLES.values(), ids=TABLES)
def test_the_table_is_what_autograd_says(terms):
    told = parsed(objective(*terms).describe())
    assert [*told] == [term.name for term in terms]
    for term in terms:
        assert learners(DENOISER, objective(term)) == told[term.name], term.name


def test_the_table_names_patterns_and_turns():
    policy = cv.GradientPolicy("full", freeze=("text_head.*",), freeze_bridge=("*",))
    _, makes, reads = objective(text_cycle(policy)).describe().splitlines()
    assert "nobody" in makes and makes.endswith("*")
    assert "decoder_only, shared except text_head.*" in reads and reads.endswith("text_head.*")
    turns = objective(text_cycle("alternating"))
    assert "nobody" in turns.describe(0).splitlines()[1]
    assert "nobody" in turns.describe(1).splitlines()[2]


# --- the picture in the docs ------------------------------------------------------------------


def test_the_picture_shows_who_learns():
    """Of each policy the boxes of both passes; of `alternating` those of the second turn."""
    picture = Path(__file__).parents[2] / "docs" / "images" / "who-learns.svg"
    svg = "{http://www.w3.org/2000/svg}"
    shown = {
        group.get("id"): [
            (box.get("data-role"), box.get("class")) for box in group.iter(f"{svg}rect")
        ]
        for group in ElementTree.parse(picture).getroot().iter(f"{svg}g")
    }
    assert shown.keys() == TEXT_POLICIES.keys()
    for name, boxes in shown.items():
        step = 1 if name == "alternating" else 0
        learns = {role for role, kind in boxes if kind == "learns"}
        assert learners(DENOISER, objective(text_cycle(name)), step) == learns, name
        makes, reads = boxes[:2], boxes[2:]
        policy = policy_at(text_cycle(name).policy, step)
        assert {kind for _, kind in makes} == {"none" if policy.bridge == "detach" else "learns"}
        frozen = {"decoder_only", "shared"} if policy.freeze == ("*",) else {*policy.freeze}
        assert {role for role, kind in reads if kind == "frozen"} == frozen - {"encoder_only"}
