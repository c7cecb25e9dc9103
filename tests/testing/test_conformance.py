"""`check_denoiser` accepts the sound models of the field, and refuses each unsound one by name."""

import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.testing import ToyNetwork, check_denoiser

TEXT = cv.TextProcess(mask_id=2, vocab_size=11, pad_id=0)
LATENT = cv.LatentProcess(prediction="v", shape=(4,))
WIDTH = 16


class Transformer(nn.Module):
    """A latent token before the text, one block of attention, two heads; options make the zoo."""

    def __init__(self, *, causal=False, zero=(), dropout=0.0, positions=None, behind=False):
        super().__init__()
        self.word, self.latent_in = nn.Embedding(11, WIDTH), nn.Linear(4, WIDTH)
        self.times = nn.Linear(2, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.gate = nn.Parameter(torch.zeros(()) if "gate" in zero else torch.ones(()))
        self.text_head, self.latent_head = nn.Linear(WIDTH, 11), nn.Linear(WIDTH, 4)
        self.position = None if positions is None else nn.Embedding(positions, WIDTH)
        self.causal, self.dropout, self.behind = causal, dropout, behind
        for name in {"text_head", "latent_head"} & set(zero):
            nn.init.zeros_(getattr(self, name).weight)
            nn.init.zeros_(getattr(self, name).bias)

    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
        words = cv.embed_tokens(self.word.weight, tokens)
        length = words.shape[1]
        if self.position is not None:
            words = words + self.position(torch.arange(length))
        words = nn.functional.dropout(words, self.dropout)  # on in evaluation too
        times = self.times(torch.stack([text_time, latent_time], dim=1).to(latents.dtype))
        latent = (self.latent_in(latents) + times)[:, None]
        ends = [words, latent] if self.behind else [latent, words]
        hidden = torch.cat(ends, dim=1)
        keep = nn.functional.pad(attention_mask, (0, 1) if self.behind else (1, 0), value=True)
        causal = torch.ones(length + 1, length + 1).triu(1).bool() if self.causal else None
        mixed, _ = self.attention(
            hidden, hidden, hidden, key_padding_mask=~keep, attn_mask=causal, need_weights=False
        )
        hidden = hidden + self.gate * mixed
        text, latent = hidden[:, 1:], hidden[:, 0]
        if self.behind:
            text, latent = hidden[:, :-1], hidden[:, -1]
        return self.text_head(text), self.latent_head(latent)


class OneLength(nn.Module):
    """Texts of four words, and no attention mask, as in the tour."""

    def __init__(self, takes_mask=False):
        super().__init__()
        self.word, self.encoder = nn.Embedding(11, 3), nn.Linear(12, 4)
        self.decoder = nn.Linear(4, 44)
        if takes_mask:
            self.forward = self.with_mask

    def forward(self, tokens, latents, *, text_time, latent_time):
        return self.decoder(latents).unflatten(1, (4, 11)), self.encoder(
            self.word(tokens).flatten(1)
        )

    def with_mask(self, tokens, latents, *, text_time, latent_time, attention_mask):
        return OneLength.forward(self, tokens, latents, text_time=0, latent_time=0)


class Half(nn.Module):
    def __init__(self, network, output):
        super().__init__()
        self.network, self.output = network, output

    def forward(self, *inputs, **state):
        return self.network(*inputs, **state)[self.output]


class Frozen(nn.Module):
    """A pretrained encoder that is run without a graph."""

    def __init__(self):
        super().__init__()
        self.inner = Transformer().requires_grad_(False)

    def forward(self, *inputs, **state):
        with torch.no_grad():
            return self.inner(*inputs, **state)[1]


class OwnDraws(nn.Module):
    """Noise from a generator of its own, which no seed reaches."""

    def __init__(self):
        super().__init__()
        self.inner, self.generator = Transformer(), torch.Generator()

    def forward(self, tokens, latents, *, need, **state):
        noise = torch.randn(latents.shape, generator=self.generator)
        return self.inner(tokens, latents + 0.3 * noise, **state)


class RoundTokens(nn.Module):
    """Attention by a window of three words, as a convolution."""

    def __init__(self):
        super().__init__()
        self.inner = ToyNetwork(11, 4)
        self.near = nn.Conv1d(11, 11, 3, padding=1)

    def forward(self, tokens, latents, *, attention_mask, **state):
        output = self.inner(tokens, latents, attention_mask=attention_mask, **state)
        words = nn.functional.one_hot(tokens, 11).float() * attention_mask[..., None]
        logits = self.near(words.mT).mT if output.logits is not None else None
        return None if logits is None else output.logits + logits, output.latent_prediction


def frozen_in(network, *names):
    for name in names:
        network.get_submodule(name).requires_grad_(False)
    return network


def pair(encoder, decoder):
    return cv.EncoderDecoder(encoder, decoder)


def low_rank(network):
    """Low-rank adapters that begin at 0, on a frozen network, as PEFT puts them."""
    network.requires_grad_(False)

    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Parameter(torch.randn(11, 2)), nn.Parameter(torch.zeros(2, 16))

        def forward(self, weight):
            return weight + self.down @ self.up

    nn.utils.parametrize.register_parametrization(network.word, "weight", Adapter())
    return network


SOUND = {
    "transformer": Transformer,
    "latent behind the text": lambda: Transformer(behind=True),
    "one frozen parameter": lambda: frozen_in(Transformer(), "word"),
    "a frozen head": lambda: frozen_in(Transformer(), "text_head"),
    "frozen altogether": lambda: frozen_in(Transformer(), ""),
    "frozen encoder": lambda: pair(frozen_in(Half(Transformer(), 1), ""), Half(Transformer(), 0)),
    "encoder without a graph": lambda: pair(Frozen(), Half(Transformer(), 0)),
    "low-rank adapters": lambda: low_rank(Transformer()),
    "heads at zero": lambda: Transformer(zero=("text_head", "latent_head")),
    "gate at zero": lambda: Transformer(zero=("gate",)),
    "all at zero": lambda: Transformer(zero=("gate", "text_head", "latent_head")),
    "dropout, off in evaluation": lambda: Dropped(),
    "dropout, always": lambda: Transformer(dropout=0.3),
    "draws of its own": OwnDraws,
    **{f"{n} positions": lambda n=n: Transformer(positions=n) for n in (1, 2, 3, 5, 6)},
    "no mask": OneLength,
    "bfloat16": lambda: Transformer().bfloat16(),
    "float64": lambda: Transformer().double(),
    "batch normalisation that rests": lambda: Normalised().eval(),
    "convolution": RoundTokens,
}


class Normalised(Transformer):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, tokens, latents, *, need, **state):
        return super().forward(tokens, self.norm(latents), **state)


