"""What a user of the objective sees: options, steps and phases that are refused, and how."""

import pytest
import torch

import cyclevae as cv
from cyclevae.testing import toy_batch, toy_denoiser
from oracles import Spy
from recipes import every_term

pytestmark = pytest.mark.unhooked

DENOISER, TEXT, LATENT = toy_denoiser()
TOKENS = torch.tensor([[3, 4, 5], [4, 6, 0]])
SIX = toy_batch(seed=0, rows=6)


def cases(**named):
    """`name=(options, words)`; the words must all be in the text."""
    return pytest.mark.parametrize(("options", "words"), list(named.values()), ids=list(named))


def refused(call, words, exception=ValueError):
    with pytest.raises(exception) as caught:
        call()
    for word in (words,) if isinstance(words, str) else words:
        assert word in str(caught.value), str(caught.value)


def learned(**options):
    """An objective whose prior is the learned one."""
    return {"prior": "learned", "prior_weight": 0.1, **options}


@cases(
    unknown_prior_option=(
        {"prior_options": {"scale": (1.0,)}},
        "unknown key 'scale' in `prior_options` of prior='mmd'; did you mean 'scales'?",
    ),
    option_of_the_step=(
        learned(prior_options={"time": 0.5}),
        "unknown key 'time' in `prior_options` of prior='learned'",
    ),
    scales=(
        {"prior_options": {"scales": (0.5, -1.0)}},
        "`scales` must be a finite number of at least 0, got -1.0",
    ),
    options_at_odds=(
        {"prior": "moment", "prior_options": {"form": "full_bures"}},
        "`prior_options` of prior='moment': ",
    ),
    moment_of_another_shape=(
        {"prior_options": {"mean": torch.zeros(3)}},
        "`mean` must be a number or have the shape of one latent [4], got [3]",
    ),
    learned_form=(
        learned(prior_options={"form": "score_difference"}),
        "give a `posterior_std` above 0",
    ),
    ddvi_range=(
        {"prior": "ddvi", "prior_options": {"low": 0.9, "high": 0.1}},
        "`low` and `high` must be times in [0, 1]",
    ),
    pooled_rows=(
        learned(pool_prior=True),
        "`pool_prior` has no effect on prior='learned'",
    ),
    contrastive_option=(
        {"contrastive_options": {"temprature": 1.0}},
        "unknown key 'temprature' in `contrastive_options`; did you mean 'temperature'?",
    ),
    unknown_cap=(
        {"caps": {"txet": 1.0}},
        "unknown term 'txet' in `caps`; did you mean 'text'?",
    ),
    cap_of_nothing=({"caps": {"text": 0.0}}, "`caps['text']` must be above 0, got 0"),
    text_time=({"base_text_time": 1.5}, "`base_text_time` must lie in [0, 1], got 1.5"),
    contrastive_temperature=(
        {"contrastive_options": {"temperature": 0.0}},
        "`contrastive_options['temperature']` must be above 0, got 0",
    ),
    contrastive_critic=(
        {"contrastive_options": {"critic": "cos"}},
        "`contrastive_options['critic']` is 'cos'; did you mean 'cosine'?",
    ),
    latent_distance=(
        {"latent_distance": "l2"},
        "`latent_distance` is 'l2'",
    ),
    cycle_latent_distance=(
        {"cycle_latent_distance": "cos"},
        "`cycle_latent_distance` is 'cos'; did you mean 'cosine'?",
    ),
    latent_space=({"latent_space": "z"}, "`latent_space` is 'z'"),
    min_snr=({"min_snr": 0.0}, "`min_snr` must be above 0, got 0"),
    p_dual=({"p_dual": 1.5}, "`p_dual` must lie in [0, 1], got 1.5"),
    null_text_rate=({"null_text_rate": -0.1}, "`null_text_rate` must lie in [0, 1], got -0.1"),
    cycle_fraction=({"cycle_fraction": 0.0}, "`cycle_fraction` must lie in (0, 1], got 0.0"),
    cycle_every=({"cycle_every": 0}, "`cycle_every` must be an integer of at least 1, got 0"),
    marginal_of_ids=(
        {"text_marginal_weight": 0.1},
        "`text_marginal_weight` teaches the decoder through a relaxed text, and the 'argmax'",
    ),
    dropped_gradient=(
        {"text_bridge": "gumbel"},
        "use GradientPolicy(bridge='full')",
    ),
)
def test_new_options(options, words):
    refused(lambda: every_term(TEXT, LATENT, **options), words)


