"""`check_denoiser` over small models built as those of the field are, sound and unsound."""

import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cyclevae as cv
from cyclevae.testing import check_denoiser

TEXT = cv.TextProcess(mask_id=2, vocab_size=11, pad_id=0)
LATENT = cv.LatentProcess(prediction="v", shape=(3, 4))
WIDTH = 16


def attend(q, k, v, keep=None, causal=False):
    """Attention of two heads, over `[b, s, w]`."""
    q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if keep is None else keep[:, None, None]
    if causal:
        mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class Times(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, text_time, latent_time):
        return self.layers(torch.stack([text_time, latent_time], dim=1))


class AdaBlock(nn.Module):
    """A block of a DiT: shift, scale and gate of the time, all of which begin at 0."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        for parameter in self.modulation.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x, time, keep):
        shift, scale, gate = self.modulation(F.silu(time))[:, None].chunk(3, dim=-1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).chunk(3, dim=-1)
        return x + gate * self.out(attend(q, k, v, keep))


class DiT(nn.Module):
    """Words and latents in one sequence; gates, modulations and both heads begin at 0."""

    def __init__(self):
        super().__init__()
        self.word, self.patch, self.times = nn.Embedding(11, WIDTH), nn.Linear(4, WIDTH), Times()
        self.place = nn.Parameter(torch.randn(40, WIDTH))
        self.blocks = nn.ModuleList([AdaBlock(), AdaBlock()])
        self.text_head, self.latent_head = nn.Linear(WIDTH, 11), nn.Linear(WIDTH, 4)
        for parameter in (*self.text_head.parameters(), *self.latent_head.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
        x = torch.cat([self.patch(latents), cv.embed_tokens(self.word.weight, tokens)], dim=1)
        x = x + self.place[: x.shape[1]]
        keep = F.pad(attention_mask, (latents.shape[1], 0), value=True)
        time = self.times(text_time, latent_time)
        for block in self.blocks:
            x = block(x, time, keep)
        latent, text = x.split([latents.shape[1], tokens.shape[1]], dim=1)
        return self.text_head(text), self.latent_head(latent)


class TwoStreams(nn.Module):
    """As in SD3: a stream for each part, projections of its own, one attention over both."""

    def __init__(self):
        super().__init__()
        self.word, self.patch, self.times = nn.Embedding(11, WIDTH), nn.Linear(4, WIDTH), Times()
        self.text_qkv, self.latent_qkv = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.text_norm, self.latent_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.text_head, self.latent_head = nn.Linear(WIDTH, 11), nn.Linear(WIDTH, 4)

    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
        time = self.times(text_time, latent_time)[:, None]
        text = self.word(tokens) + time
        latent = self.patch(latents) * (1 + time)
        text_qkv = self.text_qkv(self.text_norm(text)).chunk(3, dim=-1)
        latent_qkv = self.latent_qkv(self.latent_norm(latent)).chunk(3, dim=-1)
        both = [torch.cat(pair, dim=1) for pair in zip(latent_qkv, text_qkv, strict=True)]
        keep = F.pad(attention_mask, (latents.shape[1], 0), value=True)
        mixed = attend(*both, keep).split([latents.shape[1], tokens.shape[1]], dim=1)
        return self.text_head(text + mixed[1]), self.latent_head(latent + mixed[0])


class LLaDA(nn.Module):
    """RMS norms, rotary places, a gated layer, the latents as a prefix; tied or causal."""

    def __init__(self, *, causal=False, tied=False):
        super().__init__()
        self.word, self.prefix, self.times = nn.Embedding(11, WIDTH), nn.Linear(4, WIDTH), Times()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.latent_head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 4)
        self.text_head = nn.Linear(WIDTH, 11, bias=False)
        if tied:
            self.text_head.weight = self.word.weight
        self.causal = causal

    def turned(self, x):
        """Rotary places."""
        angle = torch.arange(x.shape[1])[:, None] / 10 ** torch.linspace(0, 2, WIDTH // 2)
        a, b = x.chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask, need="both"):
        n = latents.shape[1]
        keep = F.pad(attention_mask, (n, 0), value=True)
        prefix = self.prefix(latents) + self.times(text_time, latent_time)[:, None]
        x = torch.cat([prefix, cv.embed_tokens(self.word.weight, tokens)], dim=1)
        y = self.norm(x)
        q, k, v = self.turned(self.q(y)), self.turned(self.k(y)), self.v(y)
        x = x + attend(q, k, v, keep, self.causal)
        gate, up = self.up(self.norm(x)).chunk(2, dim=-1)
        x = x + self.down(F.silu(gate) * up)
        return self.text_head(x[:, n:]), self.latent_head(x[:, :n])


class Faulty(nn.Module):
    """The same with one fault."""

    def __init__(self, fault):
        super().__init__()
        self.inner, self.fault = LLaDA(), fault

    def forward(self, tokens, latents, *, attention_mask, **state):
        state["attention_mask"] = attention_mask
        logits, prediction = self.inner(tokens, latents, **state)
        first = torch.arange(tokens.shape[1]) == 0
        match self.fault:
            case "blind to the text":
                prediction = self.inner(torch.full_like(tokens, 5), latents, **state)[1]
            case "blind to the latent":
                logits = self.inner(tokens, torch.zeros_like(latents), **state)[0]
            case "leaks":
                state["attention_mask"] = torch.ones_like(attention_mask)
                logits = self.inner(tokens, latents, **state)[0]
            case "an encoder of the first word":
                prediction = self.inner(tokens.masked_fill(~first, 5), latents, **state)[1]
            case "a latent that one place reads":
                deaf = self.inner(tokens, torch.zeros_like(latents), **state)[0]
                logits = torch.where(first[:, None], logits, deaf)
            case "inference mode":
                with torch.inference_mode():
                    words = F.one_hot(tokens, 11).float()
                logits, prediction = self.inner(words, latents, **state)
            case "writes":
                latents += 1
            case "reentrant":
                logits = checkpoint(torch.tanh, logits, use_reentrant=True)
        return logits, prediction


class LoRA(nn.Module):
    """A frozen layer and a product of two, the second of which begins at 0."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def with_lora(network, *names):
    network.requires_grad_(False)
    for name in names:
        setattr(network, name, LoRA(getattr(network, name)))
    return network


