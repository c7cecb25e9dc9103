"""Cycle losses, priors and gradient policies for bidirectional text/latent denoisers."""

from cyclevae._checks import check_values as check_values
from cyclevae.base import UnconditionalLoss as UnconditionalLoss
from cyclevae.base import l2t_loss as l2t_loss
from cyclevae.base import latent_loss as latent_loss
from cyclevae.base import t2l_loss as t2l_loss
from cyclevae.base import text_loss as text_loss
from cyclevae.base import unconditional_loss as unconditional_loss
from cyclevae.batch import Batch as Batch
from cyclevae.bridges import argmax_text as argmax_text
from cyclevae.bridges import categorical_text as categorical_text
from cyclevae.bridges import draw_lengths as draw_lengths
from cyclevae.bridges import pseudo_text as pseudo_text
from cyclevae.cycles import cycle_latent_loss as cycle_latent_loss
from cyclevae.cycles import cycle_text_loss as cycle_text_loss
from cyclevae.denoiser import Denoised as Denoised
from cyclevae.denoiser import Denoiser as Denoiser
from cyclevae.denoiser import EncoderDecoder as EncoderDecoder
from cyclevae.denoiser import as_denoiser as as_denoiser
from cyclevae.gradient_policy import GradientPolicy as GradientPolicy
from cyclevae.gradient_policy import detach as detach
from cyclevae.gradient_policy import freeze as freeze
from cyclevae.latent_process import LatentProcess as LatentProcess
from cyclevae.latent_process import convert as convert
from cyclevae.objective import CycleObjective as CycleObjective
from cyclevae.objective import StepModule as StepModule
from cyclevae.objective import StepOutput as StepOutput
from cyclevae.passes import joint as joint
from cyclevae.passes import l2t as l2t
from cyclevae.passes import t2l as t2l
from cyclevae.priors import mmd_prior as mmd_prior
from cyclevae.priors import moment_prior as moment_prior
from cyclevae.schedules import ramp as ramp
from cyclevae.text_process import TextProcess as TextProcess

__version__ = "0.1.0"
