"""Objectives as plain dicts: what survives, and what is refused by its path and nothing else."""

import copy
import json
import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cyclevae as cv
from cyclevae.objective.config import VERSION
from cyclevae.objective.terms import SHIPPED
from cyclevae.testing import toy_denoiser
from running import LATENT, TEXT, of, run, teacher_of
from strategies import quick

BRIDGE = cv.LatentBridge(steps=2, noise=0.1, threshold=1.0, quantile=0.9, norm=2.0)
TIMES = cv.TimePolicy("logit_normal", low=0.1, high=0.9, mean=0.5, std=2.0, stratified=False)
MOVING = cv.TimePolicy("full", high=cv.anneal(0.5, 1.0, 3, 4))
TURNS = cv.take_turns(cv.ramp(4.0, 5, 2), 1.0, together=0.5, every=2, seed=3)
OPENING = cv.PolicySchedule(
    (cv.GradientPolicy(), cv.GradientPolicy("last", ("word.*",))), (0, 4), 7
)
NORM = {"form": "norm", "mean": torch.arange(4.0), "covariance": torch.eye(4) * 2}
# Every term, with no option at its default
EVERYTHING = of(
    cv.Text(weight=2.0, cap=100.0, every=1, fraction=0.5, time=TIMES, null_rate=0.2),
    cv.Latent(cap=50.0, time=TIMES, distance="cosine", space="x0", min_snr=5.0, every=3),
    cv.Latent(name="latent_3", null_rate=0.1),
    cv.Unconditional(
        weight=cv.ramp(1.0, 2),
        latent_time=0.5,
        null_text_rate=0.2,
        text_weighting="mean",
        latent_weighting=cv.LogitNormal(std=0.5),
    ),
    cv.CycleText(weight=TURNS[0], bridge=BRIDGE, time=MOVING, policy=OPENING, pairs=True, every=2),
    cv.CycleLatent(
        weight=TURNS[1],
        bridge=cv.TextBridge("gumbel", temperature=0.5),
        time=0.9,
        show_latent=True,
        distance="normalized_mse",
        policy=cv.GradientPolicy("full", ("word.*",), ("shared.*",)),
        pairs=True,
    ),
    cv.CycleText(name="cycle_text_2", maker=cv.Maker("teacher", guidance=2.0)),
    cv.CycleLatent(name="cycle_latent_2", maker=cv.Maker("evaluated"), bridge="argmax"),
    cv.Prior("moment", weight=cv.ramp(0.1, 5), pool=True, bridge=BRIDGE, through="full", **NORM),
    cv.Prior("mmd", name="prior_2", time=TIMES, scales=(0.5, 1.0), kernel="imq", standardize=True),
    cv.Prior("learned", name="prior_3", samples=2, weight=0.5),
    cv.Sleep(weight=0.2, pairs=True, maker=cv.Maker(guidance=1.5)),
    cv.Contrastive(temperature=0.2, critic="euclidean", bridge=BRIDGE, time=MOVING, through="full"),
    cv.TextMarginal(bridge="soft", freeze=("word.*",), pairs=True),
    cv.Distill(top=4, likelihood=0.3, variance=2.0, time=TIMES, maker=cv.Maker("teacher")),
    cv.CycleLatent(name="cycle_latent_3", bridge=cv.TextBridge("best", samples=4, steps=2)),
    cv.Latent(name="latent_2", time=TIMES, weighting=cv.LogitNormal(mean=0.5, std=2.0)),
    cv.Text(name="text_2", weighting="bound"),
    non_finite="skip",
    seed=3,
)
CONFIG = EVERYTHING.to_config()


def changed(config, path, value):
    """The same with something else at a path."""
    config = copy.deepcopy(config)
    (*way, last), node = path, config
    for key in way:
        node = node[key]
    node[last] = value
    return config


def read(config, **classes):
    return cv.CycleObjective.from_config(config, **classes)


# What survives


