"""The adapter for `latentDLM_mmdit` of LGDLM: `trainer = with_cycle(trainer)`.

Reference: https://github.com/Joshua-Zhang-Jiaquan/LGDLM.
"""

from cyclevae.adapters.latentdlm.checkpoints import load_weights as load_weights
from cyclevae.adapters.latentdlm.checkpoints import resume as resume
from cyclevae.adapters.latentdlm.data import Marked as Marked
from cyclevae.adapters.latentdlm.data import collate_marks as collate_marks
from cyclevae.adapters.latentdlm.trainer import CycleTrainer as CycleTrainer
from cyclevae.adapters.latentdlm.trainer import with_cycle as with_cycle
