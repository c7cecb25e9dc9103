"""Relaxed texts `[b, s, v]`: where they may go, what they mean, and who can read them."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cyclevae as cv
from cyclevae.model.denoiser import embed_tokens
from cyclevae.testing import ToyNetwork, check_denoiser, toy_batch, toy_denoiser
from strategies import masks, quick, seeds

sys.path.append(str(Path(__file__).parents[2] / "examples" / "sentences"))

PROCESSES = (
    cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0),
    cv.TextProcess(mask_id=2, vocab_size=7),
    cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, start_id=3, end_id=4),
    cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, start_id=3, end_id=4, end="predicted"),
    cv.TextProcess(mask_id=2, vocab_size=7, pad_id=4, end_id=4, end="predicted"),
)
RELAXED = ("straight_through", "sampled_straight_through", "gumbel", "soft")
FULL = cv.GradientPolicy("full")


def one_hot(tokens, dtype=torch.float32):
    return torch.nn.functional.one_hot(tokens, 7).to(dtype)


# --- the text process -------------------------------------------------------------------------


@quick
@given(masks(), st.sampled_from(PROCESSES), seeds, st.sampled_from(["pad", "frame", "cut"]))
def test_a_one_hot_text_is_treated_as_its_ids(mask, process, seed, method):
    tokens = torch.randint(7, mask.shape, generator=torch.Generator().manual_seed(seed))
    ids, relaxed = (getattr(process, method)(t, mask) for t in (tokens, one_hot(tokens)))
    if method == "cut":
        (ids, left), (relaxed, same) = ids, relaxed
        assert torch.equal(left, same)
    assert relaxed.dtype == torch.float32 and torch.equal(relaxed, one_hot(ids))


@quick
@given(masks(), st.sampled_from(PROCESSES), seeds)
def test_placed_and_padded_positions_are_constant(mask, process, seed):
    text = torch.rand(*mask.shape, 7, generator=torch.Generator().manual_seed(seed))
    text = text.double().requires_grad_()
    framed = process.frame(text, mask)
    gradient = torch.autograd.grad(framed.sum(), text)[0]
    chosen = process.chosen(mask)
    assert (gradient[chosen] == 1).all() and not gradient[~chosen].any()
    assert torch.equal(framed[chosen], text[chosen]) and framed.dtype == torch.float64
    assert (framed[~chosen].amax(dim=-1) == 1).all() and (framed[~chosen].sum(dim=-1) == 1).all()


def test_the_places_of_a_text():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    both, predicted = PROCESSES[2], PROCESSES[3]
    assert both.chosen(mask).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert predicted.chosen(mask).int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(PROCESSES[0].chosen(mask), mask)


def test_a_relaxed_text_ends_at_its_most_probable_end():
    soft = torch.tensor([[[0.1, 0.5, 0.0, 0.0, 0.4, 0.0, 0.0], [0.1, 0, 0, 0, 0.6, 0.3, 0]] * 2])
    text, mask = PROCESSES[3].cut(soft, torch.ones(1, 4).bool())
    assert mask.tolist() == [[True, True, False, False]]
    assert torch.equal(text[:, :2], soft[:, :2])
    assert torch.equal(text[:, 2:], torch.eye(7)[0].expand(1, 2, 7))


# --- embed_tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_embed_tokens(dtype):
    embedding = nn.Embedding(7, 5, dtype=dtype)
    tokens = torch.randint(7, (2, 3))
    ids = embed_tokens(embedding.weight, tokens)
    assert torch.equal(ids, embedding(tokens))
    assert torch.equal(embed_tokens(embedding.weight, tokens.int()), ids)
    for other in (torch.float32, torch.float64, torch.bfloat16):
        relaxed = embed_tokens(embedding.weight, one_hot(tokens, other))
        assert relaxed.dtype == dtype and torch.equal(relaxed, ids)


def test_embed_tokens_keeps_its_precision_under_autocast():
    weight, tokens = torch.randn(7, 5), torch.randint(7, (2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        relaxed = embed_tokens(weight, one_hot(tokens))
        assert torch.equal(relaxed, embed_tokens(weight, tokens))
    assert relaxed.dtype == torch.float32


def test_embed_tokens_gradcheck():
    generator = torch.Generator().manual_seed(0)
    weight, text = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((7, 3), (2, 4, 7))
    )
    assert torch.autograd.gradcheck(embed_tokens, [weight, text])


def test_rows_beyond_the_vocabulary_are_not_read():
    """Embeddings are often padded to a round number of rows."""
    weight, tokens = torch.randn(8, 5), torch.randint(7, (2, 3))
    assert torch.equal(embed_tokens(weight, one_hot(tokens)), embed_tokens(weight, tokens))
    with pytest.raises(ValueError, match="`tokens` are relaxed over 7 ids, but `weight` has 6 r"):
        embed_tokens(weight[:6], one_hot(tokens))


# --- the encoder pass -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("see", ["noise", "latents"])
def test_t2l_reads_a_one_hot_text_as_its_ids(dtype, see):
    denoiser, text, process = toy_denoiser(seed=0)
    denoiser.module.to(dtype)
    tokens, mask, latents = toy_batch(seed=0)[:3]
    options = {"start": "noise"} if see == "noise" else {"latents": latents.to(dtype)}
    options |= {"noise": torch.randn(3, 4, dtype=dtype), "time": 0.3}
    ids, relaxed = (
        cv.t2l(denoiser, t, mask, text_process=text, latent_process=process, **options)
        for t in (tokens, one_hot(tokens, dtype))
    )
    torch.testing.assert_close(relaxed.prediction, ids.prediction, rtol=1e-6, atol=1e-6)
    assert torch.equal(relaxed.time, ids.time) and relaxed.time.dtype == ids.time.dtype
    assert torch.equal(relaxed.z_t, ids.z_t)


def test_gradient_reaches_the_kept_words_of_a_relaxed_text():
    denoiser, text, process = toy_denoiser(seed=0)
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    words = torch.rand(2, 3, 7).requires_grad_()
    encoded = cv.t2l(
        denoiser, words, mask, text_process=text, latent_process=process, start="noise"
    )
    gradient = torch.autograd.grad(encoded.z_hat(process).square().sum(), words)[0]
    assert gradient[mask].any(dim=-1).all() and not gradient[~mask].any()


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("tokens", "error", "expected"),
    [
        (torch.zeros(2, 3, 6), ValueError, r"or a relaxed text \[b, s, v\] over .* = 7 ids, got f"),
        (torch.zeros(2, 3), TypeError, "`tokens` must hold integer ids"),
        (torch.zeros(2, 3, 7).long(), ValueError, r"must be token ids of shape \[b, s\], got int"),
        (torch.full((2, 3, 7), math.nan), ValueError, "`tokens` must be finite.* diverged"),
        (torch.full((2, 3, 7), math.inf), ValueError, "`tokens` must be finite"),
        (torch.zeros(2, 4, 7), ValueError, r"`attention_mask` must have the shape .* \[2, 4\]"),
        (torch.full((2, 3), 7), ValueError, r"`tokens` must hold ids in \[0, 7\)"),
    ],
)
def test_bad_texts(tokens, error, expected):
    denoiser, text, process = toy_denoiser()
    options = {"text_process": text, "latent_process": process, "start": "noise"}
    with pytest.raises(error, match=expected):
        cv.t2l(denoiser, tokens, torch.ones(2, 3), **options)


def test_l2t_reads_a_partly_masked_text():
    calls = []

    class Recording(ToyNetwork):
        def forward(self, tokens, latents, **state):
            calls.append((tokens, state["text_time"]))
            return super().forward(tokens, latents, **state)

    denoiser, text = cv.as_denoiser(Recording(7, 4)), PROCESSES[0]
    tokens, mask = torch.tensor([[3, 2, 5], [2, 6, 1]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    time = torch.tensor([1 / 3, 0.5])
    latents = torch.randn(2, 4)
    cv.l2t(denoiser, latents, mask, text_process=text, tokens=tokens, text_time=time)
    assert calls[0][0].tolist() == [[3, 2, 5], [2, 6, 0]] and torch.equal(calls[0][1], time)
    cv.l2t(denoiser, latents, mask, text_process=text)
    assert calls[1][0].tolist() == [[2, 2, 2], [2, 2, 0]] and calls[1][1].tolist() == [1, 1]


@pytest.mark.unhooked
def test_l2t_refuses_bad_texts():
    denoiser, text, _ = toy_denoiser()

    def refused(error, expected, **options):
        with pytest.raises(error, match=expected):
            cv.l2t(denoiser, torch.zeros(2, 4), torch.ones(2, 3), text_process=text, **options)

    refused(TypeError, "`tokens` must hold integer ids", tokens=torch.zeros(2, 3))
    refused(ValueError, "`tokens` must hold ids", tokens=torch.full((2, 3), 7))
    refused(ValueError, r"the shape of its tokens \[2, 4\]", tokens=torch.zeros(2, 4).long())
    refused(ValueError, "`text_time` must lie in", text_time=1.5)


# --- networks that cannot read them -----------------------------------------------------------


class IdsOnly(ToyNetwork):
    """An `nn.Embedding`, as most networks have it."""

    def forward(self, tokens, latents, **state):
        self.word(tokens)
        return super().forward(tokens, latents, **state)


def cycle(network, bridge, policy=FULL, **options):
    _, text, latent = toy_denoiser()
    return cv.cycle_latent_loss(
        cv.as_denoiser(network),
        torch.randn(2, 4),
        torch.ones(2, 3).bool(),
        text_process=text,
        latent_process=latent,
        bridge=bridge,
        policy=policy,
        **options,
    )


@pytest.mark.parametrize("bridge", RELAXED)
def test_a_network_that_cannot_is_told_which_bridge_asks_and_what_to_do(bridge):
    with pytest.raises(TypeError) as caught:
        cycle(IdsOnly(7, 4), bridge)
    for part in (
        f"the relaxed text [b, s, v] of the '{bridge}' bridge",
        "cyclevae.embed_tokens(embedding.weight, tokens) in place of embedding(tokens)",
        "check_denoiser(..., relaxed=True)",
        "or use the bridge 'argmax' or 'categorical'",
    ):
        assert part in str(caught.value)
    logits = torch.zeros(2, 3, 7)
    with pytest.raises(TypeError, match=r"relaxed text \[b, s, v\] given as `y_hat` \("):
        cycle(IdsOnly(7, 4), "argmax", y_hat=logits)
    cause = caught.value.__cause__
    assert f"{type(cause).__name__}: {cause}" in str(caught.value)


@pytest.mark.parametrize("bridge", ["argmax", "categorical", "unmask", "rloo"])
def test_bridges_of_ids_need_nothing_of_the_network(bridge):
    policy = FULL if bridge == "rloo" else cv.GradientPolicy()
    assert cycle(IdsOnly(7, 4), bridge, policy).isfinite()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()])
def test_what_is_no_fault_of_the_network_passes_through(error):
    class Full(ToyNetwork):
        def forward(self, tokens, latents, **state):
            if tokens.is_floating_point():
                raise error
            return super().forward(tokens, latents, **state)

    with pytest.raises(type(error)) as caught:
        cycle(Full(7, 4), "soft")
    assert caught.value is error


def test_an_error_on_ids_is_the_networks_own():
    class Broken(ToyNetwork):
        def forward(self, tokens, latents, *, need, **state):
            if need == "latents":
                raise LookupError("its own")
            return super().forward(tokens, latents, need=need, **state)

    with pytest.raises(LookupError, match="its own"):
        cycle(Broken(7, 4), "argmax", cv.GradientPolicy())


class Reads(ToyNetwork):
    """A toy that reads a relaxed text in a way of its own."""

    def __init__(self, how):
        super().__init__(7, 4)
        self.how = how

    def forward(self, tokens, latents, **state):
        if tokens.is_floating_point():
            tokens = self.how(tokens)
        return super().forward(tokens, latents, **state)


def refuse(text):
    raise NotImplementedError("ids only")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (
            refuse,
            r"cannot read a relaxed text \[b, s, v\] \(NotImplementedError: ids only\); use e",
        ),
        (lambda text: 2 * text, "gives another latent_prediction than its ids; embed both by"),
        (lambda text: text.flip(-1), "gives another latent_prediction than its ids"),
        (lambda text: text.detach(), "no gradient .* reaches a relaxed text.*; is it detached"),
        (lambda text: text.argmax(dim=-1), "no gradient of the latent_prediction reaches"),
        (lambda text: text.round(), "no gradient of the latent_prediction reaches"),
    ],
)
def test_the_dry_run_names_the_fault(how, expected):
    torch.manual_seed(0)
    _, text, latent = toy_denoiser()
    denoiser = cv.as_denoiser(Reads(how))
    check_denoiser(denoiser, text, latent)  # not asked
    with pytest.raises(AssertionError, match=expected):
        check_denoiser(denoiser, text, latent, relaxed=True)


def test_the_dry_run_passes():
    torch.manual_seed(0)
    _, text, latent = toy_denoiser()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        denoiser = cv.as_denoiser(Reads(lambda relaxed: relaxed).to(dtype))
        check_denoiser(denoiser, text, latent, dtype=dtype, relaxed=True)


def test_two_networks_read_relaxed_texts():
    class Head(ToyNetwork):
        def __init__(self, output):
            super().__init__(7, 4)
            self.output = output

        def forward(self, tokens, latents, **state):
            return super().forward(tokens, latents, **state)[self.output]

    torch.manual_seed(0)
    _, text, latent = toy_denoiser()
    pair = cv.EncoderDecoder(Head(1), Head(0))
    check_denoiser(cv.as_denoiser(pair), text, latent, relaxed=True)


# --- the networks of the examples -------------------------------------------------------------


def example(name, *arguments, **options):
    module = importlib.import_module(name)
    torch.manual_seed(0)
    return getattr(module, *arguments)(7, 4, length=7, **options)


def joint_transformer():
    return example("model", "JointTransformer", width=16, depth=1, heads=2, dropout=0.0)


def mmdit():
    return example("mmdit_model", "MMDiTDenoiser", width=16, depth=1, heads=2)


def joint_mmdit():
    return example("mmdit_model", "JointMMDiT", width=16, heads=2, dropout=0.0)


NETWORKS = {
    joint_transformer: (["word.weight", "latent_in.weight"], "text_head.bias"),
    joint_mmdit: (["word.weight", "latent_in.weight"], "text_head.bias"),
    mmdit: (["text_head.weight", "latent_in.0.weight"], "text_head.bias"),
}


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.slow
def test_the_examples_read_relaxed_texts(make):
    _, text, latent = toy_denoiser()
    check_denoiser(cv.as_denoiser(make()), text, latent, relaxed=True)


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("bridge", [*RELAXED, "rloo", "argmax", "categorical", "unmask"])
@pytest.mark.slow
def test_every_bridge_teaches_the_decoder_of_the_examples_or_says_it_does_not(make, bridge):
    """The text head is read by the decoder pass alone."""
    torch.manual_seed(0)
    network, ids = make(), bridge in ("argmax", "categorical", "unmask")
    loss = cycle(network, bridge, cv.GradientPolicy() if ids else FULL)
    loss.backward()
    names, head = NETWORKS[make]
    parameters = dict(network.named_parameters())
    for name in [head] if ids else [*names, head]:
        gradient = parameters[name].grad
        if ids:
            assert gradient is None
        else:
            assert gradient.any() and gradient.isfinite().all()
