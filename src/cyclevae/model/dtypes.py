"""In what precision a network computes, and latents come to it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from cyclevae._base.types import Latents

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def network_dtype(denoiser: object) -> torch.dtype | None:
    """The dtype of the parameters behind a denoiser, that of the first; None if it shows none."""
    module = getattr(denoiser, "module", None)
    if not isinstance(module, nn.Module):
        return None
    for parameter in module.parameters():
        if parameter.dtype in _DTYPES:  # others, of quantised weights, are none to compute in
            return parameter.dtype
    return None


def in_its_dtype(latents: Latents, denoiser: object) -> Latents:
    """Latents or noise in no lower a dtype than the network's parameters.

    So that half-precision latents from a file lose nothing more in an fp32 network. Those in a
    higher one stay, and are cast where the network reads them.
    """
    dtype = network_dtype(denoiser)
    return latents if dtype is None else latents.to(torch.promote_types(latents.dtype, dtype))


def reading_in(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Where a network fails on dtypes, say in which it is given what."""
    return nullcontext() if torch.compiler.is_compiling() else _naming_dtypes(dtype)


@contextmanager
def _naming_dtypes(dtype: torch.dtype | None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        raise TypeError(
            f"the network failed on dtypes ({error}). It is given `latents` in the dtype of its "
            f"parameters ({dtype}) and `text_time` and `latent_time` in float32 or better: cast "
            "these where they are read, as in latent_time.to(latents), and all parameters alike"
        ) from error
