"""Latents of variable length in an objective, and what is refused of their masks."""

import math

import pytest
import torch

import cyclevae as cv
from cyclevae.testing._draws import SameDraws
from masked import (
    BRIDGE,
    HOLES,
    KEPT,
    LATENT,
    MASK,
    PROCESSES,
    TEXT,
    TOKENS,
    Sequence,
    Z,
    denoiser,
    padded_with,
    rows,
    seeded,
    teacher,
)
from oracles import Spy

# The whole objective


def batch(dtype=torch.float32, n=4, seed=0):
    tokens, mask, z, kept = rows(5, n, seed=seed, dtype=dtype)
    more = rows(6, n, seed=seed + 1, dtype=dtype)
    return cv.Batch(
        tokens, mask, z, more[0], more[1], more[2], more[1].flip(0),
        latent_mask=kept, unpaired_latent_mask=more[3], unpaired_text_latent_mask=more[3].flip(0),
    )  # fmt: skip


PER_ROW = [
    cv.Text(), cv.Latent(), cv.Latent(name="between", time=0.5, distance="cosine"),
    cv.Unconditional(), cv.CycleText(bridge=BRIDGE, pairs=True),
    cv.CycleLatent(bridge=cv.TextBridge("gumbel"), policy="full", pairs=True),
    cv.CycleLatent(name="rloo", bridge="rloo", policy="full"), cv.TextMarginal(), cv.Sleep(),
    cv.Prior("learned", weight=0.1), cv.Prior("ddvi", name="ddvi"),
]  # fmt: skip
OF_BATCHES = [cv.Contrastive(), cv.Prior("mmd", name="mmd"), cv.Prior("sigreg", name="sigreg")]
OF_BATCHES += [cv.Prior("moment", name="moment", bridge=BRIDGE, through="full")]
OBJECTIVE = cv.CycleObjective(TEXT, LATENT, [*PER_ROW, *OF_BATCHES])


def run(objective, data, d=None, counts=None):
    d = denoiser(dtype=data.latents.dtype) if d is None else d
    with SameDraws():
        output = objective(d, data, step=0, teacher=teacher(d), counts=counts)
    output.loss.backward()
    gradients = {name: p.grad for name, p in d.module.named_parameters()}
    return output.metrics, gradients


def filled(data, value):
    return data._replace(
        latents=padded_with(data.latents, data.latent_mask, value),
        unpaired_latents=padded_with(data.unpaired_latents, data.unpaired_latent_mask, value),
    )


