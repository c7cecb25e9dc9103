"""What a user sees: the texts of refusals, raised before anything has happened.

Run without jaxtyping's import hook, which would refuse wrong shapes first and in its own words.
"""

import math
import re

import pytest
import torch

import cyclevae as cv
from cyclevae.objective.terms import SHIPPED
from cyclevae.processes.latent import LatentProcess
from cyclevae.testing import toy_batch, toy_denoiser
from oracles import Spy

pytestmark = pytest.mark.unhooked

DENOISER, TEXT, LATENT = toy_denoiser()
TOKENS = torch.tensor([[3, 4, 5], [4, 6, 0]])
MASK = TOKENS > 0
Z = torch.zeros(2, 4)
LOGITS = torch.zeros(2, 3, 7)
PROCESSES = {"text_process": TEXT, "latent_process": LATENT}
NAN = Z.masked_fill(torch.tensor([[False], [True]]), math.nan)
INF = Z.masked_fill(torch.tensor([[True], [False]]), -math.inf)
CYCLES = (cv.CycleText(pairs=True), cv.CycleLatent(pairs=True))
ALL = (cv.Text(time=1.0), cv.Latent(), cv.Unconditional(), *CYCLES)


def base(**changes):
    return cv.text_loss(**{"logits": LOGITS, "tokens": TOKENS, "attention_mask": MASK} | changes)


def latent(prediction=Z, target=Z, **options):
    return cv.latent_loss(prediction, target, **options)


def text_cycle(spy, tokens=TOKENS, attention_mask=MASK, **options):
    return cv.cycle_text_loss(spy, tokens, attention_mask, **{**PROCESSES, **options})


def latent_cycle(spy, latents=Z, attention_mask=MASK, **options):
    return cv.cycle_latent_loss(spy, latents, attention_mask, **{**PROCESSES, **options})


def t2l(spy, tokens=TOKENS, attention_mask=MASK, **options):
    return cv.t2l(spy, tokens, attention_mask, **{**PROCESSES, "start": "noise", **options})


def l2t(spy, latents=Z, attention_mask=MASK):
    return cv.l2t(spy, latents, attention_mask, text_process=TEXT)


def unconditional(spy, tokens=TOKENS, latents=Z, attention_mask=MASK, **options):
    return cv.unconditional_loss(spy, tokens, latents, attention_mask, **{**PROCESSES, **options})


def objective(*terms, latent_process=LATENT):
    return cv.CycleObjective(TEXT, latent_process, terms)


def step(spy, batch, terms=ALL, generator=None):
    return objective(*terms)(spy, batch, step=0, generator=generator)


def cases(**named):
    """`name=(call, exception, words)`; the words must all be in the text."""
    return pytest.mark.parametrize(
        ("call", "exception", "words"), list(named.values()), ids=list(named)
    )


def refused(call, exception, words, *arguments, **options):
    with pytest.raises(exception) as caught:
        call(*arguments, **options)
    assert type(caught.value) is exception
    for word in (words,) if isinstance(words, str) else words:
        assert word in str(caught.value), str(caught.value)


# --- the two formulas -------------------------------------------------------------------------


