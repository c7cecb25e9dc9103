"""Random objectives on random batches: each step is right as far as it can be told, or refused.

Seeded: what fails here fails again. `ODDS` of the options are values that no option takes.
"""

import random
import traceback
from pathlib import Path

import pytest
import torch

import cyclevae as cv
from cyclevae.gradient_policy.roles import ROLES
from cyclevae.objective.term import Term
from cyclevae.testing import ToyNetwork
from running import Recorder, seeded, teacher_of

SHARDS, DRAWS = 20, 500
ODDS = 0.01
WIDTH, WORDS, SRC = 4, 7, str(Path(cv.__file__).parent)

torch.manual_seed(0)
NETWORK = ToyNetwork(WORDS, WIDTH)
DENOISER = cv.as_denoiser(NETWORK)
JUDGE = teacher_of(DENOISER)

JUNK = [
    *(None, True, "", "mmd", "1e-1", -1, -0.5, 0, 2.5, float("nan"), float("inf"), 10**30, 1 + 2j),
    *([], {}, {"x": 1}, [1, "a"], (), {1, 2}, b"mse", torch.ones(2), torch.tensor(torch.nan)),
    *(object(), len, int, cv.Text(), cv.LatentBridge(), cv.TimePolicy()),
]  # fmt: skip
TIMES = [
    *(1.0, 0.5, 0.9, 1, cv.TimePolicy("uniform"), cv.TimePolicy("uniform", high=0.9)),
    *(cv.TimePolicy("logit_normal", low=0.1, high=0.9), cv.TimePolicy(high=cv.anneal(0.5, 0.9, 3))),
]  # fmt: skip
WEIGHTS = [1.0, 0.5, 3, cv.ramp(1.0, 1, 2), cv.ramp(0.5, 3)]
GUARDED = [
    *(cv.LatentBridge(), cv.LatentBridge(noise=0.5), cv.LatentBridge(2), cv.LatentBridge(3, 0.1)),
    *(cv.LatentBridge(threshold=1.0), cv.LatentBridge(norm=1.5, steps=2)),
]  # fmt: skip
TEXTS = [
    *("argmax", "categorical", "straight_through", "sampled_straight_through", "gumbel", "soft"),
    *("unmask", "best", "rloo", cv.TextBridge("unmask", steps=3), cv.TextBridge("rloo", samples=3)),
    *(cv.TextBridge("rloo", marginal_weight=0.1), cv.TextBridge("gumbel", temperature=0.5)),
]  # fmt: skip
RELAXED = ["straight_through", "sampled_straight_through", "gumbel", "soft", "rloo", *TEXTS[-3:]]
POLICIES = [
    *("stop_gradient", "full", "alternating", cv.GradientPolicy("full")),
    *(cv.GradientPolicy("last", ("shared",)), cv.GradientPolicy("detach", ("encoder_only",))),
    cv.GradientPolicy("full", (), ("decoder_only", "shared.*")),
]
MAKERS = [cv.Maker(), cv.Maker(), cv.Maker("teacher"), cv.Maker("evaluated", guidance=1.5)]
YES = [False, True]
COMMON = {
    "weight": WEIGHTS,
    "cap": [None, None, 0.1, 100.0],
    "every": [1, 1, 2],
    "fraction": [1.0, 1.0, 0.5, 0.01],
}
OPTIONS = {
    cv.Text: {"time": TIMES, "null_rate": [0.0, 0.2]},
    cv.Latent: {
        "time": TIMES,
        "distance": ["mse", "cosine", "normalized_mse"],
        "space": [None, "x0", "epsilon", "v", "velocity"],
        "min_snr": [None, None, 5.0],
        "null_rate": [0.0, 0.2],
        "weighting": [None, None, cv.LogitNormal()],
    },
    cv.Unconditional: {
        "latent_time": [None, *TIMES],
        "null_text_rate": [None, 0.0, 0.3, 1.0],
        "latent_weighting": [None, None, cv.LogitNormal()],
    },
    cv.CycleText: {
        "bridge": GUARDED,
        "time": TIMES,
        "policy": [*POLICIES, "decoder_isolated"],
        "maker": MAKERS,
        "pairs": YES,
    },
    cv.CycleLatent: {
        "bridge": TEXTS,
        "time": TIMES,
        "show_latent": YES,
        "distance": ["mse", "cosine", "normalized_mse"],
        "policy": [*POLICIES, "encoder_isolated"],
        "maker": MAKERS,
        "pairs": YES,
    },
    cv.Prior: {
        "prior": ["mmd", "moment", "sigreg", "learned", "ddvi"],
        "pool": [False] * 4 + [True],
        "bridge": GUARDED,
        "time": TIMES,
        "through": ["last", "full"],
        "variance": [None, 1.0, 2.0],
        "standardize": [None] * 5 + [True],
    },
    cv.Sleep: {"pairs": YES, "maker": MAKERS},
    cv.Distill: {
        "top": [1, 2, 8],
        "likelihood": [0.3, 1.0],
        "variance": [None, 1.0],
        "time": TIMES,
        "maker": MAKERS[:3],
        "pairs": YES,
    },
    cv.Contrastive: {
        "temperature": [0.1, 1.0],
        "critic": ["cosine", "euclidean"],
        "bridge": GUARDED,
        "time": TIMES,
        "through": ["last", "full"],
    },
    cv.TextMarginal: {
        "bridge": [*TEXTS, *RELAXED[:4] * 9],
        "freeze": [(), ("shared.*",)],
        "pairs": YES,
    },
}
REPORTED = {
    *("loss", "text_accuracy", "non_finite_terms", "latent_norm", "latent_pred_norm"),
    *("latent_pred_mean", "latent_pred_variance", "cycle_text_accuracy"),
}


