"""A stand-in of the trainer in LGDLM's `latentDLM_mmdit`, written anew from its contract.

It keeps what an adapter can see: calls, shapes, dtypes, names, draws, losses, and the faults.
There are three flavours: "stable"; "plain", without its guards (`improved_trainer.py`); and
"fork", of another repository, whose l2t and t2l draw their times.

Reference: https://github.com/Joshua-Zhang-Jiaquan/LGDLM.
"""

import math
import random
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from mmdit.mmdit_generalized_pytorch import MMDiT
from torch import nn

# The model


class TextEncoder(nn.Module):
    def __init__(self, vocab, hidden, length):
        super().__init__()
        self.token_embed = nn.Embedding(vocab, hidden)
        self.position_embed = nn.Parameter(0.02 * torch.randn(1, length, hidden))

    def forward(self, ids):
        return self.token_embed(ids) + self.position_embed[:, : ids.shape[1]]


class LatentEncoder(nn.Module):
    """Normalises inside, so the scale of the latents hardly shows."""

    def __init__(self, latent_dim, hidden):
        super().__init__()
        wide = 2 * hidden
        self.projection = nn.Sequential(
            nn.Linear(latent_dim, wide), nn.LayerNorm(wide), nn.GELU(), nn.Linear(wide, hidden)
        )
        self.position_embed = nn.Parameter(0.02 * torch.randn(1, 1, hidden))

    def forward(self, z):
        return self.projection(z) + self.position_embed


class ForkLatentEncoder(nn.Module):
    """Normalises first, and adds a linear map of the raw latents."""

    def __init__(self, latent_dim, hidden):
        super().__init__()
        wide = 2 * hidden
        self.norm = nn.LayerNorm(latent_dim)
        self.adapter = nn.Sequential(
            nn.Linear(latent_dim, wide), nn.GELU(), nn.Linear(wide, hidden)
        )
        self.residual_proj = nn.Linear(latent_dim, hidden)
        self.position_embed = nn.Parameter(0.02 * torch.randn(1, 1, hidden))

    def forward(self, z):
        return self.adapter(self.norm(z)) + self.residual_proj(z) + self.position_embed


class TimeEmbedder(nn.Module):
    """Waves of t, computed in float32 and rounded to the dtype of t."""

    def __init__(self, width, waves=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(waves, width), nn.SiLU(), nn.Linear(width, width))
        self.half = waves // 2

    def forward(self, t):
        steps = torch.arange(self.half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10_000) * steps / self.half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(t.dtype))


