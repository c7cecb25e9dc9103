"""What a step is told to run: its passes, its rows, its priors and bridges, and its phases."""

import json
import math
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.options import TERMS
from cyclevae.testing import (
    ToyNetwork,
    assert_frozen,
    assert_learns,
    check_denoiser,
    toy_batch,
    toy_denoiser,
)
from recipes import every_term

FULL = cv.GradientPolicy("full")
NONE = {f"{term}_weight": 0.0 for term in TERMS}
CYCLES = ("cycle_text", "cycle_latent")


def only(*terms, **options):
    return NONE | {f"{term}_weight": 1.0 for term in terms} | options


class Recorder:
    """A denoiser that keeps what it was asked, and what it answered."""

    def __init__(self, denoiser):
        self.inner, self.module, self.calls, self.answers = denoiser, denoiser.module, [], []

    def denoise(self, tokens, latents, **state):
        self.calls.append((tokens, latents, state))
        self.answers.append(self.inner.denoise(tokens, latents, **state))
        return self.answers[-1]

    def encodes(self):
        return [call for call in self.calls if not call[2]["text_time"].any()]


@pytest.fixture
def toy():
    return toy_denoiser(seed=0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def teacher_of(denoiser):
    return cv.Teacher(denoiser.module).denoiser


def run(objective, denoiser, batch=None, step=0, **options):
    batch = toy_batch(rows=4) if batch is None else batch
    return objective(denoiser, batch, step=step, generator=seeded(), **options)


# The plan


BRIDGES = [
    {},
    {"latent_bridge": cv.LatentBridge(steps=3)},
    {"base_latent_time": None},
    {"text_policy": cv.GradientPolicy("full", (), ("shared.*",))},
    {"text_bridge": "gumbel", "latent_policy": FULL},
    {"text_bridge": "gumbel", "latent_policy": cv.GradientPolicy("full", (), ("shared.*",))},
    {
        "latent_bridge": cv.LatentBridge(steps=2),
        "text_policy": cv.GradientPolicy("last", (), ("shared.*",)),
    },
]
SOME_TERMS = [
    terms
    for size in (1, 2, 3)
    for start in range(len(TERMS))
    for terms in [tuple(TERMS[(start + k * size) % len(TERMS)] for k in range(size))]
] + [TERMS]


@pytest.mark.parametrize("prior", ["mmd", "learned", "ddvi"])
@pytest.mark.parametrize("options", BRIDGES)
def test_the_announced_passes_are_those_that_run(toy, prior, options):
    denoiser, text, latent = toy
    teacher = teacher_of(denoiser)
    for terms in SOME_TERMS:
        if "text_marginal" in terms and "text_bridge" not in options:
            continue
        objective = every_term(text, latent, **only(*terms, prior=prior, **options))
        model, judge = Recorder(denoiser), Recorder(teacher)
        metrics = run(objective, model, teacher=judge).metrics
        assert len(model.calls) + len(judge.calls) == objective.passes(0), terms
        assert set(terms) <= {
            "unconditional" if name.startswith("unc") else name.removesuffix("_loss")
            for name in metrics
        }


@pytest.mark.parametrize(
    ("bridge", "passes"),
    [
        (cv.TextBridge("unmask", steps=3), 3 + 1),
        (cv.TextBridge("categorical", temperature=0.5), 2),
        (lambda logits, mask, **_: logits.argmax(dim=-1), 2),
    ],
)
def test_text_bridges_and_their_passes(toy, bridge, passes):
    denoiser, text, latent = toy
    recorder = Recorder(denoiser)
    objective = every_term(text, latent, **only("cycle_latent", text_bridge=bridge))
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
    denoiser, (_, text, latent) = two_towers(), toy_denoiser()
    recorder = Recorder(denoiser)
    options = only("cycle_latent", text_bridge=bridge, latent_policy=FULL)
    objective = every_term(text, latent, **options)
    loss = run(objective, recorder).loss
    assert len(recorder.calls) == objective.passes(0) == passes
    assert_learns(loss, tower(denoiser, "encoder") + tower(denoiser, "decoder"))


def test_p_dual_is_the_share_of_steps_with_both_cycles(toy):
    _, text, latent = toy
    for p_dual, seed in product((0.0, 0.1, 0.5, 0.75, 1.0), (0, 1, 7)):
        objective = every_term(text, latent, p_dual=p_dual, seed=seed)
        ran = [objective.weights(step).keys() & set(CYCLES) for step in range(400)]
        assert abs(sum(len(cycles) == 2 for cycles in ran) - p_dual * 400) <= 1
        singles = [cycle for cycles in ran if len(cycles) == 1 for cycle in cycles]
        assert all(a != b for a, b in pairwise(singles))  # in turn
        assert all(cycles for cycles in ran)
        again = every_term(text, latent, p_dual=p_dual, seed=seed)
        assert ran == [again.weights(step).keys() & set(CYCLES) for step in range(400)]
    plans = {
        tuple(
            "cycle_text" in every_term(text, latent, p_dual=0.5, seed=seed).weights(step)
            for step in range(16)
        )
        for seed in range(8)
    }
    assert len(plans) > 2  # the seed has a say


def test_the_text_marginal_and_the_sleep_term_go_with_the_latent_cycle(toy):
    _, text, latent = toy
    objective = every_term(
        text,
        latent,
        p_dual=0.0,
        sleep_weight=1.0,
        text_marginal_weight=1.0,
        text_bridge="soft",
        latent_policy=FULL,
    )
    texts, latents = objective.weights(0).keys(), objective.weights(1).keys()
    assert texts ^ latents == {"cycle_text", "cycle_latent", "sleep", "text_marginal"}
    assert {"text", "latent", "unconditional"} <= texts & latents


def test_cycles_on_every_third_step_and_there_in_turn(toy):
    _, text, latent = toy
    objective = every_term(text, latent, cycle_every=3, p_dual=0.0)
    ran = [sorted(objective.weights(step).keys() & set(CYCLES)) for step in range(8)]
    assert ran == [["cycle_text"], [], [], ["cycle_latent"], [], [], ["cycle_text"], []]
    assert [objective.passes(step) for step in range(4)] == [4, 3, 3, 4]


@pytest.mark.parametrize("prior_weight", [0.0, 1.0])
@pytest.mark.parametrize("base_latent_time", [1.0, None])
def test_cycles_on_a_fraction_of_the_batch(toy, prior_weight, base_latent_time):
    denoiser, text, latent = toy
    options = {
        "unconditional_weight": 0.0,
        "prior_weight": prior_weight,
        "base_latent_time": base_latent_time,
    }
    part = every_term(text, latent, cycle_fraction=0.5, **options)
    batch = toy_batch(rows=5)
    recorder = Recorder(denoiser)
    metrics = run(part, recorder, batch).metrics
    reads = [len(call[0]) for call in recorder.calls]
    full_texts = 10 if prior_weight else 5 + 3 if base_latent_time else 3 + 3
    base = [] if base_latent_time else [5]
    # decoder with all pairs and 3 other latents, encoder of 3 + 3, base, bridge, decoder of 3 + 3
    assert reads == [5 + 3, 3 + 3, *base, full_texts, 3 + 3]

    # the values are those of a batch that holds these rows alone
    first = cv.Batch(*(None if value is None else value[:3] for value in batch))
    counts = part.counts(batch)
    assert counts["cycle_text_loss"] == (
        first.attention_mask.sum() + first.unpaired_attention_mask.sum()
    )
    assert counts["cycle_latent_loss"] == 6 * 4 and counts["latent_loss"] == 5 * 4
    z_hat = recorder.calls[-1][1]
    alone = cv.cycle_text_loss(
        denoiser,
        torch.cat([first.tokens, first.unpaired_tokens]),
        torch.cat([first.attention_mask, first.unpaired_attention_mask]),
        z_hat=z_hat,
        text_process=text,
        latent_process=latent,
    )
    torch.testing.assert_close(metrics["cycle_text_loss"], alone.detach())


def test_a_small_fraction_is_rounded_up_but_not_by_a_rounding_error(toy):
    _, text, latent = toy
    objective = every_term(text, latent, cycle_fraction=0.7)
    assert objective.cycled(10, 20, marked=False) == (7, 7)
    assert replace(objective, cycle_fraction=0.01).cycled(3, 3, marked=False) == (1, 0)


def test_cycles_that_leave_pairs_out_read_the_other_rows_alone(toy):
    denoiser, text, latent = toy
    whole = every_term(text, latent, unconditional_weight=0.0)
    batch, recorder = toy_batch(rows=5), Recorder(denoiser)
    alone = replace(whole, cycle_pairs=False)
    metrics = run(alone, recorder, batch).metrics
    # decoder of pairs and latents, encoder of 5 pseudo-texts, of pairs and texts, decoder of 5
    assert [len(call[0]) for call in recorder.calls] == [10, 5, 10, 5]
    assert alone.passes(0) == whole.passes(0) == 4
    counts = alone.counts(batch)
    assert counts["cycle_text_loss"] == batch.unpaired_attention_mask.sum()
    assert counts["cycle_latent_loss"] == 5 * 4 and counts["latent_loss"] == 5 * 4
    expected = cv.cycle_text_loss(
        denoiser,
        batch.unpaired_tokens,
        batch.unpaired_attention_mask,
        z_hat=recorder.calls[-1][1],
        text_process=text,
        latent_process=latent,
    )
    torch.testing.assert_close(metrics["cycle_text_loss"], expected.detach())


@pytest.mark.parametrize(
    ("missing", "term"),
    [("unpaired_tokens", "texts"), ("unpaired_latents", "latents")],
)
def test_cycles_that_leave_pairs_out_need_something_else(toy, missing, term):
    denoiser, text, latent = toy
    objective = every_term(text, latent, unconditional_weight=0.0, cycle_pairs=False)
    batch = toy_batch()
    gone = {missing: None} | (
        {"unpaired_attention_mask": None} if term == "texts" else {"pseudo_text_mask": None}
    )
    with pytest.raises(ValueError, match=f"run on {term} without a partner, and the batch holds"):
        run(objective, denoiser, batch._replace(**gone))


# Priors by name


@pytest.mark.parametrize(
    ("prior", "options", "function"),
    [
        ("moment", {"form": "kl", "variance": 2.0}, cv.moment_prior),
        ("mmd", {"kernel": "imq", "scales": (0.5,)}, cv.mmd_prior),
        ("mmd", {"reference": torch.randn(5, 4, generator=seeded(1))}, cv.mmd_prior),
        ("moment", {"form": "norm", "covariance": torch.eye(4) * 2}, cv.moment_prior),
        (lambda z, scale: scale * z.square().mean(), {"scale": 3.0}, None),
    ],
)
def test_a_prior_is_the_function_on_the_encoders_latents(toy, prior, options, function):
    denoiser, text, latent = toy
    recorder = Recorder(denoiser)
    objective = every_term(
        text, latent, **only("cycle_text", "prior", prior=prior, prior_options=options)
    )
    metrics = run(objective, recorder).metrics
    z_hat = recorder.calls[1][1]
    expected = (function or prior)(z_hat, **options)
    torch.testing.assert_close(metrics["prior_loss"], expected)
    assert len(z_hat) == 8  # paired and unpaired


def test_sigreg_reads_the_generator_of_the_step(toy):
    denoiser, text, latent = toy
    objective = every_term(text, latent, **only("prior", prior="sigreg"))
    values = [
        objective(denoiser, toy_batch(), step=0, generator=seeded(s)).metrics["prior_loss"]
        for s in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("prior", ["learned", "ddvi"])
def test_learned_priors_count_rows(toy, prior):
    denoiser, text, latent = toy
    objective = every_term(text, latent, **only("prior", prior=prior))
    batch, teacher = toy_batch(rows=4), teacher_of(denoiser)
    own = run(objective, denoiser, batch, teacher=teacher).metrics["prior_loss"]
    counts = objective.counts(batch)
    assert counts["prior_loss"] == 8
    counts["prior_loss"] *= 2
    other = run(objective, denoiser, batch, teacher=teacher, counts=counts).metrics["prior_loss"]
    torch.testing.assert_close(own, 2 * other)


def test_the_length_that_the_teacher_sees_tells_nothing(toy):
    denoiser, text, latent = toy
    judge = Recorder(teacher_of(denoiser))
    objective = every_term(text, latent, **only("prior", prior="learned"))
    batch = toy_batch(rows=8)
    run(objective, denoiser, batch, teacher=judge)
    ((tokens, _, state),) = judge.calls
    own = torch.cat([batch.attention_mask, batch.unpaired_attention_mask])
    assert not torch.equal(state["attention_mask"], own)
    assert bool((tokens[state["attention_mask"]] == text.mask_id).all())
    assert all(any(torch.equal(row, its) for its in own) for row in state["attention_mask"])


def test_contrast_is_infonce_of_the_pairs(toy):
    denoiser, text, latent = toy
    recorder, batch = Recorder(denoiser), toy_batch(rows=4)
    options = {"temperature": 0.3, "critic": "euclidean"}
    objective = every_term(
        text, latent, **only("cycle_text", "contrastive", contrastive_options=options)
    )
    metrics = run(objective, recorder, batch).metrics
    expected = cv.infonce_loss(
        recorder.calls[1][1][:4],
        batch.latents,
        duplicates=cv.same_text(batch.tokens, batch.attention_mask),
        **options,
    )
    torch.testing.assert_close(metrics["contrastive_loss"], expected)


def test_the_sleep_term_is_its_function_on_the_dreamt_texts(toy):
    denoiser, text, latent = toy
    recorder = Recorder(denoiser)
    objective = every_term(text, latent, **only("sleep"))
    metrics = run(objective, recorder).metrics
    (_, latents, _), (dream, z_t, state) = recorder.calls
    assert not (dream == text.mask_id).any() and len(z_t) == 8
    _, predicted = denoiser.module(dream, z_t, **{k: v for k, v in state.items() if k != "need"})
    noise = (z_t - wide(latent, state["latent_time"], 0) * latents) / wide(
        latent, state["latent_time"], 1
    )
    target = latent.target(latents, noise, state["latent_time"])
    expected = (predicted - target).square().mean().detach()
    torch.testing.assert_close(metrics["sleep_loss"], expected, rtol=1e-3, atol=1e-3)


def wide(process, time, which):
    return process.alpha_sigma(time)[which][:, None]


# Who learns


class OneHead(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head, self.network = head, ToyNetwork(7, 4)

    def forward(self, tokens, latents, **state):
        return getattr(self.network(tokens, latents, **state), self.head)


def two_towers():
    torch.manual_seed(0)
    return cv.as_denoiser(cv.EncoderDecoder(OneHead("latent_prediction"), OneHead("logits")))


def tower(denoiser, name):
    unused = {"encoder": "network.text_head", "decoder": "network.latent_head"}[name]
    return [
        (key, parameter)
        for key, parameter in denoiser.module.named_parameters()
        if key.startswith(name) and unused not in key
    ]


@pytest.mark.parametrize(
    ("term", "options", "learns", "frozen"),
    [
        ("prior", {"prior": "sigreg"}, "encoder", "decoder"),
        ("prior", {"prior": "learned"}, "encoder", "decoder"),
        ("prior", {"prior": "ddvi"}, "encoder", "decoder"),
        ("prior", {"latent_bridge": cv.LatentBridge(steps=3)}, "encoder", "decoder"),
        ("sleep", {}, "encoder", "decoder"),
        ("sleep", {"text_bridge": "soft", "latent_policy": FULL}, "encoder", "decoder"),
        ("contrastive", {}, "encoder", "decoder"),
        ("text_marginal", {"text_bridge": "soft", "latent_policy": FULL}, "decoder", "encoder"),
        ("cycle_text", {"latent_bridge": cv.LatentBridge(steps=3)}, "decoder", "encoder"),
        (
            "cycle_text",
            {
                "latent_bridge": cv.LatentBridge(steps=3),
                "text_policy": cv.GradientPolicy("last", ("decoder.*",)),
            },
            "encoder",
            "decoder",
        ),
    ],
)
def test_who_learns_from_which_term(term, options, learns, frozen):
    denoiser, (_, text, latent) = two_towers(), toy_denoiser()
    objective = every_term(text, latent, **only(term, **options))
    loss = run(objective, denoiser, teacher=teacher_of(denoiser)).loss
    assert_learns(loss, tower(denoiser, learns))
    assert_frozen(loss, tower(denoiser, frozen))


def test_a_prior_trains_what_the_cycle_freezes(toy):
    """Beside a text cycle with a frozen bridge, the prior's gradient is that of the prior alone."""
    denoiser, text, latent = toy
    policy = cv.GradientPolicy("full", (), ("latent_head.*",))
    weight = denoiser.module.latent_head.weight
    gradients = []
    for terms in (("cycle_text", "prior"), ("prior",)):
        objective = every_term(text, latent, **only(*terms, text_policy=policy))
        loss = run(objective, denoiser).loss
        gradients.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    alone = every_term(text, latent, **only("cycle_text", text_policy=policy))
    assert_frozen(run(alone, denoiser).loss, [("latent_head.weight", weight)])


def test_the_base_decoder_loss_trains_what_the_latent_cycle_freezes(toy):
    denoiser, text, latent = toy
    policy = cv.GradientPolicy("full", (), ("text_head.*",))
    options = {"text_bridge": "soft", "latent_policy": policy}
    weight = denoiser.module.text_head.weight
    gradients = []
    for terms in (("cycle_latent", "text"), ("text",)):
        objective = every_term(text, latent, **only(*terms, **options))
        gradients.append(torch.autograd.grad(run(objective, denoiser).loss, weight)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


# Times, distances and the fully masked state


def test_time_policies_move_with_the_step(toy):
    denoiser, text, latent = toy
    cap = cv.TimePolicy("uniform", high=cv.anneal(0.2, 0.9, steps=10))
    objective = every_term(
        text,
        latent,
        bridge_time=cv.TimePolicy("full", high=cv.anneal(0.5, 1.0, steps=10)),
        base_latent_time=cap,
        unconditional_latent_time=cap,
    )
    for step, high, start in ((0, 0.2, 0.5), (10, 0.9, 1.0)):
        recorder = Recorder(denoiser)
        run(objective, recorder, toy_batch(rows=16), step=step)
        assert len(recorder.calls) == objective.passes(step) == 6
        latent_cycle, base, bridge = (call[2]["latent_time"] for call in recorder.encodes())
        torch.testing.assert_close(latent_cycle, torch.full((32,), start))
        torch.testing.assert_close(bridge, torch.full((32,), start))
        both = recorder.calls[-1][2]["latent_time"]
        for times in (base, both[:16]):
            assert 0.8 * high < times.max() <= high


def test_a_moving_bridge_is_refused_where_it_becomes_ill_conditioned(toy):
    denoiser, text, _ = toy
    epsilon = cv.LatentProcess(prediction="epsilon", shape=(4,))
    objective = every_term(
        text,
        epsilon,
        base_latent_time=None,
        bridge_time=cv.TimePolicy("full", high=cv.anneal(0.5, 1.0, steps=10)),
    )
    recorder = Recorder(denoiser)
    with pytest.raises(ValueError, match=r"gain of .* above max_gain"):
        run(objective, recorder, step=10)
    assert not recorder.calls
    run(objective, denoiser, step=0)


@pytest.mark.parametrize("base_latent_time", [1.0, 0.5])
@pytest.mark.parametrize(
    "options",
    [
        {"latent_distance": "cosine"},
        {"latent_distance": "normalized_mse"},
        {"latent_space": "x0"},
        {"latent_space": "x0", "min_snr": 2.0},
    ],
)
def test_the_base_latent_loss_takes_every_form(toy, options, base_latent_time):
    denoiser, text, latent = toy
    recorder, batch = Recorder(denoiser), toy_batch(rows=4)
    objective = every_term(
        text, latent, **only("latent", base_latent_time=base_latent_time, **options)
    )
    value = run(objective, recorder, batch).metrics["latent_loss"]
    ((_, z_t, state),) = recorder.calls
    alpha, sigma = (x[:, None] for x in latent.alpha_sigma(state["latent_time"]))
    noise = (z_t - alpha * batch.latents) / sigma if base_latent_time < 1 else z_t
    loss = cv.t2l_loss(
        denoiser,
        *(batch.tokens, batch.latents, batch.attention_mask),
        text_process=text,
        latent_process=latent,
        time=base_latent_time,
        noise=noise,
        space=options.get("latent_space"),
        distance=options.get("latent_distance", "mse"),
        min_snr=options.get("min_snr"),
    )
    torch.testing.assert_close(value, loss.detach(), rtol=1e-4, atol=1e-4)
    if "latent_distance" in options:
        of_cosine = 4 if options["latent_distance"] == "cosine" else 16
        assert objective.counts(batch)["latent_loss"] == of_cosine


def test_the_latent_cycle_takes_a_distance(toy):
    denoiser, text, latent = toy
    values = []
    for distance in ("cosine", "normalized_mse"):
        objective = every_term(text, latent, **only("cycle_latent", cycle_latent_distance=distance))
        values.append(run(objective, denoiser).metrics["cycle_latent_loss"])
    torch.testing.assert_close(values[0] * 2 / 4, values[1])
    assert objective.counts(toy_batch(rows=4))["cycle_latent_loss"] == 8 * 4


def absolute(prediction, target):
    return (prediction - target).abs()


def test_a_distance_of_ones_own(toy):
    denoiser, text, latent = toy
    objective = every_term(
        text,
        latent,
        **only(
            "latent",
            "cycle_latent",
            latent_distance=absolute,
            cycle_latent_distance=absolute,
        ),
    )
    metrics = run(objective, denoiser).metrics
    mine = every_term(
        text,
        latent,
        **only(
            "latent",
            "cycle_latent",
            latent_distance=lambda p, t: 2 * absolute(p, t),
            cycle_latent_distance=lambda p, t: 3 * absolute(p, t),
        ),
    )
    doubled = run(mine, denoiser).metrics
    torch.testing.assert_close(doubled["latent_loss"], 2 * metrics["latent_loss"])
    torch.testing.assert_close(doubled["cycle_latent_loss"], 3 * metrics["cycle_latent_loss"])
    assert objective.counts(toy_batch(rows=4))["latent_loss"] == 4 * 4
    z = torch.tensor([[1.0, -2.0]])
    assert cv.latent_loss(z, torch.zeros(1, 2), distance=absolute) == 1.5
    with pytest.raises(ValueError, match=r"`distance\(...\)` and `prediction` must have equal"):
        cv.latent_loss(z, z, distance=lambda p, t: (p - t).sum(dim=1))
    with pytest.raises(ValueError, match=r"`latent_distance` is <function absolute .* a function"):
        objective.to_config()


def test_the_fully_masked_state_is_trained_where_a_prior_reads_it(toy):
    denoiser, text, latent = toy
    batch = toy_batch(rows=20)

    def fully_masked(**options):
        recorder = Recorder(denoiser)
        objective = every_term(text, latent, **only("unconditional", **options))
        run(objective, recorder, batch)
        tokens, _, state = recorder.calls[-1]
        pairs = slice(20)
        assert (state["text_time"][pairs] == 1).sum() == (
            (tokens[pairs] == text.mask_id) == state["attention_mask"][pairs]
        ).all(dim=1).logical_and(state["text_time"][pairs] == 1).sum()
        return int((state["text_time"][pairs] == 1).sum()), objective

    assert fully_masked()[0] == 0
    count, objective = fully_masked(null_text_rate=0.25)
    assert count == 5
    kept = batch.unpaired_attention_mask.sum() + 0.75 * batch.attention_mask.sum()
    torch.testing.assert_close(objective.counts(batch)["unconditional_text_loss"], kept)
    default = every_term(text, latent)
    assert default.null_rate == 0
    assert replace(default, prior="learned").null_rate == 0
    assert replace(default, prior="learned", prior_weight=0.1).null_rate == 0.1
    assert replace(default, prior="ddvi", prior_weight=0.1, null_text_rate=0.0).null_rate == 0


@pytest.mark.parametrize("guard", [{"norm": 1.5}, {"threshold": 0.1}, {"noise": 0.5}])
def test_the_guards_of_the_latent_bridge_act_in_the_step(toy, guard):
    denoiser, text, latent = toy
    plain, guarded = Recorder(denoiser), Recorder(denoiser)
    for recorder, bridge in ((plain, cv.LatentBridge()), (guarded, cv.LatentBridge(**guard))):
        run(every_term(text, latent, **only("cycle_text", latent_bridge=bridge)), recorder)
    z_hat, crossing = plain.calls[1][1], guarded.calls[1][1]
    assert not torch.equal(z_hat, crossing)
    if "norm" in guard:
        torch.testing.assert_close(crossing.norm(dim=1), torch.full((8,), 1.5))


# Counts


@pytest.mark.parametrize(
    "options",
    [
        {"latent_distance": "cosine", "latent_weight": 1.0},
        {"cycle_latent_distance": "cosine", "cycle_latent_weight": 1.0},
        {"sleep_weight": 1.0},
        {"text_marginal_weight": 1.0, "text_bridge": "soft", "latent_policy": FULL},
    ],
)
def test_counts_are_the_denominators(toy, options):
    """Twice the count is half the loss, and the own count is the loss."""
    denoiser, text, latent = toy
    objective = every_term(text, latent, **NONE | options)
    batch = toy_batch(rows=4)
    losses = []
    for factor in (None, 1, 2):
        counts = objective.counts(batch)
        counts = None if factor is None else {k: factor * v for k, v in counts.items()}
        losses.append(run(objective, denoiser, batch, counts=counts).loss)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], 2 * losses[2])


# Configuration


def everything():
    _, text, latent = toy_denoiser()
    return every_term(
        text,
        latent,
        prior="moment",
        prior_options={"form": "norm", "mean": torch.arange(4.0), "covariance": torch.eye(4) * 2},
        prior_weight=cv.ramp(0.1, 5),
        contrastive_options={"temperature": 0.2},
        contrastive_weight=0.1,
        sleep_weight=0.2,
        text_marginal_weight=0.3,
        bridge_time=cv.TimePolicy("full", high=cv.anneal(0.5, 1.0, 3, 4)),
        base_latent_time=cv.TimePolicy("logit_normal", low=0.1, mean=0.5),
        unconditional_latent_time=0.5,
        null_text_rate=0.2,
        latent_distance="cosine",
        latent_space="x0",
        min_snr=5.0,
        text_bridge=cv.TextBridge("gumbel", temperature=0.5),
        latent_bridge=cv.LatentBridge(steps=2, noise=0.1),
        text_policy=cv.GradientPolicy("last"),
        latent_policy=cv.GradientPolicy("full", ("word.*",)),
        p_dual=0.5,
        cycle_every=2,
        cycle_fraction=0.5,
        seed=3,
    )


def test_everything_survives_json():
    objective = everything()
    config = json.loads(json.dumps(objective.to_config()))
    again = cv.CycleObjective.from_config(config)
    assert again.to_config() == config == objective.to_config()
    for name in ("bridge_time", "base_latent_time", "text_bridge", "latent_bridge", "prior_weight"):
        assert getattr(again, name) == getattr(objective, name)
    assert torch.equal(again.prior_options["covariance"], torch.eye(4) * 2)
    for step in (0, 6):
        losses = [
            o(toy_denoiser(seed=0)[0], toy_batch(), step=step, generator=seeded()).loss
            for o in (objective, again)
        ]
        assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_bridge": {"name": "gumbel", "temprature": 1}}, "'temprature' for TextBridge"),
        ({"latent_bridge": {"step": 2}}, "'step' for LatentBridge; did you mean 'steps'"),
        ({"bridge_time": {"distribution": "full", "hi": 1}}, "'hi' for TimePolicy"),
        ({"bridge_time": {"high": {"star": 0.5, "end": 1.0}}}, "'star' for Anneal"),
        ({"prior_options": {"frm": "norm"}}, "'frm' in `prior_options`"),
    ],
)
def test_a_typo_is_found_at_any_depth(change, message):
    config = everything().to_config()
    with pytest.raises(ValueError, match=message):
        cv.CycleObjective.from_config(config | change)


