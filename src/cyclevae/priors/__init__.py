"""Priors: keep the aggregate of encoded latents where the decoder expects it.

These are statistics of a batch. They return one scalar and take no reduction, and they are not
linear in the batch: averages over accumulation steps or ranks are not the value of the whole batch.
The unbiased forms are unbiased on any split and may be negative; the biased forms never are, and
reward contraction in small batches.
"""

from cyclevae.priors.mmd import mmd_prior as mmd_prior
from cyclevae.priors.moment import moment_prior as moment_prior
