"""Latents of variable length in every function: padding changes nothing, what is kept counts."""

import math

import pytest
import torch

import cyclevae as cv
from cyclevae import diagnostics
from cyclevae.objective.statistics import moments
from masked import (
    BRIDGE,
    HOLES,
    KEPT,
    LATENT,
    MASK,
    PROCESSES,
    TEXT,
    TOKENS,
    Z,
    denoiser,
    padded_with,
    rows,
    seeded,
    teacher,
)
from oracles import Spy

# Everything public that reads latents: of a denoiser, latents and their mask. `p` are processes and
# a generator.
READS_PAIRS = {
    "t2l": lambda d, z, m, **p: torch.cat(
        cv.t2l(d, TOKENS, MASK, latents=z, time=0.5, latent_mask=m, **p)[:3]
    ),
    "z_hat": lambda d, z, m, **p: cv.t2l(
        d, TOKENS, MASK, latents=z, time=0.5, noise=z, latent_mask=m, **p
    ).z_hat(LATENT),
    "l2t": lambda d, z, m, **p: cv.l2t(d, z, MASK, text_process=TEXT, latent_mask=m),
    "guided": lambda d, z, m, generator, **p: cv.l2t(
        cv.guided(d, scale=2.0, generator=generator, **p), z, MASK, text_process=TEXT, latent_mask=m
    ),
    "l2t_and_t2l": lambda d, z, m, **p: torch.cat(
        [
            part.flatten()
            for part in (
                *cv.l2t_and_t2l(
                    d, z, MASK, TOKENS, MASK, noise=z, latent_mask=m, text_latent_mask=m, **p
                )[1][:3],
            )
        ]
    ),
    "joint": lambda d, z, m, **p: cv.joint(d, TOKENS, z, MASK, latent_mask=m, **p)[1],
    "encode_text": lambda d, z, m, **p: cv.encode_text(
        d, TOKENS, MASK, bridge=BRIDGE, noise=z, latent_mask=m,
        policy=cv.GradientPolicy("full"), **p,
    ),
    "unmask_text": lambda d, z, m, generator, **p: cv.unmask_text(
        d, z, MASK, text_process=TEXT, steps=2, latent_mask=m
    ),
    "best_text": lambda d, z, m, **p: cv.best_text(
        d, z, MASK, samples=3, steps=2, noise=z, bridge=BRIDGE, latent_mask=m, **p
    ).scores,
    "l2t_loss": lambda d, z, m, generator, **p: cv.l2t_loss(
        d, TOKENS, z, MASK, text_process=TEXT, text_time=0.5, generator=generator, latent_mask=m
    ),
    "t2l_loss": lambda d, z, m, **p: cv.t2l_loss(
        d, TOKENS, z, MASK, time=None, space="x0", min_snr=5.0, latent_mask=m, **p
    ),
    "t2l_loss, cosine": lambda d, z, m, **p: cv.t2l_loss(
        d, TOKENS, z, MASK, distance="cosine", reduction="none", latent_mask=m, **p
    ),
    "cycle_text_loss": lambda d, z, m, **p: cv.cycle_text_loss(
        d, TOKENS, MASK, z_hat=z, bridge=BRIDGE, latent_mask=m,
        policy=cv.GradientPolicy("full"), **p,
    ),
    "cycle_latent_loss": lambda d, z, m, **p: cv.cycle_latent_loss(
        d, z, MASK, latent_mask=m, noise=z, show_latent=True, distance="normalized_mse", **p
    ),
    "cycle_latent_loss, rloo": lambda d, z, m, **p: cv.cycle_latent_loss(
        d, z, MASK, bridge=cv.TextBridge("rloo", marginal_weight=0.1), latent_mask=m,
        policy=cv.GradientPolicy("full"), **p,
    ),
    "unconditional_loss": lambda d, z, m, **p: torch.stack(
        cv.unconditional_loss(
            d, TOKENS, z, MASK, noise=z, has_latent=MASK[:, 2], latent_mask=m, **p
        )
    ),
    "text_marginal_loss": lambda d, z, m, **p: cv.text_marginal_loss(
        d, TOKENS, MASK, noise=z, latent_mask=m, **p
    ),
    "learned_prior": lambda d, z, m, **p: cv.learned_prior(
        teacher(d), z, MASK, boundaries=True, samples=2, posterior_std=0.1, latent_mask=m, **p
    ),
    "ddvi_wake_kl": lambda d, z, m, **p: cv.ddvi_wake_kl(
        d, teacher(d), TOKENS, MASK, z, latent_mask=m, noise=z, **p
    ),
    "ddvi_sleep_loss": lambda d, z, m, **p: cv.ddvi_sleep_loss(d, z, MASK, latent_mask=m, **p),
    "latent_loss": lambda d, z, m, **p: cv.latent_loss(z, 2 * z, latent_mask=m),
    "latent_loss, nats": lambda d, z, m, **p: cv.latent_loss(
        z, 2 * z.flip(2), latent_mask=m, reduction="nats", variance=torch.tensor([1.0, 2.0, 3.0])
    ),
    "latent_loss, a function": lambda d, z, m, **p: cv.latent_loss(
        z, z.flip(2), latent_mask=m, reduction="none", distance=lambda x, y: (x - y).abs().exp()
    ),
    "infonce_loss": lambda d, z, m, **p: cv.infonce_loss(z.flip(2) + 1, z, latent_mask=m),
}  # fmt: skip
STATISTICS = {  # of the kept vectors: of latents, and of a mask that there may be
    **{
        f"moment, {form}, {estimator}": lambda z, m=None, form=form, estimator=estimator: (
            cv.moment_prior(z, form=form, estimator=estimator, mean=0.5, latent_mask=m)
        )
        for form in cv.priors.moment.get_args(cv.priors.moment.MomentForm)
        for estimator in ("biased", "unbiased")
        if (form, estimator) != ("full_bures", "unbiased")
    },
    "moment, covariance": lambda z, m=None: cv.moment_prior(
        z, form="full_kl", covariance=torch.eye(3) + 0.5, latent_mask=m
    ),
    "mmd": lambda z, m=None: cv.mmd_prior(
        z, mean=torch.tensor([0.1, 0.2, 0.3]), standardize=True, kernel="imq", latent_mask=m
    ),
    "mmd, biased": lambda z, m=None: cv.mmd_prior(
        z, estimator="biased", covariance=torch.eye(3) + 0.5, latent_mask=m
    ),
    "mmd, median": lambda z, m=None: cv.mmd_prior(z, bandwidth="median", latent_mask=m),
    "mmd, samples": lambda z, m=None: cv.mmd_prior(
        z, reference=torch.randn(6, 3, generator=seeded()), bandwidth="median", latent_mask=m
    ),
    "sigreg": lambda z, m=None: cv.sigreg_prior(z, generator=seeded(), latent_mask=m),
    "sigreg, biased": lambda z, m=None: cv.sigreg_prior(
        z, generator=seeded(), estimator="biased", variance=2.0, latent_mask=m
    ),
    "health": lambda z, m=None: torch.tensor(
        [
            value
            for part in diagnostics.latent_health(z, mean=0.1, latent_mask=m)
            for value in (part if isinstance(part, tuple) else (part,))
        ]
    ),
}
PUBLIC = READS_PAIRS | {
    name: lambda d, z, m, generator, f=f, **_: f(z, m) for name, f in STATISTICS.items()
}


