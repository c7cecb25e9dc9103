"""Whether a model is dead: no step of many in a row had a finite term."""

from typing import Any

import torch
from torch import Tensor, nn


class Watch:
    """Counts steps in a row without one finite term, and stops the run at `limit`.

    The count stays on the device and is read as late as it takes to become `limit` again, from a
    copy that has long arrived, so that no step waits. Ranks agree which terms are finite, and so
    stop at the same step.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.steps = limit, 0
        self._count: Tensor | None = None
        self._copy: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __reduce__(self) -> tuple[type["Watch"], tuple[int]]:
        return Watch, (self.limit,)  # a copy counts anew: an event is no thing to copy

    def note(self, dead: Tensor) -> None:
        """Take in whether no term of a step was finite.

        Raises:
            FloatingPointError: none was for `limit` steps.
        """
        if dead.is_meta:
            return
        before = torch.zeros_like(dead, dtype=torch.long) if self._count is None else self._count
        self._count = torch.where(dead, before + 1, torch.zeros_like(before))
        self.steps += 1
        if self.steps % self.limit:
            return
        if dead.is_cuda:
            read, self._copy = self._copy, self._begin_copy(self._count)
        else:
            read = self._count, None
        if read is None:
            return
        count, arrived = read
        if arrived is not None:
            arrived.synchronize()  # with a copy of `limit` steps ago
        if int(count) >= self.limit:
            raise FloatingPointError(
                f"no term of the loss was finite for {int(count)} steps in a row: the model is "
                "dead. Go on from the last checkpoint, whose weights are finite, with a lower "
                "`optimizer.lr`; `loss.cycle_dead_steps` sets how many steps that takes"
            )

    @staticmethod
    def _begin_copy(count: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        there = torch.empty((), dtype=count.dtype, pin_memory=True)
        there.copy_(count, non_blocking=True)
        events: Any = torch.cuda.Event  # which has no annotations
        arrived = events()
        arrived.record()
        return there, arrived


def refuse_dead(model: nn.Module) -> None:
    """Refuse weights that are not finite, before they overwrite a checkpoint; reads the device.

    Raises:
        FloatingPointError: how many are not, and the first by its name.
    """
    weights = {name: p for name, p in model.named_parameters() if not p.is_meta}
    if not weights:
        return
    finite = torch.stack([p.detach().isfinite().all() for p in weights.values()]).tolist()
    bad = [name for name, fine in zip(weights, finite, strict=True) if not fine]
    if bad:
        raise FloatingPointError(
            f"{len(bad)} of {len(weights)} parameters are not finite, such as `{bad[0]}`: no "
            "checkpoint is made of a dead model, and the one before stays; the bare "
            "`trainer.host.state_dict()` gives them still"
        )