class Conditioning(nn.Module):
    """Both times together; None is zero."""

    def __init__(self, width):
        super().__init__()
        self.text_sigma_map = TimeEmbedder(width)
        self.latent_sigma_map = TimeEmbedder(width)
        self.combine = nn.Sequential(
            nn.Linear(2 * width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
        )

    def forward(self, text_time, latent_time):
        weight = self.combine[0].weight
        known = text_time if text_time is not None else latent_time
        none = weight.new_zeros(1 if known is None else len(known))
        text_time, latent_time = (
            none if t is None else t.to(weight.dtype) for t in (text_time, latent_time)
        )
        text, latent = self.text_sigma_map(text_time), self.latent_sigma_map(latent_time)
        return self.combine(torch.cat([F.silu(text), F.silu(latent)], dim=-1))


class HostModel(nn.Module):
    """The real `mmdit` between the host's encoders and heads."""

    def __init__(
        self,
        vocab,
        latent_dim,
        *,
        hidden=32,
        blocks=1,
        length=12,
        cluster_size=0,
        dropout=0.0,
        encoder=LatentEncoder,
    ):
        super().__init__()
        self.vocab_size, self.latent_dim, self.cluster_size = vocab, latent_dim, cluster_size
        self.text_encoder = TextEncoder(vocab, hidden, length)
        self.latent_encoder = encoder(latent_dim, hidden)
        self.conditioning = Conditioning(hidden)
        self.mmdit = MMDiT(
            depth=blocks,
            dim_modalities=(hidden, hidden),
            dim_cond=hidden,
            qk_rmsnorm=True,
            num_residual_streams=2,
        )
        self.text_head = nn.Linear(hidden, vocab)
        self.latent_head = nn.Sequential(
            nn.Linear(hidden, 2 * hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * hidden, latent_dim),
        )
        self.text_head_clusters = nn.Linear(hidden, vocab) if cluster_size else None
        for head in (self.text_head, self.latent_head[-1], self.text_head_clusters):
            if head is not None:
                nn.init.normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)

    def forward(self, text_tokens, latents, text_timesteps, latent_timesteps, attention_mask=None):
        assert latents is not None, "the blocks join two modalities"
        text = self.text_encoder(text_tokens)
        latents = latents.to(text.dtype)
        latents = latents[:, None] if latents.dim() == 2 else latents.mean(dim=1, keepdim=True)
        latent = self.latent_encoder(latents)
        if attention_mask is None:
            attention_mask = torch.ones_like(text_tokens)
        text, latent = self.mmdit(
            modality_tokens=(text, latent),
            modality_masks=(attention_mask.bool(), latent.new_ones(latent.shape[:2]).bool()),
            time_cond=self.conditioning(text_timesteps, latent_timesteps),
        )
        output = self.text_head(text), self.latent_head(latent)
        if self.text_head_clusters is not None:
            output += (self.text_head_clusters(text),)
        return output


class QuickModel(nn.Module):
    """Of the same call, names and outputs, without the blocks, for tests of many steps."""

    def __init__(self, vocab, latent_dim, *, hidden=64, length=12):
        super().__init__()
        self.latent_dim = latent_dim
        self.text_encoder = nn.Embedding(vocab, hidden)
        self.latent_encoder = nn.Linear(latent_dim, hidden)
        self.position = nn.Parameter(0.1 * torch.randn(length, hidden))
        self.mix = nn.Sequential(nn.Linear(2 * hidden + 2, hidden), nn.GELU())
        self.text_head = nn.Linear(hidden, vocab)
        self.latent_head = nn.Linear(hidden, latent_dim)

    def forward(self, text_tokens, latents, text_timesteps, latent_timesteps, attention_mask=None):
        words = self.text_encoder(text_tokens)
        kept = torch.ones_like(text_tokens) if attention_mask is None else attention_mask
        kept = kept.to(words.dtype)[..., None]
        words = (words * kept).sum(1) / kept.sum(1).clamp(min=1)
        latent = self.latent_encoder(latents.to(words.dtype).flatten(1))
        times = torch.stack([text_timesteps, latent_timesteps], dim=1).to(words.dtype)
        mixed = self.mix(torch.cat([words, latent, times], dim=1))[:, None]
        places = F.gelu(mixed + self.position[: text_tokens.shape[1]])
        return self.text_head(places), self.latent_head(mixed)


# The processes


class Diffusion:
    """The noise of the latents, in tables. No module: `.to` does not move it."""

    def __init__(
        self,
        num_timesteps=1000,
        beta_schedule="cosine",
        beta_start=1e-4,
        beta_end=0.02,
        parameterization="epsilon",
        device="cpu",
    ):
        self.num_timesteps, self.parameterization = num_timesteps, parameterization
        self.device = device
        if beta_schedule == "cosine":
            angle = (torch.arange(num_timesteps + 1.0) / num_timesteps + 0.008) / 1.008
            signal = (angle * math.pi / 2).cos() ** 2
            betas = (1 - signal[1:] / signal[:-1]).clip(1e-4, 0.9999)
        elif beta_schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, num_timesteps)
        else:
            raise ValueError(f"Unknown beta_schedule: {beta_schedule}")
        self.betas = betas.to(device)
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()

    def sample_continuous_timesteps(self, batch_size, device=None):
        return torch.rand(batch_size, device=device or self.device)

    def get_schedule_values(self, t, device=None):
        """Of times up to 1, or of steps above: which one, the largest of t says, on the host."""
        last = self.num_timesteps - 1
        if t.max() <= 1:
            t = t * last
        index = t.long().clamp(0, last)
        tables = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        return tuple(table.to(device or t.device)[index] for table in tables)

    def add_noise(self, x0, t, noise=None):
        noise = torch.randn_like(x0) if noise is None else noise
        shape = (-1,) + (1,) * (x0.dim() - 1)
        a, b = (value.view(shape) for value in self.get_schedule_values(t, x0.device))
        targets = {
            "epsilon": lambda: noise,
            "x0": lambda: x0,
            "v_param": lambda: a * noise - b * x0,
        }
        if self.parameterization not in targets:
            raise ValueError(f"Unknown parameterization: {self.parameterization}")
        return a * x0 + b * noise, targets[self.parameterization]()


