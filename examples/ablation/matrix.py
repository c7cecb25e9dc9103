"""The matrix: which rows are compared, on how much data, and which cells a tier consists of."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

ALL = 0  # every training sentence a pair: what `pairs` says in a cell of the oracle's kind
SEEDS, FEW_SEEDS, FRESH_SEEDS, TUNING_SEED = range(5), range(2), range(10, 13), 100
REPAIR_SEEDS, CONFIRMING_SEEDS = range(20, 22), range(30, 35)
WAIT = {"warmup_steps": 300, "ramp_steps": 200}  # the cycles wait until the pairs have taught

# What a term is told where a row says no more, whatever the library's defaults are. Terms run, and
# draw their random numbers, in this order.
PLAIN: dict[str, dict[str, Any]] = {
    "text": {"weight": 1.0, "time": 1.0},
    "cycle_latent": {
        "weight": {"weight": 1.0, **WAIT},
        "bridge": "categorical",
        "policy": "stop_gradient",
        "pairs": False,
    },
    "text_marginal": {"weight": 0.01, "bridge": "gumbel"},
    "latent": {"weight": 5.0, "time": 1.0},
    "cycle_text": {
        "weight": {"weight": 4.0, **WAIT},
        "bridge": {"noise": 0.75},
        "policy": "stop_gradient",
        "pairs": False,
    },
    "prior": {"weight": 0.1},
    "contrastive": {"weight": 0.1},
    "unconditional": {"weight": 1.0},
}
Terms = Mapping[str, Mapping[str, Any] | None]  # options by term; None leaves it out


def merged(terms: Terms) -> dict[str, dict[str, Any]]:
    """A row's terms, over the plain ones: the base losses, and what else it names."""
    told = {"text": {}, "latent": {}} | terms
    order = sorted(told, key=list(PLAIN).index)
    return {name: PLAIN[name] | told[name] for name in order if told[name] is not None}


PARTLY: Terms = {"text": {"time": {"distribution": "uniform"}}}  # decoding in passes meets these


def half(**options: Any) -> Terms:
    """The recipe, with other options of its cycle."""
    return {**PARTLY, "cycle_text": options}


UNIMODAL: Terms = {"unconditional": {}}
LATENT_CYCLE: Terms = {"cycle_latent": {}}
HALF = half()
BOTH = {**HALF, **LATENT_CYCLE}
FULL = {"bridge": "full"}  # a gradient crosses
BEST = {"name": "best", "samples": 4, "steps": 2, "temperature": 0.8}

Unpaired = Literal["none", "real", "corrupted", "encoded"]
Extra = Literal["pseudo_pairs", "noised_latents", "teacher_bridge"]


@dataclass(frozen=True)
class Row:
    """What one line of the matrix trains on, and with which terms.

    Attributes:
        label: as tables and plots name it.
        terms: of the `CycleObjective`, as in its `from_config`, but for what `PLAIN` says.
        unpaired: which unpaired data there is: none, the real one, one whose words are shuffled and
            whose latents are rotated, or one whose texts an encoder at hand has made pairs.
        extra: a loss beside the objective: see `row_loss`.
        teacher: the row whose best weights label the unpaired data, once; ridge regression if it
            has labels and none is named.
        channel: whether labels are drawn to the unpaired latents that a text may be of.
        distilled: whether T2L learns the labels too.
        modes: such terms of objectives that take turns; drawn at random with `shuffled`.
        select: the part of the joint score that chooses the checkpoint.
        ends: what ends it: the cap or early stopping, whichever comes first, or one of them alone.
        cost: expected time beside that of `paired`, for the progress bar alone.
    """

    label: str
    terms: Terms = field(default_factory=dict)
    unpaired: Unpaired = "real"
    extra: Extra | None = None
    teacher: str | None = None
    channel: bool = False
    distilled: bool = False
    modes: tuple[Terms, ...] = ()
    shuffled: bool = False
    select: Literal["both", "text", "latent"] = "both"
    ends: Literal["both", "cap", "stop"] = "both"
    cost: float = 2.0


