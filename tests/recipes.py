"""Objectives that differ from the default in one option each, for tests that run them all."""

from dataclasses import replace

import cyclevae as cv
from cyclevae.testing import toy_denoiser
from flat import WEIGHTS, flat

_, TEXT, LATENT = toy_denoiser(seed=0)
FULL = cv.GradientPolicy("full")
FROZEN = cv.GradientPolicy("full", freeze=("word.*", "text_head.*"), freeze_bridge=("shared.*",))
EPSILON = cv.LatentProcess(prediction="epsilon", shape=(4,))
X0 = cv.LatentProcess("continuous_cosine", prediction="x0", shape=(4,))
UNIFORM = cv.UniformTextProcess(vocab_size=7, pad_id=0)
HYBRID = cv.HybridTextProcess(2, 7, pad_id=0, p_uniform=0.2)

EVERY_TERM = {
    "unconditional_weight": 1.0,
    "cycle_text_weight": 2.0,
    "cycle_latent_weight": 10.0,
    "base_text_time": 1.0,
    "cycle_pairs": True,
    "text_bridge": "argmax",
    "latent_bridge": cv.LatentBridge(),
}


def only(*terms):
    return {f"{term}_weight": float(term in terms) for term in WEIGHTS}


def prior(name, **options):
    return only("prior") | {"prior": name, "prior_options": options}


RECIPES = {
    "default": {},
    "argmax bridge": only("cycle_latent"),
    "categorical bridge": only("cycle_latent") | {"text_bridge": "categorical"},
    **{
        f"{name} bridge": only("cycle_latent") | {"text_bridge": name, "latent_policy": FULL}
        for name in ("straight_through", "sampled_straight_through", "gumbel", "soft", "rloo")
    },
    "unmask bridge": only("cycle_latent") | {"text_bridge": cv.TextBridge("unmask", steps=3)},
    **{
        f"three steps, {bridge}": only("cycle_text")
        | {"latent_bridge": cv.LatentBridge(steps=3), "text_policy": cv.GradientPolicy(bridge)}
        for bridge in ("detach", "last", "full")
    },
    "guards": only("cycle_text")
    | {"latent_bridge": cv.LatentBridge(steps=2, noise=0.1, threshold=1.0, norm=2.0)},
    "frozen": {
        "text_policy": FROZEN,
        "latent_policy": cv.GradientPolicy(freeze=("times.*",)),
    },
    "isolated": {"text_policy": "decoder_isolated", "latent_policy": "encoder_isolated"},
    "skip": {"non_finite": "skip"},
    "joined": {"join_passes": True},
    "predicted end": {"text_process": replace(TEXT, end_id=3, end="predicted")},
    "placed ends": {"text_process": replace(TEXT, start_id=4, end_id=3)},
    "times": {
        "bridge_time": cv.TimePolicy("uniform", high=0.8),
        "base_latent_time": None,
        "unconditional_latent_time": cv.TimePolicy("logit_normal"),
    },
    "moving cap": {
        "latent_process": EPSILON,
        "bridge_time": cv.TimePolicy("full", high=cv.anneal(0.5, 0.9, steps=10)),
        "base_latent_time": None,
    },
    "x0, latent shown": only("cycle_latent") | {"latent_process": X0, "show_latent": True},
    **{f"moments, {form}": prior("moment", form=form) for form in ("diagonal", "norm")},
    "mmd": prior("mmd"),
    "mmd, imq": prior("mmd", kernel="imq", standardize=True),
    "sigreg": prior("sigreg"),
    "learned": prior("learned"),
    "ddvi": prior("ddvi") | {"sleep_weight": 1.0},
    "contrastive": only("contrastive"),
    "text marginal": only("text_marginal", "cycle_latent")
    | {"text_bridge": "gumbel", "latent_policy": FROZEN},
    "base losses": only("text", "latent") | {"latent_distance": "cosine", "latent_space": "x0"},
    "min snr": only("latent") | {"min_snr": 5.0, "latent_space": "x0", "base_latent_time": None},
    "no cycle of a pair": {"cycle_pairs": False},
    "uniform text": only("text", "unconditional", "text_marginal")
    | {"text_process": UNIFORM, "text_bridge": "gumbel", "latent_policy": FULL},
    "half of the rows": {"cycle_fraction": 0.5, "null_text_rate": 0.2},
}


def every_term(text_process, latent_process, **options):
    """An objective of the unconditional mode and both cycles, on all rows, unless told not."""
    return flat(text_process, latent_process, **EVERY_TERM | options)


def recipe(options):
    return every_term(**{"text_process": TEXT, "latent_process": LATENT} | options)
