"""Ranks and accumulation steps: they must not change the gradient of a training step."""

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cyclevae.objective.batch import Batch, join_batches
from cyclevae.objective.in_turn import Phases
from cyclevae.objective.module import StepModule
from cyclevae.objective.objective import CycleObjective
from cyclevae.processes.schedules import Ramp
from cyclevae.testing._draws import SameDraws
from cyclevae.testing._processes import run_ranks

Gradients = dict[str, Tensor | None]


def check_ranks(
    make: Callable[[], StepModule],
    parts: Sequence[Sequence[Batch]],
    *,
    step: int = 0,
    wrap: Callable[[StepModule], nn.Module] = DistributedDataParallel,
    tolerance: float = 1e-9,
    time_limit: float = 60.0,
) -> None:
    """Assert that neither ranks nor accumulation steps change the gradient of a training step.

    Runs the step in this process on the joined batch, and in one gloo process per rank on its
    parts, with the `counts` summed over accumulation steps and ranks; then compares the gradients
    of all parameters on all ranks. With one rank everything runs in this process.

    All of it is on the CPU and in float64. Every row is given the same noise and the same times,
    however the rows are split; rows that exchange theirs go unseen. A draw of your own must come
    from `torch.rand`, `torch.randn` or `Tensor.exponential_` to be controlled like this.

    Args:
        make: makes the module of the step, after a fixed seed. Every process calls it, so it must
            be importable: a function at the top of a module, or a `functools.partial` of one. A
            script calls `check_ranks` below `if __name__ == "__main__"`.
        parts: `parts[r][a]` is the batch of rank `r` at accumulation step `a`. Make them uneven:
            other numbers of rows, shorter texts, a rank without unpaired rows. Unpaired latents
            need their `pseudo_text_mask`, because lengths drawn from the texts of a batch depend
            on the split.
        step: the training step, past the warm-up of every term: one that has not begun is not
            tested, which a warning says.
        wrap: what training does to the module on each rank, importable like `make`. It is called
            as `wrap(module)(batch, step, counts=counts)`, under its `no_sync()`, where it has one,
            at all accumulation steps but the last; twice, because DDP settles at its first step
            and complains at its second. Not called where there is one rank.
        tolerance: of a gradient, relative to the largest entry of all gradients.
        time_limit: seconds that ranks may take from when all of them are there. Not to finish in
            time is an error: a rank waits for what another one skips.

    Raises:
        AssertionError: another gradient, with the first parameter, both values and what usually
            causes it; a rank that fails or does not finish.
        ValueError: a comparison of which nothing could be learned: fewer than two parts; a
            statistic of the batch that is not pooled; a draw that must depend on the split.
        TypeError: `make` returns no `StepModule`.

    Examples:
        >>> from cyclevae import CycleObjective, StepModule
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> def make():
        ...     denoiser, text_process, latent_process = toy_denoiser(seed=0)
        ...     return StepModule(denoiser, CycleObjective(text_process, latent_process))
        >>> batches = [Batch(*toy_batch(seed, rows)[:5]) for seed, rows in [(0, 3), (1, 2)]]
        >>> check_ranks(make, [batches])  # one rank, two accumulation steps
    """
    if sum(len(batches) for batches in parts) < 2 or not all(parts):
        raise ValueError(
            "`parts` must hold a batch for every rank and at least 2 in all, or nothing would be "
            f"tested; got {[len(batches) for batches in parts]} for the ranks"
        )
    _need_lengths(parts)
    expected = _joined_gradients(make, parts, step)
    if len(parts) == 1:
        return _compare(expected, _gradients(make, parts[0], step), "accumulation", tolerance)
    _check_importable("make", make)
    _check_importable("wrap", wrap)
    work = partial(_rank_gradients, make, parts, step, wrap)
    for rank, gradients in enumerate(run_ranks(work, len(parts), time_limit)):
        _compare(expected, gradients, f"rank {rank}", tolerance)


# What is compared


def _joined_gradients(
    make: Callable[[], StepModule], parts: Sequence[Sequence[Batch]], step: int
) -> Gradients:
    """Those of one process that sees all rows at once and is given no counts."""
    with _reproducible():
        module = _make(make)
        _tell_waiting(module, step)
        _refuse_statistics(module, parts, step)
        batch = _double(join_batches([batch for batches in parts for batch in batches]))
        # except where a term itself draws what counts and divides by the number to be expected
        objective: Any = module.objective
        counts = objective.counts(batch)
        expected = [
            term.metric(part)
            for term in getattr(_at(objective, step), "terms", ())
            for part in term.expected_counts
        ]
        counts = {name: counts[name] for name in expected if name in counts}
        with SameDraws():
            loss = module(batch, step, counts=counts).loss
        loss.backward()  # type: ignore[no-untyped-call]
    return _whole(module)


def _tell_waiting(module: StepModule, step: int) -> None:
    """A term whose ramp has not begun is not tested."""
    for term in getattr(_at(module.objective, step), "terms", None) or ():
        if isinstance(ramp := term.weight, Ramp) and ramp.weight and not ramp(step):
            later = ramp.warmup_steps + ramp.ramp_steps
            warnings.warn(
                f"`{term.name}` has not begun at step {step} and is not tested: give step={later}, "
                "or a later one",
                stacklevel=4,
            )