def test_everything_survives_json():
    config = json.loads(json.dumps(CONFIG))
    again = read(config)
    assert again == EVERYTHING and again.to_config() == config == CONFIG
    assert again.terms == EVERYTHING.terms and hash(again) == hash(EVERYTHING)
    assert torch.equal(again.terms[8].options["covariance"], torch.eye(4) * 2)
    for step in (0, 6):
        losses = []
        for objective in (EVERYTHING, again):
            denoiser = toy_denoiser(seed=0)[0]
            output = run(objective, denoiser, step=step, teacher=teacher_of(denoiser))
            losses.append(output.loss)
        assert losses[0] == losses[1] and losses[0].isfinite()
    assert {f.name for f in fields(EVERYTHING) if f.init} | {"version"} == CONFIG.keys()


@pytest.mark.parametrize("term", SHIPPED)
def test_every_option_of_every_term_is_written_and_has_a_default(term):
    """Of this file's objective none is at its default, so that none can be lost unseen."""
    mine = [each for each in EVERYTHING.terms if type(each) is term]
    assert mine
    written = {key for each in mine for key in CONFIG["terms"][each.name]}
    own = {f.name for f in fields(term) if f.init} - {"name", "options"}
    assert own <= written
    plain = read({**CONFIG, "terms": {term.kind(): None}}).terms
    assert plain == (term(),)
    common = {"weight", "cap", "every", "fraction", "time", "pairs", "pool", "bridge", "through"}
    for option in own - common:
        assert any(getattr(each, option) != getattr(term(), option) for each in mine), option


def test_the_recipe_is_what_is_not_said():
    processes = {name: CONFIG[name] for name in ("text_process", "latent_process")}
    assert read(processes) == read({**processes, "terms": None}) == cv.CycleObjective(TEXT, LATENT)
    assert read({"text_process": TEXT, "latent_process": LATENT}) == cv.CycleObjective(TEXT, LATENT)
    config = cv.CycleObjective(TEXT, LATENT).to_config()
    assert config["version"] == VERSION == 2 and list(config["terms"]) == [
        "text",
        "latent",
        "cycle_text",
    ]


def test_the_order_of_terms_is_kept():
    terms = [cv.CycleText(), cv.Prior("mmd", name="second"), cv.Prior("sigreg"), cv.Latent()]
    again = read(json.loads(json.dumps(of(*terms).to_config())))
    assert [term.name for term in again.terms] == ["cycle_text", "second", "prior", "latent"]
    assert CONFIG["terms"]["prior_2"]["kind"] == "prior" and "kind" not in CONFIG["terms"]["prior"]


def test_numbers_of_yaml_that_are_strings_are_read_as_numbers():
    config = {**CONFIG, "terms": {"text": {"weight": "1e-1", "every": "2", "cap": "100"}}}
    (term,) = read({**config, "seed": "7"}).terms
    assert (term.weight, term.every, term.cap) == (0.1, 2, 100) and type(term.every) is int
    (term,) = read({**config, "terms": {"cycle_text": {"bridge": {"noise": "1e-1"}}}}).terms
    assert term.bridge == cv.LatentBridge(noise=0.1)
    (term,) = read({**config, "terms": {"prior": {"scales": ["1e-1", 2], "weight": "3"}}}).terms
    assert term.options == {"scales": (0.1, 2)} and term.weight == 3


def test_tensors_of_a_prior_compare_by_value():
    def prior(mean, **options):
        return cv.Prior("moment", mean=mean, **options)

    one, same = prior(torch.arange(4.0)), prior(torch.arange(4.0))
    assert one == same and hash(one) == hash(same) and of(one) == of(same)
    for other in (
        prior(torch.arange(4.0) + 1),
        prior(torch.arange(4.0).double()),
        prior(torch.zeros(())),
        prior(0.5),
        prior(torch.arange(4.0), variance=2.0),
        cv.Prior("moment"),
        replace(one, weight=2.0),
        replace(one, name="another"),
    ):
        assert one != other and of(one, cv.Latent()) != of(other, cv.Latent())
    assert prior(torch.tensor(0.0)) != prior(0.0)