def value_and_gradients(name, z, mask, dtype=torch.float32):
    d = denoiser(dtype=dtype)
    z = z.clone().requires_grad_()
    value = PUBLIC[name](d, z, mask, generator=seeded(), **PROCESSES)
    learning = [z, *d.module.parameters()]
    if not value.requires_grad:
        return [value]
    return [value, *torch.autograd.grad(value.sum(), learning, allow_unused=True)]


@pytest.mark.parametrize("name", PUBLIC)
def test_padding_changes_nothing(name):
    """Not a bit of any value or gradient, whatever stands there; and none reaches it."""
    zeros = value_and_gradients(name, padded_with(Z, HOLES, 0.0), HOLES)
    for value in (math.nan, 1e30):
        other = value_and_gradients(name, padded_with(Z, HOLES, value), HOLES.int())
        for a, b in zip(zeros, other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (torch.equal(a, b) and bool(a.isfinite().all()))
    if len(zeros) > 1 and zeros[1] is not None:
        assert not zeros[1][~HOLES].any()


LOSSES = {
    "t2l_loss": (cv.t2l_loss, {"time": 0.5, "space": "x0", "min_snr": 5.0}),
    "t2l_loss, cosine": (cv.t2l_loss, {"distance": "cosine"}),
    "t2l_loss, of a flow": (
        cv.t2l_loss,
        {
            "time": 0.4,
            "weighting": lambda t: 1 + t,
            "latent_process": cv.LatentProcess("flow", prediction="velocity"),
        },
    ),
    "cycle_latent_loss": (cv.cycle_latent_loss, {}),
    "ddvi_sleep_loss": (cv.ddvi_sleep_loss, {"time": 0.3}),
}


@pytest.mark.parametrize("reduction", ["sum", "mean", "nats", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_each_row_cut_to_its_length(name, reduction):
    if (name, reduction) == ("t2l_loss, cosine", "nats"):
        return
    function, options = LOSSES[name]
    tokens, mask, z, kept = rows(dtype=torch.float64)
    noise, d = torch.randn(z.shape, generator=seeded(), dtype=z.dtype), denoiser(1, torch.float64)
    texts = () if function is not cv.t2l_loss else (tokens,)

    def loss(at, reduction, n=4, **masks):
        head = [part[at] for part in texts]
        return function(
            d, *head, z[at, :n], mask[at], noise=noise[at, :n], reduction=reduction,
            **masks, **({} if name != "ddvi_sleep_loss" else {"y_hat": tokens[at]}),
            **PROCESSES | options,
        )  # fmt: skip

    whole = loss(slice(None), reduction, latent_mask=kept)
    each = [
        loss(slice(i, i + 1), "none", n=int(length)) for i, length in enumerate(kept.sum(dim=1))
    ]
    total, number = sum(part.sum() for part in each), sum(part.numel() for part in each)
    expected = {"sum": total, "mean": total / number, "nats": total / 2 / len(z), "none": total}
    torch.testing.assert_close(whole.sum() if reduction == "none" else whole, expected[reduction])
    if reduction == "none":
        for row, part, length in zip(whole, each, kept.sum(dim=1), strict=True):
            torch.testing.assert_close(row[:length], part[0])
            assert not row[length:].any()


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_those_of_the_kept_vectors(name):
    z = Z.double().requires_grad_()
    masked, plain = STATISTICS[name](z, HOLES), STATISTICS[name](z[HOLES])
    torch.testing.assert_close(masked, plain, rtol=1e-9, atol=1e-11)
    if masked.requires_grad:
        (got,), (expected,) = (torch.autograd.grad(v, z) for v in (masked, plain))
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_the_unconditional_mode_counts_elements_of_latents_that_are_there():
    there = torch.tensor([True, False, True, True, True])
    total, mean = (
        cv.unconditional_loss(
            denoiser(), TOKENS, Z, MASK, has_latent=there, latent_mask=KEPT, reduction=reduction,
            generator=seeded(), **PROCESSES,
        ).latent
        for reduction in ("sum", "mean")
    )  # fmt: skip
    torch.testing.assert_close(total / mean, torch.tensor(3.0 * (2 + 1 + 3 + 2)))


def test_nats_are_of_what_a_row_keeps():
    """The mean over rows of the bounds of each alone, cut to its length."""
    tokens, mask, z, kept = rows(dtype=torch.float64)
    noise, d = torch.randn(z.shape, generator=seeded(), dtype=z.dtype), denoiser(1, torch.float64)
    prior, options = teacher(denoiser(2, torch.float64)), {"boundaries": True, "posterior_std": 0.3}

    def nats(at, n=4, **masks):
        given = {"noise": noise[at, :n], "time": 0.4, **masks, **PROCESSES}
        return torch.stack(
            [
                cv.learned_prior(prior, z[at, :n], mask[at], **options, **given),
                cv.ddvi_wake_kl(d, prior, tokens[at], mask[at], z[at, :n], **given),
            ]
        )

    each = [nats(slice(i, i + 1), int(n)) for i, n in enumerate(kept.sum(dim=1))]
    torch.testing.assert_close(nats(slice(None), latent_mask=kept), torch.stack(each).mean(dim=0))


def test_the_moments_of_a_step_are_of_kept_vectors():
    masked, plain = moments(padded_with(Z, HOLES, 0.0), HOLES), moments(Z[HOLES])
    for name in ("latent_pred_mean", "latent_pred_variance"):
        torch.testing.assert_close(masked[name], plain[name])
    norms = torch.stack([z[kept].norm() for z, kept in zip(Z, HOLES, strict=True)])
    torch.testing.assert_close(masked["latent_pred_norm"], norms.mean())


def test_another_rows_latent_comes_with_its_mask():
    for probe in (diagnostics.text_probe, diagnostics.cheat_test):
        spy = Spy(denoiser())
        probe(spy, TOKENS, Z, MASK, latent_mask=KEPT, **PROCESSES)
        shown = [call for call in spy.calls if torch.equal(call["latent_mask"], KEPT.roll(1, 0))]
        assert len(shown) == 1 and not shown[0]["latents"][~KEPT.roll(1, 0)].any()
        assert shown[0]["latents"][KEPT.roll(1, 0)].all()


def test_rows_are_compared_by_the_mean_of_what_they_keep():
    means = [torch.stack([r[k].mean(0) for r, k in zip(z, KEPT, strict=True)]) for z in (Z, -Z)]
    for critic in ("cosine", "euclidean"):
        torch.testing.assert_close(
            cv.infonce_loss(Z + 0.1, -Z, critic=critic, latent_mask=KEPT),
            cv.infonce_loss(means[0] + 0.1, means[1], critic=critic),
        )
    assert diagnostics.retrieval(Z, -Z, latent_mask=KEPT) == diagnostics.retrieval(*means)


def test_the_guards_of_a_bridge_see_what_is_kept():
    z = padded_with(Z, HOLES, math.nan)
    for threshold, quantile in ((0.2, 0.5), (0.5, 1.0), (0.1, 0.93)):
        bridge = cv.LatentBridge(threshold=threshold, quantile=quantile)
        found = bridge.thresholded(z, HOLES)
        for row, kept, got in zip(Z, HOLES, found, strict=True):
            numbers = row[kept].flatten()
            limit = max(threshold, torch.quantile(numbers.abs(), quantile).item())
            expected = numbers.clamp(-limit, limit) * threshold / limit
            torch.testing.assert_close(got[kept].flatten(), expected)
            assert not got[~kept].any()
    normed = cv.LatentBridge(norm=2.0).normed(z, HOLES)
    torch.testing.assert_close(normed.norm(dim=-1), 2.0 * HOLES)
    noised = cv.LatentBridge(noise=0.5).noised(z, latent_mask=HOLES, generator=seeded())
    noise = torch.randn(z.shape, generator=seeded())
    torch.testing.assert_close(noised, padded_with(Z + 0.5 * noise, HOLES, 0.0))