def _rank_gradients(
    make: Callable[[], StepModule],
    parts: Sequence[Sequence[Batch]],
    step: int,
    wrap: Callable[[StepModule], nn.Module],
    rank: int,
) -> Gradients:
    return _gradients(make, parts[rank], step, wrap)


def _gradients(
    make: Callable[[], StepModule],
    batches: Sequence[Batch],
    step: int,
    wrap: Callable[[StepModule], nn.Module] | None = None,
) -> Gradients:
    """Those of one rank, as docs/distributed.md says to train."""
    with _reproducible():
        module = _make(make)
        batches = [_double(batch) for batch in batches]
        counts = _global_counts(module, batches, ranks=wrap is not None)
        wrapped = module if wrap is None else wrap(module)
        hold: Any = getattr(wrapped, "no_sync", nullcontext)
        for _ in range(1 if wrap is None else 2):  # DDP settles at its first step
            module.zero_grad()
            for left, batch in zip(range(len(batches))[::-1], batches, strict=True):
                with hold() if left else nullcontext():
                    with SameDraws():
                        loss = wrapped(batch, step, counts=counts).loss
                    loss.backward()
        return _whole(module)


def _global_counts(module: Any, batches: Sequence[Batch], *, ranks: bool) -> Mapping[str, Tensor]:
    """Summed over accumulation steps and ranks, over the number of ranks, as gradients are."""
    each = [module.objective.counts(batch) for batch in batches]
    counts = {name: sum(count[name].double() for count in each) for name in each[0]}
    if ranks:
        for count in counts.values():
            dist.all_reduce(count)
            count /= dist.get_world_size()
    return counts


def _make(make: Callable[[], StepModule]) -> StepModule:
    torch.manual_seed(0)
    module = make()
    if not isinstance(module, StepModule):
        raise TypeError(
            f"`make` must return a StepModule, got {type(module).__name__}; "
            "return StepModule(denoiser, objective)"
        )
    return module.double()


def _double(batch: Batch) -> Batch:
    latents = ("latents", "unpaired_latents")
    parts = {name: part for name in latents if (part := getattr(batch, name)) is not None}
    return batch._replace(**{name: part.double() for name, part in parts.items()})


def _whole(module: nn.Module) -> Gradients:
    """The gradients, put together where FSDP2 has sharded them."""
    whole = {}
    for name, parameter in module.named_parameters():
        gradient: Any = parameter.grad
        whole[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return whole


@contextmanager
def _reproducible() -> Iterator[None]:
    """The global random state and the default dtype are put back; float64 inside."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng([]):
        torch.set_default_dtype(torch.float64)  # of noise where a batch holds no latents
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _compare(expected: Gradients, found: Gradients, where: str, tolerance: float) -> None:
    scale = max((float(g.abs().max()) for g in expected.values() if g is not None), default=0.0)
    if not 0 < scale < float("inf"):
        raise AssertionError(f"nothing to compare: the largest gradient of one process is {scale}")
    for name, wanted in expected.items():
        got = found[name]
        like = wanted if got is None else got
        if like is None:
            continue
        pair = [torch.zeros_like(like) if g is None else g for g in (got, wanted)]
        error = (pair[0] - pair[1]).abs()
        if not bool(error.max() <= tolerance * scale):
            worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
            here, there = (float(g[worst]) for g in pair)
            raise AssertionError(
                f"{where}: the gradient of {name} at {list(worst)} is {here:.12g}, and "
                f"{there:.12g} in one process on the joined batch. The usual causes: `counts` that "
                "are not used, or not summed over accumulation steps and ranks; batch "
                "normalisation, or another statistic of the batch; dropout; a draw that depends on "
                "the split"
            )


# What cannot be compared


def _need_lengths(parts: Sequence[Sequence[Batch]]) -> None:
    for rank, batches in enumerate(parts):
        for number, batch in enumerate(batches):
            if batch.unpaired_latents is not None and batch.pseudo_text_mask is None:
                raise ValueError(
                    f"`parts[{rank}][{number}]` has `unpaired_latents` without `pseudo_text_mask`: "
                    "lengths drawn from the texts of a batch depend on the split; give them"
                )


def _refuse_statistics(module: StepModule, parts: Sequence[Sequence[Batch]], step: int) -> None:
    """Refuse what is no sum over rows and must therefore depend on the split."""
    objective: Any = _at(module.objective, step)
    if not isinstance(objective, CycleObjective):
        return
    accumulates = any(len(batches) > 1 for batches in parts)
    weights = objective.weights(step)
    for term in objective.terms or ():
        if term.name in weights and (why := term.depends_on_split(accumulates=accumulates)):
            raise ValueError(f"`{term.name}`: {why}")


def _at(objective: object, step: int) -> object:
    """The objective of a step, where several follow each other."""
    return objective.at(step) if isinstance(objective, Phases) else objective


def _check_importable(name: str, function: Callable[..., object]) -> None:
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`{name}` must be importable by new processes, a function at the top of a module or a "
            f"functools.partial of one; got {function!r} ({error})"
        ) from error
