"""Probes and ledgers: is the cycle honest, is the latent alive, who pulls where."""

from cyclevae.diagnostics.ledger import GradientLedger as GradientLedger
from cyclevae.diagnostics.ledger import gradient_ledger as gradient_ledger
