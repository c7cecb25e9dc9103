"""What a checkpoint of the host has learned, and which terms it can be trained on next."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cyclevae._base.table import table
from cyclevae.adapters.latentdlm.host import HostDenoiser, latent_process_of
from cyclevae.adapters.latentdlm.trainer import rows_of
from cyclevae.diagnostics._measuring import measuring, statistics
from cyclevae.diagnostics.health import latent_health
from cyclevae.diagnostics.probes import Probe, text_probe
from cyclevae.diagnostics.verdicts import STRETCH, SURE, ignored_latent
from cyclevae.losses.latent import latent_loss
from cyclevae.model.passes import t2l
from cyclevae.processes.noise import draw_noise
from cyclevae.processes.text import TextProcess

CAP = 0.9  # where z_hat of an epsilon model is read: at full noise it is rounding alone
TOLD = 0.1  # of the cosine that another row's text leaves open; below it z_hat tells no text
_WARM_STEPS = 5000
_OTHER = 1.5  # a variance by which a prior's default target of 1 would be wrong
COPIED = 0.5  # cosine of a prediction and its input above which it is called a copy

_PREDICTS = """\
latent_parameterization: {prediction}   # at the root, where the host reads it{retrained}
"""
_RETRAINED = """: give load_weights
                              # skip=["latent_head.*"], which is trained anew"""
_CYCLE = """\
loss:
  loss_type: cycle_vae
"""
_WARM_START = """\
  cycle_warmup_steps: 5000   # base L2T and base T2L alone; then check again
"""
_AT_STEP = """\
# The checkpoint stands at step {step}: load_weights begins at step 0. To go on by resume instead,
# let the warm-up count from there, or the cycles begin {when}:
#   cycle_start_step: {step}
"""
_VARIANCE = """\
  prior_options: {{variance: {variance:.3g}}}   # of the latents, if you use a prior
"""
_CAPPED = """\
  latent_t_mode: random      # base T2L is trained at all times
  cycle_latent_t_max: {time:g}
  cycle_bridge_steps: 4
"""


class Term(NamedTuple):
    """Whether a checkpoint supports a term, why, and what to do first."""

    name: str
    supported: bool
    why: str
    first: str = ""


