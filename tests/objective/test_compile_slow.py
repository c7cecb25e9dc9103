"""`torch.compile`: no graph break, the same numbers as eager, and recompiles only where it must.

The draws inside a compiled step come from the global random state, since dynamo refuses generators.
"""

from dataclasses import fields, replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import cyclevae as cv
from cyclevae.testing import toy_batch, toy_denoiser
from recipes import FROZEN, RECIPES, every_term, only, recipe
from running import MADE, of
from test_own_term import BESIDE, RHYME

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(function, backend="eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def result(function, parameters, *arguments, seed=0, **options):
    """The loss and its gradients, with the draws of a seed."""
    torch.manual_seed(seed)
    loss = function(*arguments, **options)
    loss = getattr(loss, "loss", loss)
    return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)


def assert_same_as_eager(function, parameters, *arguments, **options):
    (fast, counter), parameters = compiled(function, "aot_eager"), list(parameters)
    for seed in range(2):
        torch.testing.assert_close(
            result(fast, parameters, *arguments, seed=seed, **options),
            result(function, parameters, *arguments, seed=seed, **options),
        )
    assert counter.frame_count == 1


DENOISER, TEXT, LATENT = toy_denoiser(seed=0)


OBJECTIVES = {name: recipe(options) for name, options in RECIPES.items()} | {
    "recommended": cv.CycleObjective(TEXT, LATENT),
    "a term of one's own": of(*BESIDE, RHYME),
    "two priors": of(cv.Latent(), cv.Prior("mmd"), cv.Prior("moment", name="second", form="norm")),
    "alternating": of(*BESIDE, cv.CycleText(policy="alternating", time=cv.TimePolicy("uniform"))),
}


def longer(batch, by):
    """The same texts, with more padding."""

    def padded(part):
        return torch.nn.functional.pad(part, (0, by))

    texts = ("tokens", "attention_mask", "unpaired_tokens", "unpaired_attention_mask")
    return batch._replace(**{name: padded(getattr(batch, name)) for name in texts})


@pytest.mark.parametrize("schedule", ["edm", cv.Flow(3.0)])
def test_a_step_of_flow_matching_compiles(schedule):
    latent = cv.LatentProcess(schedule, "velocity", max_gain=100.0, shape=(4,))
    terms = [
        cv.Latent(time=cv.TimePolicy("uniform"), weighting=cv.LogitNormal()),
        cv.Unconditional(latent_weighting=cv.LogitNormal()),
        cv.CycleText(bridge=cv.LatentBridge(steps=2)),
        cv.Prior("learned"),
    ]
    network = toy_denoiser(seed=0)[0].module
    module = cv.StepModule(
        cv.as_denoiser(network, clean_at=1),
        cv.CycleObjective(TEXT, latent, terms),
        cv.Teacher(network),
    )
    parameters = list(network.parameters())
    assert_same_as_eager(module, parameters, toy_batch(rows=4), step=3)


SIZES = [
    toy_batch(rows=4),
    longer(toy_batch(rows=3), 2),
    toy_batch(rows=3),
    longer(toy_batch(rows=5), 3),
]


# Each kind of backward: of attention, of an estimator, through several passes, of a statistic
DIFFERENTIATED = ("recommended", "default", "rloo bridge", "three steps, full", "mmd", "learned")
MANY = 8
MADE_BY_OTHERS = of(MADE[1], cv.CycleText(maker=cv.Maker("evaluated", guidance=2.0)))


def step_of(objective):
    teacher = cv.Teacher(DENOISER.module) if objective.setting.reads_teacher else None
    return cv.StepModule(DENOISER, objective, teacher)


# Of a process of its own, the terms that read it the most
READS = {
    "text_process": ("text", "cycle_latent", "text_marginal"),
    "latent_process": ("latent", "cycle_text"),
}
# tests/scale/test_non_finite_slow.py; below; who is frozen by role or by name is one code
ELSEWHERE = {"skip", "moving cap", "isolated"}


def compiled_terms(objective):
    for process, kinds in READS.items():
        if getattr(objective, process) != getattr(OBJECTIVES["default"], process):
            return [term for term in objective.terms if term.kind() in kinds]
    return objective.terms


def together():
    """The terms of all of them side by side, each once, as far as their processes are the same."""
    groups = []
    for name, objective in OBJECTIVES.items():
        if name in ELSEWHERE:
            continue
        alike = [getattr(objective, f.name) for f in fields(objective) if f.name != "terms"]
        found = next((terms for other, terms, _ in groups if other == alike), [])
        if not found:
            groups.append((alike, found, objective))
        for term in compiled_terms(objective):
            if not term.weight_at(3):
                continue
            # another weight is no other graph
            named = [replace(term, name=f"{term.kind()}_{i}", weight=1.0) for i in range(MANY)]
            if not any(term in found for term in named):
                found.append(named[len(found) % MANY])
    for _, terms, objective in groups:
        for first in range(0, len(terms), MANY):
            yield replace(objective, terms=terms[first : first + MANY])


def frames(objective, batches):
    """How many graphs there are after each batch, whose numbers are those of eager."""
    module = step_of(objective)
    (fast, counter), parameters = compiled(module), list(DENOISER.module.parameters())
    for batch in batches:
        counts = {name: count / 2 for name, count in objective.counts(batch).items()}
        torch.testing.assert_close(
            result(fast, parameters, batch, 3, counts=counts),
            result(module, parameters, batch, 3, counts=counts),
        )
        yield counter.frame_count


