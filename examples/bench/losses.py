"""The text loss and the MMD prior against what one would call otherwise."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from setting import Found, Setting
from torch import Tensor

import cyclevae as cv

OneSided = Callable[[Tensor], Tensor]
TwoSided = Callable[[Tensor, Tensor], Tensor]


def learn(loss: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Forward and backward, from no gradient."""
    x.grad = None
    loss(x).backward()


def text(setting: Setting) -> Found:
    """`text_loss` against `F.cross_entropy` of logits in fp32; the bytes include the gradient."""
    rows, length, v = (2, 8, 100) if setting.quick else (4, 128, 30522)
    tokens = torch.randint(3, v, (rows, length), device=setting.device)
    for dtype, padding in (
        (d, p) for d in (torch.float32, torch.bfloat16) for p in (0.0, 0.3, 0.6)
    ):
        logits = torch.randn(rows, length, v, device=setting.device, dtype=dtype).requires_grad_()
        keep = length - round(padding * length)
        mask = (torch.arange(length, device=setting.device) < keep).expand(rows, -1)

        def plain(x: Tensor, mask: Tensor = mask) -> Tensor:
            targets = tokens.masked_fill(~mask, -100)
            return F.cross_entropy(x.float().flatten(0, 1), targets.flatten(), ignore_index=-100)

        ours = partial(learn, partial(cv.text_loss, tokens=tokens, attention_mask=mask), logits)
        theirs = partial(learn, plain, logits)
        name = str(dtype).removeprefix("torch.")
        given = "text", f"{name}, {padding:.0%} padding", "F.cross_entropy"
        low = dtype == torch.bfloat16
        least = partial(_softmaxes, logits, keep)
        yield setting.time(*given, ours, theirs, target=0.8 if low else 1.0, limit=least)
        yield setting.peak(*given, ours, theirs, target=0.35 if low else None)
        if setting.device.type == "cuda" and find_spec("liger_kernel"):
            yield from _liger(setting, given[1], logits, tokens, mask)


def _softmaxes(logits: Tensor, keep: int) -> Callable[[], None]:
    """What the loss and its gradient read and write at least: all that counts in fp32, twice."""
    counted = logits.detach()[:, :keep].flatten(0, 1)
    x = counted.float()

    def call() -> None:
        torch.log_softmax(x, dim=1)
        gradient = torch.empty_like(logits)
        gradient[:, :keep] = torch.softmax(x, dim=1).view(len(logits), keep, -1)

    return call


def _liger(setting: Setting, case: str, logits: Tensor, tokens: Tensor, mask: Tensor) -> Found:
    """Liger writes the gradient into the logits, so both are given a copy of them."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    liger = LigerCrossEntropyLoss(ignore_index=-100)

    def theirs(x: Tensor) -> Tensor:
        return liger(x.clone().flatten(0, 1), tokens.masked_fill(~mask, -100).flatten())

    def ours(x: Tensor) -> Tensor:
        return cv.text_loss(x.clone(), tokens, mask)

    given = "text", case, "Liger"
    yield setting.time(*given, partial(learn, ours, logits), partial(learn, theirs, logits))
    yield setting.peak(*given, partial(learn, ours, logits), partial(learn, theirs, logits))


def mmd(setting: Setting) -> Found:
    """`mmd_prior` against pythae and geomloss, which draw the prior's samples in each call."""
    sizes = [(16, 8)] if setting.quick else [(64, 64), (256, 384), (512, 1024), (2048, 1024)]
    for n, d in sizes:
        z = 0.8 * torch.randn(n, d, device=setting.device) + 0.1
        z.requires_grad_()
        full = (n, d) == (512, 1024)
        for scales in ((1.0,), (0.5, 1.0, 2.0)):
            kernel = "gaussian" if len(scales) == 1 else "imq"  # pythae's only one of many scales
            case = f"{n} x {d}, {len(scales)} scale{'s' * (len(scales) > 1)}"
            needed = (2 * len(scales) + 2) * 4 * n * n * d
            if needed > setting.memory():
                yield f"mmd, {case}: pythae needs some {needed / 2**30:.0f} GiB and did not run"
            else:
                ours = partial(cv.mmd_prior, scales=scales, kernel=kernel)
                theirs = pythae(d, scales, kernel)
                target = 1 / 300 if full else None
                yield from _against(setting, f"{case}, {kernel}", "pythae", z, ours, theirs, target)
                if kernel == "gaussian":
                    yield from _errors(setting, case, "pythae", z, theirs, scales, "unbiased")
            if n > 512:
                continue
            ours = partial(cv.mmd_prior, scales=scales, estimator="biased")
            theirs = geomloss(d, scales)
            target = (1 / 2 if len(scales) == 1 else 1 / 5) if full else None
            yield from _against(setting, f"{case}, gaussian", "geomloss", z, ours, theirs, target)
            yield from _errors(setting, case, "geomloss", z, theirs, scales, "biased")


