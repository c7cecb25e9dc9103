"""`check_ranks` in one process: every per-sample term, and what the harness finds or refuses."""

from functools import partial

import pytest
import torch

import cyclevae as cv
from cyclevae.processes.times import stratified_times
from cyclevae.testing import check_ranks, join_batches, toy_batch
from cyclevae.testing._draws import SameDraws
from rank_cases import PARTS, TERMS, Dropping, Forgetful, Noisy, Normalised, batch, makes, network
from running import LATENT, MADE, TEXT

STEPS = [part for batches in PARTS for part in batches]
every_term = pytest.mark.parametrize("term", TERMS)


@every_term
def test_accumulation_leaves_the_gradient_of_a_term_alone(term):
    check_ranks(makes(**TERMS[term]), [STEPS], tolerance=1e-10)


def made_by_others():
    objective = cv.CycleObjective(TEXT, LATENT, MADE)
    return cv.StepModule(cv.as_denoiser(network()), objective, cv.Teacher(network()))


def test_makers_and_null_rows_leave_the_gradient_alone_on_ranks_that_accumulate():
    check_ranks(made_by_others, PARTS)


@every_term
def test_counts_withheld_are_found_in_every_term(term):
    with pytest.raises(
        AssertionError, match=r"the gradient of network.* is .*, and .* in one proc"
    ):
        check_ranks(makes(Forgetful, **TERMS[term]), [STEPS])


def test_the_whole_message():
    with pytest.raises(AssertionError) as error:
        check_ranks(makes(Forgetful), [STEPS])
    message = str(error.value)
    assert message.startswith("accumulation: the gradient of network.word.weight at [")
    assert message.endswith(
        " in one process on the joined batch. The usual causes: `counts` that are not used, or not "
        "summed over accumulation steps and ranks; batch normalisation, or another statistic of "
        "the batch; dropout; a draw that depends on the split"
    )


@pytest.mark.parametrize("kind", [Normalised, Dropping, Noisy])
def test_networks_whose_rows_depend_on_the_split(kind):
    with pytest.raises(AssertionError, match=r"accumulation: the gradient of network\."):
        check_ranks(makes(kind=kind), [STEPS])


def test_the_tolerance_is_relative_to_the_largest_gradient():
    tiny = {f"{name}_weight": 1e-12 for name in ("text", "latent", "unconditional")}
    make = makes(Forgetful, **tiny, cycle_text_weight=0.0, cycle_latent_weight=0.0)
    check_ranks(make, [STEPS], tolerance=1e3)
    with pytest.raises(AssertionError, match="accumulation: "):
        check_ranks(make, [STEPS])


def test_everything_is_double():
    """Also weights that are made in fp32, and noise where no latent shows its dtype."""
    texts = [cv.Batch(None, None, None, *part[:2]) for part in STEPS]
    check_ranks(partial(single, makes(**TERMS["cycle_text"])), [texts], tolerance=1e-10)


def test_cycles_that_leave_pairs_out_where_a_part_has_nothing_else():
    bridge = cv.LatentBridge(noise=0.5)
    check_ranks(makes(cycle_pairs=False, latent_bridge=bridge), [STEPS[:2]])
    check_ranks(makes(cycle_pairs=False, unconditional_weight=0.0), [STEPS])


def test_partly_masked_texts():
    check_ranks(makes(base_text_time=cv.TimePolicy("uniform")), [STEPS])
    check_ranks(makes(base_text_time=0.5), [STEPS])


def single(make):
    return make().float()


def test_phases():
    def make():
        module = makes()()
        module.objective = cv.phases(
            module.objective, latent_cycle_from=1, full_gradient_from=2, text_bridge="gumbel"
        )
        return module

    for step in range(3):
        check_ranks(make, [STEPS], step=step)


def test_nothing_outside_changes():
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    check_ranks(makes(), [STEPS[:2]])
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == dtype
    assert STEPS[0].latents.dtype == torch.float32


# The joined batch


def test_join_batches():
    joined = join_batches([batch(2, 1, 0, width=3), batch(1, 0, 2, width=5, seed=1)])
    assert [None if part is None else list(part.shape) for part in joined] == [
        [3, 5],
        [3, 5],
        [3, 4],
        [1, 3],
        [1, 3],
        [2, 4],
        [2, 5],
        *[None] * 5,
    ]
    assert not joined.attention_mask[:2, 3:].any()
    assert join_batches([cv.Batch()]) == cv.Batch()


def test_join_batches_of_which_some_are_marked():
    one, other = cv.Batch(*toy_batch(0, 3)[:5]), cv.Batch(*toy_batch(1, 2)[:5])
    marked = other._replace(has_latent=torch.tensor([True, False]))
    assert (one | marked).has_latent.tolist() == [True] * 4 + [False]
    assert (marked | one).has_latent.tolist() == [True, False, True, True, True]
    assert (one | marked).has_text is None
    long = toy_batch(0, 3)._replace(pseudo_text_mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="`pseudo_text_mask` is given for some of the batches"):
        long | toy_batch(1, 2)
    assert (long | other).pseudo_text_mask.shape == (3, 4)  # which has no latents to decode


def test_join_batches_of_latents_of_variable_length():
    def some(n):
        return cv.Batch(unpaired_latents=torch.ones(2, n, 4), unpaired_latent_mask=torch.ones(2, n))

    joined = join_batches([some(3), some(5)])
    assert joined.unpaired_latents.shape == (4, 5, 4)
    torch.testing.assert_close(joined.unpaired_latents.mean(dim=2), joined.unpaired_latent_mask)
    assert joined.unpaired_latent_mask.sum() == 16


