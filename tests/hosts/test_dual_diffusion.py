"""D-DiT: its own class, its own losses, and cycles that train it."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import cyclevae as cv
from cyclevae.testing import check_denoiser

WORDS, MASK, LENGTH, IMAGE = 12, 11, 6, (4, 8, 8)
NULL = torch.tensor([[1, 0, 0, 0, 0, 0]])


@pytest.fixture
def host(checkout):
    """Its model and T5, both tiny, and its two losses."""
    pytest.importorskip("diffusers", reason="D-DiT's model is a class of diffusers")
    from sd3_modules.sd3_model import SD3JointModelFlexible
    from sd3_modules.sd_loss_utils import ImageFlowMatchingLoss, TextMaskedDiffusionLoss
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    t5 = T5EncoderModel(T5Config(vocab_size=WORDS, **sizes)).eval()
    model = SD3JointModelFlexible(
        vocab_size=WORDS,
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    pipe = SimpleNamespace(
        text_encoder_3=t5,
        device="cpu",
        _get_t5_prompt_embeds=lambda prompt, max_sequence_length: t5(NULL)[0],
    )
    options = {"sampling_eps": 1e-3, "antithetic_sampling": True, "importance_sampling": False}
    training = SimpleNamespace(**options, ignore_padding=False)
    text = TextMaskedDiffusionLoss(SimpleNamespace(training=training), pipe)
    text.mask_index = MASK
    image = ImageFlowMatchingLoss(pipe, text_max_length=LENGTH)
    return SimpleNamespace(model=model, t5=t5, text=text, image=image)


@pytest.fixture
def step(host, example):
    module = example("dual_diffusion")
    return module.step_module(host.model, host.t5, NULL, mask_id=MASK, warmup_steps=20)


def pairs(rows, seed):
    """Captions of a word twice, and images that tell the word."""
    words = torch.randint(2, 6, (rows,), generator=torch.Generator().manual_seed(seed))
    tokens = torch.zeros(rows, LENGTH, dtype=torch.long)
    tokens[:, :2], tokens[:, 2] = words[:, None], 1
    images = torch.randn(6, *IMAGE, generator=torch.Generator().manual_seed(0))
    return tokens, images[words]


def test_it_is_a_denoiser(step):
    processes = step.objective.text_process, step.objective.latent_process
    check_denoiser(step.denoiser, *processes, latent_shape=IMAGE)


def test_its_text_loss_is_the_bound_of_the_unconditional_mode(host, step):
    tokens, images = pairs(8, seed=1)
    torch.manual_seed(0)
    expected = host.text.compute_loss(
        host.model, tokens, images, None, use_dummy_loss=False, label_mask=torch.ones_like(tokens)
    )
    torch.manual_seed(0)
    time = host.text._sample_t(8, "cpu")  # the same words are masked now as they were there
    rate = 1 - host.text.noise.eps
    found = cv.unconditional_loss(
        step.denoiser,
        tokens,
        images,
        torch.ones_like(tokens),
        text_process=step.objective.text_process,
        latent_process=step.objective.latent_process,
        text_time=rate * time,
        latent_time=0.0,
        noise=torch.zeros_like(images),
    ).text
    # it masks with probability .999 t, and weighs with 1/t
    assert_close(rate * found, expected)


def test_its_image_loss_is_that_of_the_encoder_at_its_times(host, step):
    """Rows that it shows no caption too: it draws them last."""
    tokens, images = pairs(8, seed=1)
    words, told = host.t5(tokens)[0], {}

    def model(**arguments):
        told.update(arguments)
        return host.model(**arguments)

    torch.manual_seed(0)
    expected = host.image.compute_loss(model, words, images)
    without = (told["encoder_hidden_states"] != words).any(dim=(1, 2))
    assert without.any() and not without.all()
    torch.manual_seed(0)
    processes = {
        "text_process": step.objective.text_process,
        "latent_process": step.objective.latent_process,
    }
    found = cv.t2l_loss(
        cv.without_condition(step.denoiser, **processes, rows=without),
        tokens,
        images,
        torch.ones_like(tokens),
        **processes,
        time=told["timestep"] / 1000,
        noise=torch.randn_like(images),
        space="x0",
    )
    assert_close(found, expected)


def test_captions_and_images_learn_from_each_other(step, train):
    def batch_of(number):
        (tokens, images), (texts, _), (_, more) = (
            pairs(rows, 3 * number + part) for part, rows in enumerate((16, 8, 8))
        )
        every = torch.ones(16, LENGTH, dtype=torch.bool)
        return cv.Batch(tokens, every, images, texts, every[:8], more)

    for name, (first, last) in train(step, batch_of, 150, lr=5e-3).items():
        if name.endswith("_loss"):
            assert last < 0.9 * first, (name, first, last)