@cases(
    tokens_of_one_axis=(
        lambda: base(tokens=TOKENS[0]),
        ValueError,
        "`tokens` must be token ids of shape [b, s], got int64 [3]",
    ),
    float_tokens=(
        lambda: base(tokens=TOKENS.float()),
        TypeError,
        "`tokens` must hold integer ids, got float32 [2, 3]; use .long()",
    ),
    bool_tokens=(lambda: base(tokens=MASK), TypeError, "must hold integer ids, got bool"),
    id_too_high=(
        lambda: base(tokens=TOKENS + 1),
        ValueError,
        ("`tokens` must hold ids in [0, 7), got ids from 1 to 7", "does the tokenizer match"),
    ),
    negative_id=(
        lambda: base(tokens=TOKENS.masked_fill(~MASK, -100)),
        ValueError,
        "got ids from -100 to 6",
    ),
    logits_of_another_length=(
        lambda: base(logits=LOGITS[:, :2]),
        ValueError,
        "`logits` must have shape [b, s, v] with [b, s] = [2, 3], got [2, 2, 7]",
    ),
    logits_of_two_axes=(
        lambda: base(logits=LOGITS[0]),
        ValueError,
        "`logits` must have shape [b, s, v]",
    ),
    mask_of_another_shape=(
        lambda: base(attention_mask=MASK[:, :2]),
        ValueError,
        "`attention_mask` must have the shape of its tokens [2, 3], got bool [2, 2]",
    ),
    mask_not_broadcast=(
        lambda: base(attention_mask=MASK[:1]),
        ValueError,
        "the shape of its tokens [2, 3], got bool [1, 3]",
    ),
    additive_mask=(
        lambda: base(attention_mask=torch.zeros(2, 3).masked_fill(~MASK, -math.inf)),
        ValueError,
        ("`attention_mask` must hold 1 (keep) or 0 (padding)", "turned round by `mask == 0`"),
    ),
    mask_of_segments=(
        lambda: base(attention_mask=MASK * 2),
        ValueError,
        "must hold 1 (keep) or 0 (padding), got other values",
    ),
    mask_with_nan=(
        lambda: base(attention_mask=torch.full((2, 3), math.nan)),
        ValueError,
        "must hold 1 (keep) or 0 (padding)",
    ),
    reduction=(
        lambda: base(reduction="maen"),
        ValueError,
        "`reduction` is 'maen'; did you mean 'mean'?",
    ),
    far_reduction=(
        lambda: base(reduction="xyz"),
        ValueError,
        "`reduction` is 'xyz'; known are 'mean', 'nats', 'none', 'sum'",
    ),
    no_reduction=(lambda: base(reduction=None), ValueError, "`reduction` is None"),
    middle_axis=(
        lambda: latent(Z[:, None], Z),
        ValueError,
        (
            "`prediction` and `target` must have equal shapes, got [2, 1, 4] and [2, 4]",
            "drop the middle axis with .squeeze(1)",
        ),
    ),
    one_row=(lambda: latent(Z[:1], Z), ValueError, "equal shapes, got [1, 4] and [2, 4]"),
    latent_reduction=(lambda: latent(reduction="sums"), ValueError, "did you mean 'sum'?"),
    variance_zero=(lambda: latent(variance=0.0), ValueError, "`variance` must be above 0, got 0"),
    variance_negative=(
        lambda: latent(variance=-1.0),
        ValueError,
        "`variance` must be a finite number of at least 0, got -1.0",
    ),
    variance_nan=(lambda: latent(variance=math.nan), ValueError, "`variance` must be a finite"),
)
def test_losses(call, exception, words):
    refused(call, exception, words)


# --- model passes -----------------------------------------------------------------------------

