"""What tests of a step share: a denoiser that keeps what it was asked, two towers, and draws."""

import torch
from torch import nn

import cyclevae as cv
from cyclevae.testing import ToyNetwork, toy_batch, toy_denoiser

DENOISER, TEXT, LATENT = toy_denoiser(seed=0)
FULL = cv.GradientPolicy("full")
ONE_SHOT = cv.LatentBridge()
# Each teaches something by itself; together the unconditional mode and both cycles of all rows.
FIVE = (
    cv.Text(time=1.0),
    cv.CycleLatent(weight=10.0, bridge="argmax", pairs=True),
    cv.Latent(),
    cv.CycleText(weight=2.0, bridge=ONE_SHOT, pairs=True),
    cv.Unconditional(),
)
# Bridges that others make, and what guidance stands on
MADE = (
    cv.Text(time=1.0, null_rate=0.2),
    cv.Latent(null_rate=0.2),
    cv.CycleText(maker=cv.Maker("teacher", guidance=2.0), bridge=cv.LatentBridge(steps=2)),
    cv.CycleLatent(maker=cv.Maker("evaluated"), bridge=cv.TextBridge("unmask", steps=2)),
    cv.Sleep(maker=cv.Maker(guidance=1.5)),
)


def of(*terms, **options):
    """An objective on the toy."""
    return cv.CycleObjective(TEXT, LATENT, terms, **options)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def teacher_of(denoiser):
    return cv.Teacher(denoiser.module).denoiser


def run(objective, denoiser=DENOISER, batch=None, step=0, **options):
    """A step on 4 rows of each kind, with the draws of a seed."""
    batch = toy_batch(rows=4) if batch is None else batch
    return objective(denoiser, batch, step=step, **{"generator": seeded(), **options})


class Recorder:
    """A denoiser that keeps what it was asked."""

    def __init__(self, denoiser=DENOISER):
        self.inner, self.calls = denoiser, []

    def __getattr__(self, name):
        return getattr(self.inner, name)  # `module` and `roles`, for freeze

    def denoise(self, tokens, latents, **state):
        self.calls.append((tokens, latents, state))
        return self.inner.denoise(tokens, latents, **state)

    @property
    def encodes(self):
        return [call for call in self.calls if not call[2]["text_time"].any()]


class OneHead(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head, self.network = head, ToyNetwork(7, 4)

    def forward(self, tokens, latents, **state):
        return getattr(self.network(tokens, latents, **state), self.head)


def two_towers():
    torch.manual_seed(0)
    return cv.as_denoiser(cv.EncoderDecoder(OneHead("latent_prediction"), OneHead("logits")))


def tower(denoiser, name):
    """The parameters of one of two towers, less those of the head that it does not use."""
    unused = {"encoder": "network.text_head", "decoder": "network.latent_head"}[name]
    return [
        (key, parameter)
        for key, parameter in denoiser.module.named_parameters()
        if key.startswith(name) and unused not in key
    ]