@dataclass(frozen=True)
class Check:
    """What `check` measured; `str` of it is the report.

    Attributes:
        rows: pairs that were read.
        tokens: kept tokens per text, on average.
        prediction: the host's name of the parameterisation.
        gain: by which reading a latent at full noise multiplies the error of the prediction.
        time: at which `z_hat` is read, from pure noise.
        copied: cosine of the prediction at full noise and the noise it was shown.
        text: the probe of L2T, in nats per text.
        cosine: of `z_hat` and the true latents, from the right text.
        shuffled_cosine: from another row's text.
        cosine_gap_error: standard error of the difference of the two.
        error: squared error of `z_hat` as a share of the latents' variance, from the right text.
        shuffled_error: from another row's text.
        norm: mean length of `z_hat`.
        target_norm: root mean square length of the latents.
        variance: of a dimension of the latents, on average.
        step: of the checkpoint.
    """

    rows: int
    tokens: float
    prediction: str
    gain: float
    time: float
    copied: float
    text: Probe
    cosine: float
    shuffled_cosine: float
    cosine_gap_error: float
    error: float
    shuffled_error: float
    norm: float
    target_norm: float
    variance: float = 1.0
    step: int = 0

    @property
    def decodes(self) -> bool:
        """L2T reads the latent."""
        return bool(ignored_latent(self.text.gap, self.text.gap_error, self.text.shuffled).ok)

    @property
    def encodes(self) -> bool:
        """`z_hat` depends on its text, by more than an untrained head makes it."""
        gap = self.cosine - self.shuffled_cosine
        return gap > SURE * self.cosine_gap_error and gap > TOLD * (1 - self.shuffled_cosine)

    @property
    def copies(self) -> bool:
        """An epsilon prediction that has learned to return its input, which at full noise is right.

        Such a head says nothing of the text, and a base loss near 0 hides it.
        """
        return self.prediction == "epsilon" and self.copied > COPIED

    @property
    def terms(self) -> tuple[Term, ...]:
        """Each term of `cycle_vae`: a base term is supported where it has been learned."""
        gap = f"{self.text.gap:.2g} +- {self.text.gap_error:.1g} nats"
        cosine = f"{self.cosine:.2g}, {self.shuffled_cosine:.2g} from another text"
        warm = "x0, warm start" if self.prediction == "epsilon" else "warm start"
        if self.decodes:
            l2t = Term("base L2T", True, f"another row's latent costs {gap} per text")
        else:
            l2t = Term("base L2T", False, f"the latent is not read: {gap} per text", "warm start")
        if self.encodes:
            base = Term("base T2L", True, f"z_hat has cosine {cosine}")
        elif self.copies:
            why = f"the prediction is a copy of the noise, cosine {self.copied:.2g}"
            base = Term("base T2L", False, why, warm)
        else:
            base = Term("base T2L", False, f"z_hat tells no text: cosine {cosine}", warm)

        capped = f"cap {self.time:g}, bridge steps" if self.prediction == "epsilon" else ""
        ready = ", ".join(filter(None, [capped, "cycle_bridge_norm" if self._stretched else ""]))

        def after(name: str, *needed: Term) -> Term:
            lacking = [term for term in needed if not term.supported]
            if not lacking:
                return Term(name, True, "what it needs has been learned", ready)
            why = " and ".join(term.name for term in lacking) + " must be learned before"
            return Term(name, False, why, max((term.first for term in lacking), key=len))

        return (
            l2t,
            base,
            after("cycle_text", base, l2t),
            after("cycle_latent", base, l2t),
            after("prior", base),
        )

    @property
    def config(self) -> str:
        """The lines of the config that the terms call for, as YAML."""
        warm = "" if self.decodes and self.encodes else _WARM_START
        norm = ""
        if self.encodes and self._stretched:
            norm = f"  cycle_bridge_norm: {self.target_norm:.3g}   # the length of the latents\n"
        if not 1 / _OTHER <= self.variance <= _OTHER:
            norm += _VARIANCE.format(variance=self.variance)
        own = _PREDICTS.format(prediction=self.prediction, retrained=", as this checkpoint does")
        if self.prediction != "epsilon":
            return own + _CYCLE + warm + norm + self._at_step(warm)
        capped = _CYCLE + warm + _CAPPED.format(time=self.time) + norm
        if self.encodes:
            return own + capped + self._at_step(warm)
        other = "".join(f"# {line}\n" for line in (own + capped).splitlines())
        anew = _PREDICTS.format(prediction="x0", retrained=_RETRAINED)
        keeps = "# or, which keeps epsilon:\n"
        return anew + _CYCLE + warm + norm + self._at_step(warm) + keeps + other

    def _at_step(self, warm: str) -> str:
        """What becomes of a warm-up at the step of the checkpoint."""
        if not (warm and self.step):
            return ""
        left = _WARM_STEPS - self.step
        when = "at once" if left <= 0 else f"after {left} steps"
        return _AT_STEP.format(step=self.step, when=when)

    @property
    def _stretched(self) -> bool:
        return not 1 / STRETCH <= self.norm / self.target_norm <= STRETCH

    def __str__(self) -> str:
        gap, error = self.text.gap / self.tokens, self.text.gap_error / self.tokens
        right, shuffled = self.text.right / self.tokens, self.text.shuffled / self.tokens
        told = self.cosine - self.shuffled_cosine
        rows = [
            ["", "right", "shuffled", "gap"],
            ["L2T, nats per token", _g(right), _g(shuffled), f"{_g(gap)} +- {error:.1g}"],
            [
                "T2L, cosine of z_hat and latents",
                _g(self.cosine),
                _g(self.shuffled_cosine),
                f"{_g(told)} +- {self.cosine_gap_error:.1g}",
            ],
            [
                "T2L, error as share of variance",
                _g(self.error),
                _g(self.shuffled_error),
                _g(self.shuffled_error - self.error),
            ],
        ]
        verdicts = [("term", "supported", "why", "what to do first")]
        verdicts += [(t.name, "yes" if t.supported else "no", t.why, t.first) for t in self.terms]
        blocks = [
            (f"step {self.step}; " if self.step else "")
            + f"{self.rows} pairs; the model predicts {self.prediction}; reading a latent at full "
            f"noise multiplies its error by {_g(self.gain)}",
            table(rows),
            f"z_hat is read at time {self.time:g} from noise; its length is {_g(self.norm)}, that "
            f"of the latents {_g(self.target_norm)}",
            f"at full noise, prediction and input have cosine {_g(self.copied)}: a copy explains "
            f"{self.copied**2:.0%} of the prediction",
            table(verdicts, left=True, between=" | "),
            "config:\n" + self.config.rstrip("\n"),
        ]
        return "\n\n".join(blocks)


