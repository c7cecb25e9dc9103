"""One training step: which passes run, what they weigh, what is reported."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cyclevae import _checks
from cyclevae._step import Step
from cyclevae._types import Count, Scalar
from cyclevae.batch import Batch, arrange
from cyclevae.denoiser import Denoiser
from cyclevae.options import TERMS, Options


class StepOutput(NamedTuple):
    """The result of one step.

    Attributes:
        loss: the weighted sum, with its graph.
        metrics: detached 0-d tensors: each term that ran, unweighted, its weight where it may move,
            and statistics of the latents. A term that did not run is absent.

    Examples:
        >>> output = StepOutput(torch.tensor(1.0), {"text_loss": torch.tensor(1.0)})
        >>> output.metrics["text_loss"]
        tensor(1.)
    """

    loss: Scalar
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class CycleObjective(Options):
    """The whole objective of one step; with the two processes alone it is the recommended recipe.

    `loss = sum of weight * term` over: `text` (L2T on pairs), `latent` (T2L on pairs),
    `unconditional` (both parts noised; unpaired rows train the part they have), `cycle_text`
    (T2L2T) and `cycle_latent` (L2T2L) on paired and unpaired rows, and `prior` on the encoder's
    latents. A weight is a number or a function of the step (see `ramp`); a term whose weight is 0
    costs no forward pass. Base terms and cycles together are four passes, and the unconditional
    term is a fifth. Latent terms are means over dimensions, of a size near 1, and weigh 5 beside
    cross-entropies of a token; a cycle weighs twice its base loss.

    Attributes:
        text_process: the text process.
        latent_process: the latent process.
        text_weight: of the base decoder loss.
        latent_weight: of the base encoder loss.
        unconditional_weight: of the unconditional mode.
        cycle_text_weight: of the text cycle.
        cycle_latent_weight: of the latent cycle.
        prior_weight: of the prior.
        prior: `moment` or `mmd`.
        prior_mean: of the prior's Gaussian, a number or in the shape of a latent.
        prior_variance: likewise.
        bridge_time: at which the encoder of both cycles starts from noise.
        base_latent_time: of the base encoder loss; 1.0 shares the bridge's pass, None draws
            uniform times up to `bridge_time`.
        bridge: the text bridge of the latent cycle, `argmax` or `categorical`.
        temperature: of the categorical bridge.
        show_latent: let the encoder of the latent cycle see the noised true latent.
        text_policy: who learns from the text cycle.
        latent_policy: who learns from the latent cycle.

    Raises:
        ValueError: an unknown option, a negative, NaN or infinite weight, or an epsilon process
            whose bridge would be ill-conditioned.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> objective = CycleObjective(text_process, latent_process)
        >>> output = objective(denoiser, toy_batch(seed=0), step=0)
        >>> output.loss.backward()
        >>> sorted(output.metrics)[:3]
        ['cycle_latent_loss', 'cycle_latent_weight', 'cycle_text_loss']
    """

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The denominator of each per-sample mean on this batch, by metric name.

        For gradients that depend neither on the number of ranks nor on the accumulation steps, sum
        these over both, divide by the number of ranks (DDP averages gradients), and give them to
        the objective.

        Examples:
            >>> from cyclevae.testing import toy_batch, toy_denoiser
            >>> _, text_process, latent_process = toy_denoiser(seed=0)
            >>> objective = CycleObjective(text_process, latent_process)
            >>> objective.counts(toy_batch(seed=0))["latent_loss"]  # 3 pairs of 4 dimensions
            tensor(12.)
        """
        rows = arrange(batch, self.text_process, self.latent_process)
        like = next((part for part in batch if part is not None), torch.zeros(0))
        zero = torch.zeros((), device=like.device)
        p, texts, latents = rows.paired, rows.texts, rows.latents
        tokens = zero if texts is None else texts.mask.sum()
        paired_tokens = zero if texts is None else texts.mask[:p].sum()
        elements = zero if latents is None else zero + latents.numel()
        paired_elements = zero if latents is None else zero + latents[:p].numel()
        counts = {
            "text_loss": paired_tokens,
            "latent_loss": paired_elements,
            "unconditional_text_loss": tokens,
            "unconditional_latent_loss": elements,
            "cycle_text_loss": tokens,
            "cycle_latent_loss": elements,
        }
        # Tensors of their own, so that each may be summed over ranks in place.
        return {name: count.clone() for name, count in counts.items()}

    def __call__(
        self,
        denoiser: Denoiser,
        batch: Batch,
        *,
        step: int,
        generator: torch.Generator | None = None,
        counts: Mapping[str, Count] | None = None,
    ) -> StepOutput:
        """Run the passes of a step and weigh their terms.

        Args:
            denoiser: the model.
            batch: pairs and unpaired rows.
            step: the training step, from which weights are computed.
            generator: random state of all draws, on the batch's device.
            counts: global denominators by metric name: see `counts`.

        Raises:
            ValueError: wrong shapes or values, an unknown count, or a direction without rows.
        """
        weights = self.weights(step)
        if not weights:
            raise ValueError(f"every weight is 0 at step {step}: there is nothing to train on")
        rows = arrange(batch, self.text_process, self.latent_process)
        run = Step(self, denoiser, rows, weights, generator, self._checked_counts(counts))
        losses, metrics = run.terms()
        loss = torch.stack(
            [
                losses[name] * torch.full((), weights[term], device=losses[name].device)
                for term in weights
                for name in _LOSSES[term]
            ]
        ).sum()
        metrics = {name: value.detach() for name, value in {**losses, **metrics}.items()}
        for term in weights:
            if callable(getattr(self, f"{term}_weight")) or term.startswith("cycle"):
                metrics[f"{term}_weight"] = torch.full((), weights[term], device=loss.device)
        return StepOutput(loss, {"loss": loss.detach(), **metrics})

    def _checked_counts(self, counts: Mapping[str, Count] | None) -> Mapping[str, Count]:
        known = [name for term in TERMS if term != "prior" for name in _LOSSES[term]]
        for name in counts or {}:
            if name not in known:
                raise ValueError(f"unknown count {name!r}; {_checks.nearest(name, known)}")
        return counts or {}


_LOSSES = {
    "text": ("text_loss",),
    "latent": ("latent_loss",),
    "unconditional": ("unconditional_text_loss", "unconditional_latent_loss"),
    "cycle_text": ("cycle_text_loss",),
    "cycle_latent": ("cycle_latent_loss",),
    "prior": ("prior_loss",),
}


class StepModule(nn.Module):
    """Objective and network as one module: what one wraps in DDP or compiles.

    `forward(batch, step)` runs every pass of a step inside one forward, so that DDP sees a single
    forward and backward however many passes the plan has.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> module = StepModule(denoiser, CycleObjective(text_process, latent_process))
        >>> module(toy_batch(seed=0), step=0).loss.ndim
        0
    """

    def __init__(self, denoiser: Denoiser, objective: CycleObjective) -> None:
        super().__init__()
        network = getattr(denoiser, "network", None)
        if not isinstance(network, nn.Module):
            raise TypeError(
                "StepModule needs a denoiser whose `network` is its torch.nn.Module, so that its "
                f"parameters are registered; got {type(denoiser).__name__}: make it by as_denoiser"
            )
        self.network = network
        self.denoiser = denoiser
        self.objective = objective

    def forward(
        self,
        batch: Batch,
        step: int,
        generator: torch.Generator | None = None,
        counts: Mapping[str, Count] | None = None,
    ) -> StepOutput:
        """One step of the objective."""
        return self.objective(self.denoiser, batch, step=step, generator=generator, counts=counts)