_MODES: tuple[Terms, ...] = (
    {"latent": None},
    {"text": None},
    {"text": None, "latent": None, **UNIMODAL},
)

ROWS: dict[str, Row] = {
    # the core
    "paired": Row("pairs only", unpaired="none", cost=1.0),
    "unimodal": Row("+ unimodal denoising", UNIMODAL),
    "pseudo": Row("+ offline pseudo-pairs", PARTLY, extra="pseudo_pairs", teacher="unimodal"),
    "half": Row("+ half cycle (the recipe)", HALF),
    "both": Row("+ both half cycles", BOTH),
    "straight_through": Row(
        "+ straight-through cycles",
        {**half(policy=FULL), "cycle_latent": {"bridge": "straight_through", "policy": FULL}},
    ),
    "oracle": Row("all pairs, until it stops", unpaired="none", ends="stop", cost=4.0),
    # exploratory: controls
    "paired_to_cap": Row("pairs only, trained to the cap", unpaired="none", ends="cap"),
    "paired_partly": Row("pairs only, text partly masked", PARTLY, unpaired="none"),
    "paired_joint": Row("pairs only, with the joint mode", UNIMODAL, unpaired="none"),
    "unimodal_long": Row("+ unimodal denoising, twice the cap", UNIMODAL, cost=3.0),
    "half_on_pairs": Row("half cycle on the pairs", half(pairs=True), unpaired="none"),
    "half_corrupted": Row("half cycle on corrupted data", HALF, unpaired="corrupted"),
    "noised": Row("L2T on noised latents", extra="noised_latents"),
    "contrastive": Row("InfoNCE, no cycles", {"contrastive": {}}),
    "encoded": Row("every text encoded", unpaired="encoded"),
    "encoded_cycle": Row("every text encoded, + latent cycle", LATENT_CYCLE, unpaired="encoded"),
    # exploratory: parts of the recipe
    "half_full_mask": Row("half cycle, text always masked", {"cycle_text": {}}),
    "half_weight_2": Row("half cycle of weight 2", half(weight={"weight": 2.0, **WAIT})),
    "half_no_noise": Row("half cycle without noise", half(bridge={"noise": 0.0})),
    "half_less_noise": Row("half cycle, noise 0.4", half(bridge={"noise": 0.4})),
    "half_steps": Row(
        "half cycle, latents in 4 passes",
        {**half(bridge={"noise": 0.75, "steps": 4}),
         "latent": {"time": {"distribution": "uniform"}}},
    ),
    "half_teacher": Row("half cycle, latents of an average", PARTLY, extra="teacher_bridge"),
    "half_all_rows": Row("half cycle on pairs too", half(pairs=True)),
    "half_joint": Row("half cycle + unimodal denoising", {**HALF, **UNIMODAL}),
    "half_contrastive": Row("half cycle + InfoNCE", {**HALF, "contrastive": {}}),
    "half_full": Row("half cycle, gradient through z_hat", half(policy="full")),
    "half_full_late": Row(
        "half cycle, gradient through z_hat from step 900",
        half(policy={"policies": [{"bridge": "detach"}, FULL], "starts": [0, 900]}),
    ),
    "latent_only": Row("latent cycle alone", LATENT_CYCLE),
    "both_argmax": Row(
        "both half cycles, argmax texts", {**HALF, "cycle_latent": {"bridge": "argmax"}}
    ),
    "both_unmask": Row(
        "both half cycles, texts in 6 passes",
        {**HALF, "cycle_latent": {"bridge": {"name": "unmask", "steps": 6}}},
    ),
    "both_marginal": Row(
        "both cycles, relaxed texts that must be probable",
        {**HALF, "cycle_latent": {"bridge": "gumbel", "policy": "full"}, "text_marginal": {}},
    ),
    # exploratory: priors on top of the recipe
    "moment": Row("half cycle + moment prior", {**HALF, "prior": {"prior": "moment"}}),
    "mmd": Row(
        "half cycle + MMD prior", {**HALF, "prior": {"prior": "mmd", "standardize": True}}
    ),
    "learned": Row(
        "half cycle + learned prior",
        {**HALF, **UNIMODAL, "prior": {"prior": "learned", "weight": 0.01, "weighting": "vdm"}},
    ),
    "ddvi": Row(
        "half cycle + DDVI", {**HALF, **UNIMODAL, "prior": {"prior": "ddvi", "weight": 0.01}}
    ),
    # exploratory: fewer cycles
    "half_every_2": Row("half cycle on every 2nd step", half(every=2)),
    "half_every_4": Row("half cycle on every 4th step", half(every=4)),
    "half_fraction": Row("half cycle on half the rows", half(fraction=0.5)),
    # the seed's matrix, on pairs
    "l2t_only": Row("L2T only", _MODES[0], unpaired="none", select="text", cost=1.0),
    "t2l_only": Row("T2L only", _MODES[1], unpaired="none", select="latent", cost=1.0),
    "unconditional": Row("unconditional", _MODES[2], unpaired="none", cost=1.0),
    "random": Row("random", modes=_MODES, shuffled=True, unpaired="none", cost=1.0),
    "sequential": Row("sequential", modes=_MODES, unpaired="none", cost=1.0),
    "text_cycle": Row("+ text cycle", {**UNIMODAL, **half(pairs=True)}, "none"),
    "latent_cycle": Row("+ latent cycle", {**UNIMODAL, "cycle_latent": {"pairs": True}}, "none"),
    "both_cycles": Row(
        "+ both cycles",
        {**UNIMODAL, **half(pairs=True), "cycle_latent": {"pairs": True}},
        "none",
    ),
    # opponents that a review of the first results asked for
    "pseudo_ridge": Row("+ pseudo-pairs, labelled by ridge", PARTLY, extra="pseudo_pairs"),
    "pseudo_paired": Row(
        "+ pseudo-pairs, labelled by pairs only", PARTLY, extra="pseudo_pairs", teacher="paired"
    ),
    "pseudo_half": Row(
        "+ pseudo-pairs, labelled by the recipe", PARTLY, extra="pseudo_pairs", teacher="half"
    ),
    "pseudo_half_both": Row(
        "the same, T2L taught too", PARTLY, extra="pseudo_pairs", teacher="half", distilled=True
    ),
    "channel": Row(
        "+ channel labels of the recipe, T2L taught too",
        PARTLY,
        extra="pseudo_pairs",
        teacher="half",
        channel=True,
        distilled=True,
    ),
    # the encoder as critic of the texts that it is to read
    "both_best": Row(
        "+ both half cycles, best of 4 texts",
        {**HALF, "cycle_latent": {"bridge": BEST}},
        cost=3.0,
    ),
}  # fmt: skip

