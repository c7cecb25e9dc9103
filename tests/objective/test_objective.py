"""One step: what it weighs, what is reported, what is refused before it begins; and it learns."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.testing import toy_batch, toy_denoiser
from running import DENOISER, FIVE, LATENT, TEXT, Recorder, of, run, seeded

EPSILON = cv.LatentProcess(prediction="epsilon", shape=(4,))
BASES = FIVE[0], FIVE[2]


# What is reported


def test_a_ramp_switches_a_term_on_and_every_weight_is_reported():
    objective = of(*FIVE[:3], cv.CycleText(weight=cv.ramp(2.0, 10, 9)))
    before, after = (run(objective, step=step).metrics for step in (9, 14))
    assert "cycle_text_loss" not in before and "cycle_text_weight" not in before
    assert after["cycle_text_weight"].item() == pytest.approx(1.0)
    for metrics, step in ((before, 9), (after, 14)):
        weights = {f"{name}_weight": weight for name, weight in objective.weights(step).items()}
        told = {name: metrics[name].item() for name in metrics if name.endswith("_weight")}
        assert told == pytest.approx(weights) and told["cycle_latent_weight"] == 10


def test_metrics_are_detached_scalars_and_absent_terms_are_absent():
    metrics = run(of(*FIVE), batch=toy_batch()).metrics
    for name, value in metrics.items():
        assert isinstance(value, torch.Tensor) and value.ndim == 0 and not value.requires_grad, name
    assert {"text_loss", "latent_loss", "text_accuracy", "latent_pred_norm"} <= metrics.keys()
    latents = torch.cat([toy_batch().latents, toy_batch().unpaired_latents])
    torch.testing.assert_close(metrics["latent_norm"], latents.norm(dim=1).mean())
    only = run(of(*BASES)).metrics
    assert set(only) == {"loss", "text_accuracy"} | {
        f"{term}_{what}" for term in ("text", "latent") for what in ("loss", "weight")
    }


def test_moments_of_latents_are_those_of_what_the_encoder_makes():
    recorder = Recorder()
    metrics = run(of(replace(FIVE[3], pairs=True)), recorder).metrics
    z_hat = recorder.calls[1][1]
    torch.testing.assert_close(metrics["latent_pred_norm"], z_hat.norm(dim=1).mean())
    torch.testing.assert_close(
        metrics["latent_pred_mean"], z_hat.mean(dim=0).square().mean().sqrt()
    )
    torch.testing.assert_close(
        metrics["latent_pred_variance"], z_hat.var(dim=0, correction=0).mean()
    )


# Draws and counts


@pytest.mark.parametrize(
    "terms",
    [
        FIVE,
        (*FIVE[:2], cv.Latent(time=cv.TimePolicy("uniform")), FIVE[3]),
        (FIVE[0], replace(FIVE[1], bridge="categorical"), *FIVE[2:]),
        (cv.Text(), cv.Latent(), cv.CycleText()),
    ],
)
def test_a_seed_repeats_a_step_and_leaves_the_global_state_alone(terms):
    objective = of(*terms, cv.Prior("sigreg"))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    losses = [run(objective, generator=seeded(s)).loss for s in (7, 7, 8)]
    assert torch.equal(state, torch.get_rng_state())
    assert losses[0] == losses[1] != losses[2]


def test_counts_make_the_gradient_independent_of_accumulation():
    """Two halves with the counts of the whole give the gradient of the whole."""
    # the text term alone: the others draw noise, which a split batch draws differently
    objective, denoiser = of(cv.Text(time=1.0)), toy_denoiser(seed=0)[0]
    network, whole = denoiser.module.double(), toy_batch(rows=5)
    whole = cv.Batch(whole.tokens, whole.attention_mask, whole.latents.double())
    halves = [cv.Batch(*(part[rows] for part in whole[:3])) for rows in (slice(3), slice(3, 5))]
    counts = objective.counts(whole)

    def gradient(batches):
        network.zero_grad()
        for batch in batches:
            objective(denoiser, batch, step=0, counts=counts).loss.backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    for split, joined in zip(gradient(halves), gradient([whole]), strict=True):
        torch.testing.assert_close(split, joined, rtol=1e-12, atol=1e-14)
    assert counts == {"text_loss": whole.attention_mask.sum()}
    assert of(cv.Latent()).counts(whole)["latent_loss"] == whole.latents.numel()


def test_counts_are_tensors_of_their_own_on_the_device_of_the_batch():
    counts = of(*FIVE).counts(toy_batch())
    pointers = {count.data_ptr() for count in counts.values()}
    assert len(pointers) == len(counts) == 6
    meta = cv.Batch(*(part.to("meta") for part in toy_batch()[:6]))
    assert all(count.is_meta for count in of(*FIVE).counts(meta).values())


def test_empty_unpaired_parts_count_nothing():
    batch = toy_batch()
    empty = batch._replace(
        unpaired_tokens=batch.unpaired_tokens[:0],
        unpaired_attention_mask=batch.unpaired_attention_mask[:0],
        unpaired_latents=batch.unpaired_latents[:0],
    )
    losses = [run(of(*FIVE), batch=b).loss for b in (empty, cv.Batch(*batch[:3]))]
    assert losses[0] == losses[1]


# What is refused before any pass


def test_a_frozen_pattern_is_resolved_before_its_term_switches_on():
    recorder, generator = Recorder(), seeded()
    state = generator.get_state()
    late = cv.ramp(2.0, 100)
    for term in (
        cv.CycleText(weight=late, policy=cv.GradientPolicy(freeze=("wrd.*",))),
        cv.CycleText(weight=late, policy=cv.GradientPolicy("full", (), ("wrd.*",))),
        cv.TextMarginal(weight=late, freeze=("wrd.*",)),
        cv.CycleLatent(weight=late, policy=cv.GradientPolicy(freeze=("wrd.*",))),
    ):
        with pytest.raises(ValueError, match=r"'wrd\.\*' of freeze\(\) matches no parameter"):
            run(of(*BASES, term), recorder, generator=generator)
    assert not recorder.calls and torch.equal(state, generator.get_state())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"tokens": None}, "pairs need both"),
        (
            {"tokens": None, "attention_mask": None, "latents": None},
            "`text` needs 1 pair in a batch or more, got 0; give it weight 0, or leave it out",
        ),
        ({"unpaired_attention_mask": None}, "padding must never count"),
        ({"unpaired_tokens": None}, "came without `batch.unpaired_tokens`"),
        ({"unpaired_latents": torch.zeros(3, 5)}, r"shape \[b, 4\]"),
        ({"latents": torch.zeros(3, 4, device="meta")}, "is on meta and `batch.tokens` on cpu"),
    ],
)
def test_an_incomplete_batch_is_refused_before_any_pass(part, message):
    recorder = Recorder()
    with pytest.raises(ValueError, match=message):
        run(of(*FIVE), recorder, toy_batch()._replace(**part))
    assert not recorder.calls


def test_unknown_counts_and_an_empty_plan_are_refused():
    with pytest.raises(ValueError, match=r"unknown count 'text'; did you mean 'text_loss'\?"):
        run(of(*FIVE), counts={"text": 1})
    for idle in (of(cv.Text(weight=0.0)), of(cv.Text(weight=cv.ramp(1.0, 3)))):
        assert idle.passes(0) == 0 and idle.weights(0) == {}
        with pytest.raises(ValueError, match="nothing to train on at step 0"):
            run(idle)


def test_a_number_is_refused_where_tensors_are_not_read():
    tokens, mask, _ = toy_batch()[:3]
    with cv.check_values(False):
        encoded = cv.t2l(
            DENOISER, tokens, mask, text_process=TEXT, latent_process=EPSILON, start="noise"
        )
        with pytest.raises(ValueError, match="gain of"):
            encoded.z_hat(EPSILON)


@pytest.mark.parametrize("name", ["has_text", "has_latent"])
@pytest.mark.unhooked
def test_rows_are_chosen_by_bool_of_their_number(name):
    tokens, mask, latents = toy_batch()[:3]
    for bad in (torch.tensor([True]), torch.ones(3)):
        with pytest.raises(ValueError, match=rf"`{name}` must be bool \[3\]"):
            cv.unconditional_loss(
                DENOISER, tokens, latents, mask, text_process=TEXT, latent_process=LATENT,
                **{name: bad},
            )  # fmt: skip


# It learns


@pytest.mark.slow
def test_the_text_cycle_falls_over_50_steps():
    """A real, if tiny, transformer learns to read back what it encodes."""
    torch.manual_seed(0)
    from_examples = cv.as_denoiser(TinyTransformer(7, 4))
    optimizer = torch.optim.AdamW(from_examples.module.parameters(), 1e-2)
    objective, generator, curve = of(*FIVE), seeded(), []
    for step in range(50):
        output = objective(from_examples, toy_batch(rows=8), step=step, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        curve.append(output.metrics["cycle_text_loss"].item())
    assert sum(curve[-5:]) < 0.75 * sum(curve[:5])
    # four words are equally frequent: below log 4, the latent must tell which
    assert sum(curve[-5:]) / 5 < 0.95 * math.log(4)


class TinyTransformer(nn.Module):
    def __init__(self, vocab_size, latent_dim, width=16):
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.place = nn.Parameter(torch.randn(16, width))
        self.latent_in, self.times = nn.Linear(latent_dim, width), nn.Linear(2, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 32, 0.0, batch_first=True)
        self.text_head, self.latent_head = (
            nn.Linear(width, vocab_size),
            nn.Linear(width, latent_dim),
        )

    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
        latent = self.latent_in(latents) + self.times(torch.stack([text_time, latent_time], 1))
        text = self.word(tokens) + self.place[: tokens.shape[1]]
        hidden = self.block(
            torch.cat([latent[:, None], text], 1),
            src_key_padding_mask=nn.functional.pad(~attention_mask, (1, 0)),
        )
        return self.text_head(hidden[:, 1:]), self.latent_head(hidden[:, 0])


def test_step_module_registers_the_network_and_runs_a_step():
    denoiser = toy_denoiser(seed=0)[0]
    module = cv.StepModule(denoiser, of(*FIVE))
    assert len(list(module.parameters())) == len(list(denoiser.module.parameters()))
    module(toy_batch(), step=0).loss.backward()
    assert all(p.grad is not None for p in module.parameters())
    with pytest.raises(TypeError, match="make it by as_denoiser"):
        cv.StepModule(Nothing(), of(*FIVE))


class Nothing:
    """A denoiser without a network."""

    def denoise(self, tokens, latents, **state):
        return cv.Denoised(None, None)
