"""How draws are told where their random state is."""

from typing import Any

import torch


def seeded(generator: torch.Generator | None) -> dict[str, Any]:
    """The keyword argument of a draw: none for the global random state.

    A generator of None is not the same to torch, which then takes no symbolic size, and
    `torch.compile` makes sizes symbolic once a batch comes in another one.
    """
    return {} if generator is None else {"generator": generator}