def test_an_objective_sees_no_padding():
    data = batch()
    zeros = run(OBJECTIVE, filled(data, 0.0))
    assert all(bool(value.isfinite()) for value in zeros[0].values())
    for a, b in zip(zeros, run(OBJECTIVE, filled(data, math.nan)), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert OBJECTIVE.counts(filled(data, math.nan)) == OBJECTIVE.counts(data)


def test_an_objective_is_the_sum_of_its_rows_by_length():
    """Each length alone, cut and without a mask, over the counts of all: as accumulation does."""
    data, objective = batch(torch.float64), cv.CycleObjective(TEXT, LATENT, PER_ROW)
    counts = objective.counts(data)
    expected = denoiser(dtype=torch.float64)
    for n in range(1, 5):
        pairs, texts, latents = (
            mask.sum(dim=1) == n
            for mask in (
                data.latent_mask,
                data.unpaired_text_latent_mask,
                data.unpaired_latent_mask,
            )
        )
        part = cv.Batch(
            data.tokens[pairs], data.attention_mask[pairs], data.latents[pairs, :n],
            data.unpaired_tokens[texts], data.unpaired_attention_mask[texts],
            data.unpaired_latents[latents, :n], data.pseudo_text_mask[latents],
        )  # fmt: skip
        _, gradients = run(objective, part, expected, counts)
    torch.testing.assert_close(run(objective, data, counts=counts)[1], gradients)


def test_counts_are_of_what_is_kept():
    data = batch()._replace(has_latent=torch.tensor([True, False, True, True, True]))
    terms = [
        cv.Latent(), cv.Latent(name="cosine", distance="cosine"), cv.CycleLatent(), cv.Sleep(),
        cv.Unconditional(), cv.CycleLatent(name="all", pairs=True, distance="cosine"),
    ]  # fmt: skip
    counts = cv.CycleObjective(TEXT, LATENT, terms).counts(data)
    pairs, alone = 2 + 1 + 3 + 2, 2 + 4 + 1 + 3 + 2 + 4  # vectors
    assert {name: int(count) for name, count in counts.items() if "text" not in name} == {
        "latent_loss": 3 * pairs,
        "cosine_loss": pairs,
        "cycle_latent_loss": 3 * alone,
        "sleep_loss": 3 * alone,
        "unconditional_latent_loss": 3 * (pairs + alone),
        "all_loss": pairs + alone,
    }


def test_a_row_without_a_latent_says_how_long_one_is_to_be_written():
    data = batch()._replace(
        has_latent=torch.tensor([True, False, True, False, True]),
        has_text=torch.tensor([True, True, False, False, True]),
    )
    data.latent_mask[3] = False  # of neither part: all of it, if anybody asks
    lost = ~data.has_latent[:, None, None] | ~data.latent_mask[..., None]
    found = [
        run(OBJECTIVE, data._replace(latents=data.latents.masked_fill(lost, value)))
        for value in (0.0, math.nan)
    ]
    for a, b in zip(*found, strict=True):
        assert all(torch.equal(a[name], b[name]) and bool(a[name].isfinite().all()) for name in a)
    spy = Spy(denoiser())
    cv.CycleObjective(TEXT, LATENT, [cv.CycleText(pairs=True)])(spy, data, step=0)
    encoded = spy.calls[0]["latent_mask"]
    assert torch.equal(encoded[:2], data.latent_mask[:2])
    assert torch.equal(encoded[2:4], data.latent_mask[4].expand(2, -1))  # as the text they borrow
    assert torch.equal(encoded[5:], data.unpaired_text_latent_mask)


class Part(Sequence):
    """The encoder or the decoder of two networks."""

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, tokens, latents, **state):
        return super().forward(tokens, latents, **state)[self.side]


def test_two_networks_are_told():
    pair = cv.as_denoiser(cv.EncoderDecoder(encoder=Part(1), decoder=Part(0)))
    given = {"latent_mask": HOLES, **PROCESSES}
    found = [
        cv.t2l_loss(pair, TOKENS, padded_with(Z, HOLES, v), MASK, generator=seeded(), **given)
        for v in (0.0, math.nan)
    ]
    assert torch.equal(*found) and bool(found[0] > 0)


# What is refused, before any pass


class Deaf:
    """A denoiser of one's own that was written before there were masks."""

    def denoise(self, tokens, latents, *, text_time, latent_time, attention_mask, need="both"):
        raise AssertionError("no pass was to run")


def no_mask(tokens, latents, *, text_time, latent_time, attention_mask): ...


def deaf_network():
    network = Sequence()
    network.forward = no_mask
    return cv.as_denoiser(network)


class TakesAnything(Sequence):
    def forward(self, tokens, latents, **state):
        return super().forward(tokens, latents, **state)


def objective(*terms, **changes):
    spy = Spy(denoiser())
    cv.CycleObjective(TEXT, LATENT, list(terms))(spy, batch()._replace(**changes), step=0)