def of_any_size(batch):
    """The same to dynamo, which makes rows and lengths symbolic at once."""
    parts = {name: part.clone() for name, part in batch._asdict().items() if part is not None}
    for name, part in parts.items():
        for dim in range(part.ndim - ("latents" in name)):
            torch._dynamo.maybe_mark_dynamic(part, dim)
    return batch._replace(**parts)


@pytest.mark.parametrize(
    "objective", [*together(), MADE_BY_OTHERS], ids=lambda o: ", ".join(o.weights(3))
)
def test_every_term_compiles_to_one_graph_of_every_size(objective):
    """Step 3 of each kind."""
    assert list(frames(objective, map(of_any_size, SIZES))) == [1] * len(SIZES)


def test_a_second_size_compiles_once_more_and_others_do_not():
    assert list(frames(OBJECTIVES["recommended"], SIZES)) == [1, 2, 2, 2]


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_forward_and_backward_are_traced(name):
    assert_same_as_eager(step_of(OBJECTIVES[name]), DENOISER.module.parameters(), SIZES[0], 3)


def test_with_a_generator_the_graph_breaks_at_draws_and_is_compiled_no_third_time():
    module = cv.StepModule(DENOISER, of(cv.Text()))
    counter = CompileCounterWithBackend("eager")
    fast, compiled_twice = torch.compile(module, backend=counter), 0
    for number, batch in enumerate(SIZES):
        made = [torch.Generator().manual_seed(0) for _ in range(2)]
        actual, wanted = fast(batch, 3, made[0]), module(batch, 3, made[1])
        torch.testing.assert_close(actual.loss, wanted.loss)
        if number == 1:
            compiled_twice = counter.frame_count
    assert counter.frame_count == compiled_twice


def test_a_denoiser_of_a_compiled_network_runs_compiled():
    calls = []

    def backend(graph, inputs):
        return lambda *values: calls.append(1) or graph(*values)

    denoiser = cv.as_denoiser(torch.compile(DENOISER.module, fullgraph=True, backend=backend))
    assert denoiser.module is DENOISER.module
    objective = every_term(TEXT, LATENT)
    parameters = list(DENOISER.module.parameters())
    actual, expected = (
        result(objective, parameters, d, toy_batch(), step=0) for d in (denoiser, DENOISER)
    )
    torch.testing.assert_close(actual, expected)
    assert len(calls) == objective.passes(0) == 5


@pytest.mark.parametrize("policy", [cv.GradientPolicy(), FROZEN], ids=["detach", "full"])
def test_the_text_cycle_compiles(policy):
    batch = toy_batch()

    def cycle(tokens, mask):
        return cv.cycle_text_loss(
            DENOISER, tokens, mask, text_process=TEXT, latent_process=LATENT, policy=policy
        )

    parameters = DENOISER.module.parameters()
    assert_same_as_eager(cycle, parameters, batch.tokens, batch.attention_mask)


@pytest.mark.parametrize("prior", [cv.mmd_prior, cv.moment_prior])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_priors_compile(prior, estimator):
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert_same_as_eager(prior, [z], z, mean=0.1, variance=2.0, estimator=estimator)


SCHEDULES = {
    "ramp": (cv.ramp(1.0, warmup_steps=3, ramp_steps=4), {0, 1, 3}),
    "constant": (1.0, {0}),
    # a function of one's own: dynamo traces it
    "function": (lambda step: 1.0 + step / 100, {0, 1}),
}


@pytest.mark.parametrize(("weight", "expected"), SCHEDULES.values(), ids=SCHEDULES)
def test_moving_weights_recompile_only_where_a_term_switches_on(weight, expected):
    """Step 1 is where dynamo learns that the step moves; step 3 is where the ramp switches on."""
    objective = of(cv.Latent(), cv.CycleText(weight=weight, pairs=True))
    module = cv.StepModule(DENOISER, objective)
    (fast, counter), parameters = compiled(module), list(module.parameters())
    recompiled, before = set(), 0
    for step in range(12):
        torch.testing.assert_close(
            result(fast, parameters, toy_batch(), step),
            result(module, parameters, toy_batch(), step),
        )
        if counter.frame_count > before:
            recompiled.add(step)
        before = counter.frame_count
    assert recompiled == expected


CYCLES = only("cycle_text", "cycle_latent")
PLANS = {
    "alternating": of(cv.Latent(), cv.CycleText(policy="alternating", pairs=True)),
    "a term of one's own, every other step": of(cv.Latent(), replace(RHYME, every=2)),
    "in turn": recipe(CYCLES | {"p_dual": 0.5}),
    "phases": cv.phases(recipe(CYCLES), latent_cycle_from=3, full_gradient_from=6),
    "moving cap": recipe(RECIPES["moving cap"]),
}


@pytest.mark.parametrize("objective", PLANS.values(), ids=PLANS)
def test_a_plan_compiles_once(objective):
    """Once more at step 1, where dynamo learns that the step moves."""
    module = cv.StepModule(DENOISER, objective)
    (fast, counter), parameters = compiled(module), list(module.parameters())
    plans = set()
    for step in range(9):
        torch.testing.assert_close(
            result(fast, parameters, toy_batch(), step),
            result(module, parameters, toy_batch(), step),
        )
        at = objective.at(step) if isinstance(objective, cv.Phases) else objective
        plans.add(tuple((term.name, term.requests) for term in at.plan(step).terms))
    assert counter.frame_count <= len(plans) + 1
