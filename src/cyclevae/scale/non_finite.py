"""What becomes of a step in which a term is not finite: an error, no update, or no such term."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor

from cyclevae._base.types import AnyTokens, Latents
from cyclevae.gradient_policy.gate import Frozen
from cyclevae.model.denoiser import Denoised, Denoiser

NonFinite = Literal["raise", "skip", "zero"]


class Verdict:
    """Whether a term, or the output of a pass, turned out finite: asked for by the backward."""

    finite: Bool[Tensor, ""] | None = None

    def gate(self, value: Tensor) -> Tensor:
        """The value, with the gradient 0 where the verdict is that something is not finite."""
        return self.gate_all([value])[0] if value.requires_grad else value

    def gate_all(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The values, each gated."""
        return cast(tuple[Tensor, ...], _Gated.apply(self, *values))  # type: ignore[no-untyped-call]


class _Gated(torch.autograd.Function):
    """Identity whose backward drops a gradient without touching it: 0 times NaN would be NaN."""

    @staticmethod
    def forward(ctx: Any, verdict: Verdict, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.verdict = verdict
        ctx.set_materialize_grads(False)
        return tuple([value.detach() for value in values])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        finite = ctx.verdict.finite
        kept = []
        for gradient in gradients:
            if gradient is not None:
                # A finite loss may have a gradient that is not.
                sound = gradient.isfinite().all() & (True if finite is None else finite)
                gradient = torch.where(sound, gradient, torch.zeros_like(gradient))
            kept.append(gradient)
        return None, *kept


class Guarded:
    """A denoiser whose every pass gives no gradient where its output is not finite.

    Neither to parameters nor to the bridge it read: a bad activation multiplies the zeros that come
    back, so they are stopped on both sides of the pass.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)  # `module` and `roles`, for freeze

    def denoise(self, tokens: AnyTokens, latents: Latents, **state: Any) -> Denoised:
        """One forward: see `Denoiser.denoise`."""
        verdict = Verdict()
        with Frozen(self.denoiser, (), gate=verdict.gate_all):
            output = self.denoiser.denoise(verdict.gate(tokens), verdict.gate(latents), **state)
        parts = [part.detach().isfinite().all() for part in output if part is not None]
        verdict.finite = torch.stack(parts).all()
        return output


def finite_terms(losses: Mapping[str, Tensor]) -> Bool[Tensor, " terms"]:
    """Which terms are finite on every rank; a collective where there are several."""
    finite = torch.stack([loss.detach().isfinite() for loss in losses.values()])
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return finite
    votes = finite.int()
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return votes.bool()


def refuse_compiling(rule: NonFinite | None) -> None:
    """Refuse a rule that cannot be traced: a value that is read, or a verdict after the passes.

    Raises:
        RuntimeError: `raise` or `zero` under `torch.compile`.
    """
    if rule in ("raise", "zero") and torch.compiler.is_compiling():
        raise RuntimeError(f"non_finite={rule!r} does not compile: use 'skip'")


def refuse_non_finite(terms: Mapping[str, Tensor], finite: Bool[Tensor, " terms"]) -> None:
    """Raise on all ranks alike, naming the terms; waits for the device.

    Raises:
        FloatingPointError: a term that is NaN or infinite.
    """
    if finite.is_meta or bool(finite.all()):
        return
    bad = [
        f"{term} (here {loss.item():g})"
        for (term, loss), fine in zip(terms.items(), finite.tolist(), strict=True)
        if not fine
    ]
    raise FloatingPointError(
        f"not finite on some rank: {', '.join(bad)}; look at the batch and the learning rate, or "
        "let non_finite='skip' or 'zero' pass over such steps"
    )


def zero_terms(
    terms: Mapping[str, Tensor], finite: Bool[Tensor, " terms"], verdicts: Mapping[str, Verdict]
) -> dict[str, Tensor]:
    """Terms with those that are not finite at 0, still in the graph, and their verdicts spoken."""
    kept = {}
    for (term, loss), fine in zip(terms.items(), finite, strict=True):
        verdicts[term].finite = fine
        kept[term] = torch.where(fine, loss, torch.zeros_like(loss))
    return kept


def skip_update(optimizer: torch.optim.Optimizer, skip: Bool[Tensor, ""]) -> None:
    """Let the next `optimizer.step()` do nothing where `skip` is True, without asking the device.

    It hands the flag to the optimizer's fused kernel, as `torch.amp.GradScaler` does: neither
    parameters nor moments nor step counts move.

    Args:
        optimizer: a fused one, such as `torch.optim.AdamW(..., fused=True)`.
        skip: `StepOutput.skip`, of an objective with `non_finite="skip"`.

    Raises:
        ValueError: an optimizer that is not fused.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        >>> weight.grad = torch.full((2,), torch.nan)
        >>> skip_update(optimizer, torch.tensor(True))
        >>> optimizer.step()
        >>> weight.tolist()
        [1.0, 1.0]
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise ValueError(
            f"`optimizer` must be fused to skip without waiting for the device, got a "
            f"{type(optimizer).__name__} that is not: make it with fused=True, or write "
            "`if not output.skip: optimizer.step()`, which waits"
        )
    carrier: Any = optimizer  # the attributes that GradScaler sets
    carrier.grad_scale, carrier.found_inf = None, skip.float()
