"""The stand-in keeps the contract of the host."""

import copy
import math

import numpy as np
import pytest
import torch

from latentdlm_host import FLAVOURS, Config, Diffusion, make_batch, make_host
from oldest import needs_torch_2_6

SCHEDULE = {f"text_noise_schedule.{name}" for name in ("log_prior", "log_gamma", "log_B")}


def call(host, batch, **changes):
    """The model on clean inputs at the times 0.3 and 0.6."""
    times = torch.full((2, len(batch["latent"])), 0.3) * torch.tensor([[1.0], [2.0]])
    arguments = {
        "text_tokens": batch["input_ids"],
        "latents": batch["latent"],
        "text_timesteps": times[0],
        "latent_timesteps": times[1],
        "attention_mask": batch["attention_mask"],
    }
    return host.model(**{**arguments, **changes})


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_names(flavour):
    host = make_host(flavour=flavour)
    assert type(host).__name__ == "MultimodalDiffusionTrainer_new"
    file = "improved_trainer" if flavour == "plain" else "improved_trainer_stable"
    assert type(host).__module__.rpartition(".")[2] == file
    keys = set(host.state_dict())
    assert {key for key in keys if not key.startswith("model.")} == SCHEDULE
    parts = "text_encoder latent_encoder conditioning mmdit text_head latent_head"
    assert {key.split(".")[1] for key in keys - SCHEDULE} == set(parts.split())
    groups = host.text_params, host.latent_params, host.shared_params
    assert sum(map(len, groups)) == len(list(host.parameters())) == len(set().union(*groups))


def test_a_copy_is_another_host():
    host = make_host()
    other = copy.deepcopy(host)
    assert type(other) is type(host)
    assert other.config == host.config
    assert not set(other.parameters()) & set(host.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_returns_two_or_three(dtype):
    batch = make_batch()
    for clusters in (0, 3):
        host = make_host(dtype=dtype, cluster_size=clusters)
        for latents in (batch["latent"], batch["latent"][:, None]):
            logits, prediction, *more = call(host, batch, latents=latents)
            assert logits.shape == (4, 12, 40)
            assert prediction.shape == (4, 1, 8)
            assert [part.shape for part in more] == [logits.shape] * bool(clusters)
            assert {part.dtype for part in (logits, prediction, *more)} == {dtype}
    with pytest.raises(ValueError, match="too many values"):
        host(batch)
    with pytest.raises(AssertionError):
        call(host, batch, latents=None)


def test_masks_of_any_kind_and_absent_times():
    host, batch = make_host(), make_batch()
    expected = call(host, batch)[0]
    for dtype in (torch.long, torch.bool):
        assert torch.equal(
            call(host, batch, attention_mask=batch["attention_mask"].to(dtype))[0], expected
        )
    assert not torch.equal(call(host, batch, attention_mask=None)[0], expected)
    zero = call(host, batch, text_timesteps=torch.zeros(4))[0]
    assert torch.equal(call(host, batch, text_timesteps=None)[0], zero)
    for wrong in (torch.full((4, 1), 0.3), torch.tensor(0.3)):
        with pytest.raises((RuntimeError, IndexError, TypeError)):
            call(host, batch, text_timesteps=wrong)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_ids_of_pads_change_nothing_else(flavour):
    host, batch = make_host(flavour=flavour, blocks=2), make_batch()
    real = batch["attention_mask"].bool()
    other = torch.where(real, batch["input_ids"], 7)
    before, after = call(host, batch)[0], call(host, batch, text_tokens=other)[0]
    assert torch.equal(before[real], after[real])
    assert not torch.equal(before[~real], after[~real])


def test_freezing_leaves_traces():
    host, batch = make_host(), make_batch()
    loss, _ = host(batch)
    loss.backward()
    assert not any(p.requires_grad or p.grad is not None for p in host.latent_params)
    assert all(p.grad is not None for p in host.text_params)
    host.loss_type = "t2l"
    host(batch)
    assert not any(p.requires_grad or p.grad is not None for p in host.text_params)
    assert all(p.requires_grad for p in host.latent_params | host.shared_params)


@pytest.mark.parametrize("flavour", ["stable", "plain"])
def test_l2t_is_the_cross_entropy_of_all_tokens(flavour):
    host, batch = make_host(flavour=flavour), make_batch()
    loss, metrics = host(batch)
    ids = batch["input_ids"]
    hidden = torch.full_like(ids, host.mask_token_id)
    times = {"text_timesteps": torch.ones(4), "latent_timesteps": torch.zeros(4)}
    logits = call(host, batch, text_tokens=hidden, **times)[0].tolist()
    total = 0.0
    for row, targets in zip(logits, ids.tolist(), strict=True):
        for values, target in zip(row, targets, strict=True):
            total += math.log(sum(math.exp(value) for value in values)) - values[target]
    assert loss.item() == pytest.approx(total / ids.numel(), rel=1e-6)
    assert metrics["loss"] == metrics["text_loss"] == loss.item()
    assert metrics["training_mode"] == "l2t"


@pytest.mark.parametrize("parameterization", ["epsilon", "x0", "v_param"])
@pytest.mark.parametrize("flavour", ["stable", "plain"])
def test_t2l_is_the_error_of_the_latents_at_time_one(flavour, parameterization):
    host = make_host(flavour=flavour, parameterization=parameterization, loss_type="t2l")
    batch = make_batch()
    torch.manual_seed(3)
    loss, _ = host(batch)
    torch.manual_seed(3)
    noise, z = torch.randn(4, 8), batch["latent"]
    a, b = (table[-1] for table in tables(host.latent_diffusion))
    target = {"epsilon": noise, "x0": z, "v_param": a * noise - b * z}[parameterization]
    times = {"text_timesteps": torch.zeros(4), "latent_timesteps": torch.ones(4)}
    prediction = call(host, batch, latents=a * z + b * noise, **times)[1][:, 0]
    total = 0.0
    for p, q in zip(prediction.tolist(), target.tolist(), strict=True):
        if flavour == "stable":
            p, q = ([x / math.hypot(*v) for x in v] for v in (p, q))
        total += sum((x - y) ** 2 for x, y in zip(p, q, strict=True))
    weight = {"stable": 0.1, "plain": 1.0}[flavour]
    assert loss.item() == pytest.approx(weight * total / 32, rel=1e-5)


def test_the_fork_draws_times():
    host, batch = make_host(flavour="fork"), make_batch()
    torch.manual_seed(3)
    loss, _ = host(batch)
    torch.manual_seed(3)
    times = 1e-4 + (1 - 2e-4) * torch.rand(4)
    noisy = host.text_noise_schedule.sample_zt(batch["input_ids"], times)
    hidden = noisy == host.mask_token_id
    arguments = {"text_timesteps": times, "latent_timesteps": torch.zeros(4)}
    logits = call(host, batch, text_tokens=noisy, **arguments)[0]
    expected = torch.nn.functional.cross_entropy(logits[hidden], batch["input_ids"][hidden])
    assert 0 < hidden.sum() < hidden.numel()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


MIXED = needs_torch_2_6("mse_loss of torch 2.5 has no backward of mixed dtypes")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=MIXED)])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.slow
def test_random_modes(flavour, dtype):
    host, batch = make_host(flavour=flavour, dtype=dtype, loss_type="random"), make_batch()
    np.random.seed(1)
    seen = set()
    for step in range(6):
        loss, metrics = host(batch, step=step)
        loss.backward()
        mode = metrics.pop("training_mode")
        assert type(mode) is np.str_
        assert all(type(value) is float for value in metrics.values())
        assert loss.shape == () and loss.isfinite()
        seen.add(mode)
    assert seen == {"unconditional", "l2t", "t2l"}


