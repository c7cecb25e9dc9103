"""The full objective, whose step `plain.py` writes out."""

from dataclasses import replace
from typing import Any

import cyclevae as cv

TERMS: tuple[cv.Term, ...] = (  # in the order in which the plain step draws
    cv.Text(time=1.0),
    cv.CycleLatent(weight=10.0, bridge="argmax", pairs=True),
    cv.Latent(),
    cv.CycleText(weight=2.0, bridge=cv.LatentBridge(), pairs=True),
    cv.Prior("moment", weight=0.1, estimator="biased"),
)
WEIGHTS = {term.name: term.weight for term in TERMS}


def changed(**options: dict[str, Any]) -> list[cv.Term]:
    """The same terms, some of them with other options."""
    return [replace(term, **options.get(term.name, {})) for term in TERMS]
