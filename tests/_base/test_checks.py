"""Whether values are looked at, and what all else in `_base` promises by itself."""

import math

import pytest
import torch

import cyclevae as cv
from cyclevae._base import checks
from cyclevae._base.reduce import only_present
from cyclevae._base.table import table
from cyclevae.testing import toy_denoiser

DENOISER, TEXT, LATENT = toy_denoiser()
MASK = torch.tensor([[True, True, True], [True, True, False]])
Z = torch.zeros(2, 4)
NAN = Z.masked_fill(torch.tensor([[False], [True]]), math.nan)
INF = Z.masked_fill(torch.tensor([[True], [False]]), -math.inf)


def l2t(latents):
    return cv.l2t(DENOISER, latents, MASK, text_process=TEXT)


# --- check_values -----------------------------------------------------------------------------


@pytest.mark.unhooked
def test_check_values_can_be_turned_off_and_comes_back():
    with cv.check_values(False):
        assert l2t(NAN).shape == (2, 3, 7)
        cv.latent_loss(NAN, NAN)
        with cv.check_values(True), pytest.raises(ValueError, match="must be finite"):
            l2t(NAN)
        assert l2t(INF).shape == (2, 3, 7)
        with pytest.raises(ValueError, match="`latents` must be latents of shape"):
            cv.t2l_loss(  # shapes are always checked
                DENOISER, MASK.long(), Z[:, None], MASK, text_process=TEXT, latent_process=LATENT
            )
    with pytest.raises(ValueError, match="must be finite"):
        l2t(NAN)


def test_check_values_is_restored_after_an_error():
    with pytest.raises(RuntimeError, match="inside"), cv.check_values(False):
        raise RuntimeError("inside")
    assert checks.reads_values(Z)


def test_check_values_as_a_call():
    try:
        cv.check_values(False)
        assert not checks.reads_values(Z)
        cv.check_values(True)
        assert checks.reads_values(Z)
    finally:
        cv.check_values(None)
    assert checks.reads_values(Z)
    assert not checks.reads_values(torch.empty(1, device="meta"))
    with cv.check_values(True):
        assert not checks.reads_values(torch.empty(1, device="meta"))


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "value", "words"),
    [
        (checks.check_nonnegative, -1e-9, "a finite number of at least 0, got -1e-09"),
        (checks.check_nonnegative, math.inf, "a finite number of at least 0, got inf"),
        (checks.check_positive, 0.0, "must be above 0, got 0"),
        (checks.check_share, 1.5, r"must lie in \[0, 1\], got 1.5"),
        (checks.check_share, True, r"must lie in \[0, 1\], got True"),
        (checks.check_count, 0, "an integer of at least 1, got 0"),
        (checks.check_count, 1.0, "an integer of at least 1, got 1.0"),
        (checks.check_count, True, "an integer of at least 1, got True"),
    ],
)
@pytest.mark.unhooked
def test_numbers_out_of_range_are_refused_by_name(check, value, words):
    with pytest.raises(ValueError, match=f"^`amount` .*{words}$"):
        check("amount", value)


def test_the_ends_of_ranges_are_in_them():
    for check, values in (
        (checks.check_nonnegative, (0, 0.0, 7)),
        (checks.check_positive, (1e-9,)),
        (checks.check_share, (0, 1)),
        (checks.check_count, (1, 10**9)),
    ):
        for value in values:
            check("amount", value)
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\], got 0"):
        checks.check_share("share", 0, above_zero=True)


def test_an_unknown_name_is_told_the_nearest_or_all():
    assert checks.nearest("argmx", ["soft", "argmax"]) == "did you mean 'argmax'?"
    assert checks.nearest("xyz", ["soft", "argmax"]) == "known are 'argmax', 'soft'"


# --- rows, and tables -------------------------------------------------------------------------


def test_absent_rows_get_no_gradient_even_of_nan():
    values = NAN.clone().requires_grad_()
    kept = only_present(values, torch.tensor([True, False]), otherwise=2.0)
    assert torch.equal(kept, torch.tensor([[0.0], [2.0]]).expand(2, 4))
    (gradient,) = torch.autograd.grad(kept.sum(), values)
    assert torch.equal(gradient, torch.tensor([[1.0], [0.0]]).expand(2, 4))


def test_columns_are_aligned():
    rows = [("term", "loss"), ("a", "1.25"), ("longer", "3")]
    assert table(rows).splitlines() == ["term    loss", "a       1.25", "longer     3"]
    assert table(rows, left=True, between=" | ").splitlines() == [
        "term   | loss",
        "a      | 1.25",
        "longer | 3",
    ]