def test_sequential_modes_count_steps_or_epochs():
    phases = [{"type": "l2t", "steps": 2, "epochs": 1}, {"type": "t2l", "steps": 1, "epochs": 1}]
    host = make_host(loss_type="sequential", training={"sequential_schedule": phases})
    assert [host.get_training_mode(step) for step in range(4)] == ["l2t", "l2t", "t2l", "l2t"]
    host.current_epoch = 1
    assert host.get_training_mode() == "t2l"
    assert make_host(loss_type="sequential").get_training_mode(0) == "unconditional"
    assert make_host(loss_type="cycle_vae").get_training_mode(0) == "unconditional"


def test_a_bad_loss_is_a_constant():
    host, batch = make_host(), make_batch()
    batch["latent"][0] = math.nan
    loss, _ = host(batch)
    assert loss == 0 and not loss.requires_grad


def tables(diffusion):
    return diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_tables(schedule):
    diffusion = Diffusion(beta_schedule=schedule)
    signal, noise = tables(diffusion)
    assert len(signal) == len(noise) == diffusion.num_timesteps
    torch.testing.assert_close(signal**2 + noise**2, torch.ones(1000))
    assert (signal.diff() < 0).all()
    assert torch.equal(
        diffusion.get_schedule_values(torch.tensor([0.0, 0.5, 1.0]))[0], signal[[0, 499, 999]]
    )
    assert torch.equal(diffusion.get_schedule_values(torch.tensor([0, 7]))[0], signal[[0, 7]])
    assert torch.equal(diffusion.get_schedule_values(torch.tensor([0, 1]))[0], signal[[0, 999]])


def test_the_batch():
    batch = make_batch(rows=3)
    ids, mask, latents = batch["input_ids"], batch["attention_mask"], batch["latent"]
    assert (ids.dtype, mask.dtype, latents.dtype) == (torch.int64, torch.float32, torch.float32)
    assert torch.equal(mask == 0, ids == 0) and mask.sum(1).tolist() == [12, 11, 10]
    assert not (ids == make_host().mask_token_id).any()
    assert latents.shape == (3, 8)


def test_the_config():
    config = Config({"loss": {"loss_type": "l2t"}, "seed": None})
    assert config.loss.loss_type == config["loss"]["loss_type"] == "l2t"
    assert list(config) == list(config.keys()) == ["loss", "seed"]
    assert "seed" in config and "other" not in config
    assert config.get("other") is None and config.get("other", 3) == 3
    assert getattr(config.loss, "latent_loss_weight", 0.1) == 0.1
    with pytest.raises(AttributeError):
        config.loss.other  # noqa: B018
    with pytest.raises(KeyError):
        config["other"]