def test_objectives_differ_by_anything():
    assert of(cv.Text(), cv.Latent()) != of(cv.Latent(), cv.Text())
    assert of(cv.Text()) != of(cv.Text(), seed=1) != of(cv.Text(), non_finite="skip", seed=1)
    assert of(cv.Text()) != "text" and cv.Text() != cv.Latent(weight=1.0)
    assert cv.Text(weight=1) == cv.Text()
    other = cv.LatentProcess("linear", "x0", shape=(4,))
    assert of(cv.Text()) != cv.CycleObjective(TEXT, other, [cv.Text()])
    assert read(cv.CycleObjective(TEXT, other).to_config()).latent_process == other


# One's own classes


@dataclass(frozen=True)
class Shifted(cv.LatentProcess):
    """With an option of its own."""

    shift: float = 0.0


@dataclass(frozen=True)
class Worded(cv.TextProcess):
    pass


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm(cv.Term):
    power: int = 2
    scales: tuple[float, ...] = (1.0,)

    def passes(self, step):
        return (cv.Encode(rows=cv.Share(1.0, 1.0)),)

    def loss(self, step):
        z_hat = step.z_hat(*self.passes(step.number))
        return sum(scale * z_hat.norm(dim=1).pow(self.power).mean() for scale in self.scales)


def test_processes_of_ones_own_survive():
    text, latent = Worded(2, 7, pad_id=0), Shifted(shape=(4,), shift=0.5)
    objective = cv.CycleObjective(text, latent)
    config = json.loads(json.dumps(objective.to_config()))
    assert config["latent_process"]["kind"] == "Shifted"
    again = read(config, processes=[Worded, Shifted])
    assert again == objective and type(again.latent_process) is Shifted
    assert again.latent_process.shift == 0.5 and type(again.text_process) is Worded
    with pytest.raises(
        ValueError, match=r"`latent_process.kind` is 'Shifted', a class that was no"
    ):
        read(config, processes=[Worded])
    for process, others in ((cv.TextProcess, "text"), (cv.LatentProcess, "latent")):
        assert type(getattr(read(CONFIG, processes=[Worded, Shifted]), f"{others}_process")) is (
            process
        )


def test_terms_of_ones_own_survive():
    objective = of(cv.Latent(), Norm(weight=0.5, power=3, scales=(0.5, 1.0)), Norm(name="norm_2"))
    config = json.loads(json.dumps(objective.to_config()))
    assert config["terms"]["norm_2"]["kind"] == "norm"
    assert read(config, terms={"norm": Norm}) == objective
    with pytest.raises(
        ValueError, match=r"`terms.norm` is no term that is known.*terms={'norm': C"
    ):
        read(config)
    other = changed(config, ("terms",), {"nrm": {"power": 2}})
    once = read(other, terms={"nrm": Norm})
    assert read(once.to_config(), terms={"nrm": Norm}) == once
    wrong = changed(config, ("terms", "norm", "power"), "two")
    with pytest.raises(ValueError, match=r"`terms\.norm\.power` must be an integer, got 'two'"):
        read(wrong, terms={"norm": Norm})
    with pytest.raises(ValueError, match=r"unknown key `terms\.norm\.pwer`; did you mean 'power'"):
        read(changed(config, ("terms", "norm", "pwer"), 1), terms={"norm": Norm})


@pytest.mark.unhooked
def test_a_list_of_classes_is_refused():
    with pytest.raises(ValueError, match="`terms` must be a Mapping"):
        read(of(cv.Latent()).to_config(), terms=[Norm])


def test_omegaconf_survives():
    """Whose mappings and lists are none of Python's."""
    import omegaconf

    config = omegaconf.OmegaConf.create(CONFIG)
    assert read(config) == EVERYTHING
    assert read(omegaconf.OmegaConf.create(omegaconf.OmegaConf.to_yaml(config))) == EVERYTHING
    part = omegaconf.OmegaConf.create(
        {"terms": {"text": None, "cycle_text": {"weight": {"weight": 4.0, "warmup_steps": 10}}}}
    )
    part.text_process, part.latent_process = CONFIG["text_process"], CONFIG["latent_process"]
    assert read(part).terms == (cv.Text(), cv.CycleText(weight=cv.ramp(4.0, 10)))
    with pytest.raises(ValueError, match=r"`terms\.text\.time\.low` must be a number, got \['a'\]"):
        read(omegaconf.OmegaConf.create(changed(CONFIG, ("terms", "text", "time", "low"), ["a"])))


