"""Priors: keep the aggregate of encoded latents where the decoder expects it.

Moments, MMD and SIGReg are statistics of a batch. They return one scalar and take no reduction, and
they are not linear in the batch: averages over accumulation steps or ranks are not the value of the
whole batch. The unbiased forms are unbiased on any split, under the conditions that each states,
and may be negative; the biased forms never are, but for rounding, and reward contraction in small
batches. Equal rows get equal gradients: none of them parts latents that have collapsed exactly. The
learned prior and the DDVI terms read the model's own distribution of latents, and are means over
rows.
"""

from collections.abc import Callable

from cyclevae._base.types import Scalar
from cyclevae.priors.ddvi import ddvi_sleep_loss as ddvi_sleep_loss
from cyclevae.priors.ddvi import ddvi_wake_kl as ddvi_wake_kl
from cyclevae.priors.learned import learned_prior as learned_prior
from cyclevae.priors.mmd import mmd_prior as mmd_prior
from cyclevae.priors.moment import moment_prior as moment_prior
from cyclevae.priors.sliced import sigreg_prior as sigreg_prior

PRIORS: dict[str, Callable[..., Scalar]] = {  # by the names that an objective knows
    "moment": moment_prior,
    "mmd": mmd_prior,
    "sigreg": sigreg_prior,
    "learned": learned_prior,
    "ddvi": ddvi_wake_kl,
}
