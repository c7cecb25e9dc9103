"""How a model is told which vectors of a latent are padding."""

import inspect
from typing import Any

import torch

from cyclevae._base.types import LatentMaskLike


def tell_latent_mask(
    denoiser: object, latent_mask: LatentMaskLike | None
) -> dict[str, LatentMaskLike]:
    """The keyword by which a pass tells a denoiser the mask of latents; none where there is none.

    Raises:
        ValueError: a denoiser that takes none, to which padding would be a part of the latent.
    """
    if latent_mask is None:
        return {}
    inside: Any = denoiser
    while hasattr(inside, "denoiser"):  # what hands all on
        inside = inside.denoiser
    takes = getattr(inside, "takes_latent_mask", None)
    if takes is None:
        takes = torch.compiler.is_compiling() or _names(inside.denoise, "latent_mask")
    if not takes:
        named = type(getattr(inside, "module", inside)).__name__
        raise ValueError(
            f"{named} takes no `latent_mask`, and would read the padding of latents: let its "
            "forward (of one's own Denoiser: `denoise`) take it, bool [b, n], True = keep, and "
            "look at kept positions alone; or let all latents have one length, without a mask"
        )
    return {"latent_mask": latent_mask}


def _names(function: Any, argument: str) -> bool:
    return argument in inspect.signature(function).parameters