def test_a_configuration_is_not_changed_by_reading_it():
    config = copy.deepcopy(CONFIG)
    read(config)
    assert config == CONFIG


# What is refused


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("cycle_txt",), 1.0, "unknown key 'cycle_txt' of the objective"),
        (("nonfinite",), "skip", "unknown key 'nonfinite' of the objective; did you mean 'non_fin"),
        (("latent_process", "predicton"), "v", r"unknown key `latent_process\.predicton`; did you"),
        (("latent_process",), None, "`latent_process` must be a LatentProcess, got None"),
        (("text_process",), {}, r"`text_process\.mask_id` is missing"),
        (("text_process",), {"mask_id": 2}, r"`text_process\.vocab_size` is missing"),
        (("text_process", "mask_id"), 9, r"`text_process`: `mask_id`"),
        (("text_process", "kind"), "Txt", r"`text_process\.kind` is 'Txt', a class .* 'TextProc"),
        (("version",), 9, "`version` must be 2, got 9"),
        (("join_passes",), "yes", "`join_passes` must be true or false, got 'yes'"),
        (("non_finite",), "ignore", "`non_finite` is 'ignore'; known are 'raise', 'skip', 'zero'"),
        (("seed",), 1.5, "`seed` must be an integer, got 1.5"),
        (("seed",), 2**63, "`seed` must have 64 bits at most, got a larger integer"),
        (("terms",), [{"text": {}}], "`terms` must be a mapping"),
        (("terms",), {}, "`terms` is empty, so there is nothing to train on"),
        (("terms", "text"), [], r"`terms\.text` must be a mapping, got \[\]"),
        (("terms", "txet"), {}, r"`terms\.txet` is no term that is known; did you mean 'text'"),
        (("terms", "text", "kind"), "txet", r"`terms\.text` is no term .* did you mean 'text'"),
        (("terms", "text", "tiem"), 1.0, r"unknown key `terms\.text\.tiem`; did you mean 'time'"),
        (("terms", "text", "name"), "latent", "`terms` holds two of the name 'latent'"),
        (("terms", "text", "name"), "my text", "`terms.text`: `name` is part of the names of metr"),
        (
            ("terms", "prior", "frm"),
            "norm",
            r"unknown key `terms\.prior\.frm`; did you mean 'form'",
        ),
        (("terms", "prior", "prior"), "mdm", r"`terms\.prior`: `prior` is 'mdm'; did you mean 'mm"),
        (
            ("terms", "prior", "form"),
            "nrm",
            r"`terms\.prior\.form` must be 'diagonal', .*, got 'nrm'",
        ),
        (
            ("terms", "prior", "covariance"),
            [[1.0, 0.0], [0.0]],
            r"`terms\.prior\.covariance` must be numbers of one shape",
        ),
        (
            ("terms", "cycle_text", "bridge", "noise"),
            "a lot",
            r"`terms\.cycle_text\.bridge\.noise` must be a number, got 'a lot'",
        ),
        (
            ("terms", "cycle_text", "bridge", "noise"),
            -1.0,
            r"`terms\.cycle_text\.bridge`: `noise` must be a finite number of at least 0, got -1",
        ),
        (
            ("terms", "cycle_text", "bridge", "step"),
            2,
            r"unknown key `terms\.cycle_text\.bridge\.step`; did you mean 'steps'",
        ),
        (
            ("terms", "cycle_text", "time", "high", "star"),
            0.5,
            r"unknown key `terms\.cycle_text\.time\.high\.star`; did you mean 'start'",
        ),
        (
            ("terms", "cycle_text", "policy", "policies"),
            ["full", "full"],
            r"`terms\.cycle_text\.policy\.policies\[0\]` must be .*GradientPolicy, got 'full'",
        ),
        (
            ("terms", "cycle_text", "policy", "starts"),
            [0, "x"],
            r"`terms\.cycle_text\.policy\.starts\[1\]` must be an integer, got 'x'",
        ),
        (
            ("terms", "cycle_latent", "bridge", "temprature"),
            1.0,
            r"unknown key `terms\.cycle_latent\.bridge\.temprature`; did you mean 'temperature'",
        ),
        (
            ("terms", "cycle_latent", "policy", "freeze"),
            "word.*",
            r"`terms\.cycle_latent\.policy\.freeze` must be a list, got 'word\.\*'",
        ),
        (
            ("terms", "unconditional", "weight", "warmup"),
            2,
            r"unknown key `terms\.unconditional\.weight\.warmup`; did you mean 'warmup_steps'",
        ),
        (
            ("terms", "unconditional", "weight", "weight"),
            True,
            r"`terms\.unconditional\.weight\.weight` must be a number, got True",
        ),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(path, value, message):
    with pytest.raises(ValueError, match=message):
        read(changed(CONFIG, path, value))