def option(draw, values, name=""):
    if draw.random() >= ODDS:
        return draw.choice(values)
    # a function may stand in their place, and what it returns is not known before it runs
    functions = name in ("bridge", "distance", "prior", "weighting", "latent_weighting")
    return draw.choice([value for value in JUNK if not (functions and callable(value))])


def term(draw, number):
    kind = draw.choice(list(OPTIONS))
    told = {name: option(draw, v, name) for name, v in (OPTIONS[kind] | COMMON).items()}
    few = draw.random() < 0.7  # else most are refused for options that do not go together
    told = {name: value for name, value in told.items() if not few or draw.random() < 0.3}
    if kind is cv.CycleLatent and draw.random() < 0.7:
        told["policy"] = "full" if told.get("bridge", "") in RELAXED else "stop_gradient"
    if kind is cv.Prior:
        told = {name: value for name, value in told.items() if value is not None}
    return kind(**told, name=f"{kind.kind()}_{number}")


def processes(draw):
    text = cv.TextProcess(
        mask_id=2,
        vocab_size=WORDS,
        pad_id=0,
        taught_padding=option(draw, ["none", "none", "first", "all"]),
        **draw.choice([{}, {}, {"end_id": 1}]),
    )
    latent = cv.LatentProcess(
        option(draw, ["cosine", "cosine", "linear", "flow", cv.Flow(3.0), cv.EDM(sigma_max=9.0)]),
        prediction=option(draw, ["x0"] * 6 + ["v", "v", "velocity", "epsilon"]),
        shape=draw.choice([None, (WIDTH,)]),
    )
    return text, latent


def texts(draw, rows, length, generator):
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = torch.arange(length) < lengths
    if draw.random() < 0.2:  # on the left
        mask = mask.flip(1)
    tokens = torch.randint(3, WORDS, (rows, length), generator=generator)
    return tokens * mask, draw.choice([mask, mask.long()])


def batch(draw):
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    rows = [draw.choice([0, 1, 2, 3, 4, 8, 12, 12, 12]) for _ in range(3)]
    given = {}
    if draw.random() < 0.9:
        given["tokens"], given["attention_mask"] = texts(draw, rows[0], 5, generator)
        given["latents"] = torch.randn(rows[0], WIDTH, generator=generator)
        for name, part in (("has_text", "tokens"), ("has_latent", "latents")):
            if draw.random() < 0.2:
                marks = torch.rand(rows[0], generator=generator) < 0.6
                given[name] = marks
                if part == "latents":
                    given[part] = torch.where(marks[:, None], given[part], torch.nan)
    if draw.random() < 0.8:
        length = draw.choice([5, 5, 3])
        given["unpaired_tokens"], given["unpaired_attention_mask"] = texts(
            draw, rows[1], length, generator
        )
    if draw.random() < 0.8:
        given["unpaired_latents"] = torch.randn(rows[2], WIDTH, generator=generator)
        if draw.random() < 0.2:
            given["pseudo_text_mask"] = texts(draw, rows[2], 5, generator)[1]
    return cv.Batch(**given)


