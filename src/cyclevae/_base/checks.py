"""Checks at the public door: name what is wrong, what was expected, what came and what to do.

Shapes and dtypes are always checked. Values (ids in range, finite latents, times in [0, 1]) cost a
device synchronisation on a GPU, so they are checked on CPU tensors only, unless `check_values` says
otherwise.
"""

import difflib
import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from cyclevae._base.derivatives import transformed
from cyclevae._base.types import Number

_PACKAGE = str(Path(__file__).parents[1])
_values: bool | None = None


class check_values:  # noqa: N801 - reads as a function, like torch.set_grad_enabled
    """Turn value checks on (`True`), off (`False`) or back to the default (`None`).

    By default values are checked on CPU tensors; they are not on CUDA, where each check waits for
    the device, nor on `meta` tensors, nor inside `torch.compile` or the transforms of `torch.func`.
    Works as a call or in a `with`.

    Examples:
        >>> import cyclevae
        >>> with cyclevae.check_values(False):
        ...     pass  # nothing in here reads a value back from a tensor
    """

    def __init__(self, enabled: bool | None) -> None:
        global _values
        self._previous, _values = _values, enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        global _values
        _values = self._previous


def reads_values(tensor: Tensor) -> bool:
    """Whether the values of `tensor` may be looked at."""
    if torch.compiler.is_compiling() or tensor.is_meta or transformed(tensor):
        return False
    return tensor.device.type == "cpu" if _values is None else _values


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint after an unknown name: the closest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(map(repr, known))}"


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse an unknown option, so that none is silently accepted."""
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; {nearest(str(value), choices)}")


def check_nonnegative(name: str, value: Number) -> None:
    """Refuse a weight or an amount that is negative, NaN or infinite."""
    if not (isinstance(value, int | float) and 0 <= value < math.inf):
        raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r}")


def check_positive(name: str, value: Number) -> None:
    """Refuse a scale that is not a finite number above 0."""
    check_nonnegative(name, value)
    if value == 0:
        raise ValueError(f"`{name}` must be above 0, got 0")


def check_share(name: str, value: Number, *, above_zero: bool = False) -> None:
    """Refuse a share outside [0, 1], or of 0 where nothing would be left."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 <= value <= 1) or (above_zero and value == 0):
        raise ValueError(f"`{name}` must lie in {'(' if above_zero else '['}0, 1], got {value!r}")


