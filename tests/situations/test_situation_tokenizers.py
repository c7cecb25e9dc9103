"""Whose tokenizer has other ids, or other widths, than BERT's."""

from dataclasses import replace

import pytest
import torch

import cyclevae as cv
from cyclevae.testing import ToyNetwork, toy_batch, toy_denoiser

DENOISER, TEXT, LATENT = toy_denoiser(seed=0)


def test_an_end_that_is_also_padding_counts_where_it_is_kept():
    """Whose pad token is the end token:
    https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/4660.
    """
    text = replace(TEXT, pad_id=3, end_id=3)
    tokens = torch.tensor([[4, 5, 3, 3, 3]])
    mask = torch.tensor([[True, True, True, False, False]])
    targets, counted = text.targets(tokens, mask)
    assert counted.tolist() == [[True, True, True, False, False]]
    logits = torch.zeros(1, 5, 7)
    logits[0, 2, 3] = 50.0  # the end is known, of the padding nothing is asked
    expected = 2 * torch.tensor(7.0).log() / 3
    torch.testing.assert_close(cv.text_loss(logits, targets, counted), expected)


def test_what_stands_in_padding_is_not_learned():
    """Whose padding was taught as words: https://github.com/Shark-NLP/DiffuSeq/issues/50."""
    batch = toy_batch(rows=4)
    other = batch._replace(
        tokens=batch.tokens.masked_fill(~batch.attention_mask, 6),
        unpaired_tokens=batch.unpaired_tokens.masked_fill(~batch.unpaired_attention_mask, 5),
    )
    terms = [cv.Text(), cv.Latent(), cv.CycleText(), cv.CycleLatent()]
    objective = cv.CycleObjective(TEXT, LATENT, terms)
    losses = [
        objective(DENOISER, each, step=0, generator=torch.Generator().manual_seed(0)).loss
        for each in (batch, other)
    ]
    assert torch.equal(*losses)


def test_a_text_head_of_a_rounded_width_is_named():
    """Whose embedding is wider than the tokenizer:
    https://github.com/huggingface/transformers/issues/4875.
    """
    wide = cv.as_denoiser(ToyNetwork(vocab_size=8, latent_dim=4))
    objective = cv.CycleObjective(TEXT, LATENT)
    with pytest.raises(ValueError, match=r"\[3, 5, 7\], got \[3, 5, 8\]; is `text_process.vocab"):
        objective(wide, toy_batch(seed=0), step=0)
    text = replace(TEXT, vocab_size=8, special_ids=(7,))  # what no tokenizer can read
    objective = cv.CycleObjective(text, LATENT, [cv.Text(), cv.CycleLatent()])
    objective(wide, toy_batch(seed=0), step=0).loss.backward()
    logits = torch.zeros(3, 5, 8)
    logits[..., 7] = 9.0
    words = cv.argmax_text(logits, toy_batch(seed=0).attention_mask, text_process=text)
    assert not bool((words == 7).any())


def test_a_tokenizer_without_a_mask_is_told_what_to_add():
    """Who comes with GPT-2's: https://github.com/EleutherAI/pythia/issues/156."""

    class Tokenizer:
        mask_token_id = pad_token_id = None
        eos_token_id = bos_token_id = 0

        def __len__(self):
            return 9

    with pytest.raises(ValueError, match=r"no mask token; add one.*resize the embedding"):
        cv.TextProcess.from_tokenizer(Tokenizer())
