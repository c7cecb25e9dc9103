"""From the options of version 0.1 to an objective: the one place that the new house changes."""

from typing import Any

import cyclevae as cv

from move.cases import Case


def objective_of(case: Case) -> Any:
    """What is called as `objective(denoiser, batch, step=, generator=, counts=, teacher=)`.

    It also has `passes(step)`, `counts(batch)` and, where `case.kind` is not 'phases', `terms`
    with the arguments of the call.
    """
    objective = cv.CycleObjective(
        text_process=cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, **case.text),
        latent_process=cv.LatentProcess(**case.latent),
        **case.options,
    )
    return cv.phases(objective, **case.phases) if case.kind == "phases" else objective
