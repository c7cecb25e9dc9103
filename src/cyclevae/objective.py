"""One training step: which passes run, what they weigh, what is reported."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cyclevae import _checks
from cyclevae._gate import check_patterns
from cyclevae._types import Count, Latents, Logits, Number, Scalar
from cyclevae.base import latent_loss, t2l_loss, text_loss, unconditional_loss
from cyclevae.batch import Batch, Rows, Texts, arrange, stack_masks
from cyclevae.bridges import pseudo_text
from cyclevae.cycles import bridge_pass, cycle_latent_loss, cycle_text_loss
from cyclevae.denoiser import Denoiser
from cyclevae.gradient_policy import detach
from cyclevae.options import TERMS, Options
from cyclevae.passes import T2L, draw_noise, l2t, t2l
from cyclevae.priors import mmd_prior, moment_prior
from cyclevae.process import stratified_times


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
        run = _Step(self, denoiser, rows, weights, generator, self._checked_counts(counts))
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


@dataclass
class _Step:
    """The passes of one step, each run once and read by every term that needs it."""

    objective: CycleObjective
    denoiser: Denoiser
    rows: Rows
    weights: dict[str, Number]
    generator: torch.Generator | None
    counts: Mapping[str, Count]

    def terms(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms that run, by metric name, and statistics beside them."""
        self.losses: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}
        if self._runs("text", "latent"):
            self.rows.need_pairs()
        if self._runs("latent", "cycle_text", "prior", "unconditional"):
            self.rows.need_texts()
        if self._runs("text", "cycle_latent", "unconditional"):
            self.rows.need_latents()
        if self._runs("prior") and len(self.rows.need_texts().tokens) < 2:
            raise ValueError("the prior is a statistic of a batch: give at least 2 texts")
        for policy in (self.objective.text_policy, self.objective.latent_policy):
            check_patterns(self.denoiser, policy.freeze + policy.freeze_bridge)
        if self._runs("text", "cycle_latent"):
            self._decode()
        if self._runs("latent", "cycle_text", "prior"):
            self._encode()
        if self._runs("unconditional"):
            self._denoise_both()
        return self.losses, self.metrics

    def _runs(self, *terms: str) -> bool:
        return any(term in self.weights for term in terms)

    def _decode(self) -> None:
        """One decoder pass: the base text loss on paired rows, pseudo-texts for all."""
        o, p, latents = self.objective, self.rows.paired, self.rows.need_latents()
        if self._runs("cycle_latent"):
            mask = self.rows.lengths_to_decode(self.generator)
        else:
            latents, mask = latents[:p], self.rows.need_texts().mask[:p]
        with nullcontext() if self._runs("text") else detach():
            logits = l2t(self.denoiser, latents, mask, text_process=o.text_process)
        if self._runs("text"):
            self._base_text(logits[:p])
        if self._runs("cycle_latent"):
            y_hat = pseudo_text(
                logits,
                mask,
                text_process=o.text_process,
                bridge=o.bridge,
                temperature=o.temperature,
                generator=self.generator,
            )
            self.losses["cycle_latent_loss"] = cycle_latent_loss(
                self.denoiser,
                latents,
                mask,
                text_process=o.text_process,
                latent_process=o.latent_process,
                y_hat=y_hat,
                show_latent=o.show_latent,
                time=o.bridge_time,
                generator=self.generator,
                policy=o.latent_policy,
                count=self.counts.get("cycle_latent_loss"),
            )

    def _base_text(self, logits: Logits) -> None:
        tokens, mask = self.rows.need_texts().first(self.rows.paired)
        logits = logits[:, : tokens.shape[1]]  # pseudo-texts may be longer than any text
        count = self.counts.get("text_loss")
        self.losses["text_loss"] = text_loss(logits, tokens, mask, count=count)
        hits = (logits.argmax(dim=-1) == tokens) & mask
        self.metrics["text_accuracy"] = hits.sum() / mask.sum().clamp(min=1)

    def _encode(self) -> None:
        """The encoder pass from noise: the base latent loss on paired rows, a bridge for all."""
        o, p, texts = self.objective, self.rows.paired, self.rows.need_texts()
        shared = self._runs("latent") and o.shares_encoder_pass(self.weights)
        bridges = self._runs("cycle_text", "prior")
        if self._runs("latent") and not shared:
            self._base_latent()
        if not (shared or bridges):
            return
        texts = texts if bridges else texts.first(p)
        noise = self._noise(len(texts.tokens))
        # The prior trains the encoder whatever the cycle's policy freezes or detaches.
        frozen = self._runs("cycle_text") and bool(o.text_policy.freeze_bridge)
        learns = shared or (self._runs("prior") and not frozen)
        with nullcontext() if learns else bridge_pass(self.denoiser, o.text_policy):
            encoded = self._from_noise(texts, noise)
            z_hat = encoded.z_hat(o.latent_process) if bridges else None
        if shared:
            target = o.latent_process.target(
                self.rows.need_latents()[:p], noise[:p], encoded.time[:p]
            )
            self.losses["latent_loss"] = latent_loss(
                encoded.prediction[:p], target, count=self.counts.get("latent_loss")
            )
        if z_hat is None:
            return
        self.metrics |= _moments(z_hat.detach())
        if self.rows.latents is not None:
            self.metrics["latent_norm"] = _mean_norm(self.rows.latents)
        if self._runs("cycle_text"):
            self.losses["cycle_text_loss"] = cycle_text_loss(
                self.denoiser,
                *texts,
                text_process=o.text_process,
                latent_process=o.latent_process,
                z_hat=z_hat,
                policy=o.text_policy,
                count=self.counts.get("cycle_text_loss"),
            )
        if self._runs("prior"):
            if not learns:
                z_hat = self._from_noise(texts, noise).z_hat(o.latent_process)
            prior = mmd_prior if o.prior == "mmd" else moment_prior
            self.losses["prior_loss"] = prior(z_hat, mean=o.prior_mean, variance=o.prior_variance)

    def _from_noise(self, texts: Texts, noise: Latents) -> T2L:
        o = self.objective
        return t2l(
            self.denoiser,
            *texts,
            text_process=o.text_process,
            latent_process=o.latent_process,
            start="noise",
            time=o.bridge_time,
            noise=noise,
        )

    def _base_latent(self) -> None:
        """The base latent loss in a pass of its own, below full noise or unlike the bridge."""
        o, p = self.objective, self.rows.paired
        time: float | Tensor | None = o.base_latent_time
        latents = self.rows.need_latents()[:p]
        if time is None:
            uniform = stratified_times(p, device=latents.device, generator=self.generator)
            time = uniform * o.bridge_time
        tokens, mask = self.rows.need_texts().first(p)
        self.losses["latent_loss"] = t2l_loss(
            self.denoiser,
            tokens,
            latents,
            mask,
            text_process=o.text_process,
            latent_process=o.latent_process,
            time=time,
            generator=self.generator,
            count=self.counts.get("latent_loss"),
        )

    def _denoise_both(self) -> None:
        """One pass with both parts noised; a row without a partner trains the part it has."""
        o, rows = self.objective, self.rows
        texts, latents, p = rows.need_texts(), rows.need_latents(), rows.paired
        alone, extra = len(texts.tokens) - p, len(latents) - p
        blank = latents.new_zeros(alone, *latents.shape[1:])
        lengths = rows.lengths_to_decode(self.generator)[p:]
        mask = stack_masks(texts.mask, lengths)
        tokens = F.pad(texts.tokens, (0, mask.shape[1] - texts.tokens.shape[1], 0, extra))
        row = torch.arange(len(mask), device=mask.device)
        loss = unconditional_loss(
            self.denoiser,
            o.text_process.pad(tokens, mask),
            torch.cat([latents[:p], blank, latents[p:]]),
            mask,
            text_process=o.text_process,
            latent_process=o.latent_process,
            has_text=row < p + alone,
            has_latent=(row < p) | (row >= p + alone),
            generator=self.generator,
            text_count=self.counts.get("unconditional_text_loss"),
            latent_count=self.counts.get("unconditional_latent_loss"),
        )
        self.losses["unconditional_text_loss"] = loss.text
        self.losses["unconditional_latent_loss"] = loss.latent

    def _noise(self, rows: int) -> Latents:
        texts, latents = self.rows.need_texts(), self.rows.latents
        return draw_noise(
            rows,
            self.objective.latent_process,
            at=texts.tokens,
            like=latents,
            generator=self.generator,
        )


def _mean_norm(latents: Latents) -> Tensor:
    norms: Tensor = latents.flatten(1).float().norm(dim=1)
    return norms.sum() / max(len(norms), 1)


def _moments(z_hat: Latents) -> dict[str, Tensor]:
    """Is the latent alive: its norm, and mean and variance pooled over dimensions."""
    flat = z_hat.flatten(1).float()
    return {
        "latent_pred_norm": _mean_norm(z_hat),
        "latent_pred_mean": flat.mean(dim=0).square().mean().sqrt(),
        "latent_pred_variance": flat.var(dim=0, correction=0).mean(),
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
