"""Pseudo-texts of a large vocabulary, and calls that take microseconds."""

import timeit
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from losses import learn
from plain import moments
from setting import Found, Setting
from torch import Tensor, nn

import cyclevae as cv
from cyclevae.diagnostics import gradient_ledger


def bridges(setting: Setting) -> Found:
    """Text bridges against the lines one writes in their place."""
    rows, length, v = (2, 8, 100) if setting.quick else (2, 128, 30522)
    text = cv.TextProcess(mask_id=1, vocab_size=v, pad_id=0)
    logits = torch.randn(rows, length, v, device=setting.device)
    mask = torch.ones(rows, length, dtype=torch.bool, device=setting.device)
    given = {"attention_mask": mask, "text_process": text}

    def multinomial() -> Tensor:
        return torch.multinomial(logits.softmax(dim=-1).flatten(0, 1), 1).view(rows, length)

    case = f"{rows * length} rows, v = {v}"
    draw = f"categorical, {case}", "softmax + multinomial"
    ours = partial(cv.categorical_text, logits, **given)
    least = partial(torch.softmax, logits, dim=-1)
    calls = ours, multinomial
    yield setting.time("bridges", *draw, *calls, target=1 / 3, limit=lambda: least)
    yield setting.peak("bridges", *draw, ours, multinomial)

    logits.requires_grad_()
    fixed = torch.randn_like(logits)

    def read(y_hat: Tensor) -> None:
        torch.autograd.grad(y_hat, logits, fixed)

    relaxed = f"gumbel with backward, {case}", "F.gumbel_softmax(hard=True)"
    calls = (
        lambda: read(cv.gumbel_text(logits, **given)),
        lambda: read(F.gumbel_softmax(logits, hard=True)),
    )

    def softmaxes() -> None:
        noise = torch.empty_like(logits).exponential_().log()
        soft = (logits.detach() - noise).softmax(dim=-1)
        torch.ops.aten._softmax_backward_data(fixed, soft, -1, soft.dtype)

    yield setting.time("bridges", *relaxed, *calls, target=1.0, limit=lambda: softmaxes)
    yield setting.peak("bridges", *relaxed, *calls)


def small(setting: Setting) -> Found:
    """What calls cost where the tensors are tiny, so that nothing else is measured."""
    layers = nn.ModuleList(_layer() for _ in range(25))
    assert len(list(layers.parameters())) == 300

    def enter() -> None:
        with cv.freeze(layers):
            pass

    def lend() -> None:
        """As many aliases, put in place of their parameters and taken back, and no more."""
        homes = [(m._parameters, key) for m in layers.modules() for key in m._parameters]
        held = [home[key] for home, key in homes]
        for (home, key), parameter in zip(homes, held, strict=True):
            home[key] = parameter.view_as(parameter)
        for (home, key), parameter in zip(homes, held, strict=True):
            home[key] = parameter

    def fastest(call: Callable[[], None]) -> float:
        return min(timeit.repeat(call, number=5, repeat=100)) / 5  # no other call to divide by

    case = "freeze 300 parameters, fastest round"
    given = "small", case, "time", "a millisecond", fastest(enter), 1e-3
    yield setting.row(*given, target=1.0, limit=lambda: fastest(lend) / 1e-3)

    z, target = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    tokens = torch.randint(0, 10, (2, 3))
    mask, logits = tokens >= 0, torch.randn(2, 3, 10, requires_grad=True)

    def by_hand(x: Tensor) -> Tensor:
        """The text loss of logits, tokens and a mask without a look at whether they fit."""
        targets = tokens.masked_fill(~mask, -100).flatten()
        nll = F.cross_entropy(x.flatten(0, 1), targets, reduction="none")
        return nll.sum() / mask.sum().clamp(min=1)

    biased = partial(cv.moment_prior, estimator="biased")
    pairs = {
        ("latent_loss 4 x 8", "F.mse_loss"): (
            lambda: learn(lambda x: cv.latent_loss(x, target), z),
            lambda: learn(lambda x: F.mse_loss(x, target), z),
        ),
        ("text_loss 2 x 3 x 10", "F.cross_entropy"): (
            lambda: learn(lambda x: cv.text_loss(x, tokens, mask), logits),
            lambda: learn(lambda x: F.cross_entropy(x.flatten(0, 1), tokens.flatten()), logits),
        ),
        ("moment_prior 4 x 8", "two lines"): (
            lambda: learn(biased, z),
            lambda: learn(moments, z),
        ),
        ("gradient_ledger of a toy", "its backward passes"): _ledger(),
    }
    targets = {"text_loss 2 x 3 x 10": (3.0, lambda: partial(learn, by_hand, logits))}
    for named, calls in pairs.items():
        most, least = targets.get(named[0], (None, None))
        yield setting.time("small", *named, *calls, target=most, limit=least)


def _layer() -> nn.Module:
    """12 parameters."""
    return nn.Sequential(*(part for _ in range(3) for part in (nn.LayerNorm(2), nn.Linear(2, 2))))


def _ledger() -> tuple[partial[object], partial[object]]:
    network = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x = network(torch.randn(4, 8))
    terms = {"size": x.square().mean(), "mean": x.mean()}
    groups = {"first": list(network[0].parameters()), "last": list(network[2].parameters())}

    def backward() -> None:
        for term in terms.values():
            torch.autograd.grad(term, list(network.parameters()), retain_graph=True)

    return partial(gradient_ledger, terms, groups), partial(backward)
