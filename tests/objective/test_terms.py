"""What each term makes of its passes: priors, contrast and dreams, times, distances, lengths."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

import cyclevae as cv
from cyclevae.testing import check_denoiser, toy_batch, toy_denoiser
from running import (
    DENOISER,
    FIVE,
    FULL,
    LATENT,
    TEXT,
    Recorder,
    of,
    run,
    seeded,
    teacher_of,
)

TEXT_TERM, LATENT_CYCLE, LATENT_TERM, TEXT_CYCLE, BOTH = FIVE
UNIFORM = cv.TimePolicy("uniform")


# The base losses


def test_the_base_losses_are_those_of_a_plain_trainer():
    batch = toy_batch()
    metrics = run(of(TEXT_TERM, LATENT_TERM), batch=batch).metrics

    ones, zeros = torch.ones(3), torch.zeros(3)
    noise = torch.randn(3, 4, generator=seeded())
    masked = torch.where(batch.attention_mask, 2, 0)
    network, keep = DENOISER.module, batch.attention_mask
    logits, _ = network(
        masked, batch.latents, text_time=ones, latent_time=zeros, attention_mask=keep
    )
    _, predicted = network(
        batch.tokens, noise, text_time=zeros, latent_time=ones, attention_mask=keep
    )
    torch.testing.assert_close(
        metrics["text_loss"], cross_entropy(logits[keep], batch.tokens[keep]).detach()
    )
    right = (logits.argmax(-1) == batch.tokens)[keep].float().mean()
    torch.testing.assert_close(metrics["text_accuracy"], right)
    # at full noise v is minus the latent, up to alpha = 1.6e-5
    torch.testing.assert_close(
        metrics["latent_loss"], mse_loss(predicted, -batch.latents).detach(), atol=1e-4, rtol=1e-4
    )


FORMS = [{"distance": "cosine"}, {"distance": "normalized_mse"}, {"space": "x0"}]


@pytest.mark.parametrize(
    ("time", "options"),
    [*product((1.0, 0.5), FORMS), (0.5, {"space": "x0", "min_snr": 2.0}), (0.5, {"min_snr": 2.0})],
)
def test_the_base_latent_loss_takes_every_form(time, options):
    recorder, batch = Recorder(), toy_batch(rows=4)
    objective = of(cv.Latent(weight=1.0, time=time, **options))
    value = run(objective, recorder, batch).metrics["latent_loss"]
    ((_, z_t, state),) = recorder.calls
    alpha, sigma = (x[:, None] for x in LATENT.alpha_sigma(state["latent_time"]))
    noise = (z_t - alpha * batch.latents) / sigma if time < 1 else z_t
    loss = cv.t2l_loss(
        DENOISER,
        *(batch.tokens, batch.latents, batch.attention_mask),
        text_process=TEXT,
        latent_process=LATENT,
        time=time,
        noise=noise,
        **options,
    )
    torch.testing.assert_close(value, loss.detach(), rtol=1e-4, atol=1e-4)
    of_cosine = 4 if options.get("distance") == "cosine" else 16
    assert objective.counts(batch)["latent_loss"] == of_cosine


# Cycles


def test_the_shared_passes_give_the_losses_of_the_functions():
    batch, objective, recorder = toy_batch(), of(*FIVE[:4]), Recorder()
    out = run(objective, recorder, batch)
    (_, _, first), (y_hat, noise_2, _), (tokens, noise_1, state), (_, z_hat, _) = recorder.calls
    kept = {"text_process": TEXT, "latent_process": LATENT}
    text_cycle = cv.cycle_text_loss(
        DENOISER, tokens, state["attention_mask"], noise=noise_1, **kept
    )
    latents = torch.cat([batch.latents, batch.unpaired_latents])
    latent_cycle = cv.cycle_latent_loss(
        DENOISER, latents, first["attention_mask"], noise=noise_2, **kept
    )
    torch.testing.assert_close(out.metrics["cycle_text_loss"], text_cycle.detach())
    torch.testing.assert_close(out.metrics["cycle_latent_loss"], latent_cycle.detach())
    weights = {"text": 1, "latent": 5, "cycle_text": 2, "cycle_latent": 10}
    total = sum(weight * out.metrics[f"{term}_loss"] for term, weight in weights.items())
    torch.testing.assert_close(out.loss.detach(), total)
    assert not z_hat.requires_grad and not y_hat.requires_grad


def test_the_latent_cycle_takes_a_distance():
    values = []
    for distance in ("cosine", "normalized_mse"):
        objective = of(replace(LATENT_CYCLE, weight=1.0, distance=distance))
        values.append(run(objective).metrics["cycle_latent_loss"])
    torch.testing.assert_close(values[0] * 2 / 4, values[1])
    assert objective.counts(toy_batch(rows=4))["cycle_latent_loss"] == 8 * 4


def absolute(prediction, target):
    return (prediction - target).abs()


def test_a_distance_of_ones_own():
    objective, mine = (
        of(cv.Latent(distance=d), replace(LATENT_CYCLE, distance=e))
        for d, e in (
            (absolute, absolute),
            (lambda p, t: 2 * absolute(p, t), lambda p, t: 3 * absolute(p, t)),
        )
    )
    metrics, doubled = run(objective).metrics, run(mine).metrics
    torch.testing.assert_close(doubled["latent_loss"], 2 * metrics["latent_loss"])
    torch.testing.assert_close(doubled["cycle_latent_loss"], 3 * metrics["cycle_latent_loss"])
    assert objective.counts(toy_batch(rows=4))["latent_loss"] == 4 * 4
    z = torch.tensor([[1.0, -2.0]])
    assert cv.latent_loss(z, torch.zeros(1, 2), distance=absolute) == 1.5
    with pytest.raises(ValueError, match=r"`distance\(...\)` and `prediction` must have equal"):
        cv.latent_loss(z, z, distance=lambda p, t: (p - t).sum(dim=1))


def test_a_text_marginal_reads_the_pseudo_texts_of_an_equal_cycle():
    """One draw of `gumbel` for both, and one of its own beside another bridge or gradient."""
    marginal = cv.TextMarginal(bridge="gumbel", pairs=True)
    equal = replace(LATENT_CYCLE, bridge="gumbel", policy=FULL)
    beside = {
        "equal": (equal, 1),
        "another bridge": (replace(equal, bridge="soft"), 1),
        "another gradient": (replace(equal, bridge="categorical", policy="stop_gradient"), 1),
        "another frozen part": (
            replace(equal, policy=cv.GradientPolicy("full", (), ("shared.*",))),
            2,
        ),
        "other rows": (replace(equal, pairs=False), 1),
    }
    for name, (cycle, writes) in beside.items():
        recorder, objective = Recorder(), of(cycle, marginal)
        run(objective, recorder)
        written = [call for call in recorder.calls if (call[2]["text_time"] == 1).all()]
        assert len(recorder.calls) == objective.passes(0) == writes + 2, name
        # the judge masks a part of the text, and reads the rest of what the cycle has read
        (read,), judged = recorder.encodes, recorder.calls[-1]
        assert len(written) == writes, name
        words = read[0].argmax(-1) if read[0].is_floating_point() else read[0]
        shown = (judged[0] != TEXT.mask_id) & judged[2]["attention_mask"]
        same = len(words) == len(shown) and bool((words == judged[0])[shown].all())
        assert same == (name == "equal"), name


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
def test_a_prior_is_the_function_on_the_encoders_latents(prior, options, function):
    recorder = Recorder()
    objective = of(replace(TEXT_CYCLE, weight=1.0), cv.Prior(prior, **options))
    metrics = run(objective, recorder).metrics
    z_hat = recorder.calls[1][1]
    expected = (function or prior)(z_hat, **options)
    torch.testing.assert_close(metrics["prior_loss"], expected)
    assert len(z_hat) == 8  # paired and unpaired


def test_options_of_a_prior_may_be_a_mapping_or_keywords():
    options = {"kernel": "imq", "scales": (0.5,)}
    assert cv.Prior("mmd", **options) == cv.Prior("mmd", options=options)
    assert cv.Prior("mmd", options={"kernel": "imq"}, scales=(0.5,)).options == options
    term = cv.Prior(options=options, weight=0.1, pool=True)
    assert (term.prior, term.weight, term.pool) == ("mmd", 0.1, True)
    assert replace(term, weight=0.2).options == options


def test_sigreg_reads_the_generator_of_the_step():
    objective = of(cv.Prior("sigreg"))
    values = [run(objective, generator=seeded(s)).metrics["prior_loss"] for s in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("prior", ["learned", "ddvi"])
def test_learned_priors_count_rows(prior):
    objective, batch, teacher = of(cv.Prior(prior)), toy_batch(rows=4), teacher_of(DENOISER)
    own = run(objective, batch=batch, teacher=teacher).metrics["prior_loss"]
    counts = objective.counts(batch)
    assert counts["prior_loss"] == 8
    counts["prior_loss"] *= 2
    other = run(objective, batch=batch, teacher=teacher, counts=counts).metrics["prior_loss"]
    torch.testing.assert_close(own, 2 * other)


def test_the_length_that_the_teacher_sees_tells_nothing():
    judge, batch = Recorder(teacher_of(DENOISER)), toy_batch(rows=8)
    run(of(cv.Prior("learned")), batch=batch, teacher=judge)
    ((tokens, _, state),) = judge.calls
    own = torch.cat([batch.attention_mask, batch.unpaired_attention_mask])
    assert not torch.equal(state["attention_mask"], own)
    assert bool((tokens[state["attention_mask"]] == TEXT.mask_id).all())
    assert all(any(torch.equal(row, its) for its in own) for row in state["attention_mask"])


def given_by_name(z, *, tokens, attention_mask, text_process, latent_process, generator, least=0):
    assert text_process is TEXT and latent_process is LATENT and len(tokens) == len(z) == 8
    assert attention_mask.dtype == torch.bool and generator is not None
    return z.square().mean().clamp(min=least)


def test_a_prior_of_ones_own_gets_what_it_asks_for_by_name():
    loss = run(of(cv.Prior(given_by_name, least=100.0))).metrics["prior_loss"]
    assert loss == 100


# Contrast and dreams


def test_contrast_is_infonce_of_the_pairs():
    recorder, batch = Recorder(), toy_batch(rows=4)
    options = {"temperature": 0.3, "critic": "euclidean"}
    metrics = run(of(TEXT_CYCLE, cv.Contrastive(**options)), recorder, batch).metrics
    expected = cv.infonce_loss(
        recorder.calls[1][1][:4],
        batch.latents,
        duplicates=cv.same_text(batch.tokens, batch.attention_mask),
        **options,
    )
    torch.testing.assert_close(metrics["contrastive_loss"], expected)


def test_the_sleep_term_is_its_function_on_the_dreamt_texts():
    recorder = Recorder()
    metrics = run(of(cv.Sleep(pairs=True)), recorder).metrics
    (_, latents, _), (dream, z_t, state) = recorder.calls
    assert not (dream == TEXT.mask_id).any() and len(z_t) == 8
    _, predicted = DENOISER.module(dream, z_t, **{k: v for k, v in state.items() if k != "need"})
    alpha, sigma = (x[:, None] for x in LATENT.alpha_sigma(state["latent_time"]))
    noise = (z_t - alpha * latents) / sigma
    target = LATENT.target(latents, noise, state["latent_time"])
    expected = (predicted - target).square().mean().detach()
    torch.testing.assert_close(metrics["sleep_loss"], expected, rtol=1e-3, atol=1e-3)


# Times


def test_time_policies_move_with_the_step():
    cap = cv.TimePolicy("uniform", high=cv.anneal(0.2, 0.9, steps=10))
    bridge = cv.TimePolicy("full", high=cv.anneal(0.5, 1.0, steps=10))
    objective = of(
        TEXT_TERM,
        replace(LATENT_CYCLE, time=bridge),
        cv.Latent(time=cap),
        replace(TEXT_CYCLE, time=bridge),
        cv.Unconditional(latent_time=cap),
    )
    for step, high, start in ((0, 0.2, 0.5), (10, 0.9, 1.0)):
        recorder = Recorder()
        run(objective, recorder, toy_batch(rows=16), step=step)
        assert len(recorder.calls) == objective.passes(step) == 6
        latent_cycle, base, encoder = (call[2]["latent_time"] for call in recorder.encodes)
        torch.testing.assert_close(latent_cycle, torch.full((32,), start))
        torch.testing.assert_close(encoder, torch.full((32,), start))
        both = recorder.calls[-1][2]["latent_time"]
        for times in (base, both[:16]):
            assert 0.8 * high < times.max() <= high


EPSILON = cv.LatentProcess(prediction="epsilon", shape=(4,))


@pytest.mark.parametrize(
    "make",
    [
        lambda time: cv.CycleText(time=time, pairs=True),
        lambda time: cv.CycleLatent(time=time),
        lambda time: cv.Prior("mmd", time=time),
        lambda time: cv.Contrastive(time=time),
        lambda time: cv.Latent(time=time, space="x0"),
    ],
    ids=["cycle_text", "cycle_latent", "prior", "contrastive", "latent"],
)
def test_a_moving_time_is_refused_where_it_becomes_ill_conditioned(make):
    moving = cv.TimePolicy("full", high=cv.anneal(0.5, 1.0, steps=10))
    objective, recorder = cv.CycleObjective(TEXT, EPSILON, [make(moving)]), Recorder()
    with pytest.raises(ValueError, match=r"gain of .* above max_gain"):
        run(objective, recorder, step=10)
    assert not recorder.calls
    assert run(objective).loss.isfinite()
    # and at once, where it does not move
    for time in (1.0, cv.TimePolicy("full"), cv.TimePolicy("uniform")):
        with pytest.raises(ValueError, match=r"(?s)gain of 6\.41.*predict `v`.*capped.*DDIM"):
            cv.CycleObjective(TEXT, EPSILON, [make(time)])
    assert cv.CycleObjective(TEXT, EPSILON, [make(0.9)])


def test_an_epsilon_bridge_runs_with_a_capped_time_and_then_a_base_pass_of_its_own():
    assert run(cv.CycleObjective(TEXT, EPSILON, [TEXT_TERM, LATENT_TERM])).loss.isfinite()
    capped = cv.CycleObjective(
        TEXT,
        EPSILON,
        [
            replace(LATENT_CYCLE, time=0.9),
            cv.Latent(time=cv.TimePolicy("uniform", high=0.9)),
            replace(TEXT_CYCLE, time=0.9),
        ],
    )
    recorder = Recorder()
    run(capped, recorder)
    times = [state["latent_time"] for *_, state in recorder.encodes]
    assert len(times) == 3 and max(time.max() for time in times) <= 0.9


# The fully masked state, and lengths


def test_the_fully_masked_state_is_trained_where_a_prior_reads_it():
    batch = toy_batch(rows=20)

    def fully_masked(*terms, **options):
        recorder, objective = Recorder(), of(cv.Unconditional(**options), *terms)
        run(objective, recorder, batch, teacher=teacher_of(DENOISER))
        tokens, _, state = recorder.calls[0]
        pairs = slice(20)
        assert (state["text_time"][pairs] == 1).sum() == (
            (tokens[pairs] == TEXT.mask_id) == state["attention_mask"][pairs]
        ).all(dim=1).logical_and(state["text_time"][pairs] == 1).sum()
        return int((state["text_time"][pairs] == 1).sum()), objective

    assert fully_masked()[0] == 0
    count, objective = fully_masked(null_text_rate=0.25)
    assert count == 5
    kept = batch.unpaired_attention_mask.sum() + 0.75 * batch.attention_mask.sum()
    torch.testing.assert_close(objective.counts(batch)["unconditional_text_loss"], kept)
    for prior in ("learned", "ddvi"):
        assert fully_masked(cv.Prior(prior, weight=0.1))[0] == 2  # a tenth
        assert fully_masked(cv.Prior(prior, weight=0.1), null_text_rate=0.0)[0] == 0
    assert fully_masked(cv.Prior("mmd"))[0] == 0


def test_unconditional_rows_without_a_partner_know_nothing_of_it():
    recorder, objective, batch = Recorder(), of(cv.Unconditional()), toy_batch()
    run(objective, recorder, batch)
    ((tokens, z_t, state),) = recorder.calls
    assert torch.equal(state["latent_time"][3:6], torch.ones(3))  # texts alone: pure noise
    assert torch.equal(state["text_time"][6:], torch.ones(3))  # latents alone: fully masked
    assert bool((tokens[6:][state["attention_mask"][6:]] == TEXT.mask_id).all())
    moved = batch._replace(latents=batch.latents + 1, unpaired_latents=batch.unpaired_latents + 1)
    other = Recorder()
    run(objective, other, moved)
    assert torch.equal(z_t[3:6], other.calls[0][1][3:6])


def test_pseudo_text_lengths_are_those_of_the_batchs_own_texts():
    recorder, batch = Recorder(), toy_batch()
    run(of(*FIVE), recorder, batch)
    drawn = recorder.calls[0][2]["attention_mask"][3:]
    own = torch.cat([batch.attention_mask, batch.unpaired_attention_mask])
    assert all(any(torch.equal(row, its) for its in own) for row in drawn)


def test_given_pseudo_text_masks_are_used():
    recorder = Recorder()
    mask = torch.arange(8) < torch.tensor([[8], [7], [6]])
    out = run(of(*FIVE), recorder, toy_batch()._replace(pseudo_text_mask=mask))
    assert torch.equal(recorder.calls[0][2]["attention_mask"][3:], mask)
    assert math.isfinite(out.loss.item())


def test_pseudo_texts_may_end_at_a_predicted_token():
    denoiser, _, _ = toy_denoiser(seed=0)
    text = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, end_id=6, end="predicted")
    with torch.no_grad():
        denoiser.module.text_head.bias[6] = 2.0  # likely, not certain
    recorder = Recorder(denoiser)
    objective = cv.CycleObjective(text, LATENT, [replace(LATENT_CYCLE, bridge="categorical")])
    run(objective, recorder, toy_batch(rows=16))
    y_hat, _, state = recorder.calls[1]
    ends = y_hat == 6
    assert ends.any() and not ends.all()
    assert torch.equal(ends.sum(1), ends.any(1).long())  # once, and nothing but padding after it
    after = ends.cumsum(1).bool() & ~ends
    assert bool((y_hat[after] == 0).all()) and not state["attention_mask"][after].any()


# A teacher beside the network


def test_a_step_module_keeps_its_teacher():
    denoiser, *processes = toy_denoiser(seed=0)
    check_denoiser(denoiser, *processes)
    teacher = cv.Teacher(denoiser.module, decay=0.5)
    module = cv.StepModule(denoiser, of(cv.Prior("learned")), teacher)
    module(toy_batch(), 0).loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in denoiser.module.parameters())
    names = module.state_dict().keys()
    assert {name for name in names if name.startswith("teacher.network.")}
    assert not any(name.startswith("denoiser") for name in names)
    module.train()
    assert not teacher.network.training


def test_every_term_at_once_learns_and_is_reported():
    denoiser, *_ = toy_denoiser(seed=0)
    bridge = {"bridge": cv.LatentBridge(steps=2, noise=0.1)}
    objective = of(
        cv.Text(weight=0.5),
        cv.Latent(weight=0.5),
        cv.Unconditional(weight=0.5, null_text_rate=0.2),
        cv.CycleText(weight=0.5, policy=cv.GradientPolicy("last"), **bridge),
        cv.CycleLatent(weight=0.5, bridge="gumbel", policy=FULL),
        cv.Prior("learned", weight=0.5, **bridge),
        cv.Sleep(weight=0.5),
        cv.Contrastive(weight=0.5, **bridge),
        cv.TextMarginal(weight=0.5),
        cv.Distill(weight=0.5),
    )
    assert {type(term) for term in objective.terms} == set(cv.objective.terms.SHIPPED)
    output = run(objective, denoiser, teacher=teacher_of(denoiser))
    output.loss.backward()
    total = sum(value for name, value in output.metrics.items() if name.endswith("_loss"))
    torch.testing.assert_close(output.metrics["loss"], 0.5 * total)
    assert all(math.isfinite(value) for value in output.metrics.values())
    assert all(p.grad.isfinite().all() for p in denoiser.module.parameters())
