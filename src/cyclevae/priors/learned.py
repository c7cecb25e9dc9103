"""A learned prior: the unconditional latent denoiser of a frozen teacher as p(z)."""

from contextlib import nullcontext
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.derivatives import once
from cyclevae._base.masked import kept_latents, kept_numbers, only_kept
from cyclevae._base.precision import fp32
from cyclevae._base.reduce import reduce_latents
from cyclevae._base.types import (
    Count,
    LatentMask,
    LatentMaskLike,
    Latents,
    Mask,
    MaskLike,
    Number,
    Scalar,
    Time,
    Tokens,
)
from cyclevae.gradient_policy.contexts import detach
from cyclevae.model.denoiser import Denoiser, need_latents
from cyclevae.model.door import at_the_door
from cyclevae.model.padding import tell_latent_mask
from cyclevae.model.teacher import check_frozen
from cyclevae.priors.weighting import Weighting, boundary_terms, weighted_times
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.noise import draw_noise
from cyclevae.processes.text import TextProcess

Form = Literal["cross_entropy", "score_difference", "score_distillation"]


@at_the_door
def learned_prior(
    teacher: Denoiser,
    z: Latents,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    form: Form = "cross_entropy",
    weighting: Weighting = "vdm",
    posterior_std: Number = 0.0,
    boundaries: bool = False,
    low: Number = 0.02,
    high: Number = 0.98,
    time: Number | Float[Tensor, " r"] | None = None,
    noise: Float[Tensor, "r *n d"] | None = None,
    generator: torch.Generator | None = None,
    samples: int = 1,
    latent_mask: LatentMaskLike | None = None,
    count: Count | None = None,
) -> Scalar:
    """How improbable latents are under the teacher's own distribution of latents.

    `cross_entropy`: `E_t w_t ||eps - eps_psi(alpha z + sigma eps, t, no text)||^2`, summed over
    dimensions, averaged over rows. `z` may be the mean of a posterior `q = N(z, s^2 I)`; then
    `z_t = alpha z + rho n` with `rho^2 = alpha^2 s^2 + sigma^2`, `eps_q = sigma n / rho` is what
    `q` itself predicts, and eps is averaged out given `z_t`: `w_t (||eps_q - eps_psi||^2 + D
    alpha^2 s^2 / rho^2)`. `score_difference` is without the constant, `w_t ||eps_q - eps_psi||^2`:
    the divergence KL(q || p), whose gradient is the same. `score_distillation` has the value of
    `cross_entropy` and the gradient `w_t alpha (eps_psi - eps_q)`, without the teacher's Jacobian,
    for one backward pass: second derivatives are refused.

    The weighting is also the distribution of the times, at the 1000 steps of the schedule, from
    that of `low` to that of `high`. `vdm`: uniform steps, `w = N/2 expm1(gamma_t - gamma_s)` for
    `N` steps of neighbours s and t, `gamma = -log SNR`: the discrete bound, which at 1000 steps is
    a little above its limit. `likelihood`: uniform in gamma, `w = (gamma_high - gamma_low) / 2`:
    that limit, by the trapezoidal rule. Both are in nats. `uniform`: uniform times, `w = 1`: the
    simple loss, which bounds nothing.

    Errors are taken in the teacher's own prediction space and scaled, so nothing is divided by a
    vanishing alpha, and `max_gain` has no say. In fp32 a difference of predictions is right to
    1e-7 of the size of `z` itself: latents at 1e4 have lost three digits of an error of 1.

    This acts on each row by itself, and draws it to where the teacher's density is highest: alone,
    it collapses a batch. Where it weighs, a reconstruction term must hold the rows apart.

    Args:
        teacher: the unconditional denoiser, frozen and in eval mode: `Teacher(network).denoiser`.
            The gradient reaches `z` through it.
        z: latents, `[b, ...]`.
        attention_mask: `[b, s]`, True = keep: the length of the fully masked text that the teacher
            sees. It must tell nothing of `z`: see `draw_lengths`.
        text_process: the text process.
        latent_process: the latent process.
        form: `cross_entropy`, `score_difference` (needs `posterior_std`) or `score_distillation`.
        weighting: `vdm`, `likelihood` or `uniform`.
        posterior_std: `s`, the fixed width of the posterior around `z`.
        boundaries: add the ends of the bound, so that in the mean over draws the value bounds the
            cross-entropy of `z_t` at the time `low`, `-E_q log p`, in nats (`likelihood`: but for
            the error of its quadrature): `KL(q(z_high) || p(z_high))` with the law of a start from
            noise, `p(z_high) = N(0, (alpha^2 + sigma^2) I)`, which is `N(0, I)` where the schedule
            preserves variance, and `D/2 log(2 pi e sigma_low^2)` unless the form is
            `score_difference`, which then is `KL(q || p)` at that time. In fp32 they are right to
            1e-7 nats per dimension.
        low: the lowest time.
        high: the highest time.
        time: a number or `[b * samples]`, as the weighting would draw them; drawn if not given.
        noise: standard normal `n` in the shape of `b * samples` latents; drawn if not given.
        generator: random state of the draws.
        samples: how often each row is repeated, at other times and with other noise.
        latent_mask: `[b, n]`, True = keep, of latents `[b, n, d]`; `D` is then that of what a row
            keeps, and the teacher is told.
        count: rows in the denominator, in place of those of `z`: see `text_loss`.

    Raises:
        TypeError: a teacher that is no `Denoiser`, such as a `Teacher` in place of its `.denoiser`.
        ValueError: a teacher that is not frozen or not in eval mode, wrong shapes or values, or a
            form, weighting or range of times that do not go together.

    Reference: variational diffusion models, https://arxiv.org/abs/2107.00630, eq. 11; likelihood
    weighting, https://arxiv.org/abs/2101.09258; latent score models,
    https://arxiv.org/abs/2106.05931; score distillation, https://arxiv.org/abs/2209.14988.

    Examples:
        >>> from cyclevae import Teacher
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> teacher = Teacher(denoiser.module).denoiser
        >>> z, mask = torch.zeros(3, 4, requires_grad=True), toy_batch(seed=0).attention_mask
        >>> loss = learned_prior(
        ...     teacher, z, mask, text_process=text_process, latent_process=latent_process,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> loss.backward()
        >>> loss.shape, z.grad.shape
        (torch.Size([]), torch.Size([3, 4]))
    """
    checks.check_choice("form", form, get_args(Form))
    checks.check_choice("weighting", weighting, get_args(Weighting))
    checks.check_nonnegative("posterior_std", posterior_std)
    if form == "score_difference" and posterior_std == 0:
        raise ValueError(
            "form='score_difference' compares the teacher with the posterior N(z, s^2 I) and needs "
            "its width: give a `posterior_std` above 0, or use form='cross_entropy'"
        )
    if boundaries and weighting == "uniform":
        raise ValueError(
            "weighting='uniform' is no bound, so it has no `boundaries`; use 'vdm' or 'likelihood'"
        )
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples!r}")
    check_frozen(teacher)
    z, latent_mask = kept_latents(
        "z", z, latent_mask, latent_process.shape, cure="has training diverged?"
    )
    checks.warn_without_graph("z", z, cure=checks.ENCODE_WITH_GRAPH)
    checks.check_rows("attention_mask", attention_mask, "z", z)
    mask = checks.as_mask("attention_mask", attention_mask)
    checks.check_kept("attention_mask", mask)
    z, mask = z.repeat_interleave(samples, dim=0), mask.repeat_interleave(samples, dim=0)
    if latent_mask is not None:
        latent_mask = latent_mask.repeat_interleave(samples, dim=0)
    dimensions = kept_numbers(z, latent_mask)
    mean = fp32(z)
    time, weight = weighted_times(
        weighting, mean, latent_process, low=low, high=high, time=time, generator=generator
    )
    if noise is None:
        noise = draw_noise(len(z), latent_process, at=z, like=mean, generator=generator)
    else:
        checks.check_same_shape("noise", noise, "z, repeated `samples` times,", z)
    noise = only_kept(noise, latent_mask)

    alpha, sigma = latent_process.alpha_sigma(time)
    spread = (alpha.square() * posterior_std**2 + sigma.square()).sqrt()
    # z_t = alpha clean + sigma eps, where clean and eps are what q itself predicts
    clean = mean + _wide(alpha * posterior_std**2 / spread, z) * noise
    eps = _wide(sigma / spread, z) * noise
    z_t = (_wide(alpha, z) * mean + _wide(spread, z) * noise).to(z.dtype)
    distilled = form == "score_distillation"
    with detach() if distilled else nullcontext():
        hidden = text_process.at_full_noise(mask, generator=generator)
        prediction = without_text(teacher, z_t, mask, time, hidden, latent_mask)
        error = latent_process.target(clean, eps, time) - fp32(prediction)
        error = noise_error(error, time, latent_process)

    per_row = weight * error.square().flatten(1).sum(dim=1)
    if form != "score_difference":
        unknown = (alpha * posterior_std / spread).square()  # Var(eps | z_t), per dimension
        per_row = per_row + weight * unknown * dimensions
    if distilled:
        surrogate = -weight * alpha * (error * mean).flatten(1).sum(dim=1)
        per_row = per_row + once(surrogate, "form='score_distillation'") - surrogate.detach()
    if boundaries:
        kl = form == "score_difference"
        per_row = per_row + boundary_terms(
            mean, latent_process, low, high, posterior_std, kl=kl, dimensions=dimensions
        )
    return reduce_latents(
        per_row, reduction="mean", count=None if count is None else count * samples
    )


def without_text(
    teacher: Denoiser,
    z_t: Latents,
    mask: Mask,
    time: Time,
    hidden: Tokens,
    latent_mask: LatentMask | None = None,
) -> Latents:
    """The prediction of the unconditional mode: the text is at full noise."""
    output = teacher.denoise(
        hidden,
        z_t,
        text_time=torch.ones_like(time),
        latent_time=time,
        attention_mask=mask,
        need="latents",
        **tell_latent_mask(teacher, latent_mask),
    )
    return only_kept(need_latents(output, z_t), latent_mask)


def noise_error(error: Latents, time: Time, latent_process: LatentProcess) -> Latents:
    """An error in the model's own prediction space, as an error of the noise it implies."""
    # a conversion is linear, and errors are differences at one z_t
    return latent_process.converted(error, torch.zeros_like(error), time, space="epsilon")


def _wide(scale: Time, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.ndim - 1))
