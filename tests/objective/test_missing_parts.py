"""Paired rows that lack a part: they leave every term, and shapes stay as they are."""

from dataclasses import replace

import pytest
import torch

import cyclevae as cv
from counters import HostSyncs
from cyclevae.objective.arrange import arrange
from cyclevae.testing import toy_batch, toy_denoiser
from cyclevae.testing._draws import SameDraws
from running import FIVE, FULL, LATENT, TEXT, Recorder, of, run
from test_own_term import RHYME

PARTS = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1], [0, 0], [0, 1]], dtype=torch.bool)
TEXT_TERM, LATENT_CYCLE, LATENT_TERM, TEXT_CYCLE, _ = FIVE


def cycles(**options):
    """Both base losses, and both cycles with other options."""
    return (
        TEXT_TERM,
        replace(LATENT_CYCLE, **options),
        LATENT_TERM,
        replace(TEXT_CYCLE, **options),
    )


OBJECTIVES = {
    "the cycles": of(*cycles()),
    "cosines": of(cv.Latent(distance="cosine"), replace(LATENT_CYCLE, distance="cosine")),
    "below full noise": of(cv.Text(time=0.5), LATENT_CYCLE, cv.Latent(time=0.5)),
    "dreams": of(cv.Sleep(pairs=True)),
    "channel labels": of(cv.Distill(pairs=True)),
    "relaxed texts": of(
        replace(LATENT_CYCLE, bridge="soft", policy=FULL),
        cv.TextMarginal(bridge="soft", pairs=True),
    ),
    "half of the rows": of(*cycles(fraction=0.5)),
    "no cycle of a pair": of(*cycles(pairs=False)),
    "InfoNCE": of(cv.Contrastive()),
    "InfoNCE of distances": of(cv.Contrastive(critic="euclidean")),
    "padding is taught": cv.CycleObjective(
        cv.TextProcess(2, 7, pad_id=0, taught_padding="first"), LATENT, cycles()
    ),
    "a term of one's own": of(TEXT_TERM, RHYME),
}
FROM_NOISE = {"all": of(*FIVE), "mmd": of(cv.Prior("mmd")), "moments": of(cv.Prior("moment"))}
EVERYWHERE = OBJECTIVES | FROM_NOISE


def pairs(seed=0):
    """Six pairs of one length, so that a borrowed length is as long as any."""
    tokens, _, latents = toy_batch(seed=seed, rows=6)[:3]
    mask = (torch.arange(5) < 3).expand(6, 5)
    return cv.Batch(tokens.where(tokens > 2, 3) * mask, mask, latents)


def marked(batch, garbage=torch.nan):
    """The same with something else where a part is missing."""
    has_text, has_latent = PARTS.T
    return batch._replace(
        tokens=batch.tokens.where(has_text[:, None], 99),
        latents=batch.latents.where(has_latent[:, None], garbage),
        has_text=has_text,
        has_latent=has_latent,
    )


def split(batch):
    """The rows that are there, as pairs and unpaired parts."""
    tokens, mask, latents = batch[:3]
    both, alone, extra = PARTS.all(1), PARTS[:, 0] & ~PARTS[:, 1], PARTS[:, 1] & ~PARTS[:, 0]
    rows = (tokens[both], mask[both], latents[both], tokens[alone], mask[alone], latents[extra])
    return cv.Batch(*rows)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_those_of_the_rows_that_are_there(name):
    denoiser, objective, batch = toy_denoiser(seed=0)[0], OBJECTIVES[name], pairs()
    if name == "half of the rows":  # of the rows as they stand, and these are two pairs of four
        batch = batch._replace(
            **{k: v[[0, 1, 2, 3, 3, 3]] for k, v in batch._asdict().items() if v is not None}
        )
    values = []
    for rows in (marked(batch), split(batch)):
        with SameDraws():
            values.append(objective.losses(denoiser, rows, step=0))
    assert values[0].keys() == values[1].keys()
    for term in values[0]:
        torch.testing.assert_close(values[0][term], values[1][term], msg=term)