CORE = ("unimodal", "half", "straight_through", "pseudo")  # a teacher before who learns of it
EXPLORATORY = tuple(ROWS)[7:39]
SEED_MATRIX = tuple(ROWS)[39:47]
OPPONENTS = tuple(ROWS)[47:52]
REPAIRED = ("paired", "unimodal", "half", "pseudo", *OPPONENTS)
MAPPED = ("paired", "unimodal", "pseudo_ridge", "half", "both", "both_best", "channel")


@dataclass(frozen=True)
class Cell:
    """One training run: a row, on so much data, with one seed.

    Attributes:
        corpus: whose sentences: see `corpora`.
        row: a key of `ROWS`.
        pairs: how many, `ALL` for every training sentence.
        share: of the unpaired halves, in percent.
        seed: of the deal of pairs and halves, the weights, the batches and the noise.
        learning_rate: after its warm-up, constant.
        weight_decay: of AdamW.
        cap: FLOPs, forward and backward, after which training ends.
        validation: how many of the validation pairs choose; 0 for all.
    """

    corpus: str
    row: str
    pairs: int
    share: int
    seed: int
    learning_rate: float
    weight_decay: float
    cap: float
    validation: int = 0

    @property
    def name(self) -> str:
        """Its file, among those of its corpus."""
        pairs = self.pairs or "all"
        tuned = f"lr{self.learning_rate:g}-wd{self.weight_decay:g}"
        few = f"-val{self.validation}" * (self.validation > 0)
        return f"{self.row}-{pairs}-{self.share}-{self.seed}-{tuned}{few}"

    @property
    def key(self) -> str:
        """Changes with anything that the cell is told, so that no stale result is taken for it."""
        told = {**asdict(self), "row": asdict(ROWS[self.row]), "plain": [*PLAIN.items()]}
        del told["row"]["label"], told["row"]["cost"]
        for part, later in ((told, ("validation",)), (told["row"], ("channel", "distilled"))):
            for name in later:  # what came after the stored results changes those with it alone
                if not part[name]:
                    del part[name]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def of_teacher(self, tuned: Mapping[str, Mapping[str, float]]) -> "Cell | None":
        """The cell whose weights label this one's unpaired data."""
        teacher = ROWS[self.row].teacher
        return None if teacher is None else replace(self, row=teacher, **tuned[teacher])


