import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cyclevae as cv
import oracles_latents
from cyclevae.losses.contrastive import infonce_loss, same_text
from oracles import array
from strategies import masks, quick, seeds

CRITICS = ("cosine", "euclidean")
every_critic = pytest.mark.parametrize("critic", CRITICS)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


# --- against a loop ---------------------------------------------------------------------------


@quick
@given(
    st.integers(2, 6),
    st.sampled_from([(1,), (3,), (2, 3)]),
    st.sampled_from(CRITICS),
    st.sampled_from([0.05, 0.1, 1.0, 7.0]),
    st.booleans(),
    seeds,
)
def test_infonce(rows, shape, critic, temperature, repeats, seed):
    x, y = randn(rows, *shape, seed=seed), randn(rows, *shape, seed=seed + 1)
    duplicates = randn(rows, rows, seed=seed + 2) > 0 if repeats else None
    options = {"temperature": temperature, "critic": critic, "duplicates": duplicates}
    expected = oracles_latents.infonce(x, y, **options)
    assert infonce_loss(x, y, **options).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_defaults():
    x, y = randn(4, 3), randn(4, 3, seed=1)
    expected = oracles_latents.infonce(x, y, 0.1, "cosine")
    assert infonce_loss(x, y).item() == pytest.approx(expected)