PASSES = cases(
    middle_axis=(
        lambda spy, g: latent_cycle(spy, Z[:, None], generator=g),
        ValueError,
        (
            "`latents` must be latents of shape [b, 4], got float32 [2, 1, 4]",
            "drop the middle axis with .squeeze(1)",
        ),
    ),
    integer_latents=(
        lambda spy, g: latent_cycle(spy, Z.long(), generator=g),
        TypeError,
        "`latents` must be floating point, got int64 [2, 4]; use .float()",
    ),
    wrong_width=(
        lambda spy, g: latent_cycle(spy, Z[:, :3], generator=g),
        ValueError,
        "`latents` must be latents of shape [b, 4], got float32 [2, 3]",
    ),
    one_axis=(
        lambda spy, g: cv.l2t(spy, Z[0], MASK, text_process=TEXT),
        ValueError,
        "`latents` must be latents of shape [b, d], [b, n, d] or [b, c, h, w], got float32 [4]",
    ),
    nan=(
        lambda spy, g: latent_cycle(spy, NAN, generator=g),
        ValueError,
        ("`latents` must be finite", "1 of 2 rows (first: row 1); drop or repair these rows"),
    ),
    infinity=(
        lambda spy, g: l2t(spy, INF),
        ValueError,
        "got NaN or infinity in 1 of 2 rows (first: row 0)",
    ),
    rows_of_mask_and_latents=(
        lambda spy, g: latent_cycle(spy, torch.zeros(3, 4), generator=g),
        ValueError,
        "`attention_mask` and `latents` must have the same number of rows, got 2 and 3",
    ),
    rows_of_latents_and_tokens=(
        lambda spy, g: t2l(spy, start=None, latents=torch.zeros(3, 4), generator=g),
        ValueError,
        "`latents` and `tokens` must have the same number of rows, got 3 and 2",
    ),
    z_hat_with_nan=(
        lambda spy, g: text_cycle(spy, z_hat=NAN),
        ValueError,
        ("`z_hat` must be finite", "in 1 of 2 rows (first: row 1); has training diverged?"),
    ),
    z_hat_of_another_width=(
        lambda spy, g: text_cycle(spy, z_hat=torch.zeros(2, 5)),
        ValueError,
        "`z_hat` must be latents of shape [b, 4], got float32 [2, 5]",
    ),
    latent_cycle_noise_of_other_rows=(
        lambda spy, g: latent_cycle(spy, noise=torch.zeros(3, 4)),
        ValueError,
        "`noise` and `latents` must have the same number of rows, got 3 and 2",
    ),
    mask_of_one_axis=(
        lambda spy, g: latent_cycle(spy, attention_mask=MASK[:, 0]),
        ValueError,
        "`attention_mask` must have shape [b, s], got bool [2]",
    ),
    id_in_the_base_losses=(
        lambda spy, g: cv.l2t_loss(spy, TOKENS + 3, Z, MASK, text_process=TEXT),
        ValueError,
        "`tokens` must hold ids in [0, 7)",
    ),
    id_in_t2l=(
        lambda spy, g: cv.t2l_loss(spy, TOKENS + 3, Z, MASK, **PROCESSES),
        ValueError,
        "`tokens` must hold ids in [0, 7)",
    ),
    z_hat_middle_axis=(
        lambda spy, g: text_cycle(spy, z_hat=torch.zeros(3, 4)),
        ValueError,
        "must have the same number of rows, got 2 and 3",
    ),
    noise_of_other_width=(
        lambda spy, g: text_cycle(spy, noise=torch.zeros(2, 3)),
        ValueError,
        "`noise` must be latents of shape [b, 4], got float32 [2, 3]",
    ),
    noise_of_other_rows=(
        lambda spy, g: text_cycle(spy, noise=torch.zeros(3, 4)),
        ValueError,
        "`noise` and `tokens` must have the same number of rows, got 3 and 2",
    ),
    latent_cycle_noise=(
        lambda spy, g: latent_cycle(spy, noise=torch.zeros(2, 3), generator=g),
        ValueError,
        "`noise` must be latents of shape [b, 4], got float32 [2, 3]",
    ),
    float_tokens=(
        lambda spy, g: text_cycle(spy, TOKENS.float(), generator=g),
        TypeError,
        "`tokens` must hold integer ids",
    ),
    id_out_of_vocabulary=(
        lambda spy, g: text_cycle(spy, TOKENS + 3, generator=g),
        ValueError,
        "`tokens` must hold ids in [0, 7), got ids from 3 to 9",
    ),
    id_with_z_hat=(
        lambda spy, g: text_cycle(spy, TOKENS + 3, z_hat=Z),
        ValueError,
        "`tokens` must hold ids in [0, 7), got ids from 3 to 9",
    ),
    y_hat_of_another_length=(
        lambda spy, g: latent_cycle(spy, y_hat=TOKENS[:, :2], generator=g),
        ValueError,
        "`attention_mask` must have the shape of its tokens [2, 2], got bool [2, 3]",
    ),
    additive_mask=(
        lambda spy, g: text_cycle(spy, attention_mask=MASK * -2.0, generator=g),
        ValueError,
        "`attention_mask` must hold 1 (keep) or 0 (padding)",
    ),
    time_above_one=(
        lambda spy, g: text_cycle(spy, time=1.5, generator=g),
        ValueError,
        "`time` must lie in [0 (clean), 1 (full noise)], got 1.5",
    ),
    time_negative=(
        lambda spy, g: latent_cycle(spy, time=-0.1, generator=g),
        ValueError,
        "`time` must lie in [0 (clean), 1 (full noise)], got -0.1",
    ),
    time_nan=(
        lambda spy, g: text_cycle(spy, time=math.nan, generator=g),
        ValueError,
        "`time` must lie in [0 (clean), 1 (full noise)], got nan",
    ),
    times_out_of_range=(
        lambda spy, g: text_cycle(spy, time=torch.tensor([0.5, 1.1]), generator=g),
        ValueError,
        "`time` must lie in [0 (clean), 1 (full noise)], got other values",
    ),
    discrete_times=(
        lambda spy, g: text_cycle(spy, time=torch.tensor([999, 1]), generator=g),
        TypeError,
        ("`time` must be floating point in [0, 1]", "divide discrete timesteps by their number"),
    ),
    times_of_other_rows=(
        lambda spy, g: text_cycle(spy, time=torch.ones(3), generator=g),
        ValueError,
        "`time` must be a number or have shape [2], got float32 [3]",
    ),
    rate=(
        lambda spy, g: unconditional(spy, text_time=2.0, generator=g),
        ValueError,
        "`text_time` must lie in [0 (clean), 1 (full noise)], got 2.0",
    ),
    joint_latent_time=(
        lambda spy, g: unconditional(spy, text_time=0.5, latent_time=-1.0, generator=g),
        ValueError,
        "`latent_time` must lie in",
    ),
    joint_noise=(
        lambda spy, g: unconditional(spy, noise=torch.zeros(2, 1), generator=g),
        ValueError,
        "`noise`",
    ),
    start=(
        lambda spy, g: t2l(spy, start="nois", generator=g),
        ValueError,
        "`start` is 'nois'; did you mean 'noise'?",
    ),
    neither=(
        lambda spy, g: t2l(spy, start=None, generator=g),
        ValueError,
        "give either `latents` to be noised or start='noise', got neither",
    ),
    both=(lambda spy, g: t2l(spy, latents=Z, generator=g), ValueError, "got both"),
    no_shape=(
        lambda spy, g: text_cycle(spy, latent_process=LatentProcess(), generator=g),
        ValueError,
        ("set `shape` on the LatentProcess", "or give `noise`"),
    ),
    bridge=(
        lambda spy, g: latent_cycle(spy, bridge="agmax", generator=g),
        ValueError,
        "`bridge` is 'agmax'; did you mean 'argmax'?",
    ),
    temperature=(
        lambda spy, g: latent_cycle(
            spy, bridge=cv.TextBridge("categorical", temperature=0.0), generator=g
        ),
        ValueError,
        "`temperature` must be above 0, got 0",
    ),
    text_reduction=(
        lambda spy, g: text_cycle(spy, reduction="men", generator=g),
        ValueError,
        "`reduction` is 'men'; did you mean 'mean'?",
    ),
    latent_reduction=(
        lambda spy, g: latent_cycle(spy, reduction="nat", generator=g),
        ValueError,
        "`reduction` is 'nat'; did you mean 'nats'?",
    ),
)


