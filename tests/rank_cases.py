"""What the tests of ranks share: batches for uneven ranks, objectives with every term, wrappers.

A module of its own, because the processes of the ranks import it.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import cyclevae as cv
from cyclevae.testing import ToyNetwork, check_denoiser
from flat import flat
from recipes import EVERY_TERM

TEXT = cv.TextProcess(2, 7, pad_id=0)
LATENT = cv.LatentProcess("continuous_cosine", shape=(4,))
UNIFORM = cv.TimePolicy("uniform", low=0.1, high=0.9)
ONLY = {f"{term}_weight": 0.0 for term in ("text", "latent", "unconditional")} | {
    f"cycle_{term}_weight": 0.0 for term in ("text", "latent")
}
FULL = cv.GradientPolicy("full")


def relaxed(name, **options):
    bridge = cv.TextBridge(name, **options)
    return {**ONLY, "cycle_latent_weight": 1.0, "text_bridge": bridge, "latent_policy": FULL}


# Every per-sample term by itself, so that none hides behind the others
TERMS = {
    "recommended": {},
    "text": {**ONLY, "text_weight": 1.0},
    "latent": {**ONLY, "latent_weight": 1.0},
    "latent at random times": {**ONLY, "latent_weight": 1.0, "base_latent_time": UNIFORM},
    "latent below the cap": {**ONLY, "latent_weight": 1.0, "base_latent_time": None},
    "latent by cosine": {**ONLY, "latent_weight": 1.0, "latent_distance": "cosine"},
    "unconditional": {**ONLY, "unconditional_weight": 1.0},
    "unconditional without texts": {**ONLY, "unconditional_weight": 1.0, "null_text_rate": 0.5},
    "cycle_text": {**ONLY, "cycle_text_weight": 1.0, "text_policy": FULL},
    "cycle_text at random times": {**ONLY, "cycle_text_weight": 1.0, "bridge_time": UNIFORM},
    "cycle_text in steps": {
        **ONLY,
        "cycle_text_weight": 1.0,
        "latent_bridge": cv.LatentBridge(steps=2),
    },
    "cycle_text through noise": {
        **ONLY,
        "cycle_text_weight": 1.0,
        "latent_bridge": cv.LatentBridge(noise=0.5),
    },
    "cycle_latent": {**ONLY, "cycle_latent_weight": 1.0},
    "cycle_latent, latent shown": {
        **ONLY,
        "cycle_latent_weight": 1.0,
        "show_latent": True,
        "bridge_time": UNIFORM,
    },
    "cycle_latent by unmasking": {
        **ONLY,
        "cycle_latent_weight": 1.0,
        "text_bridge": cv.TextBridge("unmask", steps=2),
    },
    "categorical": {**ONLY, "cycle_latent_weight": 1.0, "text_bridge": "categorical"},
    "gumbel": relaxed("gumbel"),
    "soft": relaxed("soft"),
    "rloo": relaxed("rloo", samples=3, marginal_weight=0.1),
    "text_marginal": {
        **ONLY,
        "text_marginal_weight": 1.0,
        "text_bridge": "gumbel",
        "latent_policy": FULL,
    },
    "sleep": {**ONLY, "sleep_weight": 1.0},
    "learned": {**ONLY, "prior_weight": 1.0, "prior": "learned"},
    "ddvi": {**ONLY, "prior_weight": 1.0, "prior": "ddvi"},
}


def batch(pairs=2, texts=2, latents=2, *, width=5, seed=0):
    """Random rows; padded to `width`, with texts of every length from 1."""
    generator = torch.Generator().manual_seed(seed)

    def rows(number):
        lengths = 1 + torch.randperm(number, generator=generator)[:, None] % width
        mask = torch.arange(width) < lengths
        return torch.randint(3, 7, (number, width), generator=generator) * mask, mask

    def normal(number):
        return torch.randn(number, 4, generator=generator)

    unpaired = {}
    if texts:
        tokens, mask = rows(texts)
        unpaired |= {"unpaired_tokens": tokens, "unpaired_attention_mask": mask}
    if latents:
        unpaired |= {"unpaired_latents": normal(latents), "pseudo_text_mask": rows(latents)[1]}
    return cv.Batch(*rows(pairs), normal(pairs), **unpaired)


# Uneven in every way, by rank and accumulation step; rank 1 has no unpaired row
PARTS = [
    [batch(1, 2, 3, width=4, seed=1), batch(3, 0, 1, seed=2)],
    [batch(3, 0, 0, width=6, seed=3), batch(2, 0, 0, width=2, seed=4)],
    [batch(2, 1, 0, seed=5)],
]
FIRST_STEP = [batches[:1] for batches in PARTS]
FROZEN = {"text_policy": cv.GradientPolicy(freeze=("text_head.*",))}


def network(kind=ToyNetwork):
    return kind(vocab_size=7, latent_dim=4)


def module(objective=cv.CycleObjective, kind=ToyNetwork, **options):
    student = network(kind)
    teacher = cv.Teacher(network()) if options.get("prior") in ("learned", "ddvi") else None
    told = flat(TEXT, LATENT, **EVERY_TERM | options)
    whole = {name: getattr(told, name) for name in ("join_passes", "non_finite", "seed")}
    told = objective(TEXT, LATENT, told.terms, **whole)
    return cv.StepModule(cv.as_denoiser(student), told, teacher)


def makes(*arguments, **options):
    return partial(module, *arguments, **options)


# What training wraps around a step or a network

FINDS_UNUSED = partial(DistributedDataParallel, find_unused_parameters=True)
STATIC = partial(DistributedDataParallel, static_graph=True)
fsdp2 = pytest.mark.skipif(
    torch.__version__.startswith("2.5."), reason="FSDP2 of torch 2.5 needs CUDA"
)


def shard(network):
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (network.shared, network.text_head):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def fsdp(module):
    shard(module.network)
    check_denoiser(module.denoiser, TEXT, LATENT, dtype=torch.float64)
    return module


# Mistakes that the harness must find


class Forgetful(cv.CycleObjective):
    """Averages over the rows of each call."""

    def __call__(self, *arguments, counts=None, **options):
        return super().__call__(*arguments, **options)


class Normalised(ToyNetwork):
    """Rows see each other."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, tokens, latents, **state):
        return super().forward(tokens, self.norm(latents), **state)


class Dropping(ToyNetwork):
    def forward(self, tokens, latents, **state):
        return super().forward(tokens, torch.nn.functional.dropout(latents, 0.5), **state)


class Noisy(ToyNetwork):
    """A draw of its own, one number for all rows of a call."""

    def forward(self, tokens, latents, **state):
        return super().forward(tokens, latents * torch.empty(()).normal_(), **state)