def test_a_function_of_ones_own_is_named_where_it_stands(toy):
    _, text, latent = toy
    for options, name in (
        ({"prior": lambda z: z.mean()}, "`prior` is"),
        ({"text_bridge": lambda logits, mask, **_: logits.argmax(-1)}, "`text_bridge` is"),
        ({"bridge_time": cv.TimePolicy(high=lambda step: 1.0)}, "`high` is"),
    ):
        with pytest.raises(ValueError, match=name):
            every_term(text, latent, **options).to_config()


# Phases


def three(toy, **options):
    _, text, latent = toy
    return cv.phases(every_term(text, latent), latent_cycle_from=2, full_gradient_from=4, **options)


def test_phases_open_one_cycle_after_the_other_and_then_the_bridges(toy):
    objective = three(toy)
    cycles = [sorted(objective.weights(step).keys() & set(CYCLES)) for step in range(6)]
    assert cycles == [["cycle_text"]] * 2 + [["cycle_latent", "cycle_text"]] * 4
    policies = [
        (objective.at(step).text_policy.bridge, objective.at(step).latent_policy.bridge)
        for step in range(6)
    ]
    assert policies == [("detach", "detach")] * 4 + [("full", "full")] * 2
    assert [objective.passes(step) for step in (1, 3, 5)] == [4, 5, 5]
    assert objective.counts(toy_batch()).keys() == objective.objective.counts(toy_batch()).keys()