class Dropped(Transformer):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.5, batch_first=True)


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_model_is_accepted(name):
    torch.manual_seed(0)
    network = SOUND[name]()
    before = [p.clone() for p in network.parameters()]
    learns = [p.requires_grad for p in network.parameters()]
    check_denoiser(cv.as_denoiser(network), TEXT, LATENT)
    assert all(torch.equal(*both) for both in zip(before, network.parameters(), strict=True))
    assert learns == [p.requires_grad for p in network.parameters()]


class Changed(Transformer):
    """With one fault."""

    def __init__(self, fault, **options):
        super().__init__(**options)
        self.fault = fault

    def forward(self, tokens, latents, *, need, **state):
        words = torch.full_like(tokens, 5) if self.fault == "text" else tokens
        logits, prediction = super().forward(words, latents, **state)
        if self.fault == "latent":
            logits = super().forward(tokens, 0 * latents, **state)[0]
        if self.fault == "size":
            prediction = prediction / len(prediction)
        if self.fault == "detached":
            logits = logits.detach()
        return logits, prediction


UNSOUND = {
    "causal": (lambda: Transformer(causal=True, behind=True), "never depend on words to their r"),
    "causal, latent first": (lambda: Transformer(causal=True), "words to their right"),
    "causal encoder, latent first": (
        lambda: pair(Half(Transformer(causal=True), 1), Half(Transformer(), 0)),
        "another text changes nothing in the latent_prediction.*in front of a causal model",
    ),
    "causal, heads at zero": (
        lambda: Transformer(causal=True, behind=True, zero=("text_head", "latent_head")),
        "words to their right, as under a causal mask.*bidirectional",
    ),
    "blind to the text": (lambda: Changed("text"), "another text changes nothing in the latent"),
    "blind, head at zero": (
        lambda: Changed("text", zero=("latent_head",)),
        "another text changes nothing in the latent_prediction",
    ),
    "blind to the latent": (
        lambda: Changed("latent"),
        "another latent changes nothing in the logits.*every position read the latent",
    ),
    "leaks, frozen": (lambda: Leaky(), "ids at padded positions change"),
    "leaks, dropout": (lambda: Leaky(dropout=0.3), "ids at padded positions change"),
    "leaks, head at zero": (
        lambda: Leaky(zero=("latent_head", "text_head")),
        r"ids at padded positions change.*lengths=\(7, 7\)",
    ),
    "no use of the mask": (lambda: OneLength(takes_mask=True), r"positions change.*lengths="),
    "batch normalisation": (Normalised, "norm is a BatchNorm1d, in which other rows.*LayerNorm"),
    "the number of rows": (lambda: Changed("size"), "other rows of the batch change the latent"),
    "detached": (lambda: Changed("detached"), "no gradient of the logits reaches"),
}