class FrozenTower(nn.Module):
    """A pretrained text encoder without a graph, and all that learns behind it."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.word = nn.Embedding(11, WIDTH).requires_grad_(False)
        self.tower = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.tower.requires_grad_(False)
        self.read, self.patch, self.times = nn.Linear(WIDTH, WIDTH), nn.Linear(4, WIDTH), Times()
        self.text_head, self.latent_head = nn.Linear(WIDTH, 11), nn.Linear(WIDTH, 4)

    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
        with torch.no_grad():
            text = self.tower(self.word(tokens), src_key_padding_mask=~attention_mask)
        text = self.read(text)
        latent = self.patch(latents) + self.times(text_time, latent_time)[:, None]
        seen = attend(latent, text, text, attention_mask)
        heard = attend(text, latent, latent)
        return self.text_head((text + heard).tanh()), self.latent_head((latent + seen).tanh())


class Dropping(nn.Module):
    """Dropout in every layer, a dropped stream, words that are dropped, and whole latents."""

    def __init__(self):
        super().__init__()
        self.inner = LLaDA()
        self.drop = nn.Dropout(0.4)

    def forward(self, tokens, latents, **state):
        if self.training:
            latents = latents * (torch.rand(len(latents), 1, 1) > 0.5)
        latents = F.dropout(latents, 0.1)  # which is on whatever the mode
        logits, prediction = self.inner(tokens, latents, **state)
        return self.drop(logits), self.drop(prediction)


class LayerDrop(nn.Module):
    """A layer that is left out at times, by whatever draws."""

    def __init__(self, draw):
        super().__init__()
        self.inner, self.layer, self.draw = LLaDA(), nn.Linear(4, 4), draw

    def forward(self, tokens, latents, **state):
        if self.draw() < 0.5:
            latents = latents + self.layer(latents)
        return self.inner(tokens, latents, **state)


class OwnNulls(nn.Module):
    """What it is shown at full noise is another embedding, as guidance wants it."""

    def __init__(self):
        super().__init__()
        self.inner = LLaDA()
        self.no_word, self.no_latent = (
            nn.Parameter(torch.zeros(11)),
            nn.Parameter(torch.zeros(3, 4)),
        )

    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
        words = F.one_hot(tokens, 11).to(latents)
        words = torch.where(text_time[:, None, None] == 1, words + self.no_word, words)
        latents = torch.where(latent_time[:, None, None] == 1, self.no_latent, latents)
        return self.inner(
            words,
            latents,
            text_time=text_time,
            latent_time=latent_time,
            attention_mask=attention_mask,
        )


class Recurrent(nn.Module):
    """An encoder that reads both ways, packed or not, and knows neither noise nor time."""

    def __init__(self, *, packed=True):
        super().__init__()
        self.word, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 12)
        self.lstm = nn.LSTM(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.packed = packed

    def forward(self, tokens, latents, *, attention_mask, **state):
        words = self.word(tokens)
        if self.packed:
            words = nn.utils.rnn.pack_padded_sequence(
                words, attention_mask.sum(1), batch_first=True, enforce_sorted=False
            )
        _, (last, _) = self.lstm(words)
        return self.head(last.mT.transpose(0, 2).flatten(1)).unflatten(1, (3, 4))


class Writer(nn.Module):
    """A decoder that reads the latents alone, at every place."""

    def __init__(self):
        super().__init__()
        self.place, self.read, self.head = (
            nn.Embedding(40, 12),
            nn.Bilinear(12, 12, 16),
            nn.Linear(16, 11),
        )

    def forward(self, tokens, latents, **state):
        place = self.place.weight[: tokens.shape[1]].expand(len(tokens), -1, -1)
        return self.head(
            self.read(place, latents.flatten(1)[:, None].expand_as(place).contiguous()).tanh()
        )


class Mixer(nn.Module):
    """Texts of six words, mixed by a matrix over places: no mask, and none asked for."""

    def __init__(self):
        super().__init__()
        self.word, self.patch, self.times = nn.Embedding(11, WIDTH), nn.Linear(4, WIDTH), Times()
        self.mix = nn.Linear(9, 9)
        self.text_head, self.latent_head = nn.Linear(WIDTH, 11), nn.Linear(WIDTH, 4)

    def forward(self, tokens, latents, *, text_time, latent_time):
        x = torch.cat([self.patch(latents), self.word(tokens)], dim=1)
        x = x + self.times(text_time, latent_time)[:, None]
        x = x + self.mix(x.mT).mT.tanh()
        return self.text_head(x[:, 3:]), self.latent_head(x[:, :3])


class Pooled(nn.Module):
    """The latents see the mean of the words, of the kept ones or of all."""

    def __init__(self, *, leaks=False):
        super().__init__()
        self.inner, self.word = LLaDA(), nn.Embedding(11, 4)
        self.leaks = leaks

    def forward(self, tokens, latents, *, attention_mask, **state):
        keep = torch.ones_like(attention_mask) if self.leaks else attention_mask
        words = self.word(tokens) * keep[..., None]
        mean = words.sum(dim=1, keepdim=True) / keep.sum(dim=1)[:, None, None]
        logits, _ = self.inner(tokens, latents, attention_mask=attention_mask, **state)
        return logits, (latents + mean).tanh() @ self.word.weight[:4]


SOUND = {
    "DiT with gates at 0": DiT,
    "two streams": TwoStreams,
    "bidirectional, latents as a prefix": LLaDA,
    "tied head": lambda: LLaDA(tied=True),
    "LoRA": lambda: with_lora(LLaDA(), "q", "v"),
    "LoRA of one direction": lambda: with_lora(LLaDA(), "latent_head"),
    "LoRA on a tied model": lambda: with_lora(LLaDA(tied=True), "q"),
    "frozen text tower": FrozenTower,
    "dropout": Dropping,
    "a layer dropped by Python": lambda: LayerDrop(random.random),
    "a layer dropped by NumPy": lambda: LayerDrop(numpy.random.rand),
    "a layer dropped by PyTorch": lambda: LayerDrop(lambda: torch.rand(())),
    "nulls of its own": OwnNulls,
    "two networks": lambda: cv.EncoderDecoder(Recurrent(), Writer()),
    "no mask": Mixer,
    "mean of the words": Pooled,
}
UNSOUND = {
    "causal": (lambda: LLaDA(causal=True), "never depend on words to their right"),
    **{
        fault: (lambda fault=fault: Faulty(fault), message)
        for fault, message in {
            "blind to the text": "another text changes nothing in the latent_prediction",
            "blind to the latent": "another latent changes nothing in the logits",
            "leaks": "ids at padded positions change the logits",
            "an encoder of the first word": "another last word changes nothing in the latent_pred",
            "a latent that one place reads": "another latent changes nothing in the logits of some",
            "inference mode": r"fails where gradients are on.*torch\.no_grad",
            "writes": "writes into the latents that it is given.*work on a copy",
            "reentrant": "fails where gradients are on.*use_reentrant=False",
        }.items()
    },
    "a mean over padding": (
        lambda: Pooled(leaks=True),
        "text_time 0.*ids at padded positions change the latent_prediction",
    ),
    "recurrent over padding": (
        lambda: cv.EncoderDecoder(Recurrent(packed=False), Writer()),
        "ids at padded positions change the latent_prediction",
    ),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.slow
def test_a_sound_model_is_accepted(name):
    torch.manual_seed(0)
    network = SOUND[name]()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    check_denoiser(cv.as_denoiser(network), TEXT, LATENT)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_model_is_refused_by_name(name):
    torch.manual_seed(0)
    make, message = UNSOUND[name]
    with pytest.raises(AssertionError, match=message):
        check_denoiser(cv.as_denoiser(make()), TEXT, LATENT)
