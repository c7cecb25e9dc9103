"""`two_pass`: a statistic of the batch over accumulation steps is that of the joined batch."""

from functools import partial

import pytest
import torch

import cyclevae as cv
from cyclevae.testing import join_batches, toy_denoiser
from rank_cases import LATENT, TEXT, batch

PARTS = [batch(rows, 0, 0, width=width, seed=rows) for rows, width in ((3, 4), (1, 6), (2, 5))]
JOINED = join_batches(PARTS)
LATENTS = JOINED.latents.double()
STATISTICS = {
    "moment": cv.moment_prior,
    "bures": partial(cv.moment_prior, form="full_bures", estimator="biased"),
    "mmd": cv.mmd_prior,
    "infonce": lambda z_hat: cv.infonce_loss(z_hat, LATENTS),
}
every_statistic = pytest.mark.parametrize("name", STATISTICS)


def denoiser():
    made = toy_denoiser(seed=0)[0]
    made.module.double()
    return made


def encode(denoiser, part, noise=None, policy=None, **options):
    """The latents of a part, from the noise of its rows or from drawn noise."""
    return cv.encode_text(
        denoiser,
        part.tokens,
        part.attention_mask,
        text_process=TEXT,
        latent_process=LATENT,
        noise=noise,
        policy=policy or cv.GradientPolicy("full"),
        **options,
    )


def gradients(denoiser):
    return {name: parameter.grad for name, parameter in denoiser.module.named_parameters()}


def assert_same(got, expected):
    assert got.keys() == expected.keys() and any(g is not None for g in expected.values())
    for name, wanted in expected.items():
        if wanted is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], wanted, rtol=1e-10, atol=1e-12, msg=name)


@every_statistic
def test_value_and_gradient_are_those_of_the_joined_batch(name):
    noise = torch.randn(6, 4, dtype=torch.float64)
    whole = denoiser()
    value = STATISTICS[name](encode(whole, JOINED, noise))
    value.backward()
    parts = denoiser()
    pairs = list(zip(PARTS, noise.split([3, 1, 2]), strict=True))
    losses = []
    for loss in cv.two_pass(STATISTICS[name], lambda pair: encode(parts, *pair), pairs):
        loss.backward()
        losses.append(loss.detach())
    assert len(losses) == 3
    torch.testing.assert_close(sum(losses), value.detach(), rtol=1e-10, atol=1e-12)
    assert_same(gradients(parts), gradients(whole))


def test_the_mean_over_parts_is_something_else():
    """What the test above would notice."""
    noise = torch.randn(6, 4, dtype=torch.float64)
    whole, parts = denoiser(), denoiser()
    cv.mmd_prior(encode(whole, JOINED, noise)).backward()
    for part, drawn in ((PARTS[0], noise[:3]), (PARTS[2], noise[4:])):
        (cv.mmd_prior(encode(parts, part, drawn)) / 2).backward()
    with pytest.raises(AssertionError):
        assert_same(gradients(parts), gradients(whole))


class Dropping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2).double()

    def forward(self, x, generator=None):
        noise = torch.randn(len(x), 2, generator=generator, dtype=x.dtype)
        return torch.nn.functional.dropout(self.layer(x), 0.5) + noise


@pytest.mark.parametrize("own", [False, True])
def test_both_passes_draw_the_same_and_others_draw_on(own):
    """The latents that the second pass trains are those that the statistic has seen."""
    module, x = Dropping(), torch.randn(6, 3, dtype=torch.float64)
    generator = torch.Generator() if own else None
    seed = torch.manual_seed if generator is None else generator.manual_seed
    seed(0)
    for part in x.split(2):
        module(part, generator)
    expected = torch.rand(3, generator=generator)  # what others draw after the first pass
    seen, again, between = [], [], []

    def statistic(z):
        seen.append(z.detach().clone())
        return cv.moment_prior(z)

    def encode(part):
        z = module(part, generator)
        if z.requires_grad:
            again.append(z.detach().clone())
        return z

    seed(0)
    for _ in cv.two_pass(statistic, encode, x.split(2), generator=generator):
        between.append(torch.rand(1, generator=generator))
    assert torch.equal(torch.cat(again), seen[0])
    assert torch.equal(torch.cat(between), expected)


def test_one_part_holds_a_graph_at_a_time():
    """A part is encoded again only when its turn comes."""
    layer, turns = torch.nn.Linear(3, 2), []

    def encode(part):
        turns.append(torch.is_grad_enabled())
        return layer(part)

    losses = cv.two_pass(cv.moment_prior, encode, torch.randn(6, 3).split(2))
    assert turns == []
    next(losses)
    assert turns == [False, False, False, True]
    next(losses)
    assert turns[4:] == [True]


def test_a_weight_and_rows_of_no_part():
    layer, x = torch.nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    wanted = torch.autograd.grad(0.5 * cv.moment_prior(layer(x)), [*layer.parameters()])
    for loss in cv.two_pass(cv.moment_prior, layer, x.split([3, 0, 1])):
        (0.5 * loss).backward()
    for parameter, expected in zip(layer.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


# What is refused


def first(*arguments):
    return next(cv.two_pass(*arguments))


def test_no_parts():
    with pytest.raises(ValueError, match="`parts` is empty, so there are no latents"):
        first(cv.moment_prior, torch.nn.Linear(3, 2), [])


def test_a_statistic_that_is_no_scalar_or_has_no_graph():
    layer, parts = torch.nn.Linear(3, 2), [torch.randn(4, 3)]
    with pytest.raises(ValueError, match=r"`statistic` must return a scalar .* got shape \[4\]"):
        first(lambda z: z.sum(dim=1), layer, parts)
    with pytest.raises(ValueError, match=r"got shape \[\] without a graph"):
        first(lambda z: z.detach().sum(), layer, parts)


def test_latents_without_a_graph():
    """The default policy of a bridge detaches."""
    encoder = partial(encode, denoiser(), noise=LATENTS, policy=cv.GradientPolicy())
    with pytest.raises(ValueError, match=r"without a graph.*GradientPolicy\('full'\)"):
        first(cv.mmd_prior, encoder, [JOINED])


def test_latents_that_change():
    layer, generator = torch.nn.Linear(3, 2), torch.Generator().manual_seed(0)

    def encode(x):
        return layer(x) + torch.randn(len(x), 2, generator=generator)

    with pytest.raises(ValueError, match=r"other latents the second time.*give the `generator`"):
        first(cv.moment_prior, encode, torch.randn(4, 3).split(2))

    def grow(x):
        return layer(x) if torch.is_grad_enabled() else layer(x)[:1]

    with pytest.raises(ValueError, match="other latents the second time"):
        first(cv.moment_prior, grow, torch.randn(4, 3).split(2))
