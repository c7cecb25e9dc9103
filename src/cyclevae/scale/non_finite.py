"""What becomes of a step in which a term is not finite: an error, no update, or no such term."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cyclevae._base.types import AnyTokens, Latents
from cyclevae.gradient_policy.gate import Frozen, refuse_reentrant
from cyclevae.model.denoiser import Denoised, Denoiser

NonFinite = Literal["raise", "skip", "zero"]


class Scale:
    """By how much the loss is multiplied before its backward, as a gradient scaler does."""

    factor: Float[Tensor, ""] | None = None

    def of(self, loss: Tensor) -> Tensor:
        """The loss, whose backward tells the factor before anything else runs."""
        return cast(Tensor, _Scaled.apply(self, loss))  # type: ignore[no-untyped-call]


class Verdict:
    """Whether a term, or the output of a pass, turned out finite: asked for by the backward."""

    finite: Bool[Tensor, ""] | None = None

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    def gate(self, value: Tensor) -> Tensor:
        """The value, with the gradient 0 where the verdict is that something is not finite."""
        return self.gate_all([value])[0] if value.requires_grad else value

    def gate_all(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The values, each gated."""
        return cast(tuple[Tensor, ...], _Gated.apply(self, *values))  # type: ignore[no-untyped-call]

    def keeps(self, gradient: Tensor) -> Bool[Tensor, ""]:
        """Whether a gradient is handed on.

        A finite loss may have a gradient that is not: it is dropped, unless the loss was scaled up,
        for then it may be an overflow, which a gradient scaler must see to scale by less.
        """
        kept = gradient.isfinite().all()
        if self.scale.factor is not None:
            kept = kept | (self.scale.factor > 1).to(kept.device)
        return kept if self.finite is None else kept & self.finite.to(kept.device)


class _Scaled(torch.autograd.Function):
    """Identity whose backward notes the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, scale: Scale, loss: Tensor) -> Tensor:
        ctx.scale = scale
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        ctx.scale.factor = gradient.detach()
        return None, gradient


class _Gated(torch.autograd.Function):
    """Identity whose backward drops a gradient without touching it: 0 times NaN would be NaN."""

    @staticmethod
    def forward(ctx: Any, verdict: Verdict, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.verdict = verdict
        ctx.set_materialize_grads(False)
        return tuple([value.detach() for value in values])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *[None if g is None else _kept(ctx.verdict, g) for g in gradients]


def _kept(verdict: Verdict, gradient: Tensor) -> Tensor:
    """The gradient, or zeros; of an embedding it may be sparse."""
    if gradient.is_sparse:
        values = _kept(verdict, gradient._values())
        return torch.sparse_coo_tensor(
            gradient._indices(), values, gradient.shape, check_invariants=False
        )
    return torch.where(verdict.keeps(gradient), gradient, torch.zeros_like(gradient))


class Guarded:
    """A denoiser whose every pass gives no gradient where its output is not finite.

    Neither to parameters nor to the bridge it read: a bad activation multiplies the zeros that come
    back, so they are stopped on both sides of the pass.
    """

    def __init__(self, denoiser: Denoiser, scale: Scale) -> None:
        self.denoiser, self.scale = denoiser, scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)  # `module` and `roles`, for freeze

    def denoise(self, tokens: AnyTokens, latents: Latents, **state: Any) -> Denoised:
        """One forward: see `Denoiser.denoise`."""
        verdict = Verdict(self.scale)
        tokens, latents = verdict.gate(tokens), verdict.gate(latents)
        with Frozen(self.denoiser, (), gate=verdict.gate_all):
            output = self.denoiser.denoise(tokens, latents, **state)
        # such a pass would run again without its guards, and give gradients that are not finite
        parts = [part for part in tree_leaves(output) if part is not None]
        refuse_reentrant(parts, bridge=latents)
        verdict.finite = torch.stack([part.detach().isfinite().all() for part in parts]).all()
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
    parameters nor moments nor step counts move. The flag is for one step; of several calls before
    it, as with gradient accumulation, one that is True is enough.

    Beside a `GradScaler` call it before `scaler.step(optimizer)`, which then skips where either of
    them says so, with and without `scaler.unscale_(optimizer)`. The scale goes by the gradients
    alone: a loss of NaN, whose gradients are NaN, lowers it as an overflow does.

    Args:
        optimizer: a fused one, such as `torch.optim.AdamW(..., fused=True)`, or what Accelerate or
            Lightning make of it.
        skip: `StepOutput.skip`, of an objective with `non_finite="skip"`.

    Raises:
        ValueError: an optimizer that is not fused, or a fused SGD with `dampening`, whose momentum
            cannot begin with a step that is skipped.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        >>> weight.grad = torch.full((2,), torch.nan)
        >>> skip_update(optimizer, torch.tensor(True))
        >>> optimizer.step()
        >>> weight.tolist()
        [1.0, 1.0]
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise ValueError(
            f"`optimizer` must be fused to skip without waiting for the device, got a "
            f"{type(optimizer).__name__} that is not: make it with fused=True, or write "
            "`if not output.skip: optimizer.step()`, which waits; beside a gradient scaler, "
            "`scaler.unscale_(optimizer)`, `if not output.skip: scaler.step(optimizer)`, "
            "`scaler.update()`"
        )
    if isinstance(optimizer, torch.optim.SGD) and any(
        group["momentum"] and group["dampening"] for group in optimizer.param_groups
    ):
        raise ValueError(
            "a fused SGD with `dampening` cannot skip its first step, since its momentum begins "
            "with the gradient as it is: set dampening=0"
        )
    carrier: Any = optimizer  # of attributes, as GradScaler makes it
    if not hasattr(carrier, "skip_next"):
        carrier.skip_next = None
        optimizer.register_step_pre_hook(_hand_over)
        optimizer.register_step_post_hook(_clear)
    carrier.skip_next = _either(skip.float(), carrier.skip_next)


def _hand_over(optimizer: Any, *_: object) -> None:
    """Give the flag to the kernel, whoever steps: a scaler has set the same attribute by now."""
    if optimizer.skip_next is None:
        return
    optimizer.found_inf = _either(optimizer.skip_next, getattr(optimizer, "found_inf", None))
    if not isinstance(optimizer, torch.optim.SGD):
        return
    # Without a momentum the kernel makes one, which it does not fill where it skips.
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if parameter.grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def _clear(optimizer: Any, *_: object) -> None:
    if optimizer.skip_next is not None:
        optimizer.skip_next = optimizer.found_inf = None


def _either(flag: Tensor, other: Tensor | None) -> Tensor:
    return flag if other is None else torch.maximum(flag, other)
