"""The passes of one step, each run once and read by every term that needs it."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclevae._gate import check_patterns
from cyclevae._types import Count, Latents, Logits, Number
from cyclevae.base import latent_loss, t2l_loss, text_loss, unconditional_loss
from cyclevae.batch import Arranged, Texts, stack_masks
from cyclevae.bridges import pseudo_text
from cyclevae.cycles import bridge_pass, cycle_latent_loss, cycle_text_loss
from cyclevae.denoiser import Denoiser
from cyclevae.gradient_policy import detach
from cyclevae.options import Options
from cyclevae.passes import T2L, draw_noise, l2t, t2l
from cyclevae.priors import mmd_prior, moment_prior
from cyclevae.times import stratified_times


@dataclass
class Step:
    """One step of an objective; `terms` runs it."""

    objective: Options
    denoiser: Denoiser
    rows: Arranged
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
