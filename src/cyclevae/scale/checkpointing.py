"""A step of many passes in the memory of one: each pass runs again in the backward."""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from cyclevae._base.types import AnyTokens, Latents
from cyclevae.model.denoiser import Denoised, Denoiser


class Checkpointed:
    """A denoiser whose passes keep their inputs and outputs alone; made by `checkpoint_passes`."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        if name == "denoiser":  # a copy asks before it has one
            raise AttributeError(name)
        return getattr(self.denoiser, name)  # `module` and `roles`

    @property
    def network(self) -> Any:
        """That of the denoiser inside."""
        return getattr(self.denoiser, "network")  # noqa: B009 - not every Denoiser has one

    def with_network(self, network: nn.Module) -> "Checkpointed":
        """The same around another network."""
        inside: Any = self.denoiser
        return Checkpointed(inside.with_network(network))

    def denoise(self, tokens: AnyTokens, latents: Latents, **state: Any) -> Denoised:
        """One forward, and one more in the backward: see `Denoiser.denoise`."""
        run = self.denoiser.denoise
        output: Denoised = checkpoint(run, tokens, latents, use_reentrant=False, **state)
        return output


def checkpoint_passes(denoiser: Denoiser) -> Denoiser:
    """Let each pass keep its inputs and outputs alone, and run again in the backward.

    The activations of one pass are in memory at a time, however many passes a step has, at the cost
    of one more forward for each pass that learns; those without a graph run once, as they would.
    Gradients are the same, also with dropout, under autocast and inside `freeze`, whose parameters
    stay frozen though the pass is run again after it has ended.

    A pass must compute the same when it is run again: its draws come from the global random state,
    which is restored, and not from a generator of the network's own; weights do not change before
    the backward; and what a forward counts, such as the statistics of batch normalisation, is
    counted twice. Restoring the state of CUDA waits for nothing, since it is held on the host; but
    older PyTorch cannot capture it in a CUDA graph. Under `torch.compile` the compiler decides what
    it keeps.

    Args:
        denoiser: any; the result has its other attributes too.

    Raises:
        TypeError: no denoiser.
        ValueError: a denoiser whose network is in DistributedDataParallel, which takes the second
            run for another step: wrap a `StepModule` instead.

    Reference: Chen et al. 2016, arXiv:1604.06174, in the form without reentrant autograd of
    https://docs.pytorch.org/docs/stable/checkpoint.html; CUDA graphs:
    https://github.com/pytorch/pytorch/issues/162504.

    Examples:
        >>> import cyclevae as cv
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> calls = []
        >>> _ = denoiser.network.register_forward_pre_hook(lambda *_: calls.append(1))
        >>> objective = cv.CycleObjective(text_process, latent_process)
        >>> output = objective(checkpoint_passes(denoiser), toy_batch(seed=0), step=0)
        >>> len(calls)
        3
        >>> output.loss.backward()
        >>> len(calls)
        6
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            "checkpoint_passes needs an object with a method `denoise`, got "
            f"{type(denoiser).__name__}: make one by as_denoiser"
        )
    network = getattr(denoiser, "network", None)
    inside = network.modules() if isinstance(network, nn.Module) else ()
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in inside):
        raise ValueError(
            "the denoiser's network is in DistributedDataParallel, which fails where its forward "
            "is run again in the backward; wrap the whole step: "
            "DistributedDataParallel(StepModule(checkpoint_passes(denoiser), objective))"
        )
    return Checkpointed(denoiser)
