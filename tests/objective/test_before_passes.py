"""What is refused is refused before the first pass, and no part of a batch needs to hold rows."""

import itertools
import random

import pytest
import torch

import cyclevae as cv
from cyclevae.testing import toy_batch, toy_denoiser

pytestmark = pytest.mark.unhooked

DENOISER, TEXT, LATENT = toy_denoiser(seed=0)
EPSILON = cv.LatentProcess(prediction="epsilon", shape=(4,))
TEACHER = cv.Teacher(DENOISER.module).denoiser
PARTS = {
    "pairs": ("tokens", "attention_mask", "latents"),
    "texts": ("unpaired_tokens", "unpaired_attention_mask"),
    "latents": ("unpaired_latents",),
}


def times(rng):
    moving = cv.TimePolicy("uniform", high=lambda step: 0.9)
    return rng.choice([1.0, 0.5, cv.TimePolicy("uniform"), moving])


def any_term(rng):
    """A term with options that may or may not go together, with a step, or with a batch."""
    fraction, pairs = rng.choice([1, 0.2]), rng.random() < 0.5
    bridge = rng.choice([cv.LatentBridge(), cv.LatentBridge(2)])
    policies = ["stop_gradient", "full", "alternating", cv.GradientPolicy(freeze=("nope.*",))]
    prior = rng.choice(["mmd", "moment", "sigreg", "learned", "ddvi"])
    options = {"mean": torch.zeros(rng.choice([3, 4]))} if prior == "moment" else {}
    by = rng.choice(["live", "live", "live", "teacher", "evaluated"])
    maker = cv.Maker(by, rng.choice([1, 1, 1, 1, 2.0]))
    rate, texts = rng.choice([0, 0, 0.3]), rng.choice(["categorical", "soft", "rloo", "argmax"])
    made = {"maker": maker, "pairs": pairs}
    kind = rng.choice(
        [
            lambda: cv.Text(time=times(rng), fraction=fraction, null_rate=rate),
            lambda: cv.Latent(
                time=times(rng), space=rng.choice([None, "x0", "v", "epsilon"]), null_rate=rate
            ),
            lambda: cv.CycleText(time=times(rng), policy=rng.choice(policies), **made),
            lambda: cv.CycleLatent(bridge=texts, policy=rng.choice(policies[:3]), **made),
            lambda: cv.Unconditional(),
            lambda: cv.TextMarginal(bridge=rng.choice(["soft", "argmax"]), pairs=pairs),
            lambda: cv.Sleep(**made),
            lambda: cv.Prior(prior, fraction=fraction, bridge=bridge, time=times(rng), **options),
            lambda: cv.Contrastive(fraction=fraction, bridge=bridge, time=times(rng)),
        ]
    )
    return kind()


def any_batch(rng):
    batch = toy_batch(rows=rng.choice([1, 2, 4]))
    for names in PARTS.values():
        left = rng.choice([None, 0, 9, 9])
        kept = {name: None if left is None else getattr(batch, name)[:left] for name in names}
        batch = batch._replace(**kept)
    if batch.tokens is not None and rng.random() < 0.3:
        has = torch.arange(len(batch.tokens)) % 2 == 0
        batch = batch._replace(has_text=has, has_latent=~has)
    if batch.unpaired_latents is not None and rng.random() < 0.3:
        lengths = torch.ones(len(batch.unpaired_latents), rng.choice([3, 9]), dtype=torch.bool)
        batch = batch._replace(pseudo_text_mask=lengths)
    return batch


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.slow
def test_a_step_is_refused_before_its_first_pass_or_runs_to_its_end(seed):
    """And with finite metrics, by a ValueError alone."""
    rng, passes, ran = random.Random(seed), [], 0
    hook = DENOISER.module.register_forward_pre_hook(lambda *_: passes.append(1))
    for _ in range(60):
        passes.clear()
        try:
            terms = {term.name: term for term in (any_term(rng) for _ in range(3))}
            process = rng.choice([LATENT, LATENT, EPSILON])
            objective = cv.CycleObjective(TEXT, process, list(terms.values()))
            batch, teacher = any_batch(rng), rng.choice([None, TEACHER])
            counts = objective.counts(batch) if rng.random() < 0.5 else None
            step = rng.randint(0, 1)
            output = objective(DENOISER, batch, step=step, counts=counts, teacher=teacher)
        except ValueError as error:
            assert not passes, error
            continue
        assert all(value.isfinite() for value in output.metrics.values()), output.metrics
        ran += 1
    hook.remove()
    assert ran > 5


ALL = {
    term.name: term
    for term in (
        cv.Text(),
        cv.Latent(),
        cv.CycleText(),
        cv.CycleLatent(),
        cv.Unconditional(),
        cv.TextMarginal(bridge="soft"),
        cv.Sleep(),
        cv.Prior("mmd"),
        cv.Contrastive(),
    )
}
NEEDS_PAIRS = ("text", "latent", "contrastive")


@pytest.mark.parametrize("missing", ["empty", "none"])
@pytest.mark.parametrize(
    "parts", [c for n in (1, 2, 3) for c in itertools.combinations(PARTS, n)], ids="+".join
)
@pytest.mark.parametrize("name", ALL)
def test_a_part_without_rows_works_or_is_refused_by_name(name, parts, missing):
    """On a rank of several, whose counts are of all; a part of no row, or no such part."""
    objective = cv.CycleObjective(TEXT, LATENT, [ALL[name]])
    whole = toy_batch(rows=2)
    counts = objective.counts(whole)
    emptied = {
        field: getattr(whole, field)[:0] if missing == "empty" else None
        for part in parts
        for field in PARTS[part]
    }
    batch = whole._replace(**emptied)
    own = objective.counts(batch)  # which never fail
    assert all(0 <= own[key] <= counts[key] for key in counts)
    try:
        output = objective(DENOISER, batch, step=0, counts=counts)
    except ValueError as error:
        told = (name, "holds none", "at least 2 samples")
        assert any(words in str(error) for words in told), error
        return
    assert all(value.isfinite() for value in output.metrics.values()), output.metrics
    if output.loss.requires_grad:
        gradients = torch.autograd.grad(
            output.loss, list(DENOISER.module.parameters()), allow_unused=True
        )
        assert all(g.isfinite().all() for g in gradients if g is not None)
    for key, count in own.items():
        assert count or not output.metrics[key], key