def check(
    model: nn.Module,
    diffusion: Any,
    text_process: TextProcess,
    batch: Mapping[str, Tensor],
    *,
    cap: float = CAP,
    seed: int = 0,
    step: int = 0,
) -> Check:
    """Does each direction of the host's model depend on its condition; seven passes, no graph.

    Args:
        model: the host's, or one called as it is.
        diffusion: the host's noise tables, with their `parameterization`.
        text_process: its ids.
        batch: as the host's collate makes it; rows that lack a part are left out.
        cap: the time at which `z_hat` of an epsilon model is read; others are read at full noise.
        seed: of the noise.
        step: of the checkpoint, to be told in the report.

    Raises:
        ValueError: fewer than 2 pairs, latents that are all equal, wrong shapes or values.
    """
    kept: Any = rows_of(batch)  # with every part, marked where it is broken
    pairs = (kept.has_text & kept.has_latent).nonzero()[:, 0]
    if len(pairs) < 2:
        raise ValueError(f"the batch must hold at least 2 pairs to compare, got {len(pairs)}")
    tokens, mask, latents = (x[pairs] for x in (kept.tokens, kept.attention_mask, kept.latents))
    host = SimpleNamespace(model=model, latent_diffusion=diffusion)
    process = latent_process_of(host, sys.float_info.max)  # nothing is refused: it is measured
    denoiser = HostDenoiser(model)
    generator = torch.Generator(latents.device).manual_seed(seed)
    noise = draw_noise(len(latents), process, at=latents, like=latents, generator=generator)
    processes: dict[str, Any] = {"text_process": text_process, "latent_process": process}
    time = cap if process.prediction == "epsilon" else 1.0

    def encode(shift: int, time: float) -> Any:
        return t2l(
            denoiser,
            tokens.roll(shift, 0),
            mask.roll(shift, 0),
            start="noise",
            time=time,
            noise=noise,
            **processes,
        )

    with measuring(denoiser):
        full = encode(0, 1.0)
        right, shuffled = (encode(shift, time).z_hat(process).float() for shift in (0, 1))
    variance = statistics(latents)[1].sum()

    def error(z_hat: Tensor) -> float:
        square = latent_loss(z_hat, latents, reduction="none").cpu().double()
        return (square.sum(dim=1).mean() / variance).item()

    cosines = [cosine_similarity(z, latents, dim=1).double() for z in (right, shuffled)]
    health = latent_health(right)
    return Check(
        rows=len(pairs),
        tokens=mask.sum().item() / len(pairs),
        prediction=diffusion.parameterization,
        gain=process.gain(torch.ones(1, device=latents.device)).item(),
        time=time,
        copied=cosine_similarity(full.prediction.float(), noise, dim=1).mean().item(),
        text=text_probe(denoiser, tokens, latents, mask, noise=noise, **processes),
        cosine=cosines[0].mean().item(),
        shuffled_cosine=cosines[1].mean().item(),
        cosine_gap_error=(cosines[0] - cosines[1]).std().item() / math.sqrt(len(pairs)),
        error=error(right),
        shuffled_error=error(shuffled),
        norm=health.norm,
        target_norm=latents.double().square().sum(dim=1).mean().sqrt().item(),
        variance=variance.item() / latents.shape[1],
        step=step,
    )


def _g(value: float) -> str:
    return f"{value:.3g}"
