"""Random draws that know neither their order nor how many rows there are."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CELLS = 1024
_LAW = {
    "rand": "uniform",
    "rand_like": "uniform",
    "uniform_": "uniform",
    "randn": "normal",
    "randn_like": "normal",
    "normal_": "normal",
    "exponential_": "exponential",
    "randint": "randint",
    "randperm": "randperm",
}
_UNKNOWN = ("multinomial", "bernoulli", "bernoulli_", "normal", "poisson", "random_", "geometric_")
_SALT = {"uniform": 11, "normal": 23, "exponential": 37}


class OrderFree(TorchFunctionMode):
    """Inside, row r of a draw is a function of the law, of r, and of the places within the row.

    So neither the order of draws matters nor how many rows, or columns, are drawn; two draws of one
    law and shape are the same draw. A generator that is given is not looked at. Stratified times
    depend on their number: a permutation is the identity, and the jitter of `rand(1)` is .37. Row r
    of `randint(high, (rows,))` is `(7 r + 3) % high`.

    Uniform numbers are odd multiples of 1/2048, so that they are the same in fp32; the others are
    read off a table, so that no vector instruction can round one of them differently.
    """

    def __init__(self) -> None:
        super().__init__()
        uniform = (torch.arange(_CELLS, dtype=torch.float64) + 0.5) / _CELLS
        self.tables = {
            "uniform": uniform,
            "normal": torch.special.ndtri(uniform),
            "exponential": -uniform.log(),
        }

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _UNKNOWN:
            raise NotImplementedError(f"a draw that `OrderFree` does not know: {name}")
        drawn = func(*args, **kwargs)
        if name not in _LAW:
            return drawn
        law = _LAW[name]
        with torch.no_grad():
            if law == "randperm":
                return drawn.copy_(torch.arange(len(drawn)))
            if law == "randint":
                high = kwargs["high"] if "high" in kwargs else args[0]
                if drawn.ndim != 1 or isinstance(args[1] if len(args) > 1 else None, int):
                    raise NotImplementedError("`OrderFree` knows only randint(high, (rows,))")
                return drawn.copy_((7 * torch.arange(len(drawn)) + 3) % high)
            return drawn.copy_(self._values(law, drawn.shape))

    def _values(self, law: str, shape: torch.Size) -> torch.Tensor:
        if law == "uniform" and len(shape) == 1:
            # row 0 is the jitter of stratified times, which is a draw of one row
            rows = torch.arange(shape[0], dtype=torch.float64)
            return (0.37 + rows * 0.61803398875).frac()
        key = torch.full((), _SALT[law], dtype=torch.long)
        for axis, size in enumerate(shape):
            place = torch.arange(size).view(-1, *[1] * (len(shape) - 1 - axis))
            key = _mixed(key * 31 + place + 1)
        return self.tables[law][(key >> 7) % _CELLS]


def _mixed(key: torch.Tensor) -> torch.Tensor:
    """A hash of integers, to 31 bits."""
    for factor in (73244475, 295559667):
        key = ((key ^ (key >> 15)) * factor) & 0x7FFFFFFF
    return key ^ (key >> 15)