class TextSchedule(nn.Module):
    """Masks each token, pads too, with the probability t; no time masks all for certain."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.mask_id, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)
        prior = torch.full((self.vocab_size,), -1e3)
        prior[self.mask_id] = 0.0
        self.register_buffer("log_prior", prior.log_softmax(-1))
        self.register_buffer("log_gamma", torch.tensor(0.0))
        self.register_buffer("log_B", torch.tensor(-20.0))

    def sample_zt(self, input_ids, t, eps=1e-4):
        rate = (1 - eps) * t.clip(eps, 1)
        hidden = torch.rand(input_ids.shape, device=input_ids.device) < rate[:, None]
        return torch.where(hidden, self.mask_id, input_ids)


# The surroundings


class Tokenizer:
    pad_token_id, unk_token_id, cls_token_id, sep_token_id, mask_token_id = range(5)

    def __init__(self, vocab):
        self.vocab_size, self.all_special_ids = vocab, list(range(5))

    def __len__(self):
        return self.vocab_size


class Config(Mapping):
    """As much of an OmegaConf `DictConfig` as a trainer reads."""

    def __init__(self, values):
        for key, value in values.items():
            setattr(self, key, Config(value) if isinstance(value, Mapping) else value)

    def __getitem__(self, key):
        return vars(self)[key]

    def __iter__(self):
        return iter(vars(self))

    def __len__(self):
        return len(vars(self))


# The trainer


class Trainer(nn.Module):
    """Of one mode a step; `make_host` gives it the host's name."""

    normalises = True  # the latent loss compares directions, is weighted, and all are guarded
    samples_times = False  # l2t and t2l draw the time of what they predict

    def __init__(self, model, tokenizer, text_noise_schedule, dtype, config):
        super().__init__()
        self.model, self.tokenizer, self.dtype, self.config = model, tokenizer, dtype, config
        self.text_noise_schedule = text_noise_schedule
        self.latent_diffusion = Diffusion(  # from the root, not from config.model
            num_timesteps=config.get("latent_timesteps", 1000),
            beta_schedule=config.get("latent_beta_schedule", "cosine"),
            parameterization=config.get("latent_parameterization", "epsilon"),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        self.mask_token_id = tokenizer.mask_token_id
        self.loss_type = getattr(config.loss, "loss_type", "multimodal_mdlm")
        self.current_step = self.current_epoch = 0
        self.text_params, self.latent_params, self.shared_params = set(), set(), set()
        for name, parameter in model.named_parameters():
            if name.startswith(("text_encoder", "text_head")):
                self.text_params.add(parameter)
            elif name.startswith(("latent_encoder", "latent_head")):
                self.latent_params.add(parameter)
            else:
                self.shared_params.add(parameter)

    def _freeze_unneeded_params(self, mode):
        """Leaves the model frozen after the step, and forgets gradients of steps before."""
        self.model.requires_grad_(True)
        for parameter in {"l2t": self.latent_params, "t2l": self.text_params}.get(mode, ()):
            parameter.requires_grad = False
            parameter.grad = None

    def get_training_mode(self, step=None):
        """Unknown names train "unconditional"."""
        training = self.config.training
        if self.loss_type in ("l2t", "t2l"):
            return self.loss_type
        if self.loss_type == "random":
            weights = np.array(getattr(training, "mode_weights", [1.0, 1.0, 1.0]))
            return np.random.choice(["unconditional", "l2t", "t2l"], p=weights / weights.sum())
        phases = getattr(training, "sequential_schedule", None)
        if self.loss_type == "sequential" and phases:
            unit, default = ("epochs", 1) if step is None else ("steps", 1000)
            lengths = [phase.get(unit, default) for phase in phases]
            left = (self.current_epoch if step is None else step) % sum(lengths)
            for phase, length in zip(phases, lengths, strict=True):
                if left < length:
                    return phase["type"]
                left -= length
        return "unconditional"

    def forward(self, batch, step=None):
        self.current_step = step or self.current_step
        mode = self.get_training_mode(step)
        self._freeze_unneeded_params(mode)
        tokens, mask = batch["input_ids"], batch.get("attention_mask")
        latents = batch["latent"].to(tokens.device, self.dtype)
        if latents.dim() == 3 and latents.shape[1] == 1:
            latents = latents[:, 0]

        text_time, latent_time = self._times(mode, len(tokens), tokens.device)
        noisy_tokens = self._noisy_tokens(mode, tokens, text_time)
        noisy_latents, target = latents, None
        if mode != "l2t":
            noise = torch.randn_like(latents)
            noisy_latents, target = self.latent_diffusion.add_noise(latents, latent_time, noise)
        logits, prediction = self.model(
            text_tokens=noisy_tokens,
            latents=noisy_latents[:, None],
            text_timesteps=text_time.to(self.dtype),
            latent_timesteps=latent_time.to(self.dtype),
            attention_mask=None if mask is None else mask.bool(),
        )

        nothing = torch.tensor(0.0, device=tokens.device, dtype=self.dtype)
        text_loss = latent_loss = nothing
        weight, accuracy = 1.0, 0.0
        hidden = noisy_tokens == self.mask_token_id  # the pads as well
        if mode != "t2l" and hidden.any():
            text_loss = self._guarded(self._text_loss(logits, tokens, hidden), 100.0)
            hits = logits.detach().argmax(-1) == tokens
            accuracy = hits[hidden].float().mean().item()
        if mode != "l2t":
            latent_loss = self._guarded(self._latent_loss(prediction, target[:, None]), 10.0)
            if self.normalises:
                weight = getattr(self.config.loss, "latent_loss_weight", 0.1)
        loss = nothing + text_loss + weight * latent_loss
        metrics = {
            "loss": loss.item(),
            "text_loss": text_loss.item(),
            "latent_loss": latent_loss.item(),
            "text_accuracy": accuracy,
            "training_mode": mode,  # of "random", a numpy.str_
            "latent_norm": latents.norm(dim=-1).mean().item(),
        }
        if mode != "l2t":
            metrics["latent_pred_norm"] = prediction.norm(dim=-1).mean().item()
        if self.current_step % 100 == 0:
            sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
            metrics["active_params_ratio"] = sum(n * on for n, on in sizes) / sum(
                n for n, _ in sizes
            )
        return loss, metrics

    def _times(self, mode, rows, device):
        clean, noise = torch.zeros(rows, device=device), torch.ones(rows, device=device)
        text, latent = {"l2t": (noise, clean), "t2l": (clean, noise)}.get(mode, (noise, noise))
        draws = self.samples_times or mode == "unconditional"
        if draws and mode != "t2l":
            text = self._text_times(rows, device)
        if draws and mode != "l2t":
            latent = self.latent_diffusion.sample_continuous_timesteps(rows, device=device)
        return text, latent

    def _text_times(self, rows, device):
        if not self.samples_times:
            return torch.rand(rows, device=device)
        if self.config.training.low_discrepancy_sampling:
            t = (torch.arange(rows, device=device) / rows + torch.rand(1, device=device)) % 1
        else:
            t = torch.rand(rows, device=device)
        eps = self.config.model.t_eps
        return eps + (1 - 2 * eps) * t

    def _noisy_tokens(self, mode, tokens, time):
        if mode == "t2l":
            return tokens
        if mode == "l2t" and not self.samples_times:
            return torch.full_like(tokens, self.mask_token_id)
        return self.text_noise_schedule.sample_zt(tokens, time)

    def _text_loss(self, logits, tokens, hidden):
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        count = hidden.sum().clamp(min=1)
        if self.normalises:
            count = count + 1e-8  # a float32, which makes the loss one
        return (losses * hidden.flatten()).sum() / count

    def _latent_loss(self, prediction, target):
        if self.normalises:
            prediction = F.normalize(prediction, dim=-1, eps=1e-8)
            target = F.normalize(target, dim=-1, eps=1e-8)
        return F.mse_loss(prediction, target)

    def _guarded(self, loss, top):
        """A bad loss becomes a constant, which has no backward."""
        if not self.normalises:
            return loss
        loss = loss.clamp(0.0, top)
        return loss if loss.isfinite() else torch.zeros_like(loss, dtype=self.dtype)


def _named(file, **differences):
    body = {"__module__": f"latentDLM_mmdit.{file}", **differences}
    return type("MultimodalDiffusionTrainer_new", (Trainer,), body)


FLAVOURS = {
    "stable": (_named("improved_trainer_stable"), LatentEncoder),
    "plain": (_named("improved_trainer", normalises=False), LatentEncoder),
    "fork": (_named("improved_trainer_stable", samples_times=True), ForkLatentEncoder),
}


def make_host(
    *,
    flavour="stable",
    parameterization="v_param",
    dtype=torch.float32,
    hidden=32,
    blocks=1,
    vocab=40,
    latent_dim=8,
    length=12,
    cluster_size=0,
    dropout=0.0,
    seed=0,
    training=None,
    quick=False,
    **loss,
):
    """A trainer; the rest goes into `config.loss`, and `training` into `config.training`."""
    kind, encoder = FLAVOURS[flavour]
    tokenizer = Tokenizer(vocab)
    config = Config(
        {
            "latent_parameterization": parameterization,
            "model": {"latent_parameterization": "epsilon", "t_eps": 1e-4},  # the first: not read
            "training": {"low_discrepancy_sampling": False, **(training or {})},
            "loss": {"loss_type": "l2t", **loss},
        }
    )
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)  # mmdit draws by it which of its streams a block begins with
        model = (
            QuickModel(vocab, latent_dim, length=length)
            if quick
            else HostModel(
                vocab,
                latent_dim,
                hidden=hidden,
                blocks=blocks,
                length=length,
                cluster_size=cluster_size,
                dropout=dropout,
                encoder=encoder,
            )
        )
    random.setstate(state)
    return kind(
        model=model.to(dtype),
        tokenizer=tokenizer,
        text_noise_schedule=TextSchedule(tokenizer),
        dtype=dtype,
        config=config,
    )


def make_batch(rows=4, *, vocab=40, length=12, latent_dim=8, seed=0):
    """What the host's collate makes: [CLS] words [SEP] and pads, and latents of norm one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab, (rows, length), generator=generator)
    ids[:, 0] = Tokenizer.cls_token_id
    ends = length - 1 - torch.arange(rows)[:, None] % (length - 2)  # the first row is full
    places = torch.arange(length)
    ids = torch.where(places == ends, Tokenizer.sep_token_id, ids)
    ids = torch.where(places > ends, Tokenizer.pad_token_id, ids)
    return {
        "input_ids": ids,
        "attention_mask": (places <= ends).float(),
        "latent": F.normalize(torch.randn(rows, latent_dim, generator=generator), dim=-1),
    }
