"""Paired rows that lack a part: they leave every term, and shapes stay as they are."""

import pytest
import torch

import cyclevae as cv
from counters import HostSyncs
from cyclevae.testing import toy_batch, toy_denoiser
from cyclevae.testing._draws import SameDraws
from recipes import FULL, LATENT, TEXT, every_term, only, prior, recipe

PARTS = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1], [0, 0], [0, 1]], dtype=torch.bool)
OPTIONS = {
    "the cycles": {"unconditional_weight": 0.0},
    "cosines": only("latent", "cycle_latent")
    | {"latent_distance": "cosine", "cycle_latent_distance": "cosine"},
    "below full noise": only("text", "latent", "cycle_latent")
    | {"base_latent_time": 0.5, "base_text_time": 0.5},
    "dreams": only("sleep"),
    "relaxed texts": only("cycle_latent", "text_marginal")
    | {"text_bridge": "soft", "latent_policy": FULL},
    "half of the rows": {"unconditional_weight": 0.0, "cycle_fraction": 0.5},
    "no cycle of a pair": {"unconditional_weight": 0.0, "cycle_pairs": False},
    "InfoNCE": only("contrastive"),
    "InfoNCE of distances": only("contrastive") | {"contrastive_options": {"critic": "euclidean"}},
    "padding is taught": {
        "unconditional_weight": 0.0,
        "text_process": cv.TextProcess(2, 7, pad_id=0, taught_padding="first"),
    },
}


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


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses_are_those_of_the_rows_that_are_there(options):
    denoiser, objective, batch = toy_denoiser(seed=0)[0], recipe(options), pairs()
    if "cycle_fraction" in options:  # of the rows as they stand, and these are two pairs of four
        batch = batch._replace(
            **{k: v[[0, 1, 2, 3, 3, 3]] for k, v in batch._asdict().items() if v is not None}
        )
    values = []
    for rows in (marked(batch), split(batch)):
        with SameDraws():
            values.append(objective.terms(denoiser, rows, step=0))
    assert values[0].keys() == values[1].keys()
    for term in values[0]:
        torch.testing.assert_close(values[0][term], values[1][term], msg=term)


def gradients(objective, batch):
    denoiser = toy_denoiser(seed=0)[0]
    generator = torch.Generator().manual_seed(1)
    output = objective(denoiser, batch, step=0, generator=generator)
    output.loss.backward()
    return output, [p.grad for p in denoiser.module.parameters() if p.grad is not None]


@pytest.mark.parametrize("options", [*OPTIONS.values(), {}, prior("mmd")])
def test_what_stands_in_a_missing_part_is_not_looked_at(options):
    objective, batch = recipe(options), pairs()
    (output, found), (other, expected) = (
        gradients(objective, marked(batch, garbage)) for garbage in (torch.nan, 1e30)
    )
    for value, same in zip(
        [*found, *output.metrics.values()], [*expected, *other.metrics.values()], strict=True
    ):
        assert value.isfinite().all() and torch.equal(value, same)


@pytest.mark.parametrize("options", [*OPTIONS.values(), {}, prior("mmd"), prior("moment")])
def test_a_batch_without_anything_gives_zero_with_a_graph(options):
    nothing = torch.zeros(6, dtype=torch.bool)
    batch = cv.Batch(
        torch.zeros(6, 5, dtype=torch.long),
        torch.zeros(6, 5),
        torch.full((6, 4), torch.nan),
        has_text=nothing,
        has_latent=nothing,
    )
    output, found = gradients(recipe(options), batch)
    assert output.loss == 0 and output.loss.requires_grad
    assert all(not grad.any() for grad in found)


def test_counts_are_those_of_the_rows_that_are_there():
    objective, batch = every_term(TEXT, LATENT), pairs()
    expected = objective.counts(split(batch))
    assert objective.counts(marked(batch)) == expected
    assert expected["latent_loss"] == 8 and expected["cycle_text_loss"] == 9


def test_every_pass_sees_texts_that_are_there():
    denoiser, _, _ = toy_denoiser(seed=0)
    batch, seen = marked(pairs()), []

    class Spy:
        module = denoiser.module

        def denoise(self, tokens, latents, **state):
            seen.append((tokens, state["attention_mask"], latents))
            return denoiser.denoise(tokens, latents, **state)

    recipe(prior("mmd"))(Spy(), batch, step=0)
    ((tokens, mask, _),) = seen
    there = {tuple(row) for row in batch.tokens[batch.has_text].tolist()}
    assert {tuple(row) for row in tokens.tolist()} == there and mask.any(dim=1).all()


def test_a_text_is_borrowed_from_the_next_row_that_has_one():
    tokens = pairs().tokens
    rows = cv.batch.arrange(marked(pairs()), TEXT, LATENT).borrowed()
    assert torch.equal(rows.texts.tokens, tokens[[0, 1, 3, 3, 0, 0]])


def test_a_missing_part_waits_for_no_value():
    meta = torch.device("meta")
    network = toy_denoiser(seed=0)[0].module.to(meta)
    batch = cv.Batch(*[None if p is None else p.to(meta) for p in marked(pairs())])
    with HostSyncs() as syncs:
        for options in OPTIONS.values():
            recipe(options)(cv.as_denoiser(network), batch, step=0).loss.backward()
        every_term(TEXT, LATENT).counts(batch)
    assert syncs.found == []


@pytest.mark.unhooked
@pytest.mark.parametrize("name", ["has_text", "has_latent"])
def test_errors(name):
    objective, batch = every_term(TEXT, LATENT), pairs()
    denoiser = toy_denoiser(seed=0)[0]
    with pytest.raises(ValueError, match=rf"`batch.{name}` must be bool \[6\], got float32 \[6\]"):
        objective(denoiser, batch._replace(**{name: torch.ones(6)}), step=0)
    unpaired = cv.Batch(*[None] * 3, *toy_batch()[3:6])._replace(**{name: PARTS[:, 0]})
    with pytest.raises(
        ValueError, match=r"say which paired rows lack a part, and the batch has no"
    ):
        objective(denoiser, unpaired, step=0)