# --- Tiers --------------------------------------------------------------------------------------

Tuned = Mapping[str, Mapping[str, float]]  # by row: the learning rate and weight decay it trains at
GRID = [
    {"learning_rate": rate, "weight_decay": decay} for rate in (3e-3, 6e-3) for decay in (0.1, 0.5)
]
DECAYS = tuple(dict.fromkeys(point["weight_decay"] for point in GRID))
BUDGETS = (300, 1000, 3000)
PRIMARY = 1000  # pairs of the primary test, the search and the exploratory rows


def tuned_as(row: str) -> str:
    """The row whose search an exploratory row borrows: the nearest one of the core."""
    if row in CORE or row == "paired":
        return row
    terms, extra = ROWS[row].terms, ROWS[row].extra
    if row in OPPONENTS:
        return "pseudo"
    if extra == "teacher_bridge" or "cycle_text" in terms:
        return "half"
    return "unimodal" if "unconditional" in terms else "paired"


def search(corpus: str, cap: float) -> Iterator[Cell]:
    """Every row of the core at every point of the same grid, with a seed that is not reported."""
    for row in ("paired", *CORE):
        for point in GRID:
            yield Cell(corpus, row, PRIMARY, 100 * (row != "paired"), TUNING_SEED, **point, cap=cap)


def core(corpus: str, tuned: Tuned, cap: float) -> Iterator[Cell]:
    """The preregistered comparison; a seed is complete before the next begins."""
    for seed in SEEDS:
        for row in (*CORE, "both", "paired"):
            share = 100 * (row != "paired")
            yield Cell(corpus, row, PRIMARY, share, seed, **tuned[tuned_as(row)], cap=cap)
        for row in CORE:
            yield Cell(corpus, row, PRIMARY, 25, seed, **tuned[tuned_as(row)], cap=cap)
        for pairs, rows in (
            (300, (*CORE, "paired")),
            (3000, (*CORE, "paired")),
            (6000, ("paired",)),
            (ALL, ("oracle",)),
        ):
            for row in rows:
                yield from both_decays(corpus, row, pairs, seed, tuned, cap)


def both_decays(
    corpus: str, row: str, pairs: int, seed: int, tuned: Tuned, cap: float
) -> Iterator[Cell]:
    """A row that the search says nothing about, with each decay: validation pairs choose later."""
    share = 100 * (ROWS[row].unpaired != "none")
    for decay in DECAYS:
        told = tuned[tuned_as(row)] | {"weight_decay": decay}
        yield Cell(corpus, row, pairs, share, seed, **told, cap=cap)


