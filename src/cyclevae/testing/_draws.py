"""Random draws that are the same for each row, however the rows are split."""

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWS = ("rand", "rand_like", "randn", "randn_like", "exponential_", "randint", "randperm")


class SameDraws(TorchFunctionMode):
    """Inside, a draw without a generator of its own does not depend on the number of rows.

    Every row gets the same numbers, a longer one the same and more of them, and each call others.
    Stratified times become one time for all rows. Indices of rows with replacement, as many as
    there are rows, become the rows themselves. Dropout stays as it is.

    Uniform numbers are evenly spread, so that a short text too has words that are masked and words
    that are not, and odd multiples of 1/2048, so that rounding to fp32 does not depend on the
    number of rows either.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.jitter = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        drawn = func(*args, **kwargs)
        kind = func.__name__
        if kind not in _DRAWS or kwargs.get("generator") is not None or drawn.is_meta:
            return drawn  # on `meta`: a run without data, which is made once for each shape
        if kind == "randint":
            rows = len(drawn) if drawn.ndim == 1 and args[0] == len(drawn) else None
            return drawn if rows is None else torch.arange(rows, device=drawn.device)
        u = self._uniform(kind, drawn.shape[1:])
        if kind == "randperm":  # for stratified_times, where (order + jitter) / rows becomes u
            order = len(drawn) * float(u) - self.jitter
            return torch.full_like(drawn, order, dtype=torch.float32)
        if drawn.shape == (1,):
            self.jitter = float(u)
        if kind.startswith("randn"):
            u = torch.special.ndtri(u)
        elif kind == "exponential_":
            u = -u.log()
        with torch.no_grad():
            return drawn.copy_(u.expand_as(drawn))

    def _uniform(self, kind: str, shape: torch.Size) -> torch.Tensor:
        """Of one row: multiples of the golden ratio modulo 1, from elsewhere at each call."""
        self.calls[kind] += 1
        start = 2**0.5 * self.calls[kind] + 3**0.5 * _DRAWS.index(kind)
        u = start + (5**0.5 - 1) / 2 * torch.arange(shape.numel(), dtype=torch.float64)
        return ((1024 * u.frac()).floor() + 0.5).view(shape) / 1024