def check_count(name: str, value: int, *, least: int = 1) -> None:
    """Refuse a number of things that is no integer, or too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}")


def check_type(name: str, value: object, kind: type) -> None:
    """Refuse an option of another type, of which a wrong one would be found late or never."""
    if not isinstance(value, kind):
        raise ValueError(f"`{name}` must be a {kind.__name__}, got {value!r}")


def check_tensor(name: str, value: object) -> None:
    """Refuse an array, a list or a dict where a tensor is read, and say how to make one of it."""
    if isinstance(value, Tensor):
        return
    match value:
        case Mapping():
            cure = "take the tensor out of it, or spread it over the arguments with **"
        case list() | tuple():
            cure = f"use torch.tensor({name.rpartition('.')[2]}), of rows padded to one length"
        case _ if hasattr(value, "__array__"):
            cure = f"use torch.as_tensor({name.rpartition('.')[2]})"
        case _:
            cure = "are the arguments in their order?"
    raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value).__name__}; {cure}")


def check_number(name: str, value: object) -> None:
    """Refuse what is neither a number nor a tensor."""
    if not isinstance(value, Real | Tensor | torch.SymFloat | torch.SymInt):
        cure = f"use torch.as_tensor({name})"
        if callable(value):  # such as a TimePolicy
            cure = f"call it for one of each row, {name}(rows, step=step)"
        raise TypeError(
            f"`{name}` must be a number or a torch.Tensor, got {type(value).__name__}; {cure}"
        )


def as_tokens(name: str, tokens: Tensor, vocab_size: int) -> Tensor:
    """Integer ids `[b, s]` within the vocabulary, as int64: what is smaller is widened."""
    check_tensor(name, tokens)
    if tokens.ndim != 2:
        raise ValueError(f"`{name}` must be token ids of shape [b, s], got {_describe(tokens)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(
            f"`{name}` must hold integer ids, got {_describe(tokens)}; use .long(), if these are "
            "ids and not another argument"
        )
    tokens = tokens.long()
    if reads_values(tokens) and tokens.numel():
        low, high = map(int, tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"`{name}` must hold ids in [0, {vocab_size}), got ids from {low} to {high}; "
                "does the tokenizer match `text_process.vocab_size`?"
            )
    return tokens


def as_any_tokens(name: str, tokens: Tensor, vocab_size: int) -> Tensor:
    """A text is ids `[b, s]`, or relaxed: finite floats `[b, s, v]` over the vocabulary."""
    check_tensor(name, tokens)
    if not (tokens.is_floating_point() and tokens.ndim == 3):
        return as_tokens(name, tokens, vocab_size)
    if tokens.shape[-1] != vocab_size:
        raise ValueError(
            f"`{name}` must be token ids [b, s], or a relaxed text [b, s, v] over "
            f"text_process.vocab_size = {vocab_size} ids, got {_describe(tokens)}"
        )
    check_finite(name, tokens, "has training diverged?")
    return tokens


def as_mask(name: str, mask: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """The attention mask as bool `[b, s]`, True = keep, from bool, integers or 0/1 floats.

    Floats are taken where their values may be read, and refused elsewhere: an additive mask, of 0
    and -inf, would be turned round.
    """
    check_tensor(name, mask)
    if mask.ndim != 2:
        raise ValueError(f"`{name}` must have shape [b, s], got {_describe(mask)}")
    if shape is not None and tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"`{name}` must have the shape of its tokens {list(shape)}, got {_describe(mask)}"
        )
    if mask.dtype == torch.bool:
        return mask
    if not (mask.is_floating_point() or mask.is_complex()):
        mask = mask.long()  # small unsigned integers know few operators
    additive = "an additive mask of 0 and -inf is turned round by `mask == 0`"
    if mask.is_complex() or (mask.is_floating_point() and not reads_values(mask)):
        raise TypeError(
            f"`{name}` must be bool or integers, got {_describe(mask)}, whose values are not "
            f"looked at here: make a mask of 1 (keep) and 0 (padding) bool by `mask.bool()`; "
            f"{additive}"
        )
    if reads_values(mask) and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"`{name}` must hold 1 (keep) or 0 (padding), got other values; {additive}"
        )
    return mask > 0


def check_kept(name: str, mask: Tensor, rows: Tensor | None = None) -> None:
    """Refuse rows that keep nothing, of which a network makes NaN; of some `rows`, if given."""
    if not reads_values(mask):
        return
    empty = ~mask.any(dim=1)
    if rows is not None:
        empty = empty & rows
    if bool(empty.any()):
        raise ValueError(
            f"`{name}` must keep a position or more in every row, and keeps none in "
            f"{int(empty.sum())} of {len(empty)} (first: row {int(empty.long().argmax())}): drop "
            "these rows; True = keep, so give ~mask where yours is True at padding"
        )


def check_latents(
    name: str,
    latents: Tensor,
    shape: Sequence[int] | None = None,
    *,
    cure: str = "drop or repair these rows",
) -> None:
    """Latents are finite floats of any shape after the batch; `shape` is that of one sample."""
    check_tensor(name, latents)
    if latents.ndim < 2 or (shape is not None and list(latents.shape[1:]) != list(shape)):
        wanted = "[b, d], [b, n, d] or [b, c, h, w]"
        if shape is not None:
            wanted = f"[b, {', '.join(map(str, shape))}]"
        raise ValueError(
            f"`{name}` must be latents of shape {wanted}, got {_describe(latents)}"
            + _squeeze_hint(latents)
        )
    if not latents.is_floating_point():
        raise TypeError(
            f"`{name}` must be floating point, got {_describe(latents)}; use .float(), "
            "if these are latents and not another argument"
        )
    check_finite(name, latents, cure)


def check_vectors(name: str, value: object, shape: Sequence[int], *, cure: str) -> None:
    """Refuse what acts on vectors where latents, of which `shape` is that of one, hold none."""
    if len(shape) > 2:
        raise ValueError(
            f"`{name}` = {value!r} acts on vectors, the last axis of latents [b, d] or [b, n, d]; "
            f"of [b, {', '.join(map(str, shape))}] that is none: {cure}"
        )


def check_finite(name: str, tensor: Tensor, cure: str) -> None:
    """Refuse NaN and infinity, and say where they are."""
    if reads_values(tensor):
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            rows = bad.reshape(len(bad), -1).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(
                f"`{name}` must be finite, got NaN or infinity in {len(rows)} of {len(bad)} rows "
                f"(first: row {rows[0]}); {cure}"
            )


def warn_without_graph(name: str, *tensors: Tensor, cure: str) -> None:
    """Say once for each place that a loss teaches nobody, which is no error, but rarely meant.

    The place is the user's. Quiet under `torch.no_grad`, where nothing is to be taught.
    """
    if not torch.is_grad_enabled() or any(t.requires_grad for t in tensors):
        return
    if torch.compiler.is_compiling() or any(t.is_meta or transformed(t) for t in tensors):
        return
    frame, depth = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(
        f"`{name}` has no graph, so that nobody learns from it: {cure}. To measure without a "
        "gradient, say so by torch.no_grad()",
        stacklevel=depth,
    )


# what makes latents detaches them by default, because most cycles want that
ENCODE_WITH_GRAPH = "encode_text(..., policy=GradientPolicy('full')) makes latents that have one"


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse to broadcast: `[b, 1, d]` against `[b, d]` is a mistake, never a wish."""
    check_tensor(name, tensor)
    check_tensor(other_name, other)
    if tensor.shape != other.shape:
        raise ValueError(
            f"`{name}` and `{other_name}` must have equal shapes, got {list(tensor.shape)} and "
            f"{list(other.shape)}" + _squeeze_hint(tensor)
        )


