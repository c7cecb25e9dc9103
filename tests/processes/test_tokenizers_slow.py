"""Ids read off tokenizers of `transformers`, whose import takes seconds."""

import cyclevae as cv


def test_a_real_tokenizer_that_never_appends_its_end():
    """As GPT-2: it has a token for the end of texts, which is also its padding."""
    import tokenizers
    import transformers

    ids = {"<end>": 0, "[MASK]": 1, "a": 2, "b": 3, "?": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="?"))
    names = {"eos_token": "<end>", "pad_token": "<end>", "mask_token": "[MASK]", "unk_token": "?"}
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)
    text = cv.TextProcess.from_tokenizer(plain)
    assert (text.start_id, text.end_id, text.pad_id) == (None, None, 0)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 0)]
    )
    ending = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)
    assert cv.TextProcess.from_tokenizer(ending).end_id == 0