def gradients(objective, batch):
    denoiser = toy_denoiser(seed=0)[0]
    generator = torch.Generator().manual_seed(1)
    output = objective(denoiser, batch, step=0, generator=generator)
    output.loss.backward()
    return output, [p.grad for p in denoiser.module.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "objective", (OBJECTIVES | FROM_NOISE).values(), ids=OBJECTIVES | FROM_NOISE
)
def test_what_stands_in_a_missing_part_is_not_looked_at(objective):
    batch = pairs()
    (output, found), (other, expected) = (
        gradients(objective, marked(batch, garbage)) for garbage in (torch.nan, 1e30)
    )
    for value, same in zip(
        [*found, *output.metrics.values()], [*expected, *other.metrics.values()], strict=True
    ):
        assert value.isfinite().all() and torch.equal(value, same)


@pytest.mark.parametrize(
    "objective", (OBJECTIVES | FROM_NOISE).values(), ids=OBJECTIVES | FROM_NOISE
)
def test_a_batch_without_anything_gives_zero_with_a_graph(objective):
    nothing = torch.zeros(6, dtype=torch.bool)
    batch = cv.Batch(
        torch.zeros(6, 5, dtype=torch.long),
        torch.zeros(6, 5),
        torch.full((6, 4), torch.nan),
        has_text=nothing,
        has_latent=nothing,
    )
    output, found = gradients(objective, batch)
    assert output.loss == 0 and output.loss.requires_grad
    assert all(not grad.any() for grad in found)


def test_counts_are_those_of_the_rows_that_are_there():
    objective, batch = of(*FIVE), pairs()
    expected = objective.counts(split(batch))
    assert objective.counts(marked(batch)) == expected
    assert expected["latent_loss"] == 8 and expected["cycle_text_loss"] == 9


def test_every_pass_sees_texts_that_are_there():
    batch, recorder = marked(pairs()), Recorder()
    run(FROM_NOISE["mmd"], recorder, batch)
    ((tokens, _, state),) = recorder.calls
    there = {tuple(row) for row in batch.tokens[batch.has_text].tolist()}
    assert {tuple(row) for row in tokens.tolist()} == there
    assert state["attention_mask"].any(dim=1).all()


def test_a_text_is_borrowed_from_the_next_row_that_has_one():
    tokens = pairs().tokens
    rows = arrange(marked(pairs()), TEXT, LATENT).borrowed(TEXT.mask_id)
    assert torch.equal(rows.texts.tokens, tokens[[0, 1, 3, 3, 0, 0]])


@pytest.mark.slow
def test_a_missing_part_waits_for_no_value():
    meta = torch.device("meta")
    network = toy_denoiser(seed=0)[0].module.to(meta)
    batch = cv.Batch(*[None if p is None else p.to(meta) for p in marked(pairs())])
    with HostSyncs() as syncs:
        for objective in OBJECTIVES.values():
            objective(cv.as_denoiser(network), batch, step=0).loss.backward()
        of(*FIVE).counts(batch)
    assert syncs.found == []


@pytest.mark.unhooked
@pytest.mark.parametrize("name", ["has_text", "has_latent"])
def test_errors(name):
    objective, batch = of(*FIVE), pairs()
    denoiser = toy_denoiser(seed=0)[0]
    with pytest.raises(ValueError, match=rf"`batch.{name}` must be bool \[6\], got float32 \[6\]"):
        objective(denoiser, batch._replace(**{name: torch.ones(6)}), step=0)
    unpaired = cv.Batch(*[None] * 3, *toy_batch()[3:6])._replace(**{name: PARTS[:, 0]})
    with pytest.raises(
        ValueError, match=r"say which paired rows lack a part, and the batch has no"
    ):
        objective(denoiser, unpaired, step=0)