def test_a_phase_for_a_cycle_that_weighs_nothing_is_refused(toy):
    objective = every_term(*toy[1:], cycle_latent_weight=0.0)
    with pytest.raises(ValueError, match="cycle_latent_weight` is 0: give it a weight"):
        cv.phases(objective, latent_cycle_from=2, full_gradient_from=4)
    assert cv.phases(objective, latent_cycle_from=4, full_gradient_from=4).passes(5) == 4


@pytest.mark.parametrize(("step", "both"), [(0, False), (3, False), (4, True)])
def test_who_learns_in_which_phase(step, both):
    denoiser, (_, text, latent) = two_towers(), toy_denoiser()
    objective = cv.phases(
        every_term(text, latent, **only("cycle_text")),
        latent_cycle_from=4,
        full_gradient_from=4,
    )
    loss = objective(denoiser, toy_batch(), step=step).loss
    assert_learns(loss, tower(denoiser, "decoder"))
    (assert_learns if both else assert_frozen)(loss, tower(denoiser, "encoder"))


def test_phases_train_in_a_step_module_and_survive_json(toy):
    denoiser, *_ = toy
    objective = three(toy, text_bridge=cv.TextBridge("gumbel", temperature=0.5))
    config = json.loads(json.dumps(objective.to_config()))
    again = cv.Phases.from_config(config)
    assert again == objective and again.to_config() == config
    with pytest.raises(ValueError, match="'latent_from' for Phases; did you mean 'latent_cycle"):
        cv.Phases.from_config(config | {"latent_from": 1})
    module = cv.StepModule(denoiser, objective)
    for step in (0, 3, 5):
        direct = objective(denoiser, toy_batch(), step=step, generator=seeded()).loss
        assert module(toy_batch(), step, seeded()).loss == direct