def reread(draw, objective):
    """The same from its configuration, in which something may have been changed."""
    config = objective.to_config()
    for _ in range(draw.choice([0, 1, 1, 2])):
        node = draw.choice(list(nodes(config)))
        key = draw.choice([*(range(len(node)) if isinstance(node, list) else node)])
        if draw.random() < 0.2:
            del node[key]
        else:
            node[key] = draw.choice([value for value in JUNK if not callable(value)])
    return cv.CycleObjective.from_config(config)


def nodes(config):
    """All dicts and lists inside that hold something."""
    if isinstance(config, dict | list) and config:
        yield config
        for inside in config.values() if isinstance(config, dict) else config:
            yield from nodes(inside)


def refused(error, calls):
    """A refusal is of ours, says what to do about which option, and comes before any pass."""
    frames = traceback.extract_tb(error.__traceback__)
    assert type(error) in (ValueError, TypeError), repr(error)
    assert frames[-1].filename.startswith(SRC) or "unexpected keyword" in str(error), repr(error)
    assert calls == 0, f"after {calls} passes: {error!r}"
    assert len(str(error).split()) >= 5, repr(error)


def draw_and_run(draw):
    """One draw; whether it ran."""
    NETWORK.zero_grad()
    model, judge = Recorder(DENOISER), Recorder(JUDGE)
    checked, number = draw.random() < 0.8, draw.randrange(4)
    try:
        objective = cv.CycleObjective(
            *processes(draw),
            [term(draw, i) for i in range(draw.randint(1, 4))],
            join_passes=draw.random() < 0.05,
            non_finite=option(draw, [None, None, "raise", "skip", "zero"]),
        )
        objective = reread(draw, objective) if draw.random() < 0.2 else objective
        given = batch(draw)
        with cv.check_values(None if checked else False):
            counts = objective.counts(given) if draw.random() < 0.3 else None
            output = objective(
                model,
                given,
                step=number,
                generator=seeded(),
                counts=counts,
                teacher=None if draw.random() < 0.05 else judge,
            )
    except Exception as error:
        refused(error, len(model.calls) + len(judge.calls))
        return False
    check(objective, output, number, len(model.calls) + len(judge.calls))
    return True


def check(objective, output, number, calls):
    """Passes as planned, metrics as named, all finite, gradients where `describe` says."""
    assert calls == objective.passes(number)
    running = [term for term in objective.terms if term.name in objective.weights(number)]
    losses = {term.metric(part) for term in running for part in term.parts}
    weights = {f"{term.name}_weight" for term in running}
    known = {name for term in running for name in reported(term)}
    assert losses | weights <= output.metrics.keys() <= losses | weights | REPORTED | known
    for name, value in {"loss": output.loss, **output.metrics}.items():
        assert torch.isfinite(value), f"{name} is {value}"
    if output.loss.requires_grad:
        output.loss.backward()
    learners = {
        role
        for planned in objective.plan(number).terms
        for request in planned.requests
        if request.learns and "*" not in request.freeze
        for role in request.roles
        if role not in request.freeze
    }
    roles = {"encoder_only": NETWORK.latent_head, "decoder_only": NETWORK.text_head}
    roles["shared"] = NETWORK.shared
    for role in ROLES:
        for parameter in roles[role].parameters():
            if parameter.grad is None:
                continue
            assert torch.isfinite(parameter.grad).all(), role
            assert role in learners or not parameter.grad.any(), f"{role} learns, unsaid"


def reported(term: Term):
    return {
        f"{term.name}_accuracy",
        f"{term.name}_reward",
        f"{term.name}_kl",
        f"{term.name}_candidates",
    }


@pytest.mark.parametrize("shard", range(SHARDS))
def test_each_step_is_right_or_refused(shard):
    ran = 0
    for number in range(DRAWS):
        draw = random.Random(f"{shard}-{number}")
        try:
            ran += draw_and_run(draw)
        except Exception as error:
            raise AssertionError(f"draw {shard}-{number}") from error
    assert ran > DRAWS / 10  # not everything is refused
