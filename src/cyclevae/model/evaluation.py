"""A denoiser in evaluation mode, and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from cyclevae._base.types import AnyTokens, Latents
from cyclevae.gradient_policy.contexts import detach
from cyclevae.model.denoiser import Denoised, Denoiser
from cyclevae.model.door import at_the_door


@contextmanager
def evaluating(module: object) -> Iterator[None]:
    """Dropout off, then every submodule back as it was, and sharded again where FSDP2 shards it."""
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    modes = [m.training for m in modules]
    for m in modules:
        m.training = False
    try:
        yield
    finally:
        for m, mode in zip(modules, modes, strict=True):
            m.training = mode
            # A root unit stays unsharded until its backward, and an optimizer made meanwhile would
            # hold the wrong parameters. By name, because torch.distributed may be missing.
            if any(base.__name__ == "FSDPModule" for base in type(m).__mro__):
                reshard: Any = m.reshard
                reshard()


class Evaluated:
    """A `Denoiser` around another one; made by `evaluated`."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)  # `module` and `roles`, for freeze

    def denoise(self, tokens: AnyTokens, latents: Latents, **state: Any) -> Denoised:
        """One forward: see `Denoiser.denoise`."""
        with detach(), evaluating(getattr(self.denoiser, "module", None)):
            return self.denoiser.denoise(tokens, latents, **state)


@at_the_door
def evaluated(denoiser: Denoiser) -> Evaluated:
    """The same network in evaluation mode, in which dropout is off: a maker of bridges.

    Its submodules are in evaluation mode during a forward and then as they were. What it returns
    has no graph, because activation checkpointing would run a forward again in another mode.

    Examples:
        >>> from cyclevae.testing import toy_denoiser
        >>> denoiser = toy_denoiser(seed=0)[0]
        >>> evaluated(denoiser).module is denoiser.module
        True
    """
    return Evaluated(denoiser)
