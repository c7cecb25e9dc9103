"""Cycle losses, priors and gradient policies for bidirectional text/latent denoisers."""

from cyclevae._base.checks import check_values
from cyclevae.bridges.latent import LatentBridge, encode_text
from cyclevae.bridges.rloo import rloo_surrogate, text_log_prob
from cyclevae.bridges.text import TextBridge, draw_lengths, pseudo_text
from cyclevae.bridges.unmasking import unmask_text
from cyclevae.bridges.words import (
    argmax_text,
    categorical_text,
    gumbel_text,
    soft_text,
    straight_through_text,
)
from cyclevae.gradient_policy.contexts import detach, freeze, gate_params
from cyclevae.gradient_policy.policy import GradientPolicy
from cyclevae.gradient_policy.presets import PolicySchedule
from cyclevae.gradient_policy.roles import Roles
from cyclevae.losses.channel import channel_latents
from cyclevae.losses.contrastive import infonce_loss, same_text
from cyclevae.losses.critic import ScoredText
from cyclevae.losses.cycle_latent import cycle_latent_loss
from cyclevae.losses.cycle_text import cycle_text_loss
from cyclevae.losses.latent import latent_loss, min_snr_weight, t2l_loss
from cyclevae.losses.text import l2t_loss, text_loss
from cyclevae.losses.text_marginal import text_marginal_loss
from cyclevae.losses.unconditional import UnconditionalLoss, unconditional_loss
from cyclevae.model.both import joint
from cyclevae.model.denoiser import (
    Denoised,
    Denoiser,
    EncoderDecoder,
    as_denoiser,
    embed_tokens,
)
from cyclevae.model.evaluation import evaluated
from cyclevae.model.guidance import guided, without_condition
from cyclevae.model.maker import Maker
from cyclevae.model.passes import l2t, l2t_and_t2l, t2l
from cyclevae.model.teacher import Teacher
from cyclevae.model.unread import TextHead, UnreadLogits, unread_logits
from cyclevae.objective.batch import Batch, collate
from cyclevae.objective.in_turn import Phases
from cyclevae.objective.module import StepModule
from cyclevae.objective.objective import CycleObjective
from cyclevae.objective.output import StepOutput
from cyclevae.objective.requests import Decode, Encode, Own
from cyclevae.objective.rows import Share
from cyclevae.objective.step import Step
from cyclevae.objective.term import Term
from cyclevae.objective.terms import (
    Contrastive,
    CycleLatent,
    CycleText,
    Distill,
    Latent,
    Prior,
    Sleep,
    Text,
    TextMarginal,
    Unconditional,
)
from cyclevae.priors import (
    ddvi_sleep_loss,
    ddvi_wake_kl,
    learned_prior,
    mmd_prior,
    moment_prior,
    sigreg_prior,
)
from cyclevae.processes.conversions import convert
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.latent_schedules import EDM, Flow
from cyclevae.processes.mixed_text import HybridTextProcess, UniformTextProcess
from cyclevae.processes.schedules import anneal, ramp, take_turns
from cyclevae.processes.shares import Shares
from cyclevae.processes.text import Noised, TextProcess
from cyclevae.processes.times import LogitNormal, TimePolicy
from cyclevae.recipes import phases
from cyclevae.scale.accumulate import two_pass
from cyclevae.scale.checkpointing import checkpoint_passes
from cyclevae.scale.non_finite import skip_update
from cyclevae.scale.pool import pool_counts, pool_rows
from cyclevae.use.best import best_text
from cyclevae.use.doors import decode, encode
from cyclevae.use.files import Trained, load, save

__version__ = "0.2.0.dev0"

__all__ = [  # noqa: RUF022 - in the order of `dir`
    "Batch",
    "Contrastive",
    "CycleLatent",
    "CycleObjective",
    "CycleText",
    "Decode",
    "Denoised",
    "Denoiser",
    "Distill",
    "EDM",
    "Encode",
    "EncoderDecoder",
    "Flow",
    "GradientPolicy",
    "HybridTextProcess",
    "Latent",
    "LatentBridge",
    "LatentProcess",
    "LogitNormal",
    "Maker",
    "Noised",
    "Own",
    "Phases",
    "PolicySchedule",
    "Prior",
    "Roles",
    "ScoredText",
    "Share",
    "Shares",
    "Sleep",
    "Step",
    "StepModule",
    "StepOutput",
    "Teacher",
    "Term",
    "Text",
    "TextBridge",
    "TextHead",
    "TextMarginal",
    "TextProcess",
    "TimePolicy",
    "Trained",
    "Unconditional",
    "UnconditionalLoss",
    "UniformTextProcess",
    "UnreadLogits",
    "anneal",
    "argmax_text",
    "as_denoiser",
    "best_text",
    "categorical_text",
    "channel_latents",
    "check_values",
    "checkpoint_passes",
    "collate",
    "convert",
    "cycle_latent_loss",
    "cycle_text_loss",
    "ddvi_sleep_loss",
    "ddvi_wake_kl",
    "decode",
    "detach",
    "draw_lengths",
    "embed_tokens",
    "encode",
    "encode_text",
    "evaluated",
    "freeze",
    "gate_params",
    "guided",
    "gumbel_text",
    "infonce_loss",
    "joint",
    "l2t",
    "l2t_and_t2l",
    "l2t_loss",
    "latent_loss",
    "learned_prior",
    "load",
    "min_snr_weight",
    "mmd_prior",
    "moment_prior",
    "phases",
    "pool_counts",
    "pool_rows",
    "pseudo_text",
    "ramp",
    "rloo_surrogate",
    "same_text",
    "save",
    "sigreg_prior",
    "skip_update",
    "soft_text",
    "straight_through_text",
    "t2l",
    "t2l_loss",
    "take_turns",
    "text_log_prob",
    "text_loss",
    "text_marginal_loss",
    "two_pass",
    "unconditional_loss",
    "unmask_text",
    "unread_logits",
    "without_condition",
]


def __dir__() -> list[str]:
    return __all__