def check_row_mask(name: str, mask: Tensor | None, like: Tensor) -> None:
    """A choice of rows is bool `[b]`."""
    if mask is not None:
        check_tensor(name, mask)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (len(like),)):
        raise ValueError(f"`{name}` must be bool [{len(like)}], got {_describe(mask)}")


def check_variance(name: str, variance: Number | Tensor, shape: Sequence[int]) -> None:
    """A variance is above 0: a number, or a tensor in the shape of one latent, or `[d]`."""
    check_number(name, variance)
    if not isinstance(variance, Tensor):
        return check_positive(name, variance)
    vector = shape[-1:] if len(shape) <= 2 else shape  # which axis of an image is none
    if variance.ndim and variance.shape not in (torch.Size(shape), torch.Size(vector)):
        raise ValueError(
            f"`{name}` must be a number or have the shape of one latent {list(shape)}, "
            f"got {list(variance.shape)}"
        )
    if reads_values(variance) and not bool((variance > 0).all()):
        raise ValueError(f"`{name}` must be above 0 in every dimension")


def check_rows(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Two parts of a batch must have the same number of rows."""
    check_tensor(name, tensor)
    check_tensor(other_name, other)
    if len(tensor) != len(other):
        raise ValueError(
            f"`{name}` and `{other_name}` must have the same number of rows, "
            f"got {len(tensor)} and {len(other)}"
        )


def as_time(name: str, time: Number | Tensor, like: Tensor) -> Tensor:
    """A time in [0, 1] as floats `[b]`, fp32 or better, for the rows of `like`."""
    check_number(name, time)
    if not isinstance(time, Tensor):
        if not 0 <= time <= 1:
            raise ValueError(f"`{name}` must lie in [0 (clean), 1 (full noise)], got {time!r}")
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        return torch.full((len(like),), float(time), dtype=dtype, device=like.device)
    if time.shape != (len(like),):
        raise ValueError(
            f"`{name}` must be a number or have shape [{len(like)}], got {_describe(time)}"
        )
    if not time.is_floating_point():
        raise TypeError(
            f"`{name}` must be floating point in [0, 1], got {_describe(time)}; "
            "divide discrete timesteps by their number less one"
        )
    if reads_values(time) and not bool(((time >= 0) & (time <= 1)).all()):
        raise ValueError(f"`{name}` must lie in [0 (clean), 1 (full noise)], got other values")
    return time if time.dtype == torch.float64 else time.float()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _squeeze_hint(tensor: Tensor) -> str:
    if tensor.ndim == 3 and tensor.shape[1] == 1:
        return "; drop the middle axis with .squeeze(1)"
    return ""
