"""Whole objectives under texts that are noised otherwise than by masks."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
import yaml

import cyclevae as cv
from cyclevae.diagnostics import text_probe
from cyclevae.testing import check_denoiser, toy_batch
from recipes import HYBRID, UNIFORM
from running import DENOISER, LATENT, Recorder, seeded, teacher_of

FULL = cv.GradientPolicy("full")
TERMS = [
    cv.Text(),
    cv.Text(name="whole", time=1.0),
    cv.Text(name="bound", weighting="bound"),
    cv.Latent(),
    cv.CycleText(pairs=True),
    cv.CycleLatent(pairs=True, bridge=cv.TextBridge("unmask", steps=2)),
    cv.CycleLatent(name="learned", bridge=cv.TextBridge("rloo", marginal_weight=0.1), policy=FULL),
    cv.Unconditional(),
    cv.Unconditional(name="plain", text_weighting="mean"),
    cv.TextMarginal(bridge="soft"),
    cv.Sleep(),
    cv.Prior("learned", weight=0.1),
]


@dataclass(frozen=True)
class Slow(cv.HybridTextProcess):
    """Of a user's own: words fall later."""

    power: float = 2.0

    def shares(self, time):
        return super().shares(time**self.power)


SLOW = Slow(2, 7, pad_id=0, p_uniform=0.2, power=1.5)
FRAMED = replace(UNIFORM, start_id=1, end_id=6)
every_kind = pytest.mark.parametrize(
    "process", [UNIFORM, HYBRID, FRAMED, SLOW], ids=["uniform", "hybrid", "framed", "own"]
)


@pytest.mark.parametrize("process", [FRAMED, SLOW], ids=["uniform", "hybrid"])
def test_every_term_runs_and_follows_its_generator(process):
    check_denoiser(DENOISER, process, LATENT, relaxed=True)
    objective, teacher = cv.CycleObjective(process, LATENT, TERMS), teacher_of(DENOISER)
    first, again, other = (
        objective(
            DENOISER, toy_batch(rows=4), step=0, generator=seeded(seed), teacher=teacher
        ).metrics
        for seed in (0, 0, 1)
    )
    losses = [term.metric(part) for term in TERMS for part in term.parts]
    assert all(bool(first[name].isfinite()) for name in losses)
    assert first == again and first["text_loss"] != other["text_loss"]


@every_kind
def test_configurations_survive(process):
    objective = cv.CycleObjective(process, LATENT, TERMS)
    config = objective.to_config()
    assert config["text_process"]["kind"] == type(process).__name__
    for plain in (
        json.loads(json.dumps(config)),
        yaml.safe_load(yaml.safe_dump(config, sort_keys=False)),
    ):
        assert cv.CycleObjective.from_config(plain, processes=[Slow]) == objective
    if process is SLOW:
        with pytest.raises(
            ValueError, match=r"`text_process.kind` is 'Slow', a class that was not"
        ):
            cv.CycleObjective.from_config(config)


def test_a_mask_of_a_uniform_process_is_refused_by_its_path():
    config = cv.CycleObjective(UNIFORM, LATENT).to_config()
    config["text_process"]["mask_id"] = 2
    with pytest.raises(ValueError, match="`text_process`: `mask_id` is 2, and uniform noise has"):
        cv.CycleObjective.from_config(config)


@every_kind
def test_l2t_starts_from_full_noise_and_shares_it(process):
    """One pass for all that decode, from what the generator draws."""
    denoiser = Recorder()
    terms = [cv.Text(time=1.0), cv.CycleLatent(bridge="argmax", pairs=True)]
    objective = cv.CycleObjective(process, LATENT, terms)
    seen = []
    for seed in (0, 0, 1):
        denoiser.calls.clear()
        objective(denoiser, toy_batch(rows=4), step=0, generator=seeded(seed))
        (start,) = [tokens for tokens, _, state in denoiser.calls if state["text_time"].all()]
        seen.append(start)
    assert torch.equal(seen[0], seen[1])
    if process in (HYBRID, SLOW):
        assert set(seen[0].unique().tolist()) <= {0, 2}
    else:
        assert seen[0].shape != seen[2].shape or not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("term", "process", "share"),
    [
        (cv.Text(), UNIFORM, 1),
        (cv.Text(time=0.3), HYBRID, 1),
        (cv.Text(weighting="bound"), cv.TextProcess(2, 7, pad_id=0), 1),
        (cv.Text(weighting="bound"), HYBRID, 1),
        (cv.Text(), cv.TextProcess(2, 7, pad_id=0), 0.5),
        (cv.Unconditional(text_weighting="mean"), cv.TextProcess(2, 7, pad_id=0), 0.5),
        (cv.Unconditional(text_weighting="mean"), UNIFORM, 1),
        (cv.Unconditional(), UNIFORM, 1),
    ],
)
def test_the_count_is_of_the_words_that_count(term, process, share):
    batch, part = toy_batch(rows=4), {"unconditional": "unconditional_text_loss"}
    objective = cv.CycleObjective(process, LATENT, [term])
    words = batch.attention_mask.sum()
    if term.name == "unconditional":
        words = words + batch.unpaired_attention_mask.sum()
    count = objective.counts(batch)[part.get(term.name, "text_loss")]
    assert count.item() == pytest.approx(share * words.item())
    losses = []
    for factor in (1, 2):  # the sum is divided by the count that is given
        counts = {name: factor * value for name, value in objective.counts(batch).items()}
        losses.append(objective(DENOISER, batch, step=0, counts=counts, generator=seeded()).loss)
    torch.testing.assert_close(losses[0], 2 * losses[1])


@pytest.mark.parametrize(
    "time",
    [
        1.0,
        0.5,
        cv.TimePolicy(),
        cv.TimePolicy("logit_normal"),
        cv.TimePolicy("uniform", low=0.5),
        cv.TimePolicy("uniform", high=0.9),
        cv.TimePolicy("uniform", high=cv.anneal(0.5, 1.0, steps=10)),
    ],
)
def test_a_bound_needs_uniform_times(time):
    words = r"a mean over uniform times from 0 to 1, and `(text_)?time` is .*: give"
    with pytest.raises(ValueError, match=words):
        cv.Text(weighting="bound", time=time)
    tokens, mask, latents = toy_batch(seed=0)[:3]
    with pytest.raises(ValueError, match=words):
        cv.l2t_loss(
            DENOISER,
            tokens,
            latents,
            mask,
            text_process=cv.TextProcess(2, 7, pad_id=0),
            text_time=time,
            weighting="bound",
        )


@pytest.mark.unhooked
def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="`weighting` is 'elbo'; known are 'bound', 'mean'"):
        cv.Text(weighting="elbo")
    with pytest.raises(ValueError, match="`text_weighting` is 'elbo'; known are 'bound', 'mean'"):
        cv.Unconditional(text_weighting="elbo")


@every_kind
def test_a_probe_compares_from_one_start(process):
    denoiser, batch = Recorder(), toy_batch(rows=4)
    text_probe(
        denoiser, batch.tokens, batch.latents, batch.attention_mask,
        text_process=process, latent_process=LATENT, generator=seeded(),
    )  # fmt: skip
    starts = [tokens for tokens, *_ in denoiser.calls]
    assert len(starts) == 3 and all(torch.equal(start, starts[0]) for start in starts)
