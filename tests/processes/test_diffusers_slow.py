"""The schedulers and the loss code of `diffusers`: equal, step by step."""

import diffusers
import numpy as np
import pytest
import torch

import cyclevae as cv
from cyclevae.model.denoiser import Denoised

TEXT = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Network:
    """Any network; `head` makes of its output what it predicts."""

    def __init__(self, head=lambda output, latents, time: output):
        self.head = head

    def denoise(self, tokens, latents, *, latent_time, **state):
        output = torch.sin(latents) + latent_time[:, None]
        return Denoised(None, self.head(output, latents, latent_time))


def encode(latent, network, steps, noise, time=1.0):
    tokens = torch.full((len(noise), 2), 3)
    return cv.encode_text(
        network,
        tokens,
        torch.ones_like(tokens),
        text_process=TEXT,
        latent_process=latent,
        bridge=cv.LatentBridge(steps=steps),
        time=time,
        noise=noise,
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 5])
def test_flow_matching(shift, steps):
    """The noise levels, noising and sampling of `FlowMatchEulerDiscreteScheduler`."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    latent, x0, noise = (
        cv.LatentProcess(cv.Flow(shift), "velocity"),
        randn(6, 4),
        randn(6, 4, seed=1),
    )
    time = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(latent.alpha_sigma(time)[1], scheduler.sigmas)
    chosen = torch.tensor([0, 10, 300, 700, 990, 999])
    theirs = scheduler.scale_noise(x0, scheduler.timesteps[chosen], noise)
    torch.testing.assert_close(latent.noised(x0, noise, time[chosen]), theirs)

    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    z = noise
    for k, t in enumerate(scheduler.timesteps):
        velocity = torch.sin(z) + (1 - k / steps)
        z = scheduler.step(velocity, t, z).prev_sample
    torch.testing.assert_close(encode(latent, Network(), steps, noise), z)


@pytest.mark.parametrize("scheme", ["none", "cosmap", "sigma_sqrt"])
def test_the_loss_of_sd3(scheme):
    """As in its training scripts: `weighting * (prediction - (noise - x0))^2`."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    x0, noise, chosen = randn(6, 4), randn(6, 4, seed=1), torch.tensor([9, 50, 300, 700, 990, 998])
    sigmas, time = scheduler.sigmas[chosen, None], (1000 - chosen) / 1000
    noisy = (1 - sigmas) * x0 + sigmas * noise
    prediction = torch.sin(noisy) + time[:, None]
    weights = compute_loss_weighting_for_sd3(scheme, sigmas)
    theirs = (weights * (prediction - (noise - x0)).square()).mean()

    flow = cv.Flow(shift=3.0)
    ours = cv.t2l_loss(
        Network(),
        torch.full((6, 2), 3),
        x0,
        torch.ones(6, 2),
        text_process=TEXT,
        latent_process=cv.LatentProcess(flow, "velocity"),
        time=time,
        noise=noise,
        weighting=lambda t: compute_loss_weighting_for_sd3(scheme, flow(t)[1]),
    )
    torch.testing.assert_close(ours, theirs)


def test_the_density_of_sd3():
    """Drawn times of `compute_density_for_timestep_sampling` have the density that we weigh by."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    drawn = compute_density_for_timestep_sampling(
        "logit_normal", 400_000, 0.4, 1.3, generator=torch.Generator().manual_seed(0)
    )
    counts = torch.histc(drawn, 10, 0, 1) / len(drawn)
    grid = ((torch.arange(10_000) + 0.5) / 10_000).double()
    density = cv.LogitNormal(mean=0.4, std=1.3)(grid).view(10, 1000).mean(dim=1) / 10
    torch.testing.assert_close(counts, density.float(), rtol=0, atol=3e-3)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(
    ("prediction", "theirs"), [("epsilon", "epsilon"), ("x0", "sample"), ("v", "v_prediction")]
)
def test_ddim(schedule, prediction, theirs):
    """`DDIMScheduler`: noising, the v target, and a step from one of its times to another."""
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=schedule, clip_sample=False, prediction_type=theirs
    )
    table = torch.stack([scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()])
    own = schedule if schedule == "linear" else lambda t: tuple(table[:, (999 * t).long()])
    latent = cv.LatentProcess(own, prediction, max_gain=1e6)
    x0, noise, step = randn(4, 3), randn(4, 3, seed=1), torch.tensor([20, 300, 700, 999])
    time = (step + 0.5).clamp(max=999) / 999  # in the middle of a step
    z_t = latent.noised(x0, noise, time)
    torch.testing.assert_close(z_t, scheduler.add_noise(x0, noise, step))
    v = latent.target(x0, noise, time, space="v")
    torch.testing.assert_close(v, scheduler.get_velocity(x0, noise, step))
    scheduler.set_timesteps(50)  # steps of 20
    output = randn(4, 3, seed=2)
    for row, t in enumerate(step):
        at, to = time[row, None], (t[None] - 20 + 0.5) / 999
        clean = latent.to_x0(output[row, None], z_t[row, None], at)
        ours = latent.ddim(clean, z_t[row, None], at, to)
        stepped = scheduler.step(output[row, None], int(t), z_t[row, None]).prev_sample
        torch.testing.assert_close(ours, stepped, rtol=1e-4, atol=1e-4)


def test_edm():
    """`EDMEulerScheduler`: its noise levels, and a bridge of its Euler steps."""
    scheduler, steps = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0), 8
    scheduler.set_timesteps(steps)
    edm = cv.EDM()
    latent = cv.LatentProcess(edm, "x0")
    time = 1 - torch.arange(steps) / (steps - 1)
    torch.testing.assert_close(edm(time)[1], scheduler.sigmas[:-1], rtol=1e-4, atol=1e-6)

    def head(output, latents, time):  # the preconditioning of a network, by the noise level
        return scheduler.precondition_outputs(latents, output, edm(time)[1][:, None])

    z = ours = latent.started(randn(3, 4), torch.ones(3))
    network = Network(head)
    for k, t in enumerate(scheduler.timesteps):
        now, to = (time[i].expand(3) for i in (k, min(k + 1, steps - 1)))
        clean = network.denoise(None, ours, latent_time=now).latent_prediction
        ours = clean if k == steps - 1 else latent.ddim(clean, ours, now, to)
        scheduler.is_scale_input_called = True
        z = scheduler.step(torch.sin(z) + time[k], t, z).prev_sample
    torch.testing.assert_close(ours, z, rtol=1e-3, atol=1e-3)
