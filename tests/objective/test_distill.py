"""The term that teaches the encoder what the decoder finds among unpaired latents."""

import pytest
import torch

import cyclevae as cv
from cyclevae.testing import assert_learns, toy_batch, toy_denoiser
from oracles import Spy

DENOISER, TEXT, LATENT = toy_denoiser(seed=0)
PROCESSES = {"text_process": TEXT, "latent_process": LATENT}
BATCH = toy_batch(seed=0)


def run(terms, batch=BATCH, denoiser=DENOISER, **options):
    objective = cv.CycleObjective(TEXT, LATENT, terms)
    generator = torch.Generator().manual_seed(0)
    return objective(denoiser, batch, step=0, generator=generator, **options)


def by_hand(texts, candidates, top, **options):
    """The loss and the number of candidates, from the parts, with the noise of the term."""
    noise = torch.randn(len(texts[0]), 4, generator=torch.Generator().manual_seed(0))
    z_hat = cv.encode(DENOISER, *texts, noise=noise, **PROCESSES)
    label = cv.channel_latents(
        DENOISER, *texts, candidates, z_hat=z_hat, top=top, **options, **PROCESSES
    )
    return (z_hat - label).square().mean()


@pytest.mark.parametrize("top", [1, 2, 3, 8])
@pytest.mark.parametrize("options", [{}, {"likelihood": 0.3, "variance": 2.0}])
def test_the_label_is_that_of_the_channel_among_the_latents_of_the_batch(top, options):
    """Also where the batch holds fewer of them than `top`."""
    output = run([cv.Distill(top=top, **options)])
    wanted = by_hand(BATCH[3:5], BATCH.unpaired_latents, top, **options)
    torch.testing.assert_close(output.metrics["distill_loss"], wanted)
    number = output.metrics["distill_candidates"]
    assert number.item() == 1 if top == 1 else 1 < number < min(top, 3)


def test_with_pairs_their_texts_are_read_and_their_latents_are_candidates():
    output = run([cv.Distill(top=6, pairs=True)])
    mask = torch.cat([BATCH.attention_mask, BATCH.unpaired_attention_mask])
    tokens = torch.cat([BATCH.tokens, BATCH.unpaired_tokens])
    candidates = torch.cat([BATCH.latents, BATCH.unpaired_latents])
    torch.testing.assert_close(
        output.metrics["distill_loss"], by_hand((tokens, mask), candidates, 6)
    )


def test_the_encoder_learns_and_the_decoder_does_not():
    denoiser = toy_denoiser(seed=0)[0]
    loss = run([cv.Distill()], denoiser=denoiser).loss
    assert_learns(loss, denoiser.module.latent_head.named_parameters())
    loss.backward()
    assert denoiser.module.text_head.weight.grad is None


@pytest.mark.parametrize("maker", [cv.Maker(), cv.Maker("evaluated"), cv.Maker("teacher")])
def test_passes_are_counted_and_shared_with_the_base_term(maker):
    terms = [cv.Latent(), cv.Distill(top=5, maker=maker)]
    spy, objective = Spy(DENOISER), cv.CycleObjective(TEXT, LATENT, terms)
    teacher = Spy(cv.Teacher(DENOISER.module).denoiser)
    objective(spy, BATCH, step=0, teacher=teacher)
    ran = len(spy.calls) + len(teacher.calls)
    assert ran == objective.passes(0) == 1 + 5 + (maker != cv.Maker())
    assert len(teacher.calls) == (6 if maker.by == "teacher" else 0)
    weighs = next(line for line in objective.describe().splitlines() if "weighs" in line)
    assert "nobody" in weighs
    assert cv.CycleObjective.from_config(objective.to_config()) == objective


def test_latents_that_are_not_there_are_no_candidates_and_texts_that_are_not_have_no_label():
    """The second row lacks its latent, the third its text, whose latent has no partner then."""
    batch = cv.Batch(
        *BATCH[:3],
        has_text=torch.tensor([True, True, False]),
        has_latent=torch.tensor([True, False, True]),
    )
    broken = batch._replace(
        latents=BATCH.latents.clone().index_fill(0, torch.tensor([1]), torch.nan)
    )
    for given in (batch, broken):
        output = run([cv.Distill()], given)
        assert output.metrics["distill_candidates"] == 1
        z_hat = cv.encode(
            DENOISER,
            *BATCH[:2],
            noise=torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
            **PROCESSES,
        )
        wanted = (z_hat[1] - BATCH.latents[2]).square().mean()
        torch.testing.assert_close(output.metrics["distill_loss"], wanted)
        objective = cv.CycleObjective(TEXT, LATENT, [cv.Distill()])
        assert objective.counts(given)["distill_loss"] == 4


def test_a_rank_without_candidates_runs_the_passes_and_counts_nothing():
    batch = cv.Batch(*BATCH[:5])
    objective = cv.CycleObjective(TEXT, LATENT, [cv.Distill()])
    assert objective.counts(batch)["distill_loss"] == 0
    with pytest.raises(ValueError, match=r"`distill` looks for latents among .* holds none"):
        run([cv.Distill()], batch)
    denoiser = toy_denoiser(seed=0)[0]
    spy = Spy(denoiser)
    output = run([cv.Distill()], batch, spy, counts={"distill_loss": 12.0})
    assert len(spy.calls) == objective.passes(0)
    output.loss.backward()
    assert output.loss == 0
    gradients = [p.grad for p in denoiser.module.parameters() if p.grad is not None]
    assert gradients and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cv.Distill(top=0), "`top` must be an integer of at least 1, got 0"),
        (lambda: cv.Distill(likelihood=0), "`likelihood` must be above 0"),
        (lambda: cv.Distill(variance=-1), "`variance` must be a finite number"),
        (lambda: cv.Distill(time=2.0), "`time`"),
        (lambda: cv.Distill(maker="teacher"), "`maker` must be a Maker"),
        (lambda: cv.Distill(maker=cv.Maker(guidance=2.0)), "guided logits are no probabilities"),
    ],
)
def test_options_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_latents_of_variable_length_are_refused():
    process = cv.LatentProcess(prediction="x0", shape=(2, 3))
    kept = torch.tensor([[True, False], [True, True], [True, True]])
    batch = cv.Batch(
        unpaired_tokens=BATCH.tokens,
        unpaired_attention_mask=BATCH.attention_mask,
        unpaired_latents=torch.zeros(3, 2, 3),
        unpaired_latent_mask=kept,
        unpaired_text_latent_mask=kept,
    )

    class Any:
        takes_latent_mask = True

        def denoise(self, tokens, latents, **state):
            raise AssertionError("no pass should run")

    with pytest.raises(ValueError, match="`distill` takes the mean of latents"):
        cv.CycleObjective(TEXT, process, [cv.Distill()])(Any(), batch, step=0)
