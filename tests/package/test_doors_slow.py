"""What comes to the door of every public function: other types, dtypes, masks and frames.

Run without jaxtyping's import hook, which would refuse wrong types first and in its own words.
"""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.diagnostics import cheat_test, cycle_report, latent_probe, text_probe
from cyclevae.testing import toy_batch, toy_denoiser
from oracles import Spy

pytestmark = pytest.mark.unhooked

DENOISER, TEXT, LATENT = toy_denoiser()
TOKENS = torch.tensor([[3, 4, 5], [4, 6, 0]])
MASK = TOKENS > 0
Z = torch.tensor([[0.1, -0.2, 0.3, 0.4], [0.5, 0.1, -0.7, 0.2]])
FROZEN = cv.Teacher(DENOISER.module).denoiser

VALUES = {
    "denoiser": DENOISER,
    "teacher": FROZEN,
    "tokens": TOKENS,
    "attention_mask": MASK,
    "lengths": MASK,
    "latents": Z,
    "logits": torch.zeros(2, 3, 7),
    "prediction": Z,
    "target": Z + 1,
    "z": Z,
    "candidates": Z,
    "z_hat": Z + 0.5,
    "value": Z,
    "z_t": Z,
    "log_probs": torch.zeros(2, 3, requires_grad=True),
    "rewards": torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 0.0]]),
    "text_process": TEXT,
    "latent_process": LATENT,
    "time": torch.tensor([0.3, 0.6]),
    "alpha": torch.tensor([0.6, 0.8]),
    "sigma": torch.tensor([0.8, 0.6]),
    "rows": 3,
    "steps": 2,
    "source": "v",
    "batch": cv.Batch(TOKENS, MASK, Z, TOKENS, MASK, Z),
}
FUNCTIONS = [
    cv.l2t,
    cv.t2l,
    cv.l2t_and_t2l,
    cv.joint,
    cv.convert,
    cv.encode_text,
    cv.unmask_text,
    cv.encode,
    cv.decode,
    cv.best_text,
    cv.channel_latents,
    cv.pseudo_text,
    cv.argmax_text,
    cv.categorical_text,
    cv.straight_through_text,
    cv.gumbel_text,
    cv.soft_text,
    cv.draw_lengths,
    cv.rloo_surrogate,
    cv.text_log_prob,
    cv.text_loss,
    cv.l2t_loss,
    cv.latent_loss,
    cv.min_snr_weight,
    cv.t2l_loss,
    cv.unconditional_loss,
    cv.text_marginal_loss,
    cv.cycle_text_loss,
    cv.cycle_latent_loss,
    cv.infonce_loss,
    cv.same_text,
    cv.mmd_prior,
    cv.moment_prior,
    cv.sigreg_prior,
    cv.learned_prior,
    cv.ddvi_wake_kl,
    cv.ddvi_sleep_loss,
    text_probe,
    latent_probe,
    cheat_test,
    cycle_report,
]
SAID = {"t2l": {"start": "noise"}, "cycle_report": {"batch": toy_batch(rows=8)}}
TENSORS = [name for name, value in VALUES.items() if isinstance(value, torch.Tensor)]
IDS = {f: f.__name__ for f in FUNCTIONS}


def arguments(function):
    """What a function cannot do without."""
    needed = inspect.signature(function).parameters.values()
    found = {p.name: VALUES[p.name] for p in needed if p.default is p.empty and p.name in VALUES}
    if function is cv.convert:
        found |= {"source": "v", "target": "x0"}
    return found | SAID.get(function.__name__, {})


def each(kinds):
    """Every function with every argument of some kinds."""
    return [
        pytest.param(function, name, id=f"{function.__name__}-{name}")
        for function in FUNCTIONS
        for name in arguments(function)
        if name in kinds and not isinstance(arguments(function)[name], str)
    ]


