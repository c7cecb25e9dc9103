"""The two context managers: parameters that get no gradient, and a bridge without a graph.

Toggling `requires_grad` would be silently wrong under activation checkpointing and breaks DDP, so
`freeze` lends the modules aliases of their parameters that stop the gradient.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from cyclevae.gradient_policy.gate import Frozen, FunctionalGate


def freeze(target: object, *patterns: str | nn.Module) -> Frozen:
    """Give the chosen parameters no gradient from the forward passes that run inside.

    Gradient still flows *through* them to everything else, and passes outside, before or after, in
    the same graph or not, learn as usual: the backward pass may run anywhere. Exact under
    non-reentrant activation checkpointing, autocast, `torch.compile`, DDP and FSDP2.

    Names are resolved at every entry, without the prefixes of wrappers (DDP's `module.`,
    `_orig_mod.`). A tied parameter is frozen in every module of the target; one outside learns, so
    give the whole network and a pattern. The swap is seen by every thread.
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