@PASSES
def test_passes(call, exception, words):
    refused(call, exception, words, Spy(DENOISER), None)


@PASSES
def test_refused_before_any_pass_or_draw(call, exception, words):
    spy, generator = Spy(DENOISER), torch.Generator().manual_seed(0)
    before = generator.get_state()
    refused(call, exception, words, spy, generator)
    assert spy.calls == [], "a pass of the model ran first"
    assert torch.equal(generator.get_state(), before), "random numbers were drawn first"


@cases(
    frozen_nothing=(
        lambda spy, g: text_cycle(spy, policy=cv.GradientPolicy(freeze=("wrod.*",)), generator=g),
        ValueError,
        ("pattern 'wrod.*' of freeze() matches no parameter name", "Nearest: 'word.*'"),
    ),
    frozen_bridge_nothing=(
        lambda spy, g: text_cycle(
            spy, policy=cv.GradientPolicy("full", freeze_bridge=("decoder",)), generator=g
        ),
        ValueError,
        "pattern 'decoder' of freeze() matches no parameter name",
    ),
    frozen_nothing_latent=(
        lambda spy, g: latent_cycle(spy, policy=cv.GradientPolicy(freeze=("wrod.*",)), generator=g),
        ValueError,
        "pattern 'wrod.*' of freeze() matches no parameter name",
    ),
)
def test_a_pattern_that_matches_nothing(call, exception, words):
    refused(call, exception, words, Spy(DENOISER), None)
    assert all(isinstance(p, torch.nn.Parameter) for p in DENOISER.module.parameters())


# --- what a denoiser returns ------------------------------------------------------------------