def test_by_hand():
    """Two rows; scores -d^2 / 2 of distances 0, 2, 1 and 1."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    rows = math.log(1 + math.exp(-2)), math.log(2)
    columns = math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(-1.5))
    got = infonce_loss(x, y, temperature=1.0, critic="euclidean").item()
    assert got == pytest.approx((sum(rows) + sum(columns)) / 4)


# --- what it bounds ---------------------------------------------------------------------------


@every_critic
@pytest.mark.parametrize("rows", [2, 7, 64])
def test_a_constant_critic_gives_log_n(rows, critic):
    constant = torch.ones(rows, 3).double()
    assert infonce_loss(constant, constant, critic=critic).item() == pytest.approx(math.log(rows))
    if critic == "cosine":
        zero = infonce_loss(constant * 0, randn(rows, 3)).item()
        assert zero == pytest.approx(math.log(rows))


@every_critic
def test_a_perfect_critic_gives_zero(critic):
    z = torch.eye(8).double() * 5
    assert 0 <= infonce_loss(z, z, temperature=0.01, critic=critic).item() < 1e-12
    worst = infonce_loss(z, z.roll(1, 0), temperature=0.01, critic=critic)
    assert worst > 90  # nothing bounds it from above


@pytest.mark.slow
def test_the_bound_of_correlated_gaussians():
    """rho = .8: I = .511 nats, of which 64 rows show .499 with the optimal critic."""
    rho, n, batches = 0.8, 64, 3000
    information = -math.log(1 - rho**2) / 2
    assert information == pytest.approx(0.511, abs=5e-4)
    # log p(x, y) / (p(x) p(y)) is B x y - A x^2 / 2 - A y^2 / 2 + const, and as a distance
    # that of (sqrt(B) x, f(x), m) and (sqrt(B) y, m, f(y)) for large m
    a, b, m = rho**2 / (1 - rho**2), rho / (1 - rho**2), 1e4
    pairs = randn(batches, n, 2)
    x = pairs[..., 0]
    y = rho * x + math.sqrt(1 - rho**2) * pairs[..., 1]

    def f(u):
        return (b - a) * u.square() / (2 * m)

    one = torch.full_like(x, m)
    left = torch.stack([math.sqrt(b) * x, f(x), one], dim=-1)
    right = torch.stack([math.sqrt(b) * y, one, f(y)], dim=-1)
    bounds = [
        math.log(n) - infonce_loss(p, q, temperature=1.0, critic="euclidean").item()
        for p, q in zip(left, right, strict=True)
    ]
    mean, error = np.mean(bounds), np.std(bounds) / math.sqrt(batches)
    assert error < 0.002
    assert abs(mean - 0.499) < 4 * error
    assert mean < information


@every_critic
def test_without_duplicates_it_bounds_and_with_them_it_does_not(critic):
    """Two texts, equally probable, whose latents tell them apart: I = log 2."""
    z = torch.randint(2, (200, 16, 1), generator=torch.Generator().manual_seed(0)).double()
    z = torch.cat([z, 1 - z], dim=-1)
    options = {"critic": critic, "temperature": 0.05}
    bounds = [math.log(16) - infonce_loss(x, x, **options).item() for x in z]
    assert np.mean(bounds) < math.log(2) < np.mean(bounds) + 0.05
    equal = [(x[:, None] == x).all(dim=-1) for x in z]
    found = [
        math.log(16) - infonce_loss(x, x, duplicates=same, **options).item()
        for x, same in zip(z, equal, strict=True)
    ]
    assert np.mean(found) > 3 * math.log(2)


def test_the_bound_is_capped():
    z = randn(16, 8)
    assert math.log(16) - infonce_loss(z, z, temperature=1e-3).item() <= math.log(16)


@every_critic
def test_symmetric(critic):
    x, y = randn(6, 3), randn(6, 3, seed=1)
    duplicates = randn(6, 6, seed=2) > 1
    options = {"critic": critic, "temperature": 0.5}
    got = infonce_loss(x, y, duplicates=duplicates, **options)
    torch.testing.assert_close(infonce_loss(y, x, duplicates=duplicates.T, **options), got)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    shuffled = duplicates[order][:, order]
    torch.testing.assert_close(
        infonce_loss(x[order], y[order], duplicates=shuffled, **options), got
    )


def test_the_cosine_knows_no_scale_and_the_distance_no_origin():
    x, y = randn(6, 3), randn(6, 3, seed=1)
    scales = torch.tensor([1e-4, 1e-2, 1, 10, 1e3, 1e4])[:, None]
    torch.testing.assert_close(infonce_loss(x * scales, y * 7), infonce_loss(x, y))
    moved = infonce_loss(x + 1e4, y + 1e4, critic="euclidean")
    torch.testing.assert_close(moved, infonce_loss(x, y, critic="euclidean"))
    far = infonce_loss((x + 1e3).float(), (y + 1e3).float(), critic="euclidean", temperature=1.0)
    near = infonce_loss(x, y, critic="euclidean", temperature=1.0)
    torch.testing.assert_close(far.double(), near, rtol=1e-3, atol=1e-3)


def test_temperature_divides_the_scores():
    x, y = randn(6, 3), randn(6, 3, seed=1)
    hot = infonce_loss(x * 2, y * 2, critic="euclidean", temperature=4.0)
    torch.testing.assert_close(hot, infonce_loss(x, y, critic="euclidean", temperature=1.0))


# --- duplicates -------------------------------------------------------------------------------


@every_critic
def test_duplicates_are_no_negatives(critic):
    """Of three rows, two with one text: each of these has one negative, the third has two."""
    z = randn(3, 4)
    z[1] = z[0]
    tokens, mask = torch.tensor([[3, 4], [3, 4], [5, 6]]), torch.ones(3, 2).bool()
    options = {"critic": critic, "temperature": 1.0}
    got = infonce_loss(z, z, duplicates=same_text(tokens, mask), **options).item()
    scores = array(z @ z.T)
    if critic == "cosine":
        norm = np.linalg.norm(z, axis=1)
        scores = scores / np.outer(norm, norm)
    else:
        scores = -np.square(array(z)[:, None] - array(z)[None]).sum(-1) / 2
    twin = np.log(np.exp(scores[0, 0]) + np.exp(scores[0, 2])) - scores[0, 0]
    third = np.log(np.exp(scores[2]).sum()) - scores[2, 2]
    assert got == pytest.approx((2 * twin + third) / 3)
    assert got < infonce_loss(z, z, **options).item()


def test_nothing_but_duplicates_gives_zero_with_a_graph():
    x = randn(3, 4).requires_grad_()
    for diagonal in (True, False):
        every = torch.ones(3, 3).bool()
        every.fill_diagonal_(diagonal)  # which is ignored
        loss = infonce_loss(x, randn(3, 4, seed=1), duplicates=every)
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert gradient(loss, x)[0].abs().max() < 1e-12


def test_no_duplicates_is_the_plain_loss():
    x, y = randn(4, 3), randn(4, 3, seed=1)
    for none in (torch.zeros(4, 4).bool(), torch.eye(4).bool()):
        assert torch.equal(infonce_loss(x, y, duplicates=none), infonce_loss(x, y))


@quick
@given(masks(rows=4), seeds)
def test_same_text(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, mask.shape, generator=generator)
    expected = [
        [
            all(
                bool(mask[i, k]) == bool(mask[j, k])
                and (not mask[i, k] or tokens[i, k] == tokens[j, k])
                for k in range(mask.shape[1])
            )
            for j in range(4)
        ]
        for i in range(4)
    ]
    for ids in (tokens, tokens.to(torch.uint8)):
        for keep in (mask, mask.long(), mask.float()):
            assert same_text(ids, keep).tolist() == expected


# --- gradients and dtypes ---------------------------------------------------------------------


@every_critic
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 2)])
def test_gradcheck(critic, shape):
    x, y = randn(*shape).requires_grad_(), randn(*shape, seed=1).requires_grad_()
    duplicates = torch.zeros(4, 4).bool()
    duplicates[0, 1] = duplicates[3, 2] = True
    assert torch.autograd.gradcheck(
        lambda p, q: infonce_loss(p, q, critic=critic, temperature=0.7, duplicates=duplicates),
        (x, y),
    )


@every_critic
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_gradients_are_finite(critic, dtype, scale):
    x, y = (randn(5, 3, seed=s) * scale for s in (0, 1))
    x[0], x[1], y[2], y[3] = 0.0, x[2], y[1], x[3]
    x, y = (z.to(dtype).requires_grad_() for z in (x, y))
    loss = infonce_loss(x, y, critic=critic, temperature=1.0)
    assert loss.dtype == torch.float32 and loss.isfinite() and loss.shape == ()
    assert all(g.isfinite().all() for g in gradient(loss, x, y))


@every_critic
def test_both_sides_learn(critic):
    x, y = randn(5, 3).requires_grad_(), randn(5, 3, seed=1).requires_grad_()
    assert all(g.any() for g in gradient(infonce_loss(x, y, critic=critic), x, y))


@every_critic
def test_computed_in_fp32_under_autocast(critic):
    x, y = randn(8, 64).float(), randn(8, 64, seed=1).float()
    expected = infonce_loss(x, y, critic=critic)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = infonce_loss(x, y, critic=critic)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    half = infonce_loss(x.bfloat16(), y.bfloat16(), critic=critic)
    wide = infonce_loss(x.bfloat16().double(), y.bfloat16().double(), critic=critic)
    torch.testing.assert_close(half.double(), wide, rtol=1e-4, atol=1e-4)
    assert wide.dtype == torch.float64


def test_it_works_on_meta():
    z = torch.zeros(3, 4, device="meta")
    for critic in CRITICS:
        assert infonce_loss(z, z, critic=critic).is_meta
        assert infonce_loss(z, z, critic=critic, duplicates=z @ z.T > 0).is_meta


# --- refusals ---------------------------------------------------------------------------------

Z = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"critic": "cosin"}, "`critic` is 'cosin'; did you mean 'cosine'"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"temperature": -1.0}, "`temperature` must be a finite number of at least 0"),
        ({"z_hat": Z[:1], "latents": Z[:1]}, r"`z_hat` needs at least 2 rows .* \[1, 4\]; raise"),
        ({"z_hat": Z[:, None]}, r"`z_hat` and `latents` must have equal shapes.*squeeze\(1\)"),
        ({"z_hat": Z / 0}, "`z_hat` must be finite.*has training diverged"),
        ({"latents": Z / 0}, "`latents` must be finite"),
        ({"z_hat": Z.long(), "latents": Z.long()}, "`z_hat` must be floating point"),
        ({"duplicates": torch.zeros(2, 3).bool()}, r"`duplicates` must be bool \[2, 2\], got"),
        ({"duplicates": torch.zeros(3, 3).bool()}, r"`duplicates` .* got torch.bool \[3, 3\]"),
        ({"duplicates": torch.zeros(2, 2)}, r"`duplicates` .* got torch.float32 \[2, 2\]"),
    ],
)
@pytest.mark.unhooked
def test_refused(arguments, expected):
    with pytest.raises((ValueError, TypeError), match=expected):
        infonce_loss(**{"z_hat": Z, "latents": Z, **arguments})


@pytest.mark.unhooked
def test_same_text_refuses_another_mask():
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of its tokens"):
        same_text(torch.ones(2, 3).long(), torch.ones(2, 2))


@pytest.mark.unhooked
def test_values_are_not_read_where_checks_are_off():
    with cv.check_values(False):
        assert not infonce_loss(Z / 0, Z).isfinite()
