"""For users' own tests: is a model a denoiser, who learns from a loss, do ranks agree."""

from cyclevae.diagnostics.ledger import gradient_ledger as gradient_ledger
from cyclevae.objective.batch import join_batches as join_batches
from cyclevae.testing.conformance import check_denoiser as check_denoiser
from cyclevae.testing.ranks import check_ranks as check_ranks
from cyclevae.testing.routing import assert_frozen as assert_frozen
from cyclevae.testing.routing import assert_learns as assert_learns
from cyclevae.testing.toy import ToyNetwork as ToyNetwork
from cyclevae.testing.toy import toy_batch as toy_batch
from cyclevae.testing.toy import toy_denoiser as toy_denoiser