def pythae(d: int, scales: Sequence[float], kernel: str) -> TwoSided:
    """The MMD inside the loss of pythae's own model; its reconstruction is of one number."""
    from pythae.models import WAE_MMD, WAE_MMD_Config

    choice = "rbf" if kernel == "gaussian" else kernel
    config = WAE_MMD_Config((1,), d, kernel_choice=choice, scales=list(scales))
    model = WAE_MMD(config)

    def loss(z: Tensor, prior: Tensor) -> Tensor:
        one = z.new_zeros(len(z), 1)
        return model.loss_function(one, one, z, prior)[2] / len(scales)

    return loss


def geomloss(d: int, scales: Sequence[float]) -> TwoSided:
    """Half the squared MMD to samples in geomloss, a call for each scale."""
    from geomloss import SamplesLoss

    losses = [SamplesLoss("gaussian", blur=math.sqrt(scale * d)) for scale in scales]
    return lambda z, prior: 2 * torch.stack([loss(z, prior) for loss in losses]).mean()


def closed_form(z: Tensor, scales: Sequence[float], estimator: str) -> Tensor:
    """The squared MMD to a standard normal, Gaussian kernel, by distances taken one by one."""
    n, d = z.shape
    pairs = torch.pdist(z).square()
    values = []
    for b in (scale * d for scale in scales):
        within = (-pairs / (2 * b)).exp().mean()
        if estimator == "biased":
            within = within + (1 - within) / n
        cross = math.exp(-d / 2 * math.log1p(1 / b)) * (-z.square().sum(1) / (2 * (b + 1))).exp()
        values.append(within - 2 * cross.mean() + math.exp(-d / 2 * math.log1p(2 / b)))
    return torch.stack(values).mean()


def _against(
    setting: Setting,
    case: str,
    name: str,
    z: Tensor,
    ours: OneSided,
    theirs: TwoSided,
    target: float | None,
) -> Found:
    def sampled(z: Tensor) -> Tensor:
        return theirs(z, torch.randn_like(z))

    def least() -> None:
        x = z.detach()
        (x @ x.t()).exp() @ x

    calls = partial(learn, ours, z), partial(learn, sampled, z)
    yield setting.time("mmd", case, name, *calls, target=target, limit=lambda: least)
    yield setting.peak("mmd", case, name, *calls)


def _errors(
    setting: Setting,
    case: str,
    name: str,
    z: Tensor,
    theirs: TwoSided,
    scales: Sequence[float],
    estimator: str,
) -> Found:
    """Relative errors of gradients: by rounding, and against the Gaussian itself."""
    prior = torch.randn_like(z)
    exact = partial(closed_form, scales=scales, estimator=estimator)
    truth = _gradient(exact, z.double())
    ours = _gradient(partial(cv.mmd_prior, scales=scales, estimator=estimator), z)
    sampled = _gradient(lambda x: theirs(x, prior), z)
    in_double = _gradient(lambda x: theirs(x, prior.double()), z.double())

    def error(got: Tensor, expected: Tensor) -> float:
        return float((got - expected).norm() / expected.norm())

    named = "mmd", f"{case}, gaussian"
    yield setting.row(*named, "error", name, error(ours, truth), error(sampled, truth), target=1.0)
    yield setting.row(*named, "rounding error", name, error(ours, truth), error(sampled, in_double))


def _gradient(loss: OneSided, z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(loss(z), z)[0].double()