@cases(
    no_teacher=(
        learned(),
        "prior='learned' reads a frozen copy of the network, and none was given",
    ),
    no_teacher_of_ddvi=(
        {"prior": "ddvi", "prior_weight": 0.1},
        "prior='ddvi' reads a frozen copy of the network, and none was given",
    ),
    nothing_runs=(
        {
            "text_weight": 0,
            "latent_weight": 0,
            "unconditional_weight": 0,
            "cycle_every": 2,
        },
        "there is nothing to train on at step 1: every weight is 0, or only cycles weigh",
    ),
    ids_for_the_marginal=(
        {
            "text_marginal_weight": 0.1,
            "text_bridge": lambda logits, mask, **_: logits.argmax(dim=-1),
            "latent_policy": cv.GradientPolicy("full"),
        },
        "`text_marginal_weight` needs a relaxed text",
    ),
)
def test_steps(options, words):
    objective = every_term(TEXT, LATENT, **options)
    refused(lambda: objective(DENOISER, SIX, step=1), words)


def test_statistics_of_one_row():
    one = toy_batch(seed=0, rows=1)._replace(unpaired_tokens=None, unpaired_attention_mask=None)
    for term, words in (("prior", "give at least 2 texts"), ("contrastive", "give at least 2")):
        objective = every_term(TEXT, LATENT, **{f"{term}_weight": 1.0})
        refused(lambda o=objective: o(DENOISER, one, step=0), words)
    refused(
        lambda: cv.moment_prior(torch.zeros(1, 2), form="covariance"),
        "`z` needs at least 2 samples for batch statistics, got shape [1, 2]",
    )


def test_a_teacher_that_learns():
    objective = every_term(TEXT, LATENT, **learned())
    refused(
        lambda: objective(DENOISER, SIX, step=0, teacher=DENOISER),
        ("`teacher` must be frozen, and its parameter", "use Teacher(network).denoiser"),
    )
    refused(
        lambda: cv.StepModule(DENOISER, objective, DENOISER.module),
        "`teacher` must be a Teacher, got ToyNetwork; make it by Teacher(network)",
        TypeError,
    )


def test_unpaired_texts_below_full_noise():
    for time in (1.0, 0.5):
        refused(
            lambda time=time: cv.t2l(
                Spy(DENOISER),
                TOKENS,
                TOKENS > 0,
                text_process=TEXT,
                latent_process=LATENT,
                time=time,
            ),
            "give either `latents` to be noised or start='noise', got neither",
        )


@cases(
    order=({"latent_cycle_from": 5, "full_gradient_from": 3}, "must be steps in this order"),
    bridge=({"text_bridge": "argmax"}, "'argmax' has none; use 'straight_through'"),
)
def test_phases(options, words):
    three = {"latent_cycle_from": 1, "full_gradient_from": 2, **options}
    objective = every_term(TEXT, LATENT)
    refused(lambda: cv.phases(objective, **three), words)


def test_phases_of_an_open_bridge():
    objective = every_term(TEXT, LATENT, text_policy=cv.GradientPolicy("full"))
    refused(
        lambda: cv.phases(objective, latent_cycle_from=1, full_gradient_from=2),
        "`objective.text_policy.bridge` must be 'detach', got 'full'",
    )