@pytest.mark.unhooked
def test_what_is_no_configuration_is_refused():
    for junk in (None, [], "text", 1, [("text_process", {})]):
        with pytest.raises(ValueError, match="`configuration` must be a mapping, got"):
            read(junk)
    for name in ("text_process", "latent_process"):
        with pytest.raises(ValueError, match=f"`{name}` is missing from the configuration"):
            read({key: value for key, value in CONFIG.items() if key != name})


# The kinds of value that each field takes; all others must be refused with its path
NUMBER, WHOLE, BOOL, NAME = "number", "integer", "bool", "name"
NONE, MAPPING, LIST = "none", "mapping", "list"
TIME = {NUMBER, MAPPING}
COMMON = {
    "weight": {NUMBER, MAPPING},
    "cap": {NUMBER, NONE},
    "every": {WHOLE},
    "fraction": {NUMBER},
    "name": {NAME},
}
TAKES = {
    "text": {"time": TIME, "null_rate": {NUMBER}, "weighting": {NAME}},
    "latent": {
        "time": TIME,
        "distance": {NAME},
        "space": {NAME, NONE},
        "min_snr": {NUMBER, NONE},
        "null_rate": {NUMBER},
        "weighting": {MAPPING, NONE},
    },
    "unconditional": {
        "latent_time": TIME | {NONE},
        "null_text_rate": {NUMBER, NONE},
        "latent_weighting": {MAPPING, NONE},
        "text_weighting": {NAME},
    },
    "cycle_text": {
        "bridge": {MAPPING},
        "time": TIME,
        "maker": {MAPPING},
        "policy": {NAME, MAPPING},
        "pairs": {BOOL},
    },
    "cycle_latent": {
        "bridge": {NAME, MAPPING},
        "time": TIME,
        "show_latent": {BOOL},
        "distance": {NAME},
        "maker": {MAPPING},
        "policy": {NAME, MAPPING},
        "pairs": {BOOL},
    },
    "prior": {
        "prior": {NAME},
        "pool": {BOOL},
        "bridge": {MAPPING},
        "time": TIME,
        "through": {NAME},
        "form": {NAME},
        "mean": {NUMBER, LIST, NONE},
        "variance": {NUMBER, LIST},
        "covariance": {LIST, NONE},
    },
    "sleep": {"maker": {MAPPING}, "pairs": {BOOL}},
    "contrastive": {
        "temperature": {NUMBER},
        "critic": {NAME},
        "bridge": {MAPPING},
        "time": TIME,
        "through": {NAME},
    },
    "text_marginal": {"bridge": {NAME, MAPPING}, "freeze": {LIST}, "pairs": {BOOL}},
    "distill": {
        "top": {WHOLE},
        "likelihood": {NUMBER},
        "variance": {NUMBER, NONE},
        "time": TIME,
        "maker": {MAPPING},
        "pairs": {BOOL},
    },
}
JUNK = {
    NUMBER: [0.5, -2.5, math.nan, math.inf],
    WHOLE: [3, -1],
    BOOL: [True, False],
    NAME: ["", "x", "None", "true", b"x"],
    NONE: [None],
    MAPPING: [{}, {"x": 1}, {1: 2}, {"weight": {"weight": {"weight": 1}}}, {"name": ["x"]}],
    LIST: [[], ["a"], [[1.0, 2.0], [3.0]], [None], [{"x": 1}], ({},)],
}


