"""The pass plan: the passes that serve a step, from seed, step and options alone."""

from collections.abc import Sequence
from typing import NamedTuple

from cyclevae._base.types import Number
from cyclevae.objective.requests import Decode, Encode, Own, Request
from cyclevae.objective.rows import Share


class Planned(NamedTuple):
    """A term of a step: its name, what it weighs, and the passes it asks for."""

    name: str
    weight: Number
    requests: tuple[Request, ...]


class Plan(NamedTuple):
    """The terms of a step, and the passes that serve them.

    Attributes:
        terms: those that run, in their order.
        shared: the passes that any number of them read.
        joined: whether the first decoder and encoder passes that can do run as one.
    """

    terms: tuple[Planned, ...]
    shared: tuple[Decode | Encode, ...]
    joined: bool

    @property
    def number(self) -> int:
        """The forward passes, of the denoiser and of a teacher."""
        own = [r.number for planned in self.terms for r in planned.requests if isinstance(r, Own)]
        return sum([p.number for p in self.shared]) + sum(own) - self.joined

    def serving(self, request: Decode | Encode) -> int:
        """Which of the shared passes gives what a request asks for.

        Raises:
            ValueError: none does, because no term named it.
        """
        place = _place(request, self.shared)
        if place == len(self.shared) or not request.rows.within(self.shared[place].rows):
            raise ValueError(
                f"a loss reads {request!r}, which is no pass of this step, or not of these rows: "
                "name it in the `passes` of its term"
            )
        return place

    def read_after(self, terms: int) -> list[int]:
        """Which of the shared passes are read by the terms after the first so many."""
        later = [r for planned in self.terms[terms:] for r in planned.requests]
        return [self.serving(request) for request in later if not isinstance(request, Own)]

    def rows_of(self, request: Decode | Encode) -> Share:
        """The rows of all passes that compute the same, which share their noise."""
        rows = request.rows
        for other in self.shared:
            if other.same_computation(request):
                rows = rows | other.rows
        return rows

    def last(self) -> Request:
        """The pass that runs last: a shared one runs where it is first read."""
        ran, last = [], None
        for planned in self.terms:
            for request in planned.requests:
                place = None if isinstance(request, Own) else self.serving(request)
                if place is None or place not in ran:
                    last = request
                if place is not None:
                    ran.append(place)
        if last is None:
            raise ValueError("a plan without passes has no last one")
        return last


def make_plan(planned: Sequence[Planned], *, join_passes: bool) -> Plan:
    """The plan of the terms that run at a step.

    Requests that compute the same, and let the same learn, become one pass over the rows of all of
    them; one from which nobody learns reads any that computes the same.
    """
    asked = [r for each in planned for r in each.requests if not isinstance(r, Own)]
    shared: list[Decode | Encode] = []
    # those that teach nobody come last, to find one that runs anyway
    for request in [r for r in asked if r.learns] + [r for r in asked if not r.learns]:
        place = _place(request, shared)
        if place == len(shared):
            shared.append(request)
        else:
            shared[place] = shared[place].merged(request)
    joined = join_passes and len({type(p) for p in shared if p.joins}) == 2
    return Plan(tuple(planned), tuple(shared), joined)


def _place(request: Decode | Encode, shared: Sequence[Decode | Encode]) -> int:
    for place, other in enumerate(shared):
        if request.may_read(other):
            return place
    return len(shared)


def learners(request: Request) -> list[str]:
    """The roles that learn from a pass."""
    if not request.learns or "*" in request.freeze:
        return []
    return [role for role in request.roles if role not in request.freeze]
