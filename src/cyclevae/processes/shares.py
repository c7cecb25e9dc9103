"""Which share of the words a noised text still shows, and how that changes with time."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from cyclevae._base.types import Time

_END = 1e-4  # nearer to an end of time no slope is taken: that of a square root is infinite there


class Shares(NamedTuple):
    """The shares of a text's words at times, which add up to 1; or how fast they grow.

    Attributes:
        kept: `[b]`, still themselves.
        masked: `[b]`, the mask.
        random: `[b]`, replaced by words drawn uniformly from all ids but the mask.

    Examples:
        >>> time = torch.tensor([0.25])
        >>> Shares(kept=1 - time, masked=time, random=0 * time).masked
        tensor([0.2500])
    """

    kept: Time
    masked: Time
    random: Time


def inside(time: Time) -> Time:
    """Times, as near to 0 and 1 as slopes are taken."""
    return time.clamp(_END, 1 - _END)


def derivatives(shares: Callable[[Time], Shares], time: Time) -> Shares:
    """How fast the shares grow, by forward differentiation."""
    found: Shares = torch.func.jvp(shares, (time,), (torch.ones_like(time),))[1]
    return found


def rates(now: Shares, slopes: Shares) -> tuple[Time, Time]:
    """How fast words become the mask, and random words: `b' - b kept'/kept` of a share `b`.

    Reference: GIDD, https://arxiv.org/abs/2503.04482.
    """
    loss = -slopes.kept / now.kept
    return slopes.masked + loss * now.masked, slopes.random + loss * now.random


def check_shares(
    name: str, shares: Callable[[Time], Shares], slopes: Callable[[Time], Shares] | None
) -> tuple[bool, bool, bool]:
    """Refuse shares that are not those of noise that only grows, and slopes that are not theirs.

    Returns:
        Whether words become masks, whether they become random words, and whether `1 - time` of them
        are kept.

    Raises:
        ValueError: shares that do not add up to 1, that do not end without a word, or of which a
            word that was noised could come back; slopes that are not their derivatives.
    """
    time = torch.linspace(0, 1, 33, dtype=torch.float64, device="cpu")
    now = shares(time)
    kept, masked, random = (share.tolist() for share in now)
    mend = f"mend `shares` of {name}"
    for t, *parts in zip(time.tolist(), kept, masked, random, strict=True):
        if not abs(sum(parts) - 1) < 1e-6 or min(parts) < 0:
            raise ValueError(
                f"the shares of kept, masked and random words must add up to 1, each at least 0, "
                f"and at time {t:g} are {parts}: {mend}"
            )
    if abs(kept[0] - 1) > 1e-6 or kept[-1] > 1e-6:
        raise ValueError(
            "all words must be kept at time 0 and none at time 1, and the shares that are kept are "
            f"{kept[0]:g} and {kept[-1]:g}: {mend}"
        )
    time, now = time[1:-1], Shares(*(share[1:-1] for share in now))
    exact = derivatives(shares, time)
    for part, found, slope in zip(
        Shares._fields, slopes(time) if slopes else exact, exact, strict=True
    ):
        if not torch.allclose(found, slope, rtol=1e-6, atol=1e-9):
            raise ValueError(f"`slopes` of {name} are not the derivatives of its `shares`: {part}")
    for what, rate in zip(("the mask", "random words"), rates(now, exact), strict=True):
        if not bool((rate > -1e-9).all()):
            raise ValueError(
                f"words become {what} at a rate below 0, {rate.min().item():.3g}, as if noise were "
                f"taken back: {mend} so that no share falls faster than that of the kept words"
            )
    linear = bool((now.kept - (1 - time)).abs().max() < 1e-12)
    return max(masked) > 0, max(random) > 0, linear
