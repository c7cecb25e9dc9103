"""Weights of a latent loss as functions of the time: SD3's, and one's own."""

import math

import pytest
import torch

import cyclevae as cv

TEXT = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0)


def of(term):
    return cv.CycleObjective(TEXT, cv.LatentProcess("flow", "velocity"), [term])


def test_weights_of_sd3():
    """Esser et al., section 3.1: `-1/2 w lambda' |eps error|^2`, `w = t / (1 - t) pi(t)`."""
    t = torch.tensor([0.1, 0.4, 0.8]).double()
    density = torch.exp(-((torch.log(t / (1 - t)) - 0.3).square()) / (2 * 0.9**2))
    density = density / (0.9 * math.sqrt(2 * math.pi) * t * (1 - t))
    weight = cv.LogitNormal(mean=0.3, std=0.9)(t)
    torch.testing.assert_close(weight, density)
    slope = -2 / (t * (1 - t))  # of lambda = 2 log((1 - t) / t)
    theirs = -t / (1 - t) * density * slope / 2  # of errors of epsilon
    ours = weight * cv.LatentProcess("flow", "epsilon").gain(t, space="velocity").square()
    torch.testing.assert_close(ours, theirs)
    # a unit weight on velocity is 1/t^2 on x0
    by_x0 = cv.LatentProcess("flow", "x0").gain(t, space="velocity").square()
    torch.testing.assert_close(by_x0, t**-2)


def test_a_density_as_a_weight_is_that_of_the_times():
    grid = (torch.arange(200_000).double() + 0.5) / 200_000
    density = cv.LogitNormal(mean=-0.5, std=1.2)(grid)
    drawn = torch.sigmoid(-0.5 + 1.2 * torch.special.ndtri(grid))
    assert density.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert (density * grid.square()).mean().item() == pytest.approx(
        drawn.square().mean().item(), abs=1e-5
    )
    assert cv.LogitNormal()(torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: cv.LogitNormal(std=0.0), "`std` must be above 0"),
        (lambda: cv.Latent(min_snr=5.0, weighting=cv.LogitNormal()), "both weigh.*give one"),
        (lambda: cv.Latent(weighting=2.0), r"`weighting` must be LogitNormal"),
        (lambda: cv.Unconditional(latent_weighting=2.0), r"`latent_weighting` must be LogitNormal"),
        (
            lambda: of(cv.Unconditional(latent_weighting=lambda t: 0 * t)),
            r"`latent_weighting` = .* weighs times from 0 to 1 with 0\.0e\+00 at most",
        ),
        (
            lambda: of(cv.Latent(weighting=cv.LogitNormal())),
            r"weighs times from 1 to 1 with 0\.0e\+00 at most",
        ),
        (
            lambda: of(cv.Latent(weighting=lambda t: -t, time=0.5)),
            "not with a number of at least 0 for each",
        ),
    ],
)
@pytest.mark.unhooked
def test_what_is_no_weight_is_refused(refused, words):
    with pytest.raises(ValueError, match=words):
        refused()


def test_a_weight_survives_a_file():
    objective = of(cv.Latent(time=cv.TimePolicy("uniform"), weighting=cv.LogitNormal(0.5)))
    again = cv.CycleObjective.from_config(objective.to_config())
    assert again == objective and again.terms[0].weighting == cv.LogitNormal(0.5)
