"""From the options of version 0.1 to an objective: the one place that the new house changes."""

from typing import Any

import cyclevae as cv
from flat import flat
from move.cases import Case


def objective_of(case: Case) -> Any:
    """What is called as `objective(denoiser, batch, step=, generator=, counts=, teacher=)`."""
    objective = flat(
        cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, **case.text),
        cv.LatentProcess(**case.latent),
        **case.options,
    )
    return cv.phases(objective, **case.phases) if case.kind == "phases" else objective