def refused(function, error=TypeError, words="", **changes):
    with pytest.raises(error) as caught:
        function(**{**arguments(function), **changes})
    for name in changes:
        assert f"`{name}`" in str(caught.value), str(caught.value)
    assert words in str(caught.value), str(caught.value)


@pytest.mark.parametrize("function", FUNCTIONS, ids=IDS.values())
def test_the_table_of_arguments_is_right(function):
    assert function(**arguments(function)) is not None


# --- types ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "name"), each(TENSORS))
def test_what_is_no_tensor_is_named_with_its_cure(function, name):
    value = arguments(function)[name].detach()
    number = name in ("time", "alpha", "sigma")  # these may be numbers in places
    refused(function, **{name: value.numpy()}, words="as_tensor(")
    refused(function, **{name: value.tolist()}, words="" if number else "use torch.tensor(")
    refused(function, **{name: {"x": value}}, words="" if number else "take the tensor out of it")
    refused(function, **{name: "text"})
    if name != "time":
        refused(function, **{name: None})


@pytest.mark.parametrize(("function", "name"), each(["denoiser", "teacher"]))
def test_what_is_no_denoiser_is_named_with_its_cure(function, name):
    refused(function, **{name: nn.Linear(2, 2)}, words="as_denoiser(network)")
    refused(function, **{name: DENOISER.module}, words="as_denoiser(network)")
    refused(function, **{name: cv.Teacher(DENOISER.module)}, words="`.denoiser`")
    refused(function, **{name: None})


@pytest.mark.parametrize(("function", "name"), each(["text_process", "latent_process"]))
def test_a_process_of_the_other_kind_is_refused(function, name):
    other = LATENT if name == "text_process" else TEXT
    refused(function, **{name: other}, words="are the two processes swapped?")
    refused(function, **{name: "cosine"})
    refused(function, **{name: {"mask_id": 2}})


@pytest.mark.parametrize("function", FUNCTIONS, ids=IDS.values())
def test_options_of_another_type(function):
    options = inspect.signature(function).parameters
    if "generator" in options:
        refused(function, generator=0, words="torch.Generator(device).manual_seed(seed)")
    if "policy" in options:
        refused(function, policy="full", words="names are for terms; ")
        refused(function, policy=0.5, words="GradientPolicy('detach')")
    for name in ("noise", "y_hat", "null_mask", "has_text", "has_latent"):
        if name in options and options[name].default is not options[name].empty:
            refused(function, **{name: np.zeros((2, 4))}, words="torch.as_tensor(")
    for name in ("count", "text_count", "latent_count", "mean", "variance"):
        if name in options:
            refused(function, **{name: [1.0]}, words="must be a number or a torch.Tensor")
    if "weight" not in options:
        with pytest.raises(TypeError, match="unexpected keyword argument 'weight'"):
            function(**arguments(function), weight=1.0)


def test_a_bridge_of_the_other_direction_and_a_policy_of_times():
    given = {"text_process": TEXT, "latent_process": LATENT}
    for function in (cv.cycle_text_loss, cv.encode_text):
        with pytest.raises(ValueError, match="`bridge` must be a LatentBridge, got 'categorical'"):
            function(DENOISER, TOKENS, MASK, bridge="categorical", **given)
    with pytest.raises(TypeError, match=r"`time` must be a number.*call it for one of each row"):
        cv.cycle_text_loss(DENOISER, TOKENS, MASK, time=cv.TimePolicy("uniform"), **given)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"tokens": TOKENS}, "use Batch(**batch)"),
        ((TOKENS, MASK, Z), "use Batch(*batch)"),
        (TOKENS, "put its tensors into Batch("),
        (None, "must be a Batch, got NoneType"),
        (cv.Batch(TOKENS.numpy(), MASK, Z), "`batch.tokens` must be a torch.Tensor, got ndarray"),
        (cv.Batch(TOKENS, MASK.tolist(), Z), "`batch.attention_mask` must be a torch.Tensor"),
        (cv.Batch(TOKENS, MASK, Z.numpy()), "use torch.as_tensor(latents)"),
        (cv.Batch(TOKENS, MASK, Z, has_text=[True, False]), "`batch.has_text`"),
        (cv.Batch(Z, MASK, TOKENS), "`batch.tokens` must hold integer ids, got float32"),
        (cv.Batch(MASK, TOKENS, Z), "`batch.tokens` must hold integer ids, got bool"),
        (cv.Batch(TOKENS, MASK, Z.long()), "`batch.latents` must be floating point"),
    ],
)
def test_what_is_no_batch(batch, words):
    spy = Spy(DENOISER)
    objective = cv.CycleObjective(TEXT, LATENT)
    for call in (objective, objective.losses):
        with pytest.raises(TypeError) as caught:
            call(spy, batch, step=0)
        assert words in str(caught.value) and not spy.calls
    with pytest.raises(TypeError):
        objective.counts(batch)


