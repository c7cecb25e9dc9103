"""Policies by name, and policies that follow each other over the steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cyclevae._base import checks
from cyclevae.gradient_policy.policy import STOP_GRADIENT, GradientPolicy


@dataclass(frozen=True)
class PolicySchedule:
    """Policies that follow each other over the steps, or take turns.

    The one whose start was last holds. With a `period` the starts are those within each period.

    Args:
        policies: in their order.
        starts: the step at which each begins, ascending from 0.
        period: begin again after so many steps.

    Raises:
        ValueError: no policy, starts that do not fit, or a period that some policy never reaches.

    Examples:
        >>> opening = PolicySchedule((GradientPolicy(), GradientPolicy("full")), (0, 1000))
        >>> [opening(step).bridge for step in (0, 999, 1000, 5000)]
        ['detach', 'detach', 'full', 'full']
        >>> turns = PolicySchedule(opening.policies, (0, 1), period=2)
        >>> [turns(step).bridge for step in range(4)]
        ['detach', 'full', 'detach', 'full']
    """

    policies: tuple[GradientPolicy, ...]
    starts: tuple[int, ...]
    period: int | None = None

    def __post_init__(self) -> None:
        for policy in self.policies:
            if not isinstance(policy, GradientPolicy):
                raise ValueError(f"`policies` must hold GradientPolicy, got {policy!r}")
        starts = self.starts
        rising = all(isinstance(start, int) for start in starts) and list(starts) == sorted(
            set(starts)
        )
        if not starts or starts[0] != 0 or not rising or len(starts) != len(self.policies):
            raise ValueError(
                f"`starts` must be one step for each of the {len(self.policies)} policies, "
                f"ascending from 0, got {starts!r}"
            )
        if self.period is not None and not self.period > starts[-1]:
            raise ValueError(
                f"`period` must be above the last start, or its policy never holds, got "
                f"{self.period!r} and starts {starts!r}"
            )

    def index(self, step: int) -> int:
        """Which of the policies holds at a step."""
        if self.period is not None:
            step = step % self.period
        return next(i for i in reversed(range(len(self.starts))) if step >= self.starts[i])

    def __call__(self, step: int) -> GradientPolicy:
        """The policy of a step."""
        return self.policies[self.index(step)]


_FULL = GradientPolicy(bridge="full")
# In the second turn nothing learns in the pass behind the bridge; the gradient flows through it.
_TURNS = PolicySchedule(
    (STOP_GRADIENT, GradientPolicy(bridge="full", freeze=("*",))), (0, 1), period=2
)
TEXT_POLICIES: Mapping[str, GradientPolicy | PolicySchedule] = {
    "stop_gradient": STOP_GRADIENT,
    "decoder_isolated": GradientPolicy(freeze=("encoder_only", "shared")),
    "full": _FULL,
    "alternating": _TURNS,
}
LATENT_POLICIES: Mapping[str, GradientPolicy | PolicySchedule] = {
    "stop_gradient": STOP_GRADIENT,
    "encoder_isolated": GradientPolicy(freeze=("decoder_only", "shared")),
    "full": _FULL,
    "alternating": _TURNS,
}
TextPolicy = (
    GradientPolicy
    | PolicySchedule
    | Literal["stop_gradient", "decoder_isolated", "full", "alternating"]
)
LatentPolicy = (
    GradientPolicy
    | PolicySchedule
    | Literal["stop_gradient", "encoder_isolated", "full", "alternating"]
)
AnyPolicy = TextPolicy | LatentPolicy


def named_policy(
    name: str, policy: object, presets: Mapping[str, GradientPolicy | PolicySchedule]
) -> GradientPolicy | PolicySchedule:
    """A policy, or the preset of a name.

    Raises:
        ValueError: an unknown name, or something else.
    """
    if isinstance(policy, str):
        checks.check_choice(name, policy, list(presets))
        return presets[policy]
    if not isinstance(policy, GradientPolicy | PolicySchedule):
        raise ValueError(
            f"`{name}` must be a GradientPolicy, a PolicySchedule or one of "
            f"{', '.join(map(repr, presets))}, got {policy!r}"
        )
    return policy


def all_policies(policy: AnyPolicy) -> tuple[GradientPolicy, ...]:
    """Every policy that may hold."""
    return policy.policies if isinstance(policy, PolicySchedule) else (policy_at(policy, 0),)


def policy_at(policy: AnyPolicy, step: int) -> GradientPolicy:
    """The policy of a step; a name must have been looked up before: see `named_policy`."""
    if isinstance(policy, str):
        raise TypeError(f"{policy!r} is a name; look it up by named_policy")
    return policy(step) if isinstance(policy, PolicySchedule) else policy
