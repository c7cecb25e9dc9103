"""Batches from parts and from single rows: the same rows, wherever they stand."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import cyclevae as cv
from cyclevae.testing import toy_batch, toy_denoiser

BATCH = toy_batch(seed=0, rows=4)


def assert_same(found, expected):
    for name, part, other in zip(cv.Batch._fields, found, expected, strict=True):
        assert (part is None) == (other is None), name
        if part is not None:
            assert torch.equal(part, other), name


def test_the_parts_of_a_batch_make_it_again():
    parts = (
        cv.Batch.of_pairs(*BATCH.need_pairs()),
        cv.Batch.of_texts(*BATCH.need_texts()),
        cv.Batch.of_latents(BATCH.need_latents()),
    )
    assert_same(parts[2] | parts[0] | parts[1], BATCH)


def test_masks_of_latents_go_to_their_rows():
    kept = torch.ones(4, 2, dtype=torch.bool)
    latents = torch.zeros(4, 2, 3)
    tokens, mask, _ = BATCH.need_pairs()
    lengths = torch.ones(4, 5)
    joined = (
        cv.Batch.of_pairs(tokens, mask, latents, latent_mask=kept)
        | cv.Batch.of_texts(tokens, mask, latent_mask=kept)
        | cv.Batch.of_latents(latents, latent_mask=kept, pseudo_text_mask=lengths)
    )
    assert all(part is not None for part in joined[:7] + joined[9:])
    assert joined.pseudo_text_mask is not lengths and torch.equal(joined.pseudo_text_mask, lengths)


@pytest.mark.parametrize("rows", ["pairs", "texts", "latents"])
def test_a_missing_part_is_named_with_its_maker(rows):
    with pytest.raises(ValueError, match=rf"holds no {rows}: Batch.of_{rows}\(...\) sets `"):
        getattr(cv.Batch(), f"need_{rows}")()


def rows_of(batch):
    """Single rows of a batch without their padding, as a data set has them."""

    def words(tokens, mask):
        return [row[kept] for row, kept in zip(tokens, mask, strict=True)]

    tokens, mask, latents = batch.need_pairs()
    pairs = [
        {"tokens": text.tolist(), "latents": z.numpy()}
        for text, z in zip(words(tokens, mask), latents, strict=True)
    ]
    texts = [{"tokens": text.numpy()} for text in words(*batch.need_texts())]
    return pairs, texts, [{"tokens": None, "latents": z} for z in batch.need_latents()]


def test_rows_in_any_order_make_the_batch_of_which_they_are():
    pairs, texts, latents = rows_of(BATCH)
    mixed = [row for three in zip(texts, latents, pairs, strict=True) for row in three]
    found = cv.collate(mixed)
    longest = found.need_pairs()[0].shape[1], found.need_texts()[0].shape[1]
    tokens, mask, latents, texts, text_mask, others = BATCH[:6]
    tokens, mask = tokens[:, : longest[0]], mask[:, : longest[0]]
    texts, text_mask = texts[:, : longest[1]], text_mask[:, : longest[1]]
    assert_same(found, cv.Batch(tokens, mask, latents, texts, text_mask, others))


def test_a_loader_collates_and_a_step_reads_it():
    pairs, texts, latents = rows_of(BATCH)
    denoiser, *processes = toy_denoiser(seed=0)
    objective = cv.CycleObjective(*processes)
    for batch in DataLoader(pairs[:2] + texts[:2] + latents[:2], 6, collate_fn=cv.collate):
        padded = cv.Batch(*(part if part is None else part[:2] for part in BATCH))
        for name in ("text_loss", "latent_loss", "cycle_text_loss"):
            assert objective.counts(batch)[name] == objective.counts(padded)[name]
        assert objective(denoiser, batch, step=0).loss.isfinite()


def test_a_row_says_which_tokens_it_keeps():
    found = cv.collate([{"tokens": [3, 4, 0], "attention_mask": [1, 1, 0]}, {"tokens": [5]}])
    assert found.need_texts()[1].tolist() == [[1, 1, 0], [1, 0, 0]]


def test_latents_of_any_lengths_are_padded_and_masked():
    long, short = torch.randn(3, 2), torch.randn(1, 2)
    found = cv.collate(
        [
            {"tokens": [3, 4], "latents": long},
            {"tokens": [5], "latents": short},
            {"tokens": [6], "latent_mask": [1, 1]},
            {"latents": long, "latent_mask": [1, 1, 0]},
        ]
    )
    assert torch.equal(found.latents, torch.stack([long, F.pad(short, (0, 0, 0, 2))]))
    assert found.latent_mask.tolist() == [[True] * 3, [True, False, False]]
    assert found.unpaired_text_latent_mask.tolist() == [[1, 1, 0]]
    assert found.unpaired_latent_mask.tolist() == [[1, 1, 0]]
    one = [{"tokens": [3], "latents": long}, {"tokens": [5], "latents": long}]
    assert cv.collate(one).latent_mask is None  # nothing varies, nothing is masked


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "`rows` is empty"),
        ([{"input_ids": [1]}], "key of rows.0.` is 'input_ids'; .*tokens"),
        ([{"tokens": [1]}, {}], "`rows.1.` must have `tokens`, `latents` or both"),
        ([{"attention_mask": [1], "latents": [0.0]}], "`rows.0.` must have `tokens`"),
        ([{"tokens": []}], r"at least one token, got shape \[0\]"),
        ([{"tokens": [[1, 2]]}], r"one row of at least one token, got shape \[1, 2\]"),
        ([{"tokens": [1, 2], "attention_mask": [1]}], r"'attention_mask'.*got shape \[1\]"),
        (
            [{"latents": [0.0]}, {"tokens": [1], "latents": [0.0, 1.0]}],
            r"one shape, or as \[n, d\] differ in n alone, got \[\[1\], \[2\]\]",
        ),
        ([{"latents": [[[0.0]]]}, {"latents": [[[0.0]]] * 3}], r"got \[\[1, 1, 1\], \[3, 1, 1\]\]"),
        ([{"latents": [[[0.0]]], "latent_mask": [1]}], r"got \[1\] and \[1, 1, 1\]"),
        ([{"latents": [[0.0]]}, {"latents": [[0.0, 1.0]]}], r"got \[\[1, 1\], \[1, 2\]\]"),
        (
            [{"tokens": [1]}, {"latents": [[0.0]]}, {"latents": [[0.0], [1.0]]}],
            r"`rows.0.` is a text beside latents of variable length: give it a `latent_mask`",
        ),
        ([{"latents": [0.0], "latent_mask": [1]}], r"'latent_mask'.*got \[1\] and \[1\]"),
        ([{"latents": [[0.0]], "latent_mask": [1, 1]}], r"'latent_mask'.*got \[2\] and \[1, 1\]"),
        ([{"tokens": [1], "latent_mask": [[1]]}], r"'latent_mask'.*got \[1, 1\]"),
        ([[1, 2]], "`rows.0.` must be a Mapping"),
    ],
)
def test_rows_that_make_no_batch_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        cv.collate(rows)