class Fixed:
    """A denoiser that returns what it was given."""

    def __init__(self, logits=None, latent_prediction=None):
        self.output = cv.Denoised(logits, latent_prediction)

    def denoise(self, tokens, latents, **state):
        return self.output


@cases(
    no_logits=(
        lambda: l2t(Fixed()),
        ValueError,
        "returned no logits where need='logits' or 'both' asked",
    ),
    wrong_logits=(
        lambda: l2t(Fixed(LOGITS[..., :5])),
        ValueError,
        ("[b, s, v] = [2, 3, 7], got [2, 3, 5]", "`text_process.vocab_size` the width"),
    ),
    no_latent=(lambda: t2l(Fixed()), ValueError, "returned no latent prediction where"),
    wrong_latent=(
        lambda: t2l(Fixed(None, Z[:, None])),
        ValueError,
        ("`latent_prediction` and `latents` must have equal shapes", ".squeeze(1)"),
    ),
    no_network=(
        lambda: cv.as_denoiser(lambda x: x),
        TypeError,
        "`network` must be a torch.nn.Module, got function",
    ),
)
def test_denoisers(call, exception, words):
    refused(call, exception, words)


def test_noise_and_latents_are_not_broadcast():
    for method in (LATENT.noised, LATENT.target):
        expected = re.escape("`noise` and `latents` must have equal shapes, got [2, 1, 4]")
        with pytest.raises(ValueError, match=expected):
            method(Z, Z[:, None], torch.ones(2))
    with pytest.raises(ValueError, match="`prediction` and `z_t` must have equal shapes"):
        LATENT.to_x0(Z[:, None], Z, torch.ones(2))


# --- processes --------------------------------------------------------------------------------


@cases(
    schedule=(
        lambda: LatentProcess("cosin"),
        ValueError,
        "`schedule` is 'cosin'; did you mean 'cosine'?",
    ),
    prediction=(
        lambda: LatentProcess(prediction="eps"),
        ValueError,
        "`prediction` is 'eps'; did you mean 'epsilon'?",
    ),
    max_gain=(lambda: LatentProcess(max_gain=0.0), ValueError, "`max_gain` must be above 0"),
    max_gain_nan=(lambda: LatentProcess(max_gain=math.nan), ValueError, "`max_gain` must be"),
    source=(
        lambda: cv.convert(Z, Z, torch.ones(2), torch.ones(2), source="x", target="v"),
        ValueError,
        "`source` is 'x'",
    ),
    target=(
        lambda: cv.convert(Z, Z, torch.ones(2), torch.ones(2), source="v", target="x1"),
        ValueError,
        "`target` is 'x1'; known are 'epsilon', 'v', 'velocity', 'x0'",
    ),
    time=(
        lambda: LATENT.alpha_sigma(torch.tensor([-0.1])),
        ValueError,
        "`time` must lie in [0 (clean), 1 (full noise)]",
    ),
    estimator=(
        lambda: cv.mmd_prior(Z, estimator="unbiase"),
        ValueError,
        "`estimator` is 'unbiase'; did you mean 'unbiased'?",
    ),
    bridge=(
        lambda: cv.pseudo_text(LOGITS, MASK, text_process=TEXT, bridge="sft"),
        ValueError,
        "`bridge` is 'sft'; did you mean 'soft'?",
    ),
    prior_latents=(
        lambda: cv.moment_prior(Z[0]),
        ValueError,
        "`z` must be latents of shape [b, d], [b, n, d] or [b, c, h, w], got float32 [4]",
    ),
)
def test_options(call, exception, words):
    refused(call, exception, words)


# --- the objective and its batch --------------------------------------------------------------


@pytest.mark.parametrize("term", SHIPPED)
@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, "1", None])
def test_weights(term, weight):
    expected = rf"^`weight` must be a finite number of at least 0, got {weight!r}"
    with pytest.raises(ValueError, match=expected):
        term(weight=weight)