@pytest.mark.unhooked
@pytest.mark.parametrize("term", SHIPPED)
@pytest.mark.slow
def test_a_value_of_another_type_is_refused_for_every_field(term):
    kind = term.kind()
    takes = COMMON | TAKES[kind]
    assert takes.keys() >= {f.name for f in fields(term) if f.init} - {"options"}
    for field, kinds in takes.items():
        beside = {"prior": "moment"} if term is cv.Prior else {}
        kinds = kinds | ({WHOLE} if NUMBER in kinds else set())
        for wrong, values in JUNK.items():
            if wrong in kinds:
                continue
            for value in values:
                if value == b"x" and NAME in kinds:
                    continue
                with pytest.raises(ValueError) as caught:
                    read({**CONFIG, "terms": {kind: {**beside, field: value}}})
                told = str(caught.value)
                begins = f"`terms.{kind}.{field}", f"`terms.{kind}`: `{field}`"
                assert told.startswith(begins), (field, value, told)


# Any mutation at all

LEAVES = [value for values in JUNK.values() for value in values] + [
    *("1e-1", "nan", "mmd", "learned", "full", "gumbel", "alternating", 10**400, "9" * 400, -0.0),
    *(object(), 1 + 2j, torch.ones(2), {"kind": "prior"}, {"high": {}}, {"start": 0.1}, float),
    *({"policies": [], "starts": []}, {"turn": 0, "of": 2, "weight": 1}, {"distribution": "full"}),
]
leaves = st.sampled_from(LEAVES)
KEYS = ("x", "weight", "time", "name", "kind", "options", "prior", "bridge", "_asks", 1, None)


def paths(node, way=()):
    """Every way to a value inside."""
    if way:
        yield way
    entries = enumerate(node) if isinstance(node, list) else getattr(node, "items", tuple)()
    for key, inside in entries:
        yield from paths(inside, (*way, key))


@pytest.mark.unhooked
@settings(quick, max_examples=100)
@given(st.data())
@pytest.mark.slow
def test_nothing_but_a_value_error_comes_out_of_a_mutated_configuration(data):
    config = copy.deepcopy(CONFIG)
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(list(paths(config))))
        node = config
        for key in way:
            node = node[key]
        change = data.draw(st.sampled_from(["replace", "replace", "delete", "add"]))
        if change == "delete":
            del node[last]
        elif change == "add" and isinstance(node, dict):
            node[data.draw(st.sampled_from(KEYS))] = copy.deepcopy(data.draw(leaves))
        else:
            node[last] = copy.deepcopy(data.draw(leaves))
    try:
        objective = read(config)
    except ValueError:
        return
    try:
        written = objective.to_config()
    except ValueError as error:  # a function was put in
        assert "which a plain configuration cannot hold" in str(error)
        return
    assert read(written) == objective


# Version 1

