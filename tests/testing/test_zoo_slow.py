"""`check_denoiser` over models of other libraries, tiny and untrained."""

import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.testing import check_denoiser

TEXT = cv.TextProcess(mask_id=2, vocab_size=23, pad_id=0)
LATENT = cv.LatentProcess(prediction="v", shape=(4, 4))
WIDTH = 16


class Prefix(nn.Module):
    """Latents in front of the embeddings of any model that takes `inputs_embeds` and a mask."""

    def __init__(self, model, *, both_ways=False, last=False):
        super().__init__()
        self.model, self.both_ways, self.last = model, both_ways, last
        self.read, self.times = nn.Linear(4, WIDTH), nn.Linear(2, WIDTH)
        self.text_head, self.latent_head = nn.Linear(WIDTH, 23), nn.Linear(WIDTH, 4)

    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
        times = self.times(torch.stack([text_time, latent_time], dim=1).to(latents.dtype))
        embed = self.model.get_input_embeddings()
        parts = [self.read(latents) + times[:, None], embed(tokens)]
        keep = [torch.ones_like(attention_mask[:, :1]).expand(latents.shape[:2]), attention_mask]
        if self.last:
            parts, keep = parts[::-1], keep[::-1]
        mask = torch.cat(keep, dim=1)
        if self.both_ways:  # 4 axes: as it is, and not made causal
            mask = mask[:, None, None].expand(-1, 1, mask.shape[1], -1)
        hidden = self.model(inputs_embeds=torch.cat(parts, dim=1), attention_mask=mask)[0]
        sizes = [part.shape[1] for part in parts]
        latent, text = hidden.split(sizes, dim=1)[:: -1 if self.last else 1]
        return self.text_head(text), self.latent_head(latent)


SIZES = {
    "vocab_size": 23,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}


def model_of(name, **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{name}Model")(config)


def modern_bert():
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    return model_of("ModernBert", **ids, local_attention=64)


def frozen_tower():
    """A pretrained encoder that stays as it is, and a model that reads what it makes."""
    pretrained = model_of("Bert").requires_grad_(False)

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.inner = pretrained, Prefix(model_of("Bert"))

        def forward(self, tokens, latents, *, attention_mask, **state):
            seen = self.tower(tokens, attention_mask=attention_mask)[0]
            weight = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
            latents = latents + (weight.to(seen) * seen).sum(1, keepdim=True)[..., :4]
            state.pop("need", None)
            logits, prediction = self.inner(tokens, latents, attention_mask=attention_mask, **state)
            return logits, prediction

    return Tower()


def with_peft(**options):
    import peft

    config = peft.LoraConfig(target_modules=["query", "value"], **options)
    return Prefix(peft.get_peft_model(model_of("Bert"), config))


class SD3(nn.Module):
    """Images `[4, 4, 4]` as four latents of a row each, and texts that all have one length."""

    def __init__(self):
        super().__init__()
        import diffusers

        self.model = diffusers.SD3Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=1,
            out_channels=1,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=4,
        )
        self.word, self.place = nn.Embedding(23, WIDTH), nn.Embedding(64, WIDTH)
        self.times, self.text_head = nn.Linear(2, WIDTH), nn.Linear(WIDTH, 23)
        self.text: list[torch.Tensor] = []
        # the last block makes nothing of the text any more
        self.model.transformer_blocks[-2].register_forward_hook(
            lambda block, inputs, outputs: self.text.append(outputs[0])
        )

    def forward(self, tokens, latents, *, text_time, latent_time):
        times = torch.stack([text_time, latent_time], dim=1).to(latents.dtype)
        (prediction,) = self.model(
            latents[:, None],
            self.word(tokens) + self.place.weight[: tokens.shape[1]],
            pooled_projections=self.times(times),
            timestep=1000 * times[:, 1],
            return_dict=False,
        )
        return self.text_head(self.text.pop()), prediction[:, 0]


SOUND = {
    "BERT": lambda: Prefix(model_of("Bert")),
    "BERT, latents behind": lambda: Prefix(model_of("Bert"), last=True),
    "ModernBERT": lambda: Prefix(modern_bert()),
    "RoBERTa": lambda: Prefix(model_of("XLMRoberta")),
    "LLaDA: Llama without a causal mask": lambda: Prefix(model_of("Llama"), both_ways=True),
    "Qwen without a causal mask": lambda: Prefix(
        model_of("Qwen2", num_key_value_heads=2), both_ways=True
    ),
    "frozen tower": frozen_tower,
    "LoRA of peft": with_peft,
    "DoRA of peft": lambda: with_peft(use_dora=True),
    "SD3 of diffusers": SD3,
}
UNSOUND = {
    "Llama": lambda: Prefix(model_of("Llama")),
    "Llama, latents behind": lambda: Prefix(model_of("Llama"), last=True),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what peft asks transformers
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_model_is_accepted(name):
    torch.manual_seed(0)
    check_denoiser(cv.as_denoiser(SOUND[name]()), TEXT, LATENT)


@pytest.mark.parametrize("name", ["BERT", "LLaDA: Llama without a causal mask", "SD3 of diffusers"])
def test_a_sound_model_is_accepted_in_half_precision(name):
    torch.manual_seed(0)
    check_denoiser(cv.as_denoiser(SOUND[name]().bfloat16()), TEXT, LATENT)


@pytest.mark.parametrize("name", UNSOUND)
def test_a_causal_model_is_refused(name):
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=r"as under a causal mask|in front of a causal model"):
        check_denoiser(cv.as_denoiser(UNSOUND[name]()), TEXT, LATENT)