@cases(
    schedule=(
        lambda: objective(cv.CycleText(weight=lambda s: -0.5)).weights(3),
        ValueError,
        "`cycle_text.weight(3)` must be a finite number of at least 0, got -0.5",
    ),
    prior=(
        lambda: cv.Prior("mdm"),
        ValueError,
        "`prior` is 'mdm'; did you mean 'mmd'?",
    ),
    text_bridge=(
        lambda: cv.CycleLatent(bridge="argmx"),
        ValueError,
        "`bridge` is 'argmx'; did you mean 'argmax'?",
    ),
    bridge_time=(
        lambda: cv.CycleText(time=1.2),
        ValueError,
        "`time` must lie in [0 (clean), 1 (full noise)] or be a TimePolicy, got 1.2",
    ),
    latent_time=(
        lambda: cv.Latent(time=math.nan),
        ValueError,
        "`time` must lie in [0 (clean), 1 (full noise)] or be a TimePolicy, got nan",
    ),
    full_bridge=(
        lambda: cv.CycleLatent(bridge="argmax", policy=cv.GradientPolicy("full")),
        ValueError,
        "the 'argmax' bridge is a choice of ids and has no gradient",
    ),
    count=(
        lambda: objective(*ALL)(DENOISER, toy_batch(), step=0, counts={"text_los": 1.0}),
        ValueError,
        "unknown count 'text_los'; did you mean 'text_loss'?",
    ),
)
def test_objective(call, exception, words):
    refused(call, exception, words)


WHOLE = toy_batch(seed=0, rows=2)


@cases(
    no_latents=(
        {"latents": None},
        ValueError,
        ("`batch.tokens` came without `batch.latents`", "into `batch.unpaired_tokens`"),
    ),
    no_tokens=(
        {"tokens": None, "attention_mask": None},
        ValueError,
        ("`batch.latents` came without `batch.tokens`", "into `batch.unpaired_latents`"),
    ),
    no_mask=(
        {"attention_mask": None},
        ValueError,
        ("`batch.tokens` came without `batch.attention_mask`", "give torch.ones_like(tokens)"),
    ),
    no_unpaired_mask=(
        {"unpaired_attention_mask": None},
        ValueError,
        "`batch.unpaired_tokens` came without `batch.unpaired_attention_mask`",
    ),
    mask_alone=(
        {"unpaired_tokens": None},
        ValueError,
        "`batch.unpaired_attention_mask` came without `batch.unpaired_tokens`",
    ),
    lengths_alone=(
        {"unpaired_latents": None, "pseudo_text_mask": torch.ones(2, 3).bool()},
        ValueError,
        "`batch.pseudo_text_mask` came without `batch.unpaired_latents`",
    ),
    lengths_of_other_rows=(
        {"pseudo_text_mask": torch.ones(3, 3).bool()},
        ValueError,
        "`batch.pseudo_text_mask` and `batch.unpaired_latents` must have the same number of rows",
    ),
    lengths_of_other_values=(
        {"pseudo_text_mask": torch.full((2, 3), 5)},
        ValueError,
        "`batch.pseudo_text_mask` must hold 1 (keep) or 0 (padding)",
    ),
    rows=(
        {"latents": torch.zeros(3, 4)},
        ValueError,
        "`batch.tokens` and `batch.latents` must have the same number of rows, got 2 and 3",
    ),
    middle_axis=(
        {"latents": torch.zeros(2, 1, 4)},
        ValueError,
        ("`batch.latents` must be latents of shape [b, 4]", ".squeeze(1)"),
    ),
    unpaired_width=(
        {"unpaired_latents": torch.zeros(2, 3)},
        ValueError,
        "`batch.unpaired_latents` must be latents of shape [b, 4], got float32 [2, 3]",
    ),
    nan=(
        {"unpaired_latents": NAN},
        ValueError,
        "`batch.unpaired_latents` must be finite, got NaN or infinity in 1 of 2 rows",
    ),
    ids=(
        {"unpaired_tokens": WHOLE.unpaired_tokens + 5},
        ValueError,
        "`batch.unpaired_tokens` must hold ids in [0, 7)",
    ),
    float_tokens=(
        {"tokens": WHOLE.tokens.float()},
        TypeError,
        "`batch.tokens` must hold integer ids, got float32 [2, 5]",
    ),
    mask_shape=(
        {"attention_mask": WHOLE.attention_mask[:, :4]},
        ValueError,
        "`batch.attention_mask` must have the shape of its tokens [2, 5], got bool [2, 4]",
    ),
)
def test_batches(call, exception, words):
    spy, generator = Spy(DENOISER), torch.Generator().manual_seed(0)
    before = generator.get_state()
    refused(step, exception, words, spy, WHOLE._replace(**call), generator=generator)
    assert spy.calls == [] and torch.equal(generator.get_state(), before)