def exploratory(corpus: str, tuned: Tuned, cap: float) -> Iterator[Cell]:
    """Two seeds of everything else; called exploratory wherever it is shown."""
    for seed in FEW_SEEDS:
        for row in EXPLORATORY:
            if ROWS[row].unpaired != "real":
                yield from both_decays(corpus, row, PRIMARY, seed, tuned, cap)
                continue
            spent = 2 * cap if row == "unimodal_long" else cap
            yield Cell(corpus, row, PRIMARY, 100, seed, **tuned[tuned_as(row)], cap=spent)
        for row in SEED_MATRIX:
            for pairs in (PRIMARY, ALL):
                yield from both_decays(corpus, row, pairs, seed, tuned, cap)


def quick(corpus: str, tuned: Tuned, cap: float) -> Iterator[Cell]:
    """The core in small, to see that it runs: its figures mean nothing."""
    for seed in FEW_SEEDS:
        for row in ("paired", *CORE, "oracle"):
            pairs, share = (ALL if row == "oracle" else 300), 100 * (row in CORE)
            yield Cell(corpus, row, pairs, share, seed, **tuned[tuned_as(row)], cap=cap / 20)


def glance(corpus: str, tuned: Tuned, cap: float) -> Iterator[Cell]:
    """The second corpus, once, with seeds that nothing was tuned on; its curve with two of them."""
    for seed in FRESH_SEEDS:
        for row in ("unimodal", "half", "pseudo", "paired", "both"):
            yield from both_decays(corpus, row, PRIMARY, seed, tuned, cap)
    for seed in FRESH_SEEDS[:2]:
        for pairs in (300, 3000, 6000):
            yield from both_decays(corpus, "paired", pairs, seed, tuned, cap)
        yield from both_decays(corpus, "oracle", ALL, seed, tuned, cap)


def repair(corpus: str, tuned: Tuned, cap: float) -> Iterator[Cell]:
    """The core rows again beside stronger opponents, with seeds that nothing was tuned on.

    With each decay; last, with few validation pairs.
    """
    for seed in REPAIR_SEEDS:
        for row in REPAIRED:
            yield from both_decays(corpus, row, PRIMARY, seed, tuned, cap)
    for seed in REPAIR_SEEDS:
        for row in ("paired", "half"):
            share = 100 * (row != "paired")
            told = tuned[tuned_as(row)]
            yield Cell(corpus, row, PRIMARY, share, seed, **told, cap=cap, validation=100)


MAP: dict[str, tuple[int, ...]] = {  # the numbers of pairs, by corpus
    "sentences": (100, 300, 1000, 3000),
    "inner": (100, 300, 1000, 3000),
    "pictures": (100, 300, 1000),  # of 3,017
    "autoencoder": (100, 300, 1000),
}


def tier_of_map(corpus: str, tuned: Tuned, cap: float) -> Iterator[Cell]:
    """Where cycles pay: by the number of pairs, in one decay, since the map is of many cells."""
    for seed in REPAIR_SEEDS:
        for pairs in MAP[corpus]:
            for row in MAPPED:
                share = 100 * (ROWS[row].unpaired != "none")
                yield Cell(corpus, row, pairs, share, seed, **tuned["half"], cap=cap)


CONFIRMED = {"fresh_sentences": 1000, "fresh_pictures": 300, "fresh_glosses": 1000}  # pairs
MORE = 3  # times as many pairs: what unpaired rows were meant to be worth


def confirmation(corpus: str, tuned: Tuned, cap: float) -> Iterator[Cell]:
    """The second preregistered comparison: fresh splits, deals and seeds."""
    pairs = CONFIRMED[corpus]
    for seed in CONFIRMING_SEEDS:
        for row in ("half", "pseudo_ridge", "unimodal"):
            told = tuned["half"] | {"learning_rate": tuned[tuned_as(row)]["learning_rate"]}
            yield Cell(corpus, row, pairs, 100, seed, **told, cap=cap)
        for many in (pairs, MORE * pairs):
            yield from both_decays(corpus, "paired", many, seed, tuned, cap)
