"""What a step will cost, told on the meta device before anything runs."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from traceback import walk_tb
from typing import Any, NamedTuple

import torch
from torch import nn

from cyclevae._base import checks
from cyclevae._base.types import AnyTokens, Latents
from cyclevae.diagnostics._meter import IN_BACKWARD, Meter, tensors_in
from cyclevae.diagnostics._twin import meta_twin
from cyclevae.diagnostics.cost import PassCost, StepCost, TermCost
from cyclevae.model.denoiser import Denoised, Denoiser
from cyclevae.objective.batch import Batch
from cyclevae.objective.in_turn import Phases
from cyclevae.objective.module import StepModule
from cyclevae.objective.objective import CycleObjective
from cyclevae.objective.step import Step
from cyclevae.objective.term import Term
from cyclevae.objective.terms import Text

_DIRECTIONS = {"logits": "L2T", "latents": "T2L", "both": "L2T and T2L"}


def step_cost(
    module: StepModule, batch: Batch, *, step: int = 0, dtype: torch.dtype | None = None
) -> StepCost:
    """What a training step will cost: passes, FLOPs and live bytes, by pass and by term.

    The step runs forward and backward on the `meta` device, where tensors have shapes and no
    numbers: it takes seconds and no memory, also for a network that fits on no machine at hand
    (make it inside `with torch.device("meta")`). Neither the network nor the batch is changed, and
    random state is left alone.

    FLOPs are those of matrix products, convolutions and attention, twice a multiplication, as
    `torch.utils.flop_counter` counts them. Live bytes are all tensors that exist at the peak beside
    parameters and their gradients: activations, logits, gradients on their way. Attention by
    `scaled_dot_product_attention` is taken to be fused, as on a GPU. Not seen are what an operator
    needs while it runs, the gaps of an allocator, the optimizer, buckets of DDP and what
    `torch.compile` saves.

    Args:
        module: the objective and the network, on any device; the plain network inside wrappers is
            what is told of.
        batch: of the shapes to come, on any device; `meta` will do.
        step: the training step, from which weights are computed.
        dtype: of the parameters, as if the network were cast to it. Stands for autocast too, which
            `meta` does not know, but for what that leaves in float32.

    Raises:
        TypeError: no `StepModule`, one whose objective is neither a `CycleObjective` nor `phases`,
            or a denoiser of one's own without `with_network`.
        ValueError: what cannot be told on `meta`, by the part of the network that fails there, such
            as one that reads values; sharded parameters; a batch that the objective refuses.
        RuntimeError: inside autocast.

    Examples:
        >>> import cyclevae as cv
        >>> from cyclevae.testing import ToyNetwork
        >>> with torch.device("meta"):
        ...     network = ToyNetwork(vocab_size=50_000, latent_dim=4096)
        ...     tokens = torch.zeros(8, 1024, dtype=torch.long)
        ...     batch = cv.Batch(tokens, torch.ones_like(tokens), torch.zeros(8, 4096))
        >>> objective = cv.CycleObjective(
        ...     cv.TextProcess(2, 50_000),
        ...     cv.LatentProcess(),
        ...     [cv.Text(time=1.0), cv.Latent(), cv.CycleText(pairs=True)],
        ... )
        >>> cost = step_cost(cv.StepModule(cv.as_denoiser(network), objective), batch)
        >>> len(cost.passes), round(cost.flops / cost.l2t.flops, 2)
        (3, 2.0)
    """
    if not isinstance(module, StepModule):
        raise TypeError(
            f"`module` must be a StepModule, got {type(module).__name__}: "
            "write StepModule(denoiser, objective)"
        )
    checks.check_type("batch", batch, Batch)
    objective = module.objective
    if isinstance(objective, Phases):
        objective = objective.at(step)
    if not isinstance(objective, CycleObjective):
        raise TypeError(
            "the objective of `module` must be a CycleObjective or phases of them, got "
            f"{type(objective).__name__}"
        )
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise RuntimeError(
                "autocast is not seen on meta: call step_cost outside of it, and say the dtype of "
                "most products by `dtype`"
            )
    batch = Batch(*[None if part is None else part.to("meta") for part in batch])
    denoiser = _on_meta(module.denoiser, dtype)
    teacher = None if module.teacher is None else _on_meta(module.teacher.denoiser, dtype)
    cost = _run(objective, denoiser, batch, step, teacher)
    if batch.tokens is None or batch.latents is None:
        return cost
    alone = CycleObjective(objective.text_process, objective.latent_process, [Text(time=1.0)])
    return replace(cost, l2t=_run(alone, denoiser, batch, step, None))


class _Pass(NamedTuple):
    """Who owns what a pass runs: its number, and what is known of it."""

    number: int
    term: str
    direction: str
    rows: int
    length: int


class _Metered:
    """A denoiser whose passes own what they run."""

    def __init__(self, denoiser: Any, meter: Meter, learning: dict[_Pass, bool]) -> None:
        self.denoiser, self.meter, self.learning = denoiser, meter, learning

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)  # `module` and `roles`, for freeze

    def denoise(self, tokens: AnyTokens, latents: Latents, **state: Any) -> Denoised:
        """One forward: see `Denoiser.denoise`."""
        term = self.meter.owner
        self.meter.own([tokens, latents], term)
        direction = _DIRECTIONS[state.get("need", "both")]
        this = _Pass(len(self.learning), str(term), direction, *tokens.shape[:2])
        with self.meter.owned_by(this), _refusing(self.denoiser.module):
            output: Denoised = self.denoiser.denoise(tokens, latents, **state)
        self.meter.own(output, this)
        self.learning[this] = any(part.requires_grad for part in tensors_in(output))
        return output


class _MeteredTerm:
    """A term that owns what its loss runs, less the passes."""

    def __init__(self, term: Term, meter: Meter) -> None:
        self.term, self.meter = term, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.term, name)

    def loss(self, step: Step) -> Any:
        """See `Term.loss`."""
        with self.meter.owned_by(self.term.name):
            found = self.term.loss(step)
        self.meter.own(found.values() if isinstance(found, dict) else [found], self.term.name)
        return found


def _run(
    objective: CycleObjective,
    denoiser: Any,
    batch: Batch,
    step: int,
    teacher: Any,
) -> StepCost:
    meter, learning = Meter(), dict[_Pass, bool]()
    metered = copy.copy(objective)
    terms = tuple([_MeteredTerm(term, meter) for term in objective.terms or ()])
    object.__setattr__(metered, "terms", terms)
    with meter:
        output = metered(
            _Metered(denoiser, meter, learning),
            batch,
            step=step,
            teacher=None if teacher is None else _Metered(teacher, meter, learning),
        )
        with _refusing(denoiser.module):  # again, where it checkpoints
            meter.run_backward(output.loss)
    passes = tuple(
        [
            PassCost(
                each.direction,
                each.term,
                each.rows,
                each.length,
                learns,
                meter.forward[each],
                meter.backward[each],
                meter.live.get(each, 0),
            )
            for each, learns in learning.items()
        ]
    )
    weights = [p for p in denoiser.module.parameters()]
    return StepCost(
        passes,
        {name: _of_term(name, passes, meter) for name in objective.weights(step)},
        meter.forward.total(),
        meter.backward.total(),
        meter.peak,
        meter.live.get(IN_BACKWARD, 0),
        sum(p.nbytes for p in weights),
        sum(p.nbytes for p in weights if p.requires_grad),
        None,
    )


def _of_term(name: str, passes: tuple[PassCost, ...], meter: Meter) -> TermCost:
    own = [each for each in passes if each.term == name]
    return TermCost(
        len(own),
        meter.forward[name] + sum(each.forward for each in own),
        meter.backward[name] + sum(each.backward for each in own),
        meter.live.get(name, 0) + sum(each.live for each in own),
        meter.live.get(name, 0),
    )


def _on_meta(denoiser: Denoiser, dtype: torch.dtype | None) -> Any:
    """The same around the plain network inside, on meta."""
    found: Any = denoiser
    if not hasattr(found, "with_network"):
        raise TypeError(
            f"the {type(denoiser).__name__} has no `with_network(network)`, by which to tell of a "
            "copy on meta: give it one that returns the same denoiser around another network"
        )
    return found.with_network(meta_twin(getattr(found, "module", found.network), dtype))


@contextmanager
def _refusing(network: nn.Module) -> Iterator[None]:
    """Where it fails on meta, say which part of it and why."""
    try:
        yield
    except Exception as error:
        names = {id(part): name for name, part in network.named_modules()}
        where = [
            (names[id(frame.f_locals["self"])], frame.f_locals["self"], line)
            for frame, line in walk_tb(error.__traceback__)
            if id(frame.f_locals.get("self")) in names
        ]
        name, part, line = where[-1] if where else ("", network, 0)
        at = f"{name or 'the network'} ({type(part).__name__}{f', line {line}' * bool(line)})"
        raise ValueError(
            f"this step cannot be told on meta: {at} fails there ({error}). Tensors on meta have "
            "shapes and no values: a network that reads values (`.item()`, `if tensor:`, indices "
            "by a mask), names a device, or runs kernels of its own must be measured where it runs"
        ) from error
