"""The contract with a model, the wrappers, and the dry run that a user calls first."""

import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.testing import ToyNetwork, check_denoiser, toy_denoiser

STATE = {
    "text_time": torch.zeros(2),
    "latent_time": torch.ones(2),
    "attention_mask": torch.ones(2, 3, dtype=torch.bool),
}
TOKENS, LATENTS = torch.full((2, 3), 4), torch.randn(2, 4, generator=torch.Generator())


def test_a_denoiser_reaches_its_network_through_its_call():
    denoiser, *_ = toy_denoiser()
    calls = []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    denoiser.denoise(TOKENS, LATENTS, **STATE)
    assert calls == [1]
    assert isinstance(denoiser, cv.Denoiser)


@pytest.mark.parametrize("need", ["both", "logits", "latents"])
def test_need_lets_a_network_skip_a_head(need):
    denoiser, *_ = toy_denoiser()
    logits, latent_prediction = denoiser.denoise(TOKENS, LATENTS, **STATE, need=need)
    assert (logits is None) == (need == "latents")
    assert (latent_prediction is None) == (need == "logits")


def test_a_network_without_need_is_called_without_it():
    class Plain(ToyNetwork):
        def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
            return super().forward(
                tokens,
                latents,
                text_time=text_time,
                latent_time=latent_time,
                attention_mask=attention_mask,
            )

    out = cv.as_denoiser(Plain(7, 4)).denoise(TOKENS, LATENTS, **STATE, need="logits")
    assert out.latent_prediction is not None


def test_module_is_the_plain_module_inside_compile():
    network = ToyNetwork(7, 4)
    denoiser = cv.as_denoiser(torch.compile(network, backend="eager"))
    assert denoiser.module is network and denoiser.network is not network


@pytest.mark.unhooked
def test_as_denoiser_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function"):
        cv.as_denoiser(lambda *_: None)


def test_a_network_must_return_a_pair():
    class Triple(nn.Module):
        def forward(self, tokens, latents, **state):
            return 1, 2, 3

    with pytest.raises(TypeError, match=r"must return \(logits, latent_prediction\).*got tuple"):
        cv.as_denoiser(Triple()).denoise(TOKENS, LATENTS, **STATE)


class Head(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name, self.network, self.calls = name, ToyNetwork(7, 4), 0

    def forward(self, tokens, latents, **state):
        self.calls += 1
        return getattr(self.network(tokens, latents, **state), self.name)


@pytest.mark.parametrize(
    ("need", "calls"), [("both", (1, 1)), ("logits", (0, 1)), ("latents", (1, 0))]
)
def test_two_networks_run_only_where_needed(need, calls):
    encoder, decoder = Head("latent_prediction"), Head("logits")
    denoiser = cv.as_denoiser(cv.EncoderDecoder(encoder, decoder))
    denoiser.denoise(TOKENS, LATENTS, **STATE, need=need)
    assert (encoder.calls, decoder.calls) == calls


def test_two_networks_pass_the_dry_run_and_train():
    torch.manual_seed(0)
    denoiser = cv.as_denoiser(cv.EncoderDecoder(Head("latent_prediction"), Head("logits")))
    _, text, latent = toy_denoiser()
    check_denoiser(denoiser, text, latent)


# --- check_denoiser ---------------------------------------------------------------------------


class Broken(ToyNetwork):
    """A toy with one fault."""

    def __init__(self, fault):
        super().__init__(7, 4)
        self.fault = fault

    def forward(self, tokens, latents, **state):
        mask, need = state["attention_mask"], state["need"]
        if self.fault == "padding":
            state["attention_mask"] = torch.ones_like(mask)
        logits, prediction = super().forward(tokens, latents, **state)
        match self.fault:
            case "rows" if prediction is not None:
                prediction = prediction + prediction.mean(0)
            case "axis" if prediction is not None:
                prediction = prediction[:, None]
            case "width" if logits is not None:
                logits = logits[..., :-1]
            case "nan" if logits is not None:
                logits = logits / 0
            case "missing" if need == "logits":
                logits = None
            case "detached" if prediction is not None:
                prediction = prediction.detach()
        return logits, prediction


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("padding", "ids at padded positions change the"),
        ("rows", "other rows of the batch change the latent_prediction"),
        ("axis", r"equal shapes.*drop the middle axis with \.squeeze\(1\)"),
        ("width", "is `text_process.vocab_size` the width of its text head"),
        ("nan", "the logits hold NaN or infinity"),
        ("missing", "returned no logits"),
        ("detached", "no gradient of the latent_prediction reaches"),
    ],
)
def test_the_dry_run_names_the_fault(fault, message):
    torch.manual_seed(0)
    _, text, latent = toy_denoiser()
    with pytest.raises(AssertionError, match=message):
        check_denoiser(cv.as_denoiser(Broken(fault)), text, latent)


@pytest.mark.unhooked
def test_the_dry_run_refuses_a_method_on_the_module_itself():
    class Bypassed(ToyNetwork):
        denoise = ToyNetwork.forward

    _, text, latent = toy_denoiser()
    with pytest.raises(TypeError, match=r"DDP, FSDP2 and torch\.compile bypass"):
        check_denoiser(Bypassed(7, 4), text, latent)
    with pytest.raises(TypeError, match="has no `denoise` method"):
        check_denoiser(object(), text, latent)
    with pytest.raises(ValueError, match="give `latent_shape`"):
        check_denoiser(toy_denoiser()[0], text, cv.LatentProcess())


def test_the_dry_run_sees_a_bypassed_call():
    denoiser, text, latent = toy_denoiser()
    denoiser.denoise = lambda *args, **state: denoiser.network.forward(*args, **state)
    with pytest.raises(AssertionError, match=r"network's own __call__.*bypassed"):
        check_denoiser(denoiser, text, latent)


@pytest.mark.parametrize("pad_id", [0, 6, None])
def test_the_dry_run_sees_a_leak_whatever_the_padding_id(pad_id):
    torch.manual_seed(0)
    text = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=pad_id)
    with pytest.raises(AssertionError, match="ids at padded positions change"):
        check_denoiser(cv.as_denoiser(Broken("padding")), text, toy_denoiser()[2])


def test_the_dry_run_leaves_no_trace():
    denoiser, text, latent = toy_denoiser()
    denoiser.module.text_head.eval()
    state = torch.get_rng_state()
    check_denoiser(denoiser, text, latent)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in denoiser.module.parameters())
    assert denoiser.module.training and not denoiser.module.text_head.training
