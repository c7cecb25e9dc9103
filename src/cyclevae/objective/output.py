"""What a step returns."""

from typing import NamedTuple

from torch import Tensor

from cyclevae._base.types import Scalar


class StepOutput(NamedTuple):
    """The result of one step.

    Attributes:
        loss: the weighted sum, with its graph.
        metrics: detached 0-d float tensors: each term that ran, unweighted, its weight, and what it
            reports beside. A term that did not run is absent.
        skip: with `non_finite="skip"`, whether a term is not finite on some rank, a 0-d bool
            tensor: see `skip_update`.

    Examples:
        >>> import torch
        >>> output = StepOutput(torch.tensor(1.0), {"text_loss": torch.tensor(1.0)})
        >>> output.metrics["text_loss"]
        tensor(1.)
    """

    loss: Scalar
    metrics: dict[str, Tensor]
    skip: Tensor | None = None