def test_an_objective_takes_a_denoiser():
    objective = cv.CycleObjective(TEXT, LATENT)
    with pytest.raises(TypeError, match=r"`denoiser` must be a Denoiser.*as_denoiser\(network\)"):
        objective(DENOISER.module, VALUES["batch"], step=0)
    with pytest.raises(TypeError, match="`generator` must be a Generator"):
        objective(DENOISER, VALUES["batch"], step=0, generator=3)
    with pytest.raises(ValueError, match="`text_process` must be a TextProcess, got LatentProcess"):
        cv.CycleObjective(LATENT, TEXT)


# --- integers ---------------------------------------------------------------------------------

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32)


def value_of(function, **changes):
    torch.manual_seed(0)
    return function(**{**arguments(function), **changes})


def equal(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, tuple):
        return all(equal(a, b) for a, b in zip(left, right, strict=True))
    return left == right


@pytest.mark.parametrize(("function", "name"), each(["tokens", "attention_mask", "lengths"]))
def test_small_integers_are_widened(function, name):
    value = arguments(function)[name]
    expected = value_of(function)
    for dtype in INTEGERS:
        assert equal(value_of(function, **{name: value.to(dtype)}), expected), dtype


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_batch_of_small_integers(dtype):
    batch = cv.Batch(*(x.to(dtype) if i % 3 < 2 else x for i, x in enumerate(VALUES["batch"][:6])))
    objective = cv.CycleObjective(TEXT, LATENT)
    losses = []
    for each_batch in (batch, VALUES["batch"]):
        generator = torch.Generator().manual_seed(0)
        losses.append(objective(DENOISER, each_batch, step=0, generator=generator).loss)
    assert torch.equal(*losses)
    assert cv.embed_tokens(torch.eye(7), TOKENS.to(dtype)).shape == (2, 3, 7)


# --- masks ------------------------------------------------------------------------------------

READERS = [f for f in FUNCTIONS if {"denoiser", "tokens"} <= set(arguments(f))]
WRITERS = [f for f in FUNCTIONS if {"denoiser", "attention_mask"} <= set(arguments(f))]
ADDITIVE = torch.zeros(2, 3).masked_fill(~MASK, -math.inf)


@pytest.mark.parametrize("function", WRITERS, ids=lambda f: f.__name__)
def test_masks_of_another_convention_are_refused(function):
    def no(mask, error, words):
        refused(function, error, words, attention_mask=mask)

    no(ADDITIVE, ValueError, "turned round by `mask == 0`")
    no(ADDITIVE.clamp(min=-1e4).long(), ValueError, "turned round by `mask == 0`")
    no(MASK.to(torch.complex64), TypeError, "must be bool or integers")
    with cv.check_values(False):  # as on CUDA: what cannot be looked at is refused by its dtype
        for mask in (ADDITIVE, ADDITIVE.half(), MASK.float()):
            no(mask, TypeError, "turned round by `mask == 0`")
    nothing = MASK.clone()
    nothing[1] = False
    no(nothing, ValueError, "keeps none in 1 of 2 (first: row 1)")


