"""The lines that take CCDD and D-DiT (examples/hosts), around stand-ins of their signature."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import cyclevae as cv
from cyclevae.testing import check_denoiser

FOLDER = Path(__file__).parents[2] / "examples" / "hosts"
WORDS, MASK, LENGTH = 9, 5, 6
NULL = torch.tensor([[1, 0, 0, 0, 0, 0]])


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ccdd, dual_diffusion = example("ccdd"), example("dual_diffusion")


class MMDIT(nn.Module):
    """As the class of CCDD: a latent per word, one length, and a text head of too many ids."""

    shape, vocab_size = (LENGTH, 4), WORDS

    def __init__(self, width=8):
        super().__init__()
        self.words, self.latent_in = nn.Embedding(16, width), nn.Linear(4, width)
        self.times = nn.Linear(2, width)
        self.text_out, self.latent_out = nn.Linear(width, 16), nn.Linear(width, 4)

    def forward(self, indices, z, sigma, attention_mask=None, c_cont=None):
        assert indices.shape[1] == z.shape[1] == LENGTH
        keep = torch.ones_like(sigma)[:, None] if attention_mask is None else attention_mask
        hidden = (self.words(indices) + self.latent_in(z)) * keep[..., None]
        times = self.times(torch.stack([sigma, c_cont], dim=1))
        hidden = torch.tanh(hidden + hidden.mean(dim=1, keepdim=True) + times[:, None])
        return self.text_out(hidden), self.latent_out(hidden)


class SD3JointModel(nn.Module):
    """As the class of D-DiT: images, embedded words, one time in thousandths."""

    shape, vocab_size = (2, 4, 4), WORDS

    def __init__(self, width=8):
        super().__init__()
        self.image_in, self.words_in = nn.Linear(32, width), nn.Linear(8, width)
        self.time_in, self.image_out = nn.Linear(1, width), nn.Linear(width, 32)
        self.text_proj_out = nn.Linear(width, WORDS)

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        pooled_projections=None,
        timestep=None,
        block_controlnet_hidden_states=None,
        joint_attention_kwargs=None,
        return_dict=True,
    ):
        words = self.words_in(encoder_hidden_states)
        state = self.image_in(hidden_states.flatten(1)) + self.time_in(timestep[:, None] / 1000)
        words = torch.tanh(words + (state + words.mean(dim=1))[:, None])
        image = self.image_out(words.mean(dim=1)).view_as(hidden_states)
        return image, self.text_proj_out(words)


class T5(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(WORDS, 8)

    def forward(self, input_ids):
        return (self.shared(input_ids),)


def step_of(host):
    torch.manual_seed(0)
    if host is MMDIT:
        return ccdd.step_module(MMDIT(), mask_id=MASK)
    return dual_diffusion.step_module(SD3JointModel(), T5(), NULL, mask_id=MASK)


def batch_of(host, rows=4):
    words = torch.randint(MASK, (4, rows, LENGTH), generator=torch.Generator().manual_seed(0))
    latents = torch.randn(2, rows, *host.shape, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(rows, LENGTH, dtype=torch.bool)
    return cv.Batch(words[0], mask, latents[0], words[1], mask, latents[1])


both = pytest.mark.parametrize("host", [MMDIT, SD3JointModel])


@both
def test_it_is_a_denoiser(host):
    step = step_of(host)
    lengths = (LENGTH, LENGTH)
    processes = step.objective.text_process, step.objective.latent_process
    check_denoiser(step.denoiser, *processes, latent_shape=host.shape, lengths=lengths)


@both
def test_a_step_teaches_all_of_the_model(host):
    step = step_of(host)
    output = step(batch_of(host), step=0)
    output.loss.backward()
    assert {"text_loss", "latent_loss", "cycle_text_loss", "cycle_latent_loss"} <= set(
        output.metrics
    )
    model = step.denoiser.module.model
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    # what T5 has is the pipeline's: neither trained nor saved
    assert len(list(step.parameters())) == len(list(model.parameters()))


@both
def test_what_was_trained_reads_and_writes(host, tmp_path):
    step, (tokens, mask, z) = step_of(host), batch_of(host)[:3]
    text, latent = step.objective.text_process, step.objective.latent_process
    processes = {"text_process": text, "latent_process": latent}
    z_hat = cv.encode(step.denoiser, tokens, mask, noise=torch.randn_like(z), **processes)
    assert z_hat.shape == z.shape and z_hat.isfinite().all()
    written = cv.decode(step.denoiser, z, mask, text_process=text)
    best = cv.best_text(step.denoiser, z, mask, samples=2, **processes)
    assert not ((written == MASK) | (best.tokens == MASK)).any()
    if host is MMDIT:
        with pytest.raises(ValueError, match=r"`latent_process\.schedule` is <function vp_linear"):
            cv.save(tmp_path / "model.pt", step.denoiser, step.objective)
    else:
        cv.save(tmp_path / "model.pt", step.denoiser, step.objective)
        assert cv.load(tmp_path / "model.pt", step.denoiser.module).objective == step.objective


def test_ccdd_with_padding_reads_none():
    torch.manual_seed(0)
    step, batch = ccdd.step_module(MMDIT(), mask_id=MASK, padded=True), batch_of(MMDIT)
    mask = torch.arange(LENGTH) < torch.tensor([6, 4, 3, 2])[:, None]
    masks = ("attention_mask", "unpaired_attention_mask", "pseudo_text_mask")
    masks += ("latent_mask", "unpaired_latent_mask", "unpaired_text_latent_mask")
    batch = batch._replace(**dict.fromkeys(masks, mask))
    padding = {
        name: torch.where(mask, getattr(batch, name), 0) for name in ("tokens", "unpaired_tokens")
    }
    for name in ("latents", "unpaired_latents"):
        padding[name] = torch.where(mask[..., None], getattr(batch, name), torch.nan)
    losses = []
    for each in (batch, batch._replace(**padding)):
        torch.manual_seed(1)
        losses.append(step(each, step=0).loss)
    assert torch.isfinite(losses[0]) and torch.equal(*losses)
    with pytest.raises(TypeError, match="latent_mask"):  # texts padded, and latents not
        step(batch._replace(**dict.fromkeys(masks[3:])), step=0)


def words_over_rate(logits, tokens, read, rate):
    """`1/(b s) sum of -log p(y_l)/rate over the masked words`, where the mask is no word."""
    total = 0.0
    for row, position in (read == MASK).nonzero().tolist():
        chances = [math.exp(x) for x in logits[row, position].double().tolist()]
        chances[MASK] = 0.0
        chance = chances[tokens[row, position]] / sum(chances[:WORDS])
        total -= math.log(chance) / rate[row].item()
    return total / tokens.numel()


@pytest.fixture
def recorded():
    """`recorded(module)` are the calls of a module from then on: what went in, what came out."""

    def record(module):
        calls = []
        module.register_forward_hook(
            lambda module, given, told, out: calls.append((given, told, out)), with_kwargs=True
        )
        return calls

    return record


def test_the_losses_of_ccdd_are_those_of_its_trainer(recorded):
    """Both parts noised at one time: `1/t` for masked words, and a mean of squared errors."""
    step, batch, time = step_of(MMDIT), batch_of(MMDIT), torch.tensor([0.2, 0.4, 0.6, 0.9])
    calls, noise = recorded(step.denoiser.module.model), torch.randn_like(batch.latents)
    found = cv.unconditional_loss(
        step.denoiser,
        *(batch.tokens, batch.latents, batch.attention_mask),
        text_process=step.objective.text_process,
        latent_process=step.objective.latent_process,
        text_time=time,
        latent_time=time,
        noise=noise,
    )
    ((read, z_t, told), more, (logits, prediction)) = calls[0]
    assert torch.equal(told, time) and torch.equal(more["c_cont"], time)
    rate = time.view(-1, 1, 1)
    assert_close(z_t, (1 - rate).sqrt() * batch.latents + rate.sqrt() * noise)
    assert found.text.item() == pytest.approx(words_over_rate(logits, batch.tokens, read, time))
    assert_close(found.latent, F.mse_loss(prediction, batch.latents))


def test_the_losses_of_d_dit_are_those_of_its_trainer(recorded):
    """Images given clean words or none; masked words given a clean image, at its time 0."""
    torch.manual_seed(0)
    model, t5, batch = SD3JointModel(), T5(), batch_of(SD3JointModel)
    step = dual_diffusion.step_module(model, t5, NULL, mask_id=MASK)
    pairs = batch.tokens, batch.latents, batch.attention_mask
    options = {"text_process": step.objective.text_process}
    both = options | {"latent_process": step.objective.latent_process}
    time, dropped = torch.tensor([0.2, 0.4, 0.6, 1.0]), torch.tensor([True, False, False, True])
    calls, texts, noise = recorded(model), recorded(t5), torch.randn_like(batch.latents)
    encoder = cv.without_condition(step.denoiser, **both, rows=dropped)
    image = cv.t2l_loss(encoder, *pairs, **both, time=time, noise=noise, space="x0")
    caption = cv.l2t_loss(step.denoiser, *pairs, **options, text_time=time, weighting="bound")

    ((z_t, _), told, (velocity, _)), ((clean, _), untold, (_, logits)) = calls
    ((words,), _, _), ((read,), _, _) = texts
    rate = time.view(-1, 1, 1, 1)
    assert torch.equal(words, torch.where(dropped[:, None], NULL, batch.tokens))
    assert_close(z_t, (1 - rate) * batch.latents + rate * noise)
    assert_close(told["timestep"], 1000 * time)
    assert_close(image, F.mse_loss(z_t - rate * velocity, batch.latents))
    assert torch.equal(clean, batch.latents) and not untold["timestep"].any()
    assert caption.item() == pytest.approx(words_over_rate(logits, batch.tokens, read, time))