VERSION_1 = {
    "text_weight": ["text.weight"],
    "latent_weight": ["latent.weight"],
    "unconditional_weight": ["unconditional.weight"],
    "cycle_text_weight": ["cycle_text.weight"],
    "cycle_latent_weight": ["cycle_latent.weight"],
    "prior_weight": ["prior.weight"],
    "sleep_weight": ["sleep.weight"],
    "contrastive_weight": ["contrastive.weight"],
    "text_marginal_weight": ["text_marginal.weight"],
    "base_text_time": ["text.time"],
    "base_latent_time": ["latent.time"],
    "unconditional_latent_time": ["unconditional.latent_time"],
    "null_text_rate": ["unconditional.null_text_rate"],
    "latent_distance": ["latent.distance"],
    "latent_space": ["latent.space"],
    "min_snr": ["latent.min_snr"],
    "cycle_latent_distance": ["cycle_latent.distance"],
    "latent_bridge": ["cycle_text.bridge"],
    "text_bridge": ["cycle_latent.bridge"],
    "bridge_time": ["cycle_text.time", "cycle_latent.time"],
    "show_latent": ["cycle_latent.show_latent"],
    "text_policy": ["cycle_text.policy"],
    "latent_policy": ["cycle_latent.policy"],
    "prior": ["prior.prior"],
    "prior_options": ["prior.options"],
    "pool_prior": ["prior.pool"],
    "contrastive_options": ["contrastive.temperature", "critic"],
    "p_dual": ["cycle_text.weight", "cycle_latent.weight"],
    "cycle_every": ["cycle_text.every", "cycle_latent.every"],
    "cycle_fraction": ["cycle_text.fraction", "cycle_latent.fraction"],
    "cycle_pairs": ["cycle_text.pairs", "cycle_latent.pairs"],
    "caps": [f"{term.kind()}.cap" for term in SHIPPED],
}


@pytest.mark.parametrize("version", [{"version": 1}, {}])
@pytest.mark.parametrize("old", VERSION_1)
def test_a_key_of_version_1_is_refused_with_its_new_place(old, version):
    processes = {name: CONFIG[name] for name in ("text_process", "latent_process")}
    with pytest.raises(ValueError, match="this is a configuration of version 1") as caught:
        read({**processes, **version, old: 1.0})
    told = str(caught.value)
    assert f"`{old}` is now `terms." in told
    for place in VERSION_1[old]:
        assert f"{place}`" in told


def test_a_whole_configuration_of_version_1_is_refused_key_by_key():
    """And the keys that both versions have are not among those that moved."""
    old = {"version": 1, **{key: CONFIG[key] for key in CONFIG if key not in ("version", "terms")}}
    with pytest.raises(ValueError, match="version 2 says what each term does under `terms`"):
        read(old)
    with pytest.raises(ValueError) as caught:
        read({**old, **dict.fromkeys(VERSION_1, 1.0)})
    assert all(f"`{key}` is now" in str(caught.value) for key in VERSION_1)
    assert not any(f"`{key}` is now" in str(caught.value) for key in ("seed", "join_passes"))


# What only code can say


def identity(logits, mask, **_):
    return logits.argmax(-1)


@pytest.mark.parametrize(
    ("term", "path"),
    [
        (cv.Prior(lambda z: z.mean()), "terms.prior.prior"),
        (cv.Prior("mmd", weight=lambda step: 1.0), "terms.prior.weight"),
        (cv.CycleLatent(bridge=identity), "terms.cycle_latent.bridge"),
        (cv.CycleLatent(bridge=cv.TextBridge(identity)), "terms.cycle_latent.bridge.name"),
        (cv.Latent(distance=lambda p, t: p), "terms.latent.distance"),
        (cv.CycleText(time=cv.TimePolicy(high=lambda step: 1.0)), "terms.cycle_text.time.high"),
        (cv.Prior("mmd", name="mine", weight=lambda step: 1.0), "terms.mine.weight"),
    ],
)
def test_a_function_of_ones_own_is_named_where_it_stands(term, path):
    with pytest.raises(ValueError, match=f"`{path}` is .*a plain configuration cannot hold"):
        of(cv.Text(), term).to_config()


@pytest.mark.parametrize(
    "term",
    [
        cv.Prior(lambda z: z.square().mean()),
        cv.CycleLatent(bridge=lambda *_: None),
        cv.Latent(weight=lambda step: 1.0),
    ],
    ids=lambda term: term.name,
)
def test_a_function_is_told_what_a_configuration_holds_in_its_place(term):
    with pytest.raises(ValueError, match=r"dataclasses.replace\(term, ...\), or use ") as caught:
        of(term).to_config()
    assert ("Ramp" in str(caught.value)) == isinstance(term, cv.Latent)
