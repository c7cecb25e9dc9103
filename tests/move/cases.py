"""Some 240 random objectives and batches, in the options of version 0.1.

Each slot of `SLOTS` says what a case must have; the rest is drawn from the slot's name and the
number of the attempt. `record.py` takes the first attempt that version 0.1 runs.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import cyclevae as cv

TERMS = (
    "text",
    "latent",
    "unconditional",
    "cycle_text",
    "cycle_latent",
    "prior",
    "sleep",
    "contrastive",
    "text_marginal",
)
LOSSES = {
    **{term: (f"{term}_loss",) for term in TERMS},
    "unconditional": ("unconditional_text_loss", "unconditional_latent_loss"),
}
DEFAULT_WEIGHTS = {"text": 1.0, "latent": 5.0, "cycle_text": 4.0}
LATENT_HALF = ("cycle_latent", "text_marginal", "sleep")
READ_Z_HAT = ("cycle_text", "prior", "contrastive")
RELAXED = ("straight_through", "sampled_straight_through", "gumbel", "soft")
STATISTICS = ("moment", "mmd", "sigreg")
MASK, WORDS, DIM = 2, 4, 4


@dataclass(frozen=True)
class Spec:
    """A batch: see `batch_of`."""

    seed: int
    pairs: int
    texts: int
    latents: int
    width: int
    marked: str | None = None  # both, text, latent, nobody
    lengths: bool = True
    shape: tuple[int, ...] = (DIM,)


@dataclass(frozen=True)
class Case:
    """An objective and what it is run on; `batches[rank]` are accumulated."""

    name: str
    kind: str
    theme: str
    options: dict[str, Any]
    text: dict[str, Any]
    latent: dict[str, Any]
    batches: tuple[tuple[Spec, ...], ...]
    step: int
    seed: int
    poison: str | None = None
    phases: dict[str, Any] = field(default_factory=dict)

    @property
    def teacher(self) -> bool:
        """Whether the prior reads one."""
        return self.options.get("prior") in ("learned", "ddvi")

    def weighs(self, term: str) -> bool:
        """Whether a term weighs at some step."""
        return self.options.get(f"{term}_weight", DEFAULT_WEIGHTS.get(term, 0.0)) != 0


# --- the network ------------------------------------------------------------------------------

POISONS = {
    "words shown": lambda need, r, t: need == "logits" and (t == 0).all() and (r < 1).all(),
    "fully masked": lambda need, r, t: need == "logits" and (t == 0).all() and (r == 1).all(),
    "latent shown": lambda need, r, t: need == "latents" and (t < 1).all(),
    "both noised": lambda need, r, t: need == "both",
    "no latent": lambda need, r, t: need == "logits" and (t == 1).all(),
}


class Network(nn.Module):
    """As `ToyNetwork`: names, roles and size; it reads several latent vectors, and positions."""

    calls = 0  # of all networks, a teacher's too
    poisoned = 0

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.word = nn.Embedding(MASK + 1 + WORDS, DIM)
        self.times = nn.Linear(2, DIM)
        self.shared = nn.Linear(DIM, DIM)
        self.text_head = nn.Linear(DIM, MASK + 1 + WORDS)
        self.latent_head = nn.Linear(DIM, DIM)
        self.double()
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.7 * draw)
        self.roles = cv.Roles(encoder_only=("latent_head.*",), decoder_only=("text_head.*",))
        self.poison: str | None = None

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        *,
        text_time: Tensor,
        latent_time: Tensor,
        attention_mask: Tensor,
        need: str = "both",
    ) -> tuple[Tensor | None, Tensor | None]:
        """Mix the mean of the words with each latent vector."""
        Network.calls += 1
        words = cv.embed_tokens(self.word.weight, tokens)
        places = torch.arange(1, words.shape[1] + 1, dtype=words.dtype)[:, None]
        words = words * (1 + places / (3 + torch.arange(DIM)))
        keep = attention_mask.to(words)
        weight = keep / keep.sum(dim=1, keepdim=True).clamp(min=1)
        mean = (weight[..., None] * words).sum(dim=1)
        vectors = latents if latents.ndim == 3 else latents[:, None]
        times = torch.stack([text_time, latent_time], dim=1).to(latents)
        state = (mean + self.times(times))[:, None] + vectors
        hidden = self.shared(state.tanh()).tanh()
        logits = self.text_head(words + hidden.mean(dim=1)[:, None])
        prediction = self.latent_head(hidden).view(latents.shape)
        if self.poison is not None and POISONS[self.poison](need, text_time, latent_time):
            Network.poisoned += 1
            logits, prediction = logits * torch.nan, prediction * torch.nan
        return None if need == "latents" else logits, None if need == "logits" else prediction


def batch_of(spec: Spec) -> cv.Batch:
    """The batch; what stands where a row lacks a part is NaN, or words that no row has."""
    generator = torch.Generator().manual_seed(spec.seed)

    def masks(rows: int, width: int) -> Tensor:
        lengths = 1 + torch.randint(0, width, (rows, 1), generator=generator)
        return torch.arange(width) < lengths

    def texts(rows: int, width: int) -> tuple[Tensor, Tensor]:
        mask = masks(rows, width)
        return torch.randint(3, 7, mask.shape, generator=generator) * mask, mask

    def latents(rows: int) -> Tensor:
        return torch.randn(rows, *spec.shape, generator=generator, dtype=torch.float64)

    parts: dict[str, Tensor] = {}
    if spec.pairs:
        tokens, mask = texts(spec.pairs, spec.width)
        z, rows = latents(spec.pairs), torch.arange(spec.pairs)
        if spec.marked in ("both", "text", "nobody"):
            there = rows % 3 != 1 if spec.marked != "nobody" else rows < 0
            parts["has_text"] = there
            tokens, mask = torch.where(there[:, None], tokens, 6), mask | ~there[:, None]
        if spec.marked in ("both", "latent", "nobody"):
            there = (rows + 1) % 4 != 1 if spec.marked != "nobody" else rows >= 0
            parts["has_latent"] = there
            z = torch.where(there.view(-1, *[1] * (z.ndim - 1)), z, torch.nan)
        parts |= {"tokens": tokens, "attention_mask": mask, "latents": z}
    if spec.texts:
        tokens, mask = texts(spec.texts, spec.width + 1)
        parts |= {"unpaired_tokens": tokens, "unpaired_attention_mask": mask}
    if spec.latents:
        parts["unpaired_latents"] = latents(spec.latents)
        if spec.lengths:
            parts["pseudo_text_mask"] = masks(spec.latents, spec.width + 2)
    return cv.Batch(**parts)


# --- functions of one's own -------------------------------------------------------------------


def next_word(logits: Tensor, mask: Tensor, *, text_process: Any, generator: Any) -> Tensor:
    """A bridge that is a choice of ids."""
    return 3 + (logits.detach()[..., 3:].argmax(dim=-1) + 1) % WORDS


def blurred(logits: Tensor, mask: Tensor, *, text_process: Any, generator: Any) -> Tensor:
    """A bridge with a gradient."""
    words = logits[..., 3:].div(2).softmax(dim=-1)
    return torch.nn.functional.pad(words, (3, 0))


def far_from_one(z: Tensor) -> Tensor:
    """A prior."""
    return (z.flatten(1).square().mean(dim=1) - 1).square().mean()


def strange(z: Tensor, *, power: float) -> Tensor:
    """A prior with an option."""
    return z.abs().pow(power).mean() + z.mean().square()


def smooth(prediction: Tensor, target: Tensor) -> Tensor:
    """A distance of latents."""
    return (1 + (prediction - target).square()).sqrt() - 1


# --- slots ------------------------------------------------------------------------------------

COVARIANCE = torch.eye(DIM, dtype=torch.float64) + 0.3
MEAN = torch.tensor([0.5, -0.5, 0.0, 0.25], dtype=torch.float64)
VARIANCE = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
REFERENCE = torch.tensor(
    [[((7 * i + 3 * j) % 11) / 4 - 1 for j in range(DIM)] for i in range(5)], dtype=torch.float64
)
PRIORS: list[tuple[Any, dict[str, Any]]] = [
    *[("moment", {"form": f}) for f in ("diagonal", "bures", "kl", "norm", "hinge")],
    *[("moment", {"form": f, "mean": 0.5, "variance": 2.0}) for f in ("diagonal", "norm", "kl")],
    *[("moment", {"form": f, "covariance": COVARIANCE}) for f in ("covariance", "norm", "full_kl")],
    ("moment", {"form": "diagonal", "mean": MEAN, "variance": VARIANCE, "estimator": "biased"}),
    ("moment", {"form": "bures", "variance": VARIANCE}),
    ("moment", {"form": "hinge", "threshold": 0.5, "estimator": "biased"}),
    ("moment", {"form": "covariance", "mean": MEAN}),
    ("moment", {"form": "full_kl", "estimator": "biased", "variance": VARIANCE}),
    ("moment", {"form": "full_bures", "estimator": "biased"}),
    ("moment", {"form": "full_bures", "estimator": "biased", "covariance": COVARIANCE}),
    ("mmd", {}),
    ("mmd", {"kernel": "imq"}),
    ("mmd", {"kernel": "imq", "standardize": True}),
    ("mmd", {"kernel": "gaussian", "standardize": True, "estimator": "linear"}),
    ("mmd", {"estimator": "biased", "scales": (0.3, 1.0)}),
    ("mmd", {"bandwidth": "median", "mean": MEAN, "variance": VARIANCE}),
    ("mmd", {"covariance": COVARIANCE}),
    ("mmd", {"reference": REFERENCE, "kernel": "imq"}),
    ("sigreg", {"directions": 8}),
    ("sigreg", {"directions": 5, "knots": 9, "bound": 2.0, "estimator": "biased"}),
    ("sigreg", {"directions": 8, "mean": MEAN, "variance": VARIANCE}),
    ("learned", {}),
    ("learned", {"form": "score_difference", "posterior_std": 0.3, "boundaries": True}),
    ("learned", {"form": "score_distillation", "weighting": "likelihood"}),
    ("learned", {"weighting": "uniform", "samples": 2, "low": 0.05, "high": 0.9}),
    ("learned", {"boundaries": True, "posterior_std": 0.2}),
    ("ddvi", {}),
    ("ddvi", {"low": 0.05, "high": 0.9}),
    ("ddvi", {"high": 0.95}),
    (far_from_one, {}),
    (strange, {"power": 3.0}),
]
FULL = cv.GradientPolicy("full")
PATTERNS = (
    ("shared.*",),
    ("word.*", "text_head.*"),
    ("times.*",),
    ("latent_head.*",),
    ("encoder_only",),
    ("shared",),
    ("decoder_only", "word.weight"),
    ("*.bias",),
)


def _frozen(bridge: str, freeze: int | None, freeze_bridge: int | None) -> cv.GradientPolicy:
    return cv.GradientPolicy(
        bridge,
        freeze=() if freeze is None else PATTERNS[freeze],
        freeze_bridge=() if freeze_bridge is None else PATTERNS[freeze_bridge],
    )


OPEN = [  # policies of an open bridge
    "full",
    FULL,
    cv.GradientPolicy("last"),
    _frozen("full", 0, None),
    _frozen("full", 1, 2),
    _frozen("full", None, 0),
    _frozen("last", 4, 7),
    _frozen("full", 6, 3),
    cv.GradientPolicy("full", freeze=("*",)),
    _frozen("last", 5, 5),
]
OPEN_TURNS = [
    cv.PolicySchedule((FULL, _frozen("full", 1, None)), (0, 2), period=4),
    cv.PolicySchedule((_frozen("full", 0, None), FULL), (0, 5)),
]
SHUT = [
    "stop_gradient",
    cv.GradientPolicy(),
    _frozen("detach", 0, None),
    _frozen("detach", 3, None),
]
TURNS = [
    "alternating",
    cv.PolicySchedule((cv.GradientPolicy(), FULL), (0, 3)),
    cv.PolicySchedule((FULL, _frozen("detach", 2, None)), (0, 1), period=3),
]
TEXT_POLICIES = [*SHUT, "decoder_isolated", *TURNS, *OPEN, OPEN_TURNS[0]]
TEXT_BRIDGES: list[tuple[Any, dict[str, Any]]] = [
    ("argmax", {}),
    ("categorical", {}),
    ("categorical", {"temperature": 0.7}),
    ("straight_through", {}),
    ("straight_through", {"temperature": 2.0}),
    ("sampled_straight_through", {}),
    ("sampled_straight_through", {"temperature": 0.5}),
    ("gumbel", {}),
    ("gumbel", {"temperature": 0.5}),
    ("soft", {}),
    ("soft", {"temperature": 1.5}),
    ("unmask", {"steps": 2}),
    ("unmask", {"steps": 3}),
    ("unmask", {}),
    ("rloo", {}),
    ("rloo", {"samples": 3, "temperature": 0.8}),
    ("rloo", {"samples": 2, "marginal_weight": 0.1}),
    (next_word, {}),
    (blurred, {}),
]
LATENT_BRIDGES: list[dict[str, Any]] = [
    {"steps": 1},
    {"steps": 2},
    {"steps": 3},
    {"noise": 0.75},
    {"noise": 0.3, "steps": 2},
    {"threshold": 0.8},
    {"threshold": 0.5, "quantile": 0.6, "steps": 2},
    {"norm": 2.0},
    {"norm": 1.5, "noise": 0.2, "threshold": 1.0},
    {"steps": 3, "threshold": 0.7, "quantile": 0.9, "norm": 2.0, "noise": 0.5},
]
TEXT_PROCESSES: list[dict[str, Any]] = [
    {"start_id": 3},
    {"start_id": 3, "end_id": 4},
    {"end_id": 4, "end": "predicted"},
    {"end_id": 5, "end": "predicted", "start_id": 3},
    {"taught_padding": "first"},
    {"taught_padding": "all"},
    {"taught_padding": "first", "end_id": 4},
    {"taught_padding": "all", "end_id": 4, "end": "predicted"},
]
BRIDGE_TIMES = [
    0.9,
    cv.TimePolicy("uniform", low=0.1, high=0.9),
    cv.TimePolicy("full", high=cv.anneal(0.5, 0.9, steps=10)),
    cv.TimePolicy("logit_normal", high=0.9, mean=0.5, std=0.8),
    cv.TimePolicy("uniform", low=0.1, high=cv.anneal(0.4, 0.85, warmup_steps=2, steps=6)),
    cv.TimePolicy("uniform", low=0.2, high=0.8, stratified=False),
]
BASE_TEXT_TIMES = [
    1.0,
    0.5,
    cv.TimePolicy("uniform"),
    cv.TimePolicy("uniform", low=0.3),
    cv.TimePolicy("logit_normal", mean=0.5),
    cv.TimePolicy("uniform", high=cv.anneal(0.4, 1.0, steps=8)),
]
BASE_LATENT_TIMES = [
    1.0,
    None,
    cv.TimePolicy("uniform", low=0.1, high=0.9),
    cv.TimePolicy("logit_normal", high=0.9),
    cv.TimePolicy("full", high=0.8),
]
RULE_POISONS: list[tuple[str | None, dict[str, Any]]] = [
    (None, {}),
    (None, {"marked": "both"}),
    (None, {"texts_open": True}),
    (None, {}),
    (None, {"terms": ("cycle_text", "cycle_latent", "prior")}),
    (None, {"terms": ("unconditional", "contrastive")}),
    ("words shown", {"terms": ("text", "latent", "cycle_text"), "base_text_time": 0.5}),
    ("fully masked", {"terms": ("text", "sleep", "latent"), "base_text_time": 1.0}),
    (
        "latent shown",
        {"terms": ("latent", "text", "cycle_text"), "base_latent_time": BASE_LATENT_TIMES[2]},
    ),
    ("latent shown", {"terms": ("sleep", "cycle_text", "latent"), "base_latent_time": 1.0}),
    ("both noised", {"terms": ("unconditional", "text", "cycle_latent")}),
    ("no latent", {"terms": ("text_marginal", "text", "cycle_latent")}),
    ("fully masked", {"terms": ("cycle_text", "latent", "prior")}),
]


def _slots() -> list[tuple[str, str, dict[str, Any]]]:
    """Name, kind and what a case must have."""
    slots: list[tuple[str, str, dict[str, Any]]] = []
    numbers: dict[str, itertools.count] = {}

    def add(theme: str, kind: str = "plain", **must: Any) -> None:
        number = next(numbers.setdefault(theme, itertools.count()))
        slots.append((f"{theme}-{number:02}", kind, must))

    for _ in range(3):
        add("defaults", defaults=True)
    for _ in range(16):
        add("anything")
    for term in TERMS:
        add("alone", terms=(term,), only=True)
        add("alone", terms=(term,), only=True, marked="both")
    add("every", terms=TERMS, base_text_time=1.0, base_latent_time=1.0)
    add("every", terms=TERMS, base_text_time=0.5, base_latent_time=None)
    add("every", terms=TERMS, base_text_time=1.0, base_latent_time=1.0, marked="both")
    for prior, options in PRIORS:
        add("prior", terms=("prior",), prior=prior, prior_options=options)
    for prior, options in PRIORS[1:28:5]:
        if prior in STATISTICS:
            add("pool", terms=("prior",), prior=prior, prior_options=options, pool_prior=True)
    for critic, temperature in (("cosine", 0.5), ("euclidean", 1.0), ("cosine", None)):
        contrastive = {"critic": critic, "temperature": temperature}
        contrastive = {k: v for k, v in contrastive.items() if v is not None}
        add("contrastive", terms=("contrastive",), contrastive_options=contrastive)
    for name, options in TEXT_BRIDGES:
        add("text_bridge", terms=("cycle_latent",), text_bridge=(name, options))
    for name in (*RELAXED, blurred):
        add("text_marginal", terms=("text_marginal",), text_bridge=(name, {}))
    for options in LATENT_BRIDGES:
        add("latent_bridge", terms=("cycle_text",), latent_bridge=options)
    for policy in TEXT_POLICIES:
        add("text_policy", terms=("cycle_text",), text_policy=policy)
    for policy in (*SHUT, "encoder_isolated"):
        add("latent_policy", terms=("cycle_latent",), latent_policy=policy, no_gradient=True)
    for policy in (*TURNS, *OPEN, *OPEN_TURNS):
        add("latent_policy", terms=("cycle_latent",), latent_policy=policy, texts_open=True)
    for rule in ("zero", "skip", "raise"):
        for poison, must in RULE_POISONS:
            add(rule, non_finite=rule, poison=poison, **must)
    for i in range(8):
        extra = ("cycle_text", "cycle_latent", "prior", "contrastive", "sleep")
        terms = ("text", "latent", *(extra[j] for j in range(5) if (i + 1) >> (j % 4) & 1))
        add("joined", terms=terms, join_passes=True, base_text_time=1.0, base_latent_time=1.0)
    for time in BRIDGE_TIMES:
        add("bridge_time", terms=("cycle_text", "cycle_latent"), bridge_time=time)
    for time in BASE_TEXT_TIMES:
        add("base_text_time", terms=("text",), base_text_time=time)
    for time in BASE_LATENT_TIMES:
        add("base_latent_time", terms=("latent",), base_latent_time=time)
    for distance in ("mse", "cosine", "normalized_mse", smooth):
        add("distance", terms=("latent", "cycle_latent"), distance=distance)
    for gamma in (1.0, 5.0):
        add("min_snr", terms=("latent",), base_latent_time=None, min_snr=gamma)
    for prediction in ("x0", "epsilon"):
        for terms in (("latent", "cycle_text"), ("cycle_latent", "prior"), ("sleep", "text")):
            add(prediction, terms=terms, prediction=prediction)
    for text in TEXT_PROCESSES:
        add("text_process", terms=("text", "cycle_text", "cycle_latent"), text=text)
    for marked in ("both", "text", "latent", "nobody") * 2:
        add("marked", terms=("text", "latent", "cycle_text", "cycle_latent"), marked=marked)
    for marked in ("both", "text", "latent"):
        add("marked", terms=("unconditional", "prior", "sleep"), marked=marked)
    for p_dual in (0.0, 0.3, 0.5):
        add("p_dual", terms=("text", "cycle_text", "cycle_latent"), p_dual=p_dual)
        add("p_dual", terms=("latent", "cycle_text", "sleep"), p_dual=p_dual, cycle_every=2)
    for every in (2, 3):
        add("cycle_every", terms=("latent", "text", "cycle_text"), cycle_every=every)
    for pairs, fraction in ((True, 0.5), (False, 0.5), (True, 0.34), (False, 0.7)):
        terms = ("text", "latent", "cycle_text", "cycle_latent")
        add("fraction", terms=terms, cycle_pairs=pairs, cycle_fraction=fraction)
    for terms in (("cycle_text",), ("cycle_latent", "sleep"), ("unconditional", "prior")):
        add("unpaired", terms=terms, only=True, pairs=0)
    for terms in (("text", "cycle_text"), ("latent", "cycle_latent"), ("unconditional", "prior")):
        add("vectors", terms=terms, shape=(2, DIM))
    for term in ("text", "latent", "cycle_text", "unconditional"):
        add("caps", terms=(term,), capped=True)
    for terms in (("unconditional", "text"), ("unconditional", "cycle_text")):
        add("null_text", terms=terms, null_text_rate=0.4)
    for schedule in ("linear", "sigmoid", "continuous_cosine"):
        add("schedule", terms=("latent", "cycle_text", "cycle_latent"), schedule=schedule)

    for term in TERMS:
        add("accumulated", "accumulated", terms=(term,), only=term != "prior")
    for marked in ("both", "text", None, None):
        add("accumulated", "accumulated", marked=marked)
    terms = ("text", "latent", "cycle_text", "cycle_latent", "sleep")
    add("accumulated", "accumulated", terms=terms, join_passes=True)
    add("accumulated", "accumulated", terms=terms, cycle_pairs=True, cycle_fraction=0.5)
    add("accumulated", "accumulated", terms=("prior", "text"), prior="learned", prior_options={})
    add("accumulated", "accumulated", terms=("prior", "text"), prior="ddvi", prior_options={})
    cosine = {"terms": ("latent", "cycle_latent"), "distance": "cosine"}
    add("accumulated", "accumulated", **cosine)
    add("accumulated", "accumulated", terms=("text", "latent"), text={"taught_padding": "first"})
    add("accumulated", "accumulated", terms=("unconditional",), null_text_rate=0.3)
    rloo = {"terms": ("cycle_latent",), "text_bridge": ("rloo", {"samples": 2})}
    add("accumulated", "accumulated", **rloo)

    mmd, moment = ("mmd", {"kernel": "imq"}), ("moment", {"form": "covariance"})
    for prior, options in (mmd, moment, ("sigreg", {"directions": 8})):
        pooled = {"prior": prior, "prior_options": options, "pool_prior": True}
        add("ranks", "ranks", terms=("prior", "text", "cycle_text"), **pooled)
    add("ranks", "ranks", terms=("text", "latent", "cycle_text", "cycle_latent"), marked="both")
    add("ranks", "ranks", terms=("unconditional", "sleep", "contrastive"))
    add("ranks", "ranks", terms=("prior", "latent"), prior="ddvi", prior_options={})
    for rule, poison in (("zero", "words shown"), ("skip", "words shown"), ("zero", None)):
        must = {"base_text_time": 0.5, "non_finite": rule, "poison": poison}
        add("ranks", "ranks", terms=("text", "latent", "cycle_text"), **must)
    starts = [(0, 2, 4), (2, 2, 4), (5, 2, 4), (1, 3, 3), (3, 3, 3), (7, 2, 6), (3, 2, 6)]
    for step, latent_from, full_from in starts:
        phases = {"latent_cycle_from": latent_from, "full_gradient_from": full_from}
        terms = ("text", "latent", "cycle_text", "cycle_latent")
        add("phases", "phases", terms=terms, phases=phases, step=step)
    return slots


SLOTS = _slots()


# --- drawing ----------------------------------------------------------------------------------


def case_of(slot: int, attempt: int) -> Case:
    """The case of a slot at an attempt."""
    name, kind, must = SLOTS[slot]
    rng = Random(f"{name}:{attempt}")
    seed = rng.randrange(1, 10_000)
    step = must.get("step", rng.randrange(0, 12))
    drawn = _Draw(rng, kind, must)
    options, text, latent = drawn.options(), drawn.text(), drawn.latent()
    if base_apart(options):
        # 0.1 then showed the encoder alpha(1) of the latent, which the new house does not: let it be 0
        latent["schedule"] = "continuous_cosine"
        if latent.get("prediction") == "epsilon":
            latent["prediction"] = "v"
    return Case(
        name=f"{name}.{attempt}",
        kind=kind,
        theme=name.rsplit("-", 1)[0],
        options=options,
        text=text,
        latent=latent,
        batches=drawn.batches(),
        step=step,
        seed=seed,
        poison=must.get("poison"),
        phases=drawn.phases(),
    )


def base_apart(options: Mapping[str, Any]) -> bool:
    """Whether the base encoder loss at full noise had a pass of its own in 0.1."""
    bridge, policy = options.get("latent_bridge"), options.get("text_policy")
    one_shot = bridge is None or bridge.steps == 1
    frozen = options.get("cycle_text_weight", 4.0) != 0 and getattr(policy, "freeze_bridge", ())
    full = options.get("base_latent_time", 1.0) == 1.0 and options.get("latent_weight", 5.0) != 0
    shared = options.get("bridge_time", 1.0) == 1.0 and one_shot and not frozen
    return bool(full and not shared)


def case_named(name: str) -> Case:
    """The case of a name, as `record.py` wrote it."""
    slot, attempt = name.rsplit(".", 1)
    return case_of([known for known, _, _ in SLOTS].index(slot), int(attempt))


class _Draw:
    def __init__(self, rng: Random, kind: str, must: Mapping[str, Any]) -> None:
        self.rng, self.kind, self.must = rng, kind, must
        self.terms = self._terms()
        self.join = must.get("join_passes", False)
        self.poison = must.get("poison")
        self.shape = must.get("shape") or ((2, DIM) if self._chance(0.08) else (DIM,))
        self.policies: dict[str, Any] = {}

    def _chance(self, p: float) -> bool:
        return self.rng.random() < p

    def _pick(self, name: str, choices: Any) -> Any:
        value = self.rng.choice(choices)
        return self.must[name] if name in self.must else value

    def has(self, *terms: str) -> bool:
        return any(term in self.terms for term in terms)

    def _terms(self) -> tuple[str, ...]:
        if self.must.get("defaults"):
            return tuple(DEFAULT_WEIGHTS)
        forced = self.must.get("terms", ())
        shares = dict(zip(TERMS, (0.4, 0.4, 0.25, 0.35, 0.3, 0.25, 0.15, 0.2, 0.12), strict=True))
        if self.must.get("no_gradient"):
            shares["text_marginal"] = 0.0
        poison = self.must.get("poison")
        drawn = {term for term in TERMS if self._chance(shares[term])}
        if self.must.get("only") or poison or self.kind == "phases":
            drawn = set()
        terms = drawn | set(forced)
        if not terms:
            terms = {self.rng.choice(TERMS)}
        if self.must.get("pairs") == 0:
            terms -= {"text", "latent", "contrastive"}
        return tuple(term for term in TERMS if term in terms)

    def _weight(self) -> Any:
        weight = round(self.rng.uniform(0.2, 3.0), 2)
        if self._chance(0.15):
            return cv.ramp(weight, self.rng.choice((0, 0, 2)), self.rng.choice((0, 4, 20)))
        return weight

    def options(self) -> dict[str, Any]:
        if self.must.get("defaults"):
            self._set_process({})
            return {}
        rng, o = self.rng, {}
        for term in TERMS:
            if term in self.terms:
                o[f"{term}_weight"] = self._weight()
            elif term in DEFAULT_WEIGHTS:
                o[f"{term}_weight"] = 0.0
        self._prior(o)
        if self.has("contrastive") and (self._chance(0.4) or "contrastive_options" in self.must):
            choices = ({"temperature": 0.3}, {"critic": "euclidean", "temperature": 2.0})
            o["contrastive_options"] = self._pick("contrastive_options", choices)
        self._set_process(o)
        self._times(o)
        self._distances(o)
        self._bridges(o)
        self._cycles(o)
        if self.has("unconditional"):
            if self._chance(0.3) or "null_text_rate" in self.must:
                o["null_text_rate"] = self._pick("null_text_rate", (0.2, 0.5))
            if self._chance(0.3):
                o["unconditional_latent_time"] = rng.choice((0.6, BRIDGE_TIMES[1], BRIDGE_TIMES[3]))
        if self.must.get("non_finite"):
            o["non_finite"] = self.must["non_finite"]
        if self.join:
            o["join_passes"] = True
        if self.must.get("capped") or (self._chance(0.08) and not self.poison):
            capped = self.must.get("terms") if self.must.get("capped") else self.terms[:1]
            o["caps"] = {term: round(rng.uniform(0.3, 2.5), 2) for term in capped}
        return o

    def _prior(self, o: dict[str, Any]) -> None:
        prior, options = self.rng.choice(PRIORS)
        pool = self._chance(0.3)
        if not self.has("prior"):
            return
        if "prior" in self.must:
            prior, options = self.must["prior"], self.must["prior_options"]
        o["prior"], o["prior_options"] = prior, options
        pool = pool and self.kind != "ranks"
        if prior not in ("learned", "ddvi") and (pool or self.must.get("pool_prior")):
            o["pool_prior"] = True
            o["seed"] = self.rng.randrange(6)
        if any(isinstance(value, Tensor) for value in options.values()):
            self.shape = (DIM,)

    def _set_process(self, o: dict[str, Any]) -> None:
        prediction = self.rng.choice(("v",) * 8 + ("x0", "epsilon"))
        self.prediction = self.must.get("prediction", prediction)
        if self.must.get("defaults") or self.join:
            self.prediction = "v"
        schedules = ["cosine"] * 5 + ["linear", "sigmoid", "continuous_cosine"]
        self.schedule = self._pick("schedule", schedules)
        if self.prediction == "epsilon":
            self.schedule = "cosine"

    def _times(self, o: dict[str, Any]) -> None:
        full, bridge = self._chance(0.65), self.rng.choice(BRIDGE_TIMES)
        if self.prediction != "epsilon" and (full or self.join):
            bridge = 1.0
        bridge = self.must.get("bridge_time", bridge)
        text_time = self._pick("base_text_time", (1.0, 1.0, 1.0, *BASE_TEXT_TIMES))
        latent_time = self._pick("base_latent_time", (1.0, 1.0, 1.0, *BASE_LATENT_TIMES))
        if self.join:
            text_time = latent_time = 1.0
        if self.has("text"):
            o["base_text_time"] = text_time
        if self.has("latent"):
            o["base_latent_time"] = latent_time
        if self.has(*READ_Z_HAT, "cycle_latent") or (self.has("latent") and latent_time is None):
            o["bridge_time"] = bridge

    def _distances(self, o: dict[str, Any]) -> None:
        distances = ("mse", "mse", "mse", "cosine", "normalized_mse", smooth)
        if self.has("latent"):
            o["latent_distance"] = self._pick("distance", distances)
            spaces = {"v": (None, None, "x0", "epsilon"), "x0": (None, "x0"), "epsilon": (None,)}
            o["latent_space"] = self.rng.choice(spaces[self.prediction])
            moves = o["base_latent_time"] is None or isinstance(
                o["base_latent_time"], cv.TimePolicy
            )
            snr = moves and self._chance(0.3) and "distance" not in self.must
            if "min_snr" in self.must or snr:
                o["min_snr"] = self._pick("min_snr", (1.0, 5.0))
                o["latent_distance"] = "mse"
        if self.has("cycle_latent"):
            o["cycle_latent_distance"] = self._pick("distance", distances)

    def _bridges(self, o: dict[str, Any]) -> None:
        rng = self.rng
        if self.has(*READ_Z_HAT):
            bridge = dict(self._pick("latent_bridge", LATENT_BRIDGES))
            if self._chance(0.4) and "latent_bridge" not in self.must:
                bridge = {}
            if self.join:
                bridge.pop("steps", None)
            if not self.has("cycle_text"):
                bridge.pop("noise", None)
            o["latent_bridge"] = cv.LatentBridge(**bridge)
        if self.has("cycle_text"):
            policies = [*SHUT, "decoder_isolated", *OPEN, *TURNS]
            if self.join:
                policies = [*SHUT, "decoder_isolated", "full", _frozen("full", 0, None)]
            if self.kind == "phases":
                policies = SHUT
            o["text_policy"] = self._pick("text_policy", policies)
        if not self.has("cycle_latent", "text_marginal"):
            return
        name, options = rng.choice(TEXT_BRIDGES)
        if self.has("text_marginal"):
            name, options = rng.choice([b for b in TEXT_BRIDGES if b[0] in (*RELAXED, blurred)])
        elif self.must.get("no_gradient") or self.kind == "phases":
            name, options = rng.choice([b for b in TEXT_BRIDGES if not _learns(b[0])])
        elif self.must.get("texts_open"):
            name, options = rng.choice([b for b in TEXT_BRIDGES if _learns(b[0])])
        name, options = self.must.get("text_bridge", (name, options))
        bare = not options and self._chance(0.5)
        o["text_bridge"] = name if bare else cv.TextBridge(name, **options)
        policies = [*OPEN, *OPEN_TURNS] if _learns(name) else [*SHUT, "encoder_isolated"]
        if _learns(name) and not self.has("text_marginal"):
            policies = [*policies, *TURNS]
        if self.join:
            policies = ["full", _frozen("full", 0, None)] if _learns(name) else SHUT
        o["latent_policy"] = self._pick("latent_policy", policies)
        if self.has("cycle_latent") and self._chance(0.25):
            o["show_latent"] = True

    def _cycles(self, o: dict[str, Any]) -> None:
        rng = self.rng
        every, pairs, fraction = rng.choice((1,) * 7 + (2, 3)), self._chance(0.5), rng.random()
        dual, seed = self._chance(0.15), rng.randrange(6)
        if not self.has("cycle_text", *LATENT_HALF):
            return
        if self.join or self.poison:
            every, dual = 1, False
        every = self.must.get("cycle_every", every)
        if every > 1:
            o["cycle_every"] = every
        o["cycle_pairs"] = pairs = self.must.get("cycle_pairs", pairs)
        if fraction < 0.3 or "cycle_fraction" in self.must:
            o["cycle_fraction"] = self._pick("cycle_fraction", (0.5, 0.34, 0.75))
        both = self.has("cycle_text") and self.has(*LATENT_HALF)
        if "p_dual" in self.must or (dual and both and self.kind != "phases"):
            o["p_dual"], o["seed"] = self._pick("p_dual", (0.0, 0.25, 0.6)), seed
        if _freezes_bridge(o.get("text_policy")):
            o["cycle_pairs"] = True
            o.pop("cycle_fraction", None)
            self.schedule = "continuous_cosine"

    def text(self) -> dict[str, Any]:
        text = self.rng.choice(TEXT_PROCESSES) if self._chance(0.2) else {}
        return self.must.get("text", text)

    def latent(self) -> dict[str, Any]:
        return {"schedule": self.schedule, "prediction": self.prediction, "shape": self.shape}

    def phases(self) -> dict[str, Any]:
        bridge = self.rng.choice((*RELAXED, cv.TextBridge("gumbel", temperature=0.6)))
        if self.kind != "phases":
            return {}
        return {**self.must["phases"], "text_bridge": bridge}

    def batches(self) -> tuple[tuple[Spec, ...], ...]:
        if self.kind == "accumulated":
            return (tuple(self._spec(i) for i in range(2)),)
        if self.kind == "ranks":
            # each batch is a collective where ranks pool rows, or judge terms together
            common = self.must.get("pool_prior") or self.must.get("non_finite")
            parts = (1, 1) if common else (2, 1)
            return tuple(
                tuple(self._spec(rank + i) for i in range(parts[rank])) for rank in range(2)
            )
        return ((self._spec(0),),)

    def _spec(self, number: int) -> Spec:
        """The batches after the first may lack what has no partner."""
        rng = self.rng
        pairs, texts, latents = rng.randint(2, 5), rng.randint(1, 4), rng.randint(1, 4)
        lone = rng.random()
        if number and lone < 0.6 and self.kind in ("accumulated", "ranks"):
            texts = 0 if lone < 0.4 else texts
            latents = 0 if lone > 0.2 else latents
        elif lone < 0.15:
            texts = latents = 0
        if lone > 0.93 and not self.has("text", "latent", "contrastive"):
            pairs, texts, latents = 0, texts + 2, latents + 1
        if self.has("prior"):
            pairs, texts = (pairs and pairs + 2), texts + 2
        marked = rng.choice(("both", "text", "latent", "nobody")) if self._chance(0.15) else None
        pairs, marked = self.must.get("pairs", pairs), self.must.get("marked", marked)
        return Spec(
            seed=rng.randrange(1, 10_000),
            pairs=pairs,
            texts=texts,
            latents=latents,
            width=rng.randint(2, 6),
            marked=marked if pairs else None,
            lengths=self._chance(0.5) or not (pairs or texts),
            shape=self.shape,
        )


def _learns(bridge: Any) -> bool:
    """Whether a text bridge has a gradient."""
    return bridge in (*RELAXED, "rloo", blurred)


def _freezes_bridge(policy: Any) -> bool:
    """Whether a policy freezes in the passes that make the bridge."""
    policies = policy.policies if isinstance(policy, cv.PolicySchedule) else (policy,)
    return any(getattr(one, "freeze_bridge", ()) for one in policies)
