"""The terms of an objective, one file each; who adds one names it here."""

from cyclevae.objective.term import Term
from cyclevae.objective.terms.contrastive import Contrastive as Contrastive
from cyclevae.objective.terms.cycle_latent import CycleLatent as CycleLatent
from cyclevae.objective.terms.cycle_text import CycleText as CycleText
from cyclevae.objective.terms.distill import Distill as Distill
from cyclevae.objective.terms.latent import Latent as Latent
from cyclevae.objective.terms.prior import Prior as Prior
from cyclevae.objective.terms.sleep import Sleep as Sleep
from cyclevae.objective.terms.text import Text as Text
from cyclevae.objective.terms.text_marginal import TextMarginal as TextMarginal
from cyclevae.objective.terms.unconditional import Unconditional as Unconditional

SHIPPED: tuple[type[Term], ...] = (
    Text,
    Latent,
    Unconditional,
    CycleText,
    CycleLatent,
    Prior,
    Sleep,
    Contrastive,
    TextMarginal,
    Distill,
)


def recommended() -> tuple[Term, ...]:
    """The terms of an objective of which nothing else is said."""
    return Text(), Latent(), CycleText()
