"""Objectives from options that lie side by side: a shorthand of tests that vary one at a time.

The terms stand in an order in which draws come as they came in version 0.1.
"""

import cyclevae as cv
from cyclevae.processes.schedules import Turn

WEIGHTS = {
    "text": 1.0,
    "latent": 5.0,
    "unconditional": 0.0,
    "cycle_text": 4.0,
    "cycle_latent": 0.0,
    "prior": 0.0,
    "sleep": 0.0,
    "contrastive": 0.0,
    "text_marginal": 0.0,
}
OBJECTIVE = ("join_passes", "non_finite", "seed")


def flat(text_process, latent_process, **options):
    """An objective; an option that no term reads is an error."""
    told = Told(options)
    weights = {term: told(f"{term}_weight", weight) for term, weight in WEIGHTS.items()}
    caps = told("caps", {})
    bridge_time, latent_bridge = told("bridge_time", 1.0), told("latent_bridge", NOISED)
    latent_bridge = as_bridge(latent_bridge)
    text_bridge, latent_policy = told("text_bridge", "categorical"), told("latent_policy", None)
    text_policy = told("text_policy", None)
    every, fraction = told("cycle_every", 1), told("cycle_fraction", 1.0)
    pairs, p_dual = told("cycle_pairs", False), told("p_dual", 1.0)
    if p_dual < 1:
        seed = options.get("seed", 0)
        for term in ("cycle_text", "cycle_latent", "text_marginal", "sleep"):
            if weights[term] != 0:
                turn = int(term != "cycle_text")
                weights[term] = Turn(weights[term], turn, 2, p_dual, every, seed)
    cycled = {"every": every, "fraction": fraction, "pairs": pairs}
    through = "full" if bridge_rule(text_policy) == "full" else "last"
    reads = {"bridge": latent_bridge, "time": bridge_time, "through": through}
    base_time = told("base_latent_time", 1.0)
    if base_time is None:
        high = bridge_time.high if isinstance(bridge_time, cv.TimePolicy) else bridge_time
        base_time = cv.TimePolicy("uniform", high=high)
    frozen = getattr(latent_policy, "freeze_bridge", ())
    of = {
        "text": lambda **o: cv.Text(time=told("base_text_time", cv.TimePolicy("uniform")), **o),
        "cycle_latent": lambda **o: cv.CycleLatent(
            bridge=text_bridge,
            time=bridge_time,
            show_latent=told("show_latent", False),
            distance=told("cycle_latent_distance", "mse"),
            policy=latent_policy or "stop_gradient",
            **cycled,
            **o,
        ),
        "text_marginal": lambda **o: cv.TextMarginal(
            bridge=text_bridge, freeze=frozen, **cycled, **o
        ),
        "sleep": lambda **o: cv.Sleep(**cycled, **o),
        "latent": lambda **o: cv.Latent(
            time=base_time,
            distance=told("latent_distance", "mse"),
            space=told("latent_space", None),
            min_snr=told("min_snr", None),
            **o,
        ),
        "cycle_text": lambda **o: cv.CycleText(
            bridge=latent_bridge,
            time=bridge_time,
            policy=text_policy or "stop_gradient",
            **cycled,
            **o,
        ),
        "prior": lambda **o: cv.Prior(
            told("prior", "mmd"),
            pool=told("pool_prior", False),
            options=told("prior_options", {}),
            **reads,
            **o,
        ),
        "contrastive": lambda **o: cv.Contrastive(**told("contrastive_options", {}), **reads, **o),
        "unconditional": lambda **o: cv.Unconditional(
            latent_time=told("unconditional_latent_time", None),
            null_text_rate=told("null_text_rate", None),
            **o,
        ),
    }
    terms = [
        make(weight=weights[name], cap=caps.get(name))
        for name, make in of.items()
        if weights[name] != 0
    ]
    whole = {name: options[name] for name in OBJECTIVE if name in options}
    return cv.CycleObjective(text_process, latent_process, terms, **whole)


class Told:
    """Options by name, with a default."""

    def __init__(self, options):
        self.options = options

    def __call__(self, name, default):
        return self.options.get(name, default)


NOISED = cv.LatentBridge(noise=0.75)


def as_bridge(bridge):
    return cv.LatentBridge(**bridge) if isinstance(bridge, dict) else bridge


def bridge_rule(policy):
    if policy == "full":
        return "full"
    return getattr(policy, "bridge", None)