EMPTY = KEPT.clone()
EMPTY[2] = False
REFUSED = {
    "network": (
        lambda: cv.l2t(deaf_network(), Z, MASK, text_process=TEXT, latent_mask=KEPT),
        "Sequence takes no `latent_mask`, and would read the padding of latents",
    ),
    "no promise": (
        lambda: cv.l2t(
            cv.as_denoiser(TakesAnything()), Z, MASK, text_process=TEXT, latent_mask=KEPT
        ),
        "TakesAnything takes no `latent_mask`",
    ),
    "denoiser": (
        lambda: cv.cycle_text_loss(Deaf(), TOKENS, MASK, noise=Z, latent_mask=KEPT, **PROCESSES),
        "Deaf takes no `latent_mask`",
    ),
    "objective": (
        lambda: cv.CycleObjective(TEXT, LATENT, [cv.CycleText()])(
            cv.checkpoint_passes(Deaf()), batch(), step=0
        ),
        "(of one's own Denoiser: `denoise`) take it, bool [b, n]",
    ),
    "unpaired latents": (
        lambda: objective(cv.Latent(), unpaired_latent_mask=None),
        "none for `batch.unpaired_latents`: give `batch.unpaired_latent_mask`, torch.ones where",
    ),
    "texts alone": (
        lambda: objective(cv.Latent(), unpaired_text_latent_mask=None),
        "`unpaired_attention_mask` where a latent is as long as its text",
    ),
    "pairs": (
        lambda: objective(cv.Latent(), latent_mask=None),
        "none for `batch.latents`: give `batch.latent_mask`",
    ),
    "no latents": (
        lambda: objective(cv.Latent(), unpaired_latents=None, pseudo_text_mask=None),
        "`batch.unpaired_latent_mask` came without `batch.unpaired_latents`",
    ),
    "nothing kept": (
        lambda: objective(cv.Latent(), latent_mask=EMPTY),
        "`batch.latent_mask` must keep a position or more in every row, and keeps none in 1 of 5",
    ),
    "shape": (
        lambda: cv.latent_loss(Z, Z, latent_mask=KEPT[:, :2]),
        "`latent_mask` must have the shape [b, n] = [5, 4] of its latents [5, 4, 3], got [5, 2]",
    ),
    "no vectors": (
        lambda: cv.latent_loss(Z[:, 0], Z[:, 0], latent_mask=KEPT),
        "these are of shape [5, 3]; leave it out",
    ),
    "an image": (
        lambda: cv.moment_prior(Z[..., None], latent_mask=KEPT),
        "n vectors of latents [b, n, d] are kept, and these are of shape [5, 4, 3, 1]",
    ),
    "neighbours": (
        lambda: cv.mmd_prior(Z, estimator="linear", latent_mask=KEPT),
        "estimator='linear' compares neighbours",
    ),
    "too few": (
        lambda: cv.moment_prior(
            Z[:2], form="full_kl", latent_mask=torch.arange(4).expand(2, 4) < 1
        ),
        "needs at least 4 samples of 3 dimensions for form 'full_kl', got 2",
    ),
    "one's own prior": (
        lambda: objective(cv.Prior(lambda z: z.square().mean())),
        "takes no `latent_mask`, and would count the padding of latents",
    ),
    "one mask of two": (
        lambda: cv.l2t_and_t2l(
            denoiser(), Z, MASK, TOKENS, MASK, noise=Z, latent_mask=KEPT, **PROCESSES
        ),
        "give both `latent_mask` and `text_latent_mask`, or none",
    ),
    "a list": (
        lambda: cv.latent_loss(Z, Z, latent_mask=[[True]]),
        "`latent_mask` must be a torch.Tensor, got list",
    ),
    "shape unknown": (
        lambda: cv.CycleObjective(TEXT, LATENT, [cv.CycleText()])(
            denoiser(),
            cv.Batch(
                unpaired_tokens=TOKENS, unpaired_attention_mask=MASK, unpaired_text_latent_mask=KEPT
            ),
            step=0,
        ),
        "is of latents whose shape nothing tells: set `shape` on the LatentProcess",
    ),
}  # fmt: skip


@pytest.mark.unhooked
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(name):
    call, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert words in str(error.value)
