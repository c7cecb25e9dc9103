"""Objectives that are worth a name of their own."""

from dataclasses import replace

from cyclevae._base import checks
from cyclevae.bridges.text import AnyTextBridge, TextBridge
from cyclevae.gradient_policy.policy import GradientPolicy
from cyclevae.gradient_policy.presets import AnyPolicy, policy_at
from cyclevae.objective.in_turn import Phases
from cyclevae.objective.objective import CycleObjective
from cyclevae.objective.term import Term
from cyclevae.objective.terms.cycle_latent import CycleLatent
from cyclevae.objective.terms.cycle_text import CycleText


def phases(
    objective: CycleObjective,
    *,
    latent_cycle_from: int,
    full_gradient_from: int,
    text_bridge: AnyTextBridge = "straight_through",
) -> Phases:
    """Run an objective in three phases.

    1. up to step `latent_cycle_from`: without its latent cycles, the bridge of the others detached;
    2. up to step `full_gradient_from`: the latent cycle too, on pseudo-texts that are data;
    3. from there on: gradients cross both bridges, `z_hat` and `text_bridge`.

    Weights keep their own schedules, so a phase may also ramp its cycle in.

    Args:
        objective: what the second phase runs; its policies detach both bridges.
        latent_cycle_from: the first step of the second phase.
        full_gradient_from: the first step of the third phase.
        text_bridge: of the third phase, one with a gradient.

    Raises:
        ValueError: a second phase without a latent cycle, steps out of order, a policy that does
            not detach, or a bridge without a gradient.

    Examples:
        >>> from cyclevae import CycleLatent, CycleText, Latent, Text
        >>> from cyclevae.testing import toy_denoiser
        >>> both = [Text(), Latent(), CycleText(), CycleLatent()]
        >>> three = phases(
        ...     CycleObjective(*toy_denoiser(seed=0)[1:], both),
        ...     latent_cycle_from=1000, full_gradient_from=2000,
        ... )
        >>> [sorted(three.weights(step)) for step in (999, 1000)]
        [['cycle_text', 'latent', ...], ['cycle_latent', 'cycle_text', 'latent', ...]]
        >>> [three.at(step).terms[-1].policy.bridge for step in (1999, 2000)]
        ['detach', 'full']
    """
    for name, step in (
        ("latent_cycle_from", latent_cycle_from),
        ("full_gradient_from", full_gradient_from),
    ):
        checks.check_count(name, step, least=0)
    if latent_cycle_from > full_gradient_from:
        raise ValueError(
            "`latent_cycle_from` and `full_gradient_from` must be steps in this order, got "
            f"{latent_cycle_from!r} and {full_gradient_from!r}"
        )
    bridge = TextBridge.of(text_bridge)
    if bridge.has_gradient is False:
        raise ValueError(
            f"`text_bridge` is that of the last phase, in which a gradient crosses it, and "
            f"{str(bridge)!r} has none; use 'straight_through'"
        )
    terms = tuple(objective.terms or ())
    first = [term for term in terms if not isinstance(term, CycleLatent)]
    if len(first) == len(terms) and latent_cycle_from < full_gradient_from:
        raise ValueError(
            "the second phase switches on the latent cycle, and the objective has none: add a "
            "CycleLatent to its terms, or give both phases the same first step"
        )
    last = [_opened(term, bridge) for term in terms]
    return Phases(
        (replace(objective, terms=first), objective, replace(objective, terms=last)),
        (0, latent_cycle_from, full_gradient_from),
    )


def _opened(term: Term, text_bridge: TextBridge) -> Term:
    """The same, but that gradients cross its bridge."""
    if isinstance(term, CycleText):
        return replace(term, policy=_opened_policy(term.name, term.policy))
    if isinstance(term, CycleLatent):
        policy = _opened_policy(term.name, term.policy)
        return replace(term, policy=policy, bridge=text_bridge)
    return term


def _opened_policy(name: str, policy: AnyPolicy) -> GradientPolicy:
    closed = policy_at(policy, 0)
    if closed != policy or closed.bridge != "detach":
        raise ValueError(
            f"the policy of `{name}` must have bridge='detach' at all steps, got {policy!r}: the "
            "phases begin with stopped gradients and open the bridges themselves"
        )
    return replace(closed, bridge="full")
