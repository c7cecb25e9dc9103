"""Probes and ledgers: is the cycle honest, is the latent alive, who pulls where."""

from cyclevae.diagnostics.chance import Chance as Chance
from cyclevae.diagnostics.cheat import CheatTest as CheatTest
from cyclevae.diagnostics.cheat import Treatment as Treatment
from cyclevae.diagnostics.cheat import cheat_test as cheat_test
from cyclevae.diagnostics.cost import PassCost as PassCost
from cyclevae.diagnostics.cost import StepCost as StepCost
from cyclevae.diagnostics.cost import TermCost as TermCost
from cyclevae.diagnostics.costing import step_cost as step_cost
from cyclevae.diagnostics.health import LatentHealth as LatentHealth
from cyclevae.diagnostics.health import Retrieval as Retrieval
from cyclevae.diagnostics.health import latent_health as latent_health
from cyclevae.diagnostics.health import retrieval as retrieval
from cyclevae.diagnostics.ledger import GradientLedger as GradientLedger
from cyclevae.diagnostics.ledger import gradient_ledger as gradient_ledger
from cyclevae.diagnostics.measure import cycle_report as cycle_report
from cyclevae.diagnostics.probes import Probe as Probe
from cyclevae.diagnostics.probes import latent_probe as latent_probe
from cyclevae.diagnostics.probes import text_probe as text_probe
from cyclevae.diagnostics.report import CycleReport as CycleReport
from cyclevae.diagnostics.verdicts import Verdict as Verdict
from cyclevae.diagnostics.weights import plot_weights as plot_weights