# A teacher beside the network


def test_a_step_module_keeps_its_teacher(toy):
    denoiser, text, latent = toy
    check_denoiser(denoiser, text, latent)
    teacher = cv.Teacher(denoiser.module, decay=0.5)
    objective = every_term(text, latent, **only("prior", prior="learned"))
    module = cv.StepModule(denoiser, objective, teacher)
    module(toy_batch(), 0).loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in denoiser.module.parameters())
    names = module.state_dict().keys()
    assert {name for name in names if name.startswith("teacher.network.")}
    assert not any(name.startswith("denoiser") for name in names)
    module.train()
    assert not teacher.network.training


def test_every_term_at_once_learns_and_is_reported(toy):
    denoiser, text, latent = toy
    objective = every_term(
        text,
        latent,
        **{f"{term}_weight": 0.5 for term in TERMS},
        prior="learned",
        text_bridge=cv.TextBridge("gumbel"),
        latent_policy=FULL,
        latent_bridge=cv.LatentBridge(steps=2, noise=0.1),
        text_policy=cv.GradientPolicy("last"),
        null_text_rate=0.2,
    )
    output = run(objective, denoiser, teacher=teacher_of(denoiser))
    output.loss.backward()
    total = sum(value for name, value in output.metrics.items() if name.endswith("_loss"))
    torch.testing.assert_close(output.metrics["loss"], 0.5 * total)
    assert all(math.isfinite(value) for value in output.metrics.values())
    assert all(p.grad.isfinite().all() for p in denoiser.module.parameters())