def test_latents_of_two_shapes():
    run = objective(*ALL, latent_process=LatentProcess())
    batch = WHOLE._replace(unpaired_latents=torch.zeros(2, 3))
    expected = r"latents of one shape, got \[4\] and \[3\]"
    with pytest.raises(ValueError, match=expected):
        run(DENOISER, batch, step=0)


@cases(
    no_pairs=(
        (WHOLE._replace(tokens=None, attention_mask=None, latents=None), ALL),
        ValueError,
        ("`text` needs 1 pair in a batch or more, got 0", "give it weight 0, or leave it out"),
    ),
    no_text=(
        (cv.Batch(unpaired_latents=Z, pseudo_text_mask=MASK), CYCLES),
        ValueError,
        "this step encodes texts, and the batch holds none",
    ),
    no_length=(
        (cv.Batch(unpaired_latents=Z), CYCLES[1:]),
        ValueError,
        "give `pseudo_text_mask`",
    ),
    no_latent=(
        (cv.Batch(unpaired_tokens=TOKENS, unpaired_attention_mask=MASK), CYCLES),
        ValueError,
        "this step decodes latents, and the batch holds none",
    ),
    frozen_nothing=(
        (WHOLE, [cv.Latent(), cv.CycleLatent(policy=cv.GradientPolicy(freeze=("nothing",)))]),
        ValueError,
        "pattern 'nothing' of freeze() matches no parameter name",
    ),
)
def test_steps_without_what_they_need(call, exception, words):
    """No gradient and no frozen parameter is left behind."""
    refused(step, exception, words, Spy(DENOISER), *call)
    for parameter in DENOISER.module.parameters():
        assert isinstance(parameter, torch.nn.Parameter)
        assert parameter.requires_grad and parameter.grad is None


def test_a_frozen_selection_that_matches_nothing():
    with pytest.raises(ValueError, match=r"pattern 'heads\.\*' .* Nearest: "):
        cv.freeze(DENOISER, "heads.*").__enter__()
    with pytest.raises(ValueError, match=r"which holds no parameter of the target"):
        cv.freeze(DENOISER, torch.nn.Linear(2, 2)).__enter__()


# --- defined results --------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [[1], [0, 1]], ids=["a row", "the batch"])
@pytest.mark.parametrize(
    "run",
    [
        text_cycle,
        lambda spy, attention_mask: latent_cycle(spy, attention_mask=attention_mask),
        lambda spy, attention_mask: unconditional(spy, attention_mask=attention_mask).text,
        lambda spy, attention_mask: (
            step(spy, cv.Batch(TOKENS, attention_mask, Z, TOKENS, attention_mask, Z)).loss
        ),
    ],
    ids=["text cycle", "latent cycle", "unconditional", "step"],
)
def test_rows_of_nothing_but_padding(run, empty):
    mask = MASK.clone()
    mask[empty] = False
    spy = Spy(DENOISER)
    with pytest.raises(ValueError, match=r"attention_mask` must keep a position or more in every"):
        run(spy, attention_mask=mask)
    assert not spy.calls
    with cv.check_values(False):  # as on CUDA: finite if the network is, but nobody looked
        loss = run(spy, attention_mask=mask)
    gradients = torch.autograd.grad(
        loss, list(DENOISER.module.parameters()), allow_unused=True, materialize_grads=True
    )
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    if len(empty) == 2 and run is text_cycle:
        assert loss == 0 and not any(g.any() for g in gradients)


# --- without checks of values ----------------------------------------------------------------


def test_values_behind_padding_may_be_anything_without_checks():
    """Ids are read by the model at padding too, so the padding id is put there first."""
    wild = TOKENS.masked_fill(~MASK, 10**6)
    with pytest.raises(ValueError, match="`tokens` must hold ids"):
        text_cycle(Spy(DENOISER), wild)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    with cv.check_values(False):
        got = text_cycle(Spy(DENOISER), wild, generator=generators[0])
    assert torch.equal(got, text_cycle(Spy(DENOISER), generator=generators[1]))
