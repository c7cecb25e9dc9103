"""CCDD: its own class, its own losses, and cycles that train it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cyclevae as cv
from cyclevae.testing import check_denoiser

WORDS, MASK, LENGTH, WIDTH = 128, 5, 8, 8  # 128: a text head without ids that are no words


class Tokenizer:
    mask_token_id = MASK

    def __len__(self):
        return WORDS


@pytest.fixture
def host(checkout):
    """Its model, tiny, its process and its loss."""
    omegaconf = pytest.importorskip("omegaconf")
    from ccdd.diffusion_process import CoevolutionaryDiffusion
    from ccdd.loss import CoevolutionaryGiddLoss
    from ccdd.models.ccdd_moe2s import MoeDiT
    from ccdd.models.dit import MMDIT

    torch.manual_seed(0)
    config = omegaconf.OmegaConf.create(
        {
            "model": {
                "hidden_size": 32,
                "cond_dim": 16,
                "n_heads": 2,
                "n_single_list": [0, 0],
                "dropout": 0.0,
                "max_seq_len": LENGTH,
                "latent_dim": WIDTH,
                "num_experts": 2,
                "num_experts_per_tok": 2,
                "norm_topk_prob": True,
            },
            "loss": {
                "loss_weighting": "none",
                "min_loss_weight": 0.0,
                "max_loss_weight": 2.0,
                "weight_type": "inv_snr",
            },
        }
    )
    process = CoevolutionaryDiffusion(Tokenizer(), nn.Embedding(WORDS, WIDTH))
    loss = CoevolutionaryGiddLoss(config, Tokenizer(), process)
    models = {"model": MMDIT(config, WORDS), "of_experts": MoeDiT(config, WORDS)}
    return SimpleNamespace(**models, process=process, loss=loss)


@pytest.fixture
def step_of(host, example):
    def make(**options):
        return example("ccdd").step_module(host.model, mask_id=MASK, warmup_steps=20, **options)

    return make


def texts(host, rows, seed, words=8):
    """Texts of one word, and its latents: the embedding of each word, normalised by the host."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(6, 6 + words, (rows, 1), generator=generator).repeat(1, LENGTH)
    return tokens, host.process.vae_encode(tokens, None)


def every(tokens):
    return torch.ones_like(tokens, dtype=torch.bool)


@pytest.mark.parametrize("name", ["model", "of_experts"])
def test_it_is_a_denoiser(host, example, name):
    step = example("ccdd").step_module(getattr(host, name), mask_id=MASK)
    processes = step.objective.text_process, step.objective.latent_process
    shape, lengths = (LENGTH, WIDTH), (LENGTH, LENGTH)
    check_denoiser(step.denoiser, *processes, latent_shape=shape, lengths=lengths)


@pytest.mark.parametrize("name", ["flow_linear", "vp_linear"])
def test_its_latents_are_noised_alike(host, example, name):
    schedule = {"flow_linear": "flow", "vp_linear": example("ccdd").vp_linear}[name]
    _, latents = texts(host, 4, seed=1)
    time, host.process.cont_schedule = torch.tensor([0.1, 0.4, 0.8, 1.0]), name
    torch.manual_seed(0)
    expected = host.process.add_cont_noise(latents.clone(), time[:, None])
    torch.manual_seed(0)
    found = cv.LatentProcess(schedule).noised(latents, torch.randn_like(latents), time)
    assert_close(found, expected)


def inv_snr(time):
    return (time / (1 - time)).clamp(max=10)


@pytest.mark.parametrize(("p_uniform", "padded"), [(0.0, False), (0.0, True), (0.1, False)])
def test_its_losses_are_those_of_the_unconditional_mode(host, step_of, p_uniform, padded):
    for parameter in host.model.parameters():  # heads that begin at 0 would tell words from none
        nn.init.normal_(parameter, std=0.1)
    step, (tokens, latents) = step_of(padded=padded), texts(host, 8, seed=1, words=100)
    mask, time, seen = every(tokens), torch.linspace(0.05, 0.95, 8), {}
    text_process = step.objective.text_process
    if p_uniform:
        text_process = cv.HybridTextProcess(MASK, WORDS, p_uniform=p_uniform)
    if padded:
        mask = torch.arange(LENGTH) < torch.arange(1, 9)[:, None]
        latents[~mask] = torch.nan

    class Recorded:
        def denoise(self, tokens, latents, *, latent_mask=None, **state):
            masks = {} if latent_mask is None else {"latent_mask": latent_mask}
            output = step.denoiser.denoise(tokens, latents, **masks, **state)
            seen.update(tokens=tokens, latents=latents, output=output)
            return output

    found = cv.unconditional_loss(
        Recorded(),
        tokens,
        latents,
        mask,
        text_process=text_process,
        latent_process=step.objective.latent_process,
        text_time=time,
        latent_time=time,
        latent_weighting=inv_snr,
        latent_mask=mask if padded else None,
    )
    logits, prediction = (value.detach() for value in seen["output"])
    latents = latents.masked_fill(~mask[..., None], 0.0)
    read = seen["tokens"], time, prediction, latents, seen["latents"]
    _, _, expected = host.loss(logits, tokens, mask, *read, p_u=p_uniform)
    assert_close(found.text.detach(), expected["elbo"], rtol=1e-5, atol=0.0)
    # it caps the squared error of a number at 10
    assert (prediction - latents)[mask].square().max() < 10
    assert_close(found.latent.detach(), expected["loss_cont"])


@pytest.mark.parametrize("padded", [False, True])
def test_texts_and_latents_learn_from_each_other(host, step_of, train, padded):
    lengths = torch.arange(LENGTH) < torch.arange(16)[:, None] % 5 + 4

    def batch_of(number):
        (tokens, latents), (alone, _), (_, more) = (
            texts(host, rows, 3 * number + part) for part, rows in enumerate((16, 8, 8))
        )
        if not padded:
            return cv.Batch(tokens, every(tokens), latents, alone, every(alone), more)
        masks = {"latent_mask": lengths, "unpaired_text_latent_mask": lengths[:8]}
        masks |= {"unpaired_latent_mask": lengths[:8], "pseudo_text_mask": lengths[:8]}
        return cv.Batch(tokens, lengths, latents, alone, lengths[:8], more, **masks)

    for name, (first, last) in train(step_of(padded=padded), batch_of, 120).items():
        if name.endswith("_loss"):
            assert last < 0.8 * first, (name, first, last)