@pytest.mark.parametrize("function", READERS, ids=lambda f: f.__name__)
def test_a_mask_that_is_true_at_padding_is_refused(function):
    one = torch.tensor([[3, 0, 0], [4, 6, 0]])  # no row is full
    for mask in (one == 0, torch.ones_like(one)):
        with pytest.raises(ValueError, match=r"hold the padding id 0.* give ~mask"):
            function(**{**arguments(function), "tokens": one, "attention_mask": mask})
    full = torch.tensor([[3, 4, 5], [4, 6, 0]])
    with pytest.raises(ValueError, match=r"keeps none in 1 of 2.*give ~mask|hold the padding id 0"):
        function(**{**arguments(function), "tokens": full, "attention_mask": full == 0})


@pytest.mark.parametrize("part", ["", "unpaired_"])
def test_a_batch_with_a_mask_of_another_convention(part):
    objective, spy = cv.CycleObjective(TEXT, LATENT), Spy(DENOISER)
    one = torch.tensor([[3, 0, 0], [4, 6, 0]])
    for tokens, mask, words in (
        (one, one == 0, "hold the padding id 0, in 2 of 2 rows"),
        (one, torch.ones_like(one), "hold the padding id 0"),
        (TOKENS, ~MASK, "keeps none in 1 of 2"),
        (TOKENS, ADDITIVE, "turned round by `mask == 0`"),
    ):
        changes = {f"{part}tokens": tokens, f"{part}attention_mask": mask}
        with pytest.raises(ValueError) as caught:
            objective(spy, VALUES["batch"]._replace(**changes), step=0)
        assert f"`batch.{part}attention_mask`" in str(caught.value) and not spy.calls
        assert words in str(caught.value)


def test_padding_that_also_ends_texts_may_be_kept():
    """As tokenizers have it that pad with their end token: kept once, at the end."""
    text = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, end_id=0)
    tokens = torch.tensor([[3, 4, 0, 0], [0, 0, 0, 0]])  # the second is an empty text
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    kept = {"text_process": text, "latent_process": LATENT}
    assert cv.cycle_text_loss(DENOISER, tokens, mask, **kept).isfinite()
    with pytest.raises(ValueError, match="in 1 of 2 rows"):
        cv.cycle_text_loss(DENOISER, tokens, 1 - mask, **kept)


def test_rows_that_lack_their_text_may_keep_nothing():
    nothing = MASK & torch.tensor([[True], [False]])
    batch = cv.Batch(TOKENS * nothing, nothing, Z, has_text=torch.tensor([True, False]))
    terms = [cv.Text(), cv.Latent(), cv.CycleText(pairs=True)]
    assert cv.CycleObjective(TEXT, LATENT, terms)(DENOISER, batch, step=0).loss.isfinite()


# --- padding on the left ----------------------------------------------------------------------


@pytest.mark.parametrize("taught", ["none", "first", "all"])
@pytest.mark.parametrize(
    "function",
    [f for f in READERS if f not in (text_probe, latent_probe, cheat_test)],
    ids=lambda f: f.__name__,
)
def test_padding_in_front_changes_nothing_but_places(function, taught):
    """The toy network knows no positions, so a text moved to the right is the same text."""
    text = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, taught_padding=taught)
    tokens = torch.tensor([[3, 4, 5, 0], [4, 6, 0, 0]])
    losses = []
    for left in (0, 2):
        moved = nn.functional.pad(tokens, (left, 0))
        with SameRates():
            found = function(
                **{
                    **arguments(function),
                    "text_process": text,
                    "tokens": moved,
                    "attention_mask": moved > 0,
                }
            )
        if function in (cv.l2t_and_t2l, cv.t2l):
            found = (found[1] if function is cv.l2t_and_t2l else found).prediction
        elif function is cv.joint:
            found = found.latent_prediction
        losses.append(found[0] if isinstance(found, tuple) else found)
    torch.testing.assert_close(*losses)


