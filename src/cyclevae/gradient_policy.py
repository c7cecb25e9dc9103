"""Who learns: the passes and parameters that receive a gradient from a term, and those that do not.

Toggling `requires_grad` would be silently wrong under activation checkpointing and breaks DDP, so
`freeze` lends the modules aliases of their parameters that stop the gradient.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cyclevae._gate import Frozen as Frozen
from cyclevae._gate import FunctionalGate
from cyclevae._gate import refuse_reentrant as refuse_reentrant


@dataclass(frozen=True)
class GradientPolicy:
    """Declares which parts of a two-pass term learn from it.

    A cycle runs one or more passes that make the bridge and one pass behind it. With
    `bridge="detach"` the first passes learn nothing; with `bridge="full"` the gradient flows
    through the bridge into all of them, and with `bridge="last"` into the last one, which costs the
    memory of one pass however many there are. Patterns are those of `freeze`.

    Args:
        bridge: what happens at the bridge, `"detach"`, `"last"` or `"full"`; the last two are the
            same where one pass makes the bridge.
        freeze: patterns of the parameters that are frozen in the pass behind the bridge.
        freeze_bridge: patterns of the parameters that are frozen in the passes that make the
            bridge; only with `bridge="last"` or `"full"`.

    Raises:
        ValueError: if a value is unknown, a pattern is not a string in a tuple, or the policy
            leaves nothing that could learn.

    Reference: stop-gradient at the bridge, as in SimSiam (Chen & He 2021, arXiv:2011.10566).

    Examples:
        >>> GradientPolicy(bridge="full", freeze=("decoder.*",))
        GradientPolicy(bridge='full', freeze=('decoder.*',), freeze_bridge=())
    """

    bridge: Literal["detach", "last", "full"] = "detach"
    freeze: tuple[str, ...] = ()
    freeze_bridge: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bridge not in ("detach", "last", "full"):
            raise ValueError(
                f"`bridge` must be 'detach' (the pass that makes the bridge learns nothing), "
                f"'last' (gradient flows into the last of its passes) or 'full' (gradient flows "
                f"through the bridge), got {self.bridge!r}."
            )
        for name, patterns in (("freeze", self.freeze), ("freeze_bridge", self.freeze_bridge)):
            if isinstance(patterns, str):
                raise ValueError(
                    f"`{name}` must be a tuple of patterns, got the bare string {patterns!r}: "
                    f"write ({patterns!r},)."
                )
            if not isinstance(patterns, tuple) or not all(isinstance(p, str) for p in patterns):
                raise ValueError(
                    f"`{name}` must be a tuple of shell patterns on parameter names such as "
                    f"('decoder.*',), got {patterns!r}."
                )
        if self.bridge == "detach" and self.freeze_bridge:
            raise ValueError(
                f"`freeze_bridge`={self.freeze_bridge!r} has no meaning with bridge='detach', "
                f"because that bridge teaches nobody: drop `freeze_bridge` or set bridge='last' or "
                f"'full'."
            )
        if "*" in self.freeze and (self.bridge == "detach" or "*" in self.freeze_bridge):
            raise ValueError(
                f"nothing would learn with bridge={self.bridge!r}, freeze={self.freeze!r} and "
                f"freeze_bridge={self.freeze_bridge!r}: freeze less, or give the term weight zero."
            )

    def bridge_pass(self, denoiser: object, *, last: bool = True) -> AbstractContextManager[object]:
        """The context of a pass that makes the bridge: without a graph, or partly frozen.

        Args:
            denoiser: what `freeze` resolves the patterns against.
            last: whether this is the last pass of the bridge.

        Examples:
            >>> encoder = nn.Linear(2, 2)
            >>> with GradientPolicy(bridge="last").bridge_pass(encoder, last=False):
            ...     z_t = encoder(torch.ones(1, 2))
            >>> with GradientPolicy(bridge="last").bridge_pass(encoder):
            ...     z_hat = encoder(z_t)
            >>> z_t.requires_grad, z_hat.requires_grad
            (False, True)
        """
        if self.bridge == "detach" or (self.bridge == "last" and not last):
            return detach()
        return freeze(denoiser, *self.freeze_bridge) if self.freeze_bridge else nullcontext()


STOP_GRADIENT = GradientPolicy()


def freeze(target: object, *patterns: str | nn.Module) -> Frozen:
    """Give the chosen parameters no gradient from the forward passes that run inside.

    Gradient still flows *through* them to everything else, and passes outside, before or after, in
    the same graph or not, learn as usual: the backward pass may run anywhere. Exact under
    non-reentrant activation checkpointing, autocast, `torch.compile`, DDP and FSDP2.

    Names are resolved at every entry, without the prefixes of wrappers (DDP's `module.`,
    `_orig_mod.`). A tied parameter is frozen wherever it is used. The swap is seen by every thread.
    It cannot hold where a pass bypasses the modules: reentrant checkpointing, which
    `refuse_reentrant` finds and the losses refuse; `functional_call`, for which there is
    `gate_params`; a list that holds parameters; an FSDP2 unit entered by another method than its
    call. `with freeze(...) as frozen:` gives a handle, and `frozen.probe(loss)` then finds any
    leak, as `cyclevae.testing.assert_frozen` does.
    Inside, do not move the module, load its state, or hand `.parameters()` to anything.

    Args:
        target: a module, or a denoiser that exposes one as `.module`.
        patterns: shell patterns on parameter names (`"decoder.*"`, `"*.bias"`) or submodules of
            the target; none means all parameters.

    Raises:
        ValueError: on entry, if the target is no module or holds none of the chosen parameters, or
            if they cannot be frozen exactly (recurrent layers, FSDP1, a part of an FSDP2 unit).
        RuntimeError: on exit, if a frozen parameter was replaced inside.

    Reference: stop-gradient on one pass of shared weights, as in SimSiam,
    https://arxiv.org/abs/2011.10566.

    Examples:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
        >>> with freeze(model, "decoder.*"):
        ...     y = model["decoder"](model["encoder"](torch.ones(1, 2)))
        >>> y.sum().backward()
        >>> [name for name, p in model.named_parameters() if p.grad is not None]
        ['encoder.weight', 'encoder.bias']

        In a test or the first steps, ask autograd whether that was so:

        >>> with freeze(model, "decoder.*") as frozen:
        ...     y = model["decoder"](model["encoder"](torch.ones(1, 2)))
        >>> frozen.probe(y.sum())
    """
    return Frozen(target, patterns)


def gate_params(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Aliases that get no gradient, to give to `torch.func.functional_call`.

    What that is given overrides `freeze`. The aliases still require grad, and gradient flows
    through them to everything else, under the transforms of `torch.func` too. Tied tensors stay
    tied.

    Args:
        parameters: by name, such as those of `module.named_parameters()` that are to be frozen.

    Reference: https://docs.pytorch.org/docs/stable/generated/torch.func.functional_call.html

    Examples:
        >>> layer, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
        >>> frozen = gate_params(dict(layer.named_parameters()))
        >>> torch.func.functional_call(layer, frozen, x).sum().backward()
        >>> x.grad is None, layer.weight.grad is None
        (False, True)
    """
    gated = {id(p): FunctionalGate.apply(p) for p in parameters.values()}  # type: ignore[no-untyped-call]
    return {name: gated[id(p)] for name, p in parameters.items()}


def detach() -> AbstractContextManager[None]:
    """Compute a bridge without a graph: nothing inside learns.

    Cheaper than computing the graph and dropping it, and safe inside an autocast region whose
    other passes learn.

    Reference: older PyTorch caches the casts made under `no_grad` and loses the gradients of later
    passes, https://github.com/pytorch/pytorch/issues/112583.

    Examples:
        >>> encoder = nn.Linear(2, 2)
        >>> with detach():
        ...     bridge = encoder(torch.ones(1, 2))
        >>> bridge.requires_grad
        False
    """
    return torch.no_grad() if torch.compiler.is_compiling() else _no_grad_no_cache()


@contextmanager
def _no_grad_no_cache() -> Iterator[None]:
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)
