"""What is refused: of the terms when an objective is made, of a step before its first pass."""

from dataclasses import fields

from cyclevae._base.types import LatentMask
from cyclevae.gradient_policy.gate import check_patterns
from cyclevae.gradient_policy.presets import PolicySchedule
from cyclevae.gradient_policy.roles import ROLES
from cyclevae.model.direction import check_predicts
from cyclevae.model.padding import tell_latent_mask
from cyclevae.model.wrappers import refuse_unused
from cyclevae.objective.plan import Plan, Planned, learners, make_plan
from cyclevae.objective.requests import Decode, Encode, Own
from cyclevae.objective.rows import Arranged
from cyclevae.objective.step import Setting, Step
from cyclevae.objective.term import Term
from cyclevae.processes.schedules import Turn
from cyclevae.scale.non_finite import NonFinite


def check_terms(terms: tuple[Term, ...]) -> None:
    """Refuse what are no terms, two of one name, and turns that nobody takes."""
    if not terms:
        raise ValueError("`terms` is empty, so there is nothing to train on; None is the recipe")
    names: set[str] = set()
    for term in terms:
        if not isinstance(term, Term):
            hint = f"; write {term.__name__}()" if isinstance(term, type) else ""
            raise ValueError(f"`terms` must hold instances of Term, got {term!r}{hint}")
        if term.name in names:
            raise ValueError(
                f"`terms` holds two of the name {term.name!r}, which their metrics would share: "
                f"give one a name, as in {type(term).__name__}(name='{term.name}_2')"
            )
        names.add(term.name)
    turns = [term.weight for term in terms if isinstance(term.weight, Turn)]
    for turn in turns:
        missing = set(range(turn.of)) - {other.turn for other in turns}
        if missing and turn.together < 1:
            raise ValueError(
                f"of the {turn.of} turns that weights take, number {min(missing)} is nobody's, and "
                "steps would pass without effect: give every weight of take_turns(...) to a term"
            )


def check_learners(terms: tuple[Term, ...]) -> None:
    """Refuse a term that freezes whoever would learn from it."""
    for term in terms:
        learning = [r for step in _turns(terms) for r in term.passes(step) if r.learns]
        if learning and not any(map(learners, learning)):
            frozen = sorted({pattern for request in learning for pattern in request.freeze})
            raise ValueError(
                f"nobody learns from `{term.name}`, whose options freeze {', '.join(frozen)}: "
                "freeze less, or leave the term out"
            )


def check_guidance(terms: tuple[Term, ...], setting: Setting) -> None:
    """Refuse guidance away from a state that no term trains."""
    trained = {
        condition
        for term in terms
        if callable(term.weight) or term.weight > 0
        for condition in term.trains_null(setting)
    }
    for term in terms:
        for request in [r for step in _turns(terms) for r in term.passes(step)]:
            if isinstance(request, Own) or request.maker.guidance == 1:
                continue
            condition, base, more = "latent", "decoder", ""
            if isinstance(request, Encode):
                condition, base = "text", "encoder"
                more = ", or the unconditional mode a `null_text_rate`"
            if condition not in trained:
                raise ValueError(
                    f"`{term.name}` guides its bridge (maker={request.maker!r}) away from what the "
                    f"network says without a {condition}, which no term trains: give the base "
                    f"{base} loss null_rate=0.1{more}, or leave guidance at 1"
                )


def check_joining(terms: tuple[Term, ...], non_finite: NonFinite | None) -> None:
    """Refuse to join passes of terms that must be told apart, or where none ever join."""
    if non_finite == "zero":
        raise ValueError(
            "`join_passes` puts two terms into one pass, where non_finite='zero' cannot tell them "
            "apart: use 'skip', or leave the passes apart"
        )
    for step in _turns(terms):
        planned = [Planned(term.name, 1.0, term.passes(step)) for term in terms]
        if make_plan(planned, join_passes=True).joined:
            return
    raise ValueError(
        "`join_passes` has no effect: it joins a decoder pass from a fully masked text with an "
        "encoder pass from pure noise, both learning in all parameters, and these terms never ask "
        "for both; let the base decoder loss mask all words, with time=1.0, or leave it out"
    )


def _turns(terms: tuple[Term, ...]) -> list[int]:
    """Steps among which every policy of these terms holds at one."""
    options = [getattr(term, f.name) for term in terms for f in fields(term)]
    starts = [option.starts for option in options if isinstance(option, PolicySchedule)]
    return sorted({0, 1}.union(*starts))


def check_step(step: Step, terms: tuple[Term, ...]) -> Arranged:
    """Refuse what the plan cannot run on this batch and network; the rows that it can run on."""
    for name in ("denoiser", "teacher"):
        check_predicts(name, getattr(step, name), step.latent_process)
    tell_latent_mask(step.denoiser, _any_mask(step.rows))
    latents = step.rows.latents
    shape = step.latent_process.shape if latents is None else latents.shape[1:]
    for term in terms:  # also those that rest
        for request in term.passes(step.number):
            check_patterns(step.denoiser, request.freeze)
            if isinstance(request, Encode):
                request.bridge.check_shape(shape or ())
    for name, _, requests in step.plan.terms:
        for request in requests:
            if not isinstance(request, Own) and request.maker.by == "teacher":
                step.need_teacher(f"the maker of the bridge of `{name}`")
    # the last pass of several must reach every parameter, or asks too much of DDP
    if step.plan.number > 1 and step.plan.last().roles != ROLES:
        refuse_unused(step.denoiser)
    if any(isinstance(p, Decode) and p.rows.others for p in step.plan.shared):
        step.rows.need_lengths()
    lacking = _lacks_rows(step.plan, step.rows)
    if lacking is None:
        return step.rows
    if not step.counts:
        raise ValueError(
            f"`{lacking}` reads rows without a partner, and the batch holds none: give some, or "
            "set pairs=True to read those of pairs too; a part of a step may lack them where "
            "`counts` are given"
        )
    # other ranks run the pass, so this one does, and counts no row of it
    return step.rows.marked()


def _any_mask(rows: Arranged) -> LatentMask | None:
    return rows.text_latent_mask if rows.latent_mask is None else rows.latent_mask


def _lacks_rows(plan: Plan, rows: Arranged) -> str | None:
    """The first term that reads no row of this batch."""
    for name, _, requests in plan.terms:
        for request in requests:
            if isinstance(request, Own):
                continue
            direction = rows.all_of(request.direction)
            if rows.numbers(request.rows, direction) == (0, 0):
                return name
    return None