class SameRates:
    """Whole texts are masked, and noise is the same: what is drawn depends on no position."""

    def __enter__(self):
        self.rand, self.randn, self.randperm = torch.rand, torch.randn, torch.randperm
        torch.randperm = lambda n, **options: torch.arange(n)
        torch.rand = lambda *size, **options: torch.zeros(*size, dtype=options.get("dtype"))
        torch.randn = lambda *size, **options: torch.ones(*size, dtype=options.get("dtype"))

    def __exit__(self, *exception):
        torch.rand, torch.randn, torch.randperm = self.rand, self.randn, self.randperm


def test_padding_is_taught_behind_a_text_alone():
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    first = [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    every = [[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    for taught, expected in (("first", first), ("all", every)):
        text = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, taught_padding=taught)
        assert text.taught(mask).long().tolist() == expected
        masked = text.fully_masked(mask)
        assert (masked == 2).long().tolist() == expected


# --- dtypes -----------------------------------------------------------------------------------

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOATING = [f for f in FUNCTIONS if {"denoiser", "teacher"} & set(arguments(f))]


def network_of(dtype):
    denoiser = toy_denoiser()[0]
    denoiser.module.to(dtype)
    return denoiser


@pytest.mark.parametrize("function", FLOATING, ids=lambda f: f.__name__)
def test_networks_and_latents_of_any_dtypes_go_together(function):
    for network, latents in itertools.product(DTYPES, DTYPES):
        given = arguments(function)
        denoiser = network_of(network)
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "time":
                given[name] = value.to(latents)
        given |= {"denoiser": denoiser} if "denoiser" in given else {}
        if "teacher" in given:  # a Teacher refuses coarse weights, which it averages
            given["teacher"] = network_of(network)
            given["teacher"].module.requires_grad_(False).eval()
        if "batch" in given:
            batch = given["batch"]
            given["batch"] = batch._replace(latents=batch.latents.to(latents))
        found = function(**given)
        tensors = [x for x in (found if isinstance(found, tuple) else (found,)) if is_float(x)]
        assert all(x.isfinite().all() for x in tensors), (network, latents)


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.parametrize("network", DTYPES)
@pytest.mark.parametrize("latents", DTYPES)
def test_the_recommended_recipe_in_any_dtypes(network, latents):
    denoiser, batch = network_of(network), VALUES["batch"]
    batch = batch._replace(
        latents=batch.latents.to(latents), unpaired_latents=batch.unpaired_latents.to(latents)
    )
    terms = [cv.Text(), cv.Latent(), cv.CycleText(), cv.CycleLatent(), cv.Unconditional()]
    output = cv.CycleObjective(TEXT, LATENT, terms)(denoiser, batch, step=0)
    output.loss.backward()
    gradients = [p.grad for p in denoiser.module.parameters()]
    assert all(g.dtype == network and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("network", DTYPES)
@pytest.mark.parametrize("latents", (None, *DTYPES))
def test_the_state_of_a_pass_is_in_no_lower_dtype_than_the_network(network, latents):
    given = {"start": "noise"} if latents is None else {"latents": Z.to(latents), "time": 0.5}
    spy = Spy(network_of(network))
    encoded = cv.t2l(spy, TOKENS, MASK, text_process=TEXT, latent_process=LATENT, **given)
    assert encoded.z_t.dtype == torch.promote_types(network, latents or torch.float32)
    assert encoded.prediction.dtype == network and encoded.time.dtype.itemsize >= 4


def test_a_network_that_does_not_cast_its_times_is_told_to():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 4)

        def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
            return torch.zeros(*tokens.shape, 7), self.layer(latent_time[:, None]) + latents

    denoiser = cv.as_denoiser(Raw().bfloat16())
    with pytest.raises(TypeError, match=r"`latent_time` in float32.*latent_time\.to\(latents\)"):
        cv.encode_text(denoiser, TOKENS, MASK, text_process=TEXT, latent_process=LATENT)