class Leaky(Transformer):
    def forward(self, *inputs, attention_mask, need, **state):
        return super().forward(*inputs, attention_mask=torch.ones_like(attention_mask), **state)


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_model_is_refused_by_name(name):
    torch.manual_seed(0)
    make, message = UNSOUND[name]
    network = make()
    before = [p.clone() for p in network.parameters()]
    with pytest.raises(AssertionError, match=message):
        check_denoiser(cv.as_denoiser(network), TEXT, LATENT)
    assert all(torch.equal(*both) for both in zip(before, network.parameters(), strict=True))


def test_texts_of_one_length_need_no_mask():
    torch.manual_seed(0)
    check_denoiser(cv.as_denoiser(OneLength(takes_mask=True)), TEXT, LATENT, lengths=(4, 4))
    denoiser = cv.as_denoiser(OneLength())
    tokens, mask = torch.full((2, 4), 5), torch.ones(2, 4)
    batch = cv.Batch(tokens, mask, torch.randn(2, 4))
    objective = cv.CycleObjective(TEXT, LATENT, [cv.Text(time=1.0), cv.Latent()])
    objective(denoiser, batch, step=0).loss.backward()
    padded = batch._replace(attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    with pytest.raises(ValueError, match="takes no `attention_mask`, so all texts must have one l"):
        objective(denoiser, padded, step=0)


def test_a_network_of_another_kind_is_told_where_to_read():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.word = nn.Embedding(11, 4)

        def forward(self, input_ids, z):
            return self.word(input_ids), z

    page = r"lengths=.*docs/denoiser\.md#a-network-with-its-own-signature"
    with pytest.raises(AssertionError, match=rf"\[3, 7\].*unexpected keyword argument.*{page}"):
        check_denoiser(cv.as_denoiser(Other()), TEXT, LATENT)
    with pytest.raises(AssertionError, match=rf"tokens \[2, 9\].*IndexError.*{page}"):
        check_denoiser(cv.as_denoiser(Transformer(positions=6)), TEXT, LATENT, lengths=(9, 2))

    class Named(Transformer):
        def forward(self, tokens, latents, text_time, latent_time, attention_mask):
            state = {"text_time": text_time, "latent_time": latent_time}
            made = super().forward(tokens, latents, **state, attention_mask=attention_mask)
            return dict(enumerate(made))

    returns_a_dict = Named(positions=6)  # which texts of 7 words do not reach
    with pytest.raises(AssertionError, match=r"must return \(logits, latent_prediction\)"):
        check_denoiser(cv.as_denoiser(returns_a_dict), TEXT, LATENT)
    with pytest.raises(ValueError, match=r"`lengths` must be of two texts or more.*got \(7,\)"):
        check_denoiser(cv.as_denoiser(Transformer()), TEXT, LATENT, lengths=(7,))