# The draws


def draws(rows, length):
    """What the library draws for some rows of some length, twice."""
    with SameDraws():
        return [
            drawn
            for _ in range(2)
            for drawn in (
                torch.rand(rows, length),
                torch.randn((rows, 4), dtype=torch.float64),
                torch.randn_like(torch.zeros(rows, 4)),
                torch.empty(rows, length, 3).exponential_(),
                stratified_times(rows),
                cv.TimePolicy("uniform", high=0.9)(rows),
                cv.TimePolicy("logit_normal", stratified=False)(rows),
                cv.draw_lengths(torch.ones(rows, length), rows).float(),
            )
        ]


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_draws_do_not_depend_on_the_number_of_rows_or_the_padding(rows):
    for few, many in zip(draws(2, 3), draws(rows, 9), strict=True):
        for row in many:
            assert torch.equal(row[tuple(slice(size) for size in few.shape[1:])], few[0])


def test_a_run_without_data_draws_nothing():
    """Of which there may be any number before the draws of a step."""
    with SameDraws():
        expected = torch.rand(2, 3)
    with SameDraws():
        for draw in (torch.rand, torch.randn):
            assert draw(2, 3, device="meta").is_meta
        assert torch.equal(torch.rand(2, 3), expected)


def test_lengths_drawn_for_the_texts_themselves_are_their_own():
    lengths = torch.arange(4) < torch.tensor([[2], [4], [1]])
    with SameDraws():
        assert torch.equal(cv.draw_lengths(lengths, 3), lengths)


def test_calls_draw_different_numbers_of_the_right_distribution():
    first, second = draws(2, 500)[:7], draws(2, 500)[8:15]
    for one, other in zip(first, second, strict=True):
        assert not torch.equal(one, other)
    uniform, race = first[0][0], first[3][0].flatten()
    torch.testing.assert_close(
        uniform.sort().values, (torch.arange(500) + 0.5) / 500, atol=5e-3, rtol=0
    )
    torch.testing.assert_close(
        (race < 1).float().mean(), torch.tensor(1 - torch.e**-1), atol=5e-3, rtol=0
    )
    with SameDraws():
        normal = torch.randn(1, 1000)
    assert abs(normal.mean()) < 1e-2 and abs(normal.std() - 1) < 2e-2


def test_a_generator_of_ones_own_is_left_alone():
    generator = torch.Generator().manual_seed(0)
    expected = torch.rand(3, 2, generator=generator)
    with SameDraws():
        assert torch.equal(torch.rand(3, 2, generator=generator.manual_seed(0)), expected)
        assert torch.randint(9, (3,)).max() < 9  # no rows of three


# What is refused


def test_parts_of_which_nothing_could_be_learned():
    for parts in ([], [[]], [[STEPS[0]]], [STEPS, []]):
        with pytest.raises(ValueError, match="`parts` must hold a batch for every rank and at lea"):
            check_ranks(makes(), parts)


def test_lengths_that_would_be_drawn():
    with pytest.raises(ValueError, match=r"`parts\[0\]\[1\]` has `unpaired_latents` without `pseu"):
        check_ranks(makes(), [[STEPS[0], toy_batch(seed=0)]])


def test_statistics_of_a_call():
    def refused(match, parts=(STEPS[:2],), **options):
        with pytest.raises(ValueError, match=match):
            check_ranks(makes(**options), parts)

    refused(
        "^`contrastive`: it is a statistic of one call; set its weight to 0 .*two_pass",
        contrastive_weight=1.0,
    )
    for prior in ("moment", "mmd", "sigreg"):
        on = {"prior": prior, "prior_weight": 1.0}
        refused(f"^`prior`: prior='{prior}' .* accumulation steps.*two_pass", **on, pool_prior=True)
        refused(f"prior='{prior}' .* set pool=True", [[STEPS[0]], [STEPS[1]]], **on)
    moving = cv.TimePolicy("uniform", high=cv.anneal(0.5, 0.9, steps=10))
    refused("^`text`: `time` has a cap that moves", base_text_time=moving)
    refused("^`cycle_latent`: fraction=0.5 takes the first rows of each batch", cycle_fraction=0.5)


def test_a_term_that_rests_is_not_refused():
    later = cv.ramp(1.0, warmup_steps=5)
    make = makes(contrastive_weight=later, prior_weight=later)
    with pytest.warns(match="`(prior|contrastive)` has not begun at step 4 .*step=5"):
        check_ranks(make, [STEPS[:2]], step=4)
    with pytest.raises(ValueError, match=r"^`prior`: "):
        check_ranks(make, [STEPS[:2]], step=5)


def test_a_step_without_gradient():
    with pytest.raises(AssertionError, match=r"the largest gradient of one process is 0\.0"):
        check_ranks(partial(frozen, makes()), [STEPS[:2]])


def frozen(make):
    module = make()
    for parameter in module.parameters():
        parameter.register_hook(torch.zeros_like)
    return module


def test_make_must_return_a_step_and_be_importable():
    with pytest.raises(TypeError, match="`make` must return a StepModule, got Linear"):
        check_ranks(lambda: torch.nn.Linear(2, 2), [STEPS])
    with pytest.raises(ValueError, match="`make` must be importable by new processes"):
        check_ranks(lambda: makes()(), PARTS)
    with pytest.raises(ValueError, match="`wrap` must be importable by new processes"):
        check_ranks(makes(), PARTS, wrap=lambda module: module)
