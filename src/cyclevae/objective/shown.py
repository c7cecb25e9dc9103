"""An objective as people read it: who learns from what, what it weighs, what it costs."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from cyclevae._base.table import Shown, shown
from cyclevae.gradient_policy.roles import ROLES
from cyclevae.objective.plan import Plan, Planned, learners, make_plan
from cyclevae.objective.requests import Own, Request
from cyclevae.objective.term import Term, Weight
from cyclevae.processes.schedules import Ramp, Turn


def describe(plan: Plan) -> Shown:
    """The passes of each term, who learns there and who is frozen, as aligned lines."""
    lines = [("term", "weight", "pass", "learns", "frozen")]
    for term, weight, requests in plan.terms:
        for i, request in enumerate(requests):
            name = ("", "") if i else (term, f"{weight:g}")
            lines.append((*name, *_pass(request)))
    return shown(lines)


class Overview(NamedTuple):
    """All terms of an objective under a line that says what it is."""

    headline: str
    terms: Shown

    def __str__(self) -> str:
        return f"{self.headline}\n{self.terms}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.headline)}</p>{self.terms._repr_html_()}"


def overview(kind: str, terms: Sequence[Term], step: int, *, join_passes: bool) -> Overview:
    """All terms, also those that rest at a step: their weights then and later, what they cost.

    A pass is counted where it is first read. One that serves several terms costs the others none.
    """
    planned = [Planned(term.name, term.weight_at(step), term.passes(step)) for term in terms]
    plan = make_plan(planned, join_passes=join_passes)
    running = [each for each in planned if each.weight > 0]
    now = make_plan(running, join_passes=join_passes).number
    at_most = f", {plan.number} where all terms run" if len(running) < len(planned) else ""
    passes = f"{now} pass{'es' * (now != 1)} at step {step}{at_most}"
    joined = ", decoder and encoder as one" if plan.joined else ""
    headline = f"{kind}: {len(terms)} term{'s' * (len(terms) != 1)}, {passes}{joined}"
    return Overview(headline, _by_term(terms, plan))


def _by_term(terms: Sequence[Term], plan: Plan) -> Shown:
    lines: list[tuple[str, ...]] = [
        ("term", "weight", "later", "pass", "costs", "learns", "frozen")
    ]
    ran: set[int] = set()
    for term, (name, weight, requests) in zip(terms, plan.terms, strict=True):
        told = (name, f"{weight:g}", later(term))
        for request in requests:
            cost = request.number
            if not isinstance(request, Own):
                place = plan.serving(request)
                cost = 0 if place in ran else plan.shared[place].number
                ran.add(place)
            does, *who = _pass(request)
            lines.append((*told, does, str(cost), *who))
            told = ("", "", "")
        if not requests:
            lines.append((*told, "-", "0", "-", "-"))
    return shown(lines)


def later(term: Term) -> str:
    """How the weight of a term moves over the steps, in a few words; empty if it does not."""
    moves = _moves(term.weight) if callable(term.weight) else ""
    rests = f"at 1 of {term.every} steps" if term.every > 1 else ""
    return ", ".join(filter(None, (moves, rests)))


def _moves(weight: Weight) -> str:
    match weight:
        case Ramp(weight=end, warmup_steps=start, ramp_steps=0):
            return f"{end:g} from step {start}"
        case Ramp(weight=end, warmup_steps=start, ramp_steps=steps):
            return f"0 to {end:g} in steps {start}..{start + steps}"
        case Turn():
            together = f" and {weight.together:.0%} of all" if weight.together else ""
            return f"{_moves(weight.weight)}, 1 of {weight.of} turns{together}"
        case int() | float():
            return f"{weight:g}"
    return f"by {getattr(weight, '__name__', type(weight).__name__)}"


def _pass(request: Request) -> tuple[str, str, str]:
    """What a pass does, who learns there and who is frozen."""
    does = request.does if isinstance(request, Own) else request.maker.does(request.does)
    frozen = request.freeze if request.learns else ()
    return does, _who_learns(request), ", ".join(frozen) or "-"


def _who_learns(request: Request) -> str:
    apart = [pattern for pattern in request.freeze if pattern not in ROLES]
    named = ", ".join(learners(request)) or "nobody"
    return named + (f" except {', '.join(apart)}" if apart and named != "nobody" else "")
