"""The passes of one step, each run once and read by every term that needs it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cyclevae._gate import check_patterns
from cyclevae._plan import LATENT_HALF, Planned
from cyclevae._prior import needs_two_rows, prior_loss
from cyclevae._reduce import reduce_latents, reduce_text
from cyclevae._statistics import mean_norm, moments
from cyclevae._types import Count, Latents, Logits, Mask, Number, Rows, Time, Tokens
from cyclevae.base import decode_masked, encoded_loss, t2l_loss, text_loss
from cyclevae.batch import Arranged, Texts, pick_rows
from cyclevae.bridges import pseudo_text
from cyclevae.contrastive import infonce_loss, same_text
from cyclevae.cycles import cycle_latent_loss, cycle_text_loss
from cyclevae.denoiser import Denoiser, refuse_unused
from cyclevae.gradient_policy import STOP_GRADIENT, GradientPolicy, detach, refuse_reentrant
from cyclevae.latent_bridges import encode_text
from cyclevae.non_finite import Verdict
from cyclevae.options import READ_A_BRIDGE, highest
from cyclevae.passes import T2L, draw_noise, l2t, l2t_and_t2l, t2l
from cyclevae.policies import constant
from cyclevae.priors import ddvi_sleep_loss
from cyclevae.text_marginal import text_marginal_loss
from cyclevae.times import TimePolicy, stratified_times
from cyclevae.unconditional import unconditional_loss


class Decoded(NamedTuple):
    """A decoder pass: what it read, and what it wrote."""

    latents: Latents
    mask: Mask
    logits: Logits


class Step(NamedTuple):
    """One step of an objective; `all` runs it.

    A named tuple: dynamo compiles anew for a number that a plain object is given as attribute.

    Attributes:
        losses: the terms that have run, by metric name.
        metrics: statistics beside them.
        verdicts: by term; empty where a term that is not finite keeps its gradient.
    """

    objective: Planned
    denoiser: Denoiser
    teacher: Denoiser | None
    rows: Arranged
    weights: dict[str, Number]
    step: int
    generator: torch.Generator | None
    counts: Mapping[str, Count]
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    verdicts: Mapping[str, Verdict]

    def all(self) -> None:
        """Run the passes, and with them the terms and the statistics."""
        self._check()
        # other ranks run the passes of the cycles, so this one does, and counts no row of them
        rows = self.rows.marked() if self._lacks_rows_to_cycle() else self.rows
        run = self._replace(rows=rows.borrowed())
        decoded, encoded = run._both() if run.objective.joins(run.weights) else (None, None)
        if self._runs("text", *LATENT_HALF):
            run._decode(decoded)
        if self._runs("latent", "cycle_text", "prior", "contrastive"):
            run._encode(encoded)
        if self._runs("unconditional"):
            run._denoise_both()

    def _read(self, term: str, output: Tensor) -> Tensor:
        """What a term reads of a pass that others read too, who must not suffer from it."""
        return self.verdicts[term].gate(output) if self.verdicts else output

    def _runs(self, *terms: str) -> bool:
        return any(term in self.weights for term in terms)

    def _lacks_rows_to_cycle(self) -> str | None:
        """Whether the cycles leave out all that the batch holds, and of what."""
        if self.objective.cycle_pairs:
            return None
        return self.rows.lacks_unpaired(
            texts=self._runs("cycle_text"), latents=self._runs(*LATENT_HALF)
        )

    def _check(self) -> None:
        """Refuse a step that could not run to its end, before any pass."""
        o, rows = self.objective, self.rows
        if self._runs("text", "latent", "contrastive"):
            rows.need_pairs()
        if self._runs("latent", "cycle_text", "prior", "contrastive", "unconditional"):
            rows.need_texts()
        if self._runs("text", "unconditional", *LATENT_HALF):
            rows.need_latents()
        if (lacking := self._lacks_rows_to_cycle()) and not self.counts:
            raise ValueError(
                f"with cycle_pairs=False cycles run on {lacking} without a partner, and the batch "
                "holds none: give some, or set cycle_pairs=True to run them on pairs too; a part "
                "of a step may lack them where `counts` are given"
            )
        few = rows.texts is None or len(rows.texts.tokens) < 2
        if self._runs("prior") and few and needs_two_rows(o.prior, o.pool_prior):
            raise ValueError("the prior is a statistic of a batch: give at least 2 texts")
        if self._runs("contrastive") and rows.paired < 2:
            raise ValueError("InfoNCE compares pairs: give at least 2, or set its weight to 0")
        for policy in (constant(o.text_policy), constant(o.latent_policy)):
            check_patterns(self.denoiser, policy.freeze + policy.freeze_bridge)
        # the unconditional pass is the last one, and asks for both heads
        if not self._runs("unconditional") and o.passes(self.step) > 1:
            refuse_unused(self.denoiser)
        if self._runs(*READ_A_BRIDGE):
            o.latent_process.refuse_ill_conditioned(highest(o.bridge_time, self.step))

    def _both(self) -> tuple[Decoded, T2L]:
        """What `_decode` and `_encode` share with the base terms, in one pass."""
        latents, mask = self._rows_to_decode(pairs=self.rows.paired)
        texts = self._texts_to_encode()
        logits, encoded = l2t_and_t2l(
            self.denoiser,
            latents,
            mask,
            *texts,
            **self._processes(),
            noise=self._noise(texts.tokens),
        )
        return Decoded(latents, mask, logits), encoded

    def _rows_to_decode(self, pairs: int) -> tuple[Latents, Mask]:
        """That many pairs, and what the cycles read beside them."""
        p, latents = self.rows.paired, self.rows.need_latents()
        if not self._runs(*LATENT_HALF):
            return latents[:pairs], self.rows.need_texts().mask[:pairs]
        mask, others = self.rows.lengths_to_decode(self.generator), self._cycled(latents)[1]
        return pick_rows(latents, p, pairs, others), pick_rows(mask, p, pairs, others)

    def _cycled(self, rows: Tensor) -> tuple[int, int]:
        marked = self.rows.has_both is not None
        return self.objective.cycled(self.rows.paired, len(rows), marked=marked)

    def _decode(self, decoded: Decoded | None) -> None:
        """One decoder pass: the base text loss on paired rows, pseudo-texts for the cycles."""
        o, p = self.objective, self.rows.paired
        writes = self._runs(*LATENT_HALF)
        shared = self._runs("text") and writes and not o.decodes_apart(self.weights)
        if self._runs("text") and not shared and decoded is None:
            self._base_text(*self._decode_pairs())
        if not writes and decoded is None:
            return
        pairs, others = self._cycled(self.rows.need_latents())
        if decoded is None:
            latents, mask = self._rows_to_decode(pairs=p if shared else pairs)
            with nullcontext() if shared else self._writing():
                logits = l2t(self.denoiser, latents, mask, text_process=o.text_process)
            decoded = Decoded(latents, mask, logits)
        if shared or not writes:
            targets = o.text_process.targets(*self.rows.need_texts().first(p))
            # pseudo-texts may be longer than any text
            self._base_text(decoded.logits[:p, : targets[0].shape[1]], *targets)
            decoded = Decoded(*(pick_rows(part, p, pairs, others) for part in decoded))
        if writes:
            there = self.rows.to_cycle(o.cycle_pairs).has_latent
            if there is not None:
                there = pick_rows(there, p, pairs, others)
            self._read_pseudo_texts(*decoded, there)

    def _decode_pairs(self) -> tuple[Logits, Tokens, Mask]:
        """A decoder pass for the base text loss alone."""
        o, p = self.objective, self.rows.paired
        tokens, mask = self.rows.need_texts().first(p)
        return decode_masked(
            self.denoiser,
            tokens,
            self.rows.need_latents()[:p],
            mask,
            text_process=o.text_process,
            time=o.base_text_time,
            step=self.step,
            generator=self.generator,
        )

    def _writing(self) -> AbstractContextManager[object]:
        """Who learns from the pass that writes the pseudo-texts."""
        if not self._runs("cycle_latent", "text_marginal"):
            return detach()
        return constant(self.objective.latent_policy).bridge_pass(self.denoiser)

    def _base_text(self, logits: Logits, targets: Tokens, taught: Mask) -> None:
        logits = self._read("text", logits)
        if self.rows.has_both is not None:
            taught = taught & self.rows.has_both[:, None]
        count = self.counts.get("text_loss")
        self.losses["text_loss"] = text_loss(logits, targets, taught, count=count)
        best = logits.detach().max(dim=-1).indices  # several times faster than argmax on a CPU
        hits = (best == targets) & taught
        self.metrics["text_accuracy"] = hits.sum() / taught.sum().clamp(min=1)

    def _read_pseudo_texts(
        self, latents: Latents, mask: Mask, logits: Logits, there: Rows | None
    ) -> None:
        """The terms that read what the decoder writes of the latents, of those that are there."""
        o = self.objective
        given = {**self._processes(), "generator": self.generator}
        y_hat = None
        if self._runs("text_marginal"):
            if constant(o.latent_policy).freeze_bridge:
                refuse_reentrant([logits])
            y_hat = pseudo_text(
                logits,
                mask,
                text_process=o.text_process,
                bridge=o.bridge,
                generator=self.generator,
            )
            if not y_hat.is_floating_point():
                raise ValueError(
                    f"`text_marginal_weight` needs a relaxed text, and the {str(o.bridge)!r} "
                    f"bridge returned {y_hat.dtype} ids"
                )
        if self._runs("cycle_latent"):
            error = cycle_latent_loss(
                self.denoiser,
                latents,
                mask,
                **given,
                y_hat=None if y_hat is None else self._read("cycle_latent", y_hat),
                logits=self._read("cycle_latent", logits) if y_hat is None else None,
                bridge=o.bridge,
                show_latent=o.show_latent,
                time=self._time(o.bridge_time, latents),
                policy=constant(o.latent_policy),
                distance=o.cycle_latent_distance,
                reduction="none",
            )
            self._mean_latents("cycle_latent_loss", error, there)
        if y_hat is not None:
            text, kept = o.text_process.cut(self._read("text_marginal", y_hat), mask)
            nats = text_marginal_loss(
                self.denoiser,
                text,
                kept,
                **given,
                noise=self._noise(latents),
                reduction="none",
            )
            count = self.counts.get("text_marginal_loss")
            self.losses["text_marginal_loss"] = reduce_text(
                nats, kept, reduction="nats", rows=there, count=count
            )
        if self._runs("sleep"):
            dream = pseudo_text(
                logits.detach(),
                mask,
                text_process=o.text_process,
                bridge="categorical",
                generator=self.generator,
            )
            error = ddvi_sleep_loss(
                self.denoiser, latents, mask, **given, y_hat=dream, reduction="none"
            )
            self._mean_latents("sleep_loss", error, there)

    def _mean_latents(self, name: str, error: Float[Tensor, " b *n"], rows: Rows | None) -> None:
        """A loss as the mean over elements of the rows that are there."""
        count = self.counts.get(name)
        self.losses[name] = reduce_latents(error, reduction="mean", rows=rows, count=count)

    def _texts_to_encode(self) -> Texts:
        """What the base latent loss and the bridges are encoded of, in one pass."""
        p, texts = self.rows.paired, self.rows.need_texts()
        pairs, others = self._cycled(texts.tokens)
        if self._runs("prior"):
            others = len(texts.tokens) - p
        elif not self._runs("cycle_text"):
            others = 0
        return texts.pick(p, p if self._encodes_all_pairs() else pairs, others)

    def _encodes_all_pairs(self) -> bool:
        base = self._runs("latent") and self.objective.shares_encoder_pass(self.weights)
        return base or self._runs("prior", "contrastive")

    def _encode(self, encoded: T2L | None) -> None:
        """The encoder from noise: the base latent loss on paired rows, a bridge for the others."""
        o, p = self.objective, self.rows.paired
        shared = self._runs("latent") and o.shares_encoder_pass(self.weights)
        reads = self._runs("cycle_text", "prior", "contrastive")
        if self._runs("latent") and not shared:
            self._base_latent()
        if not (shared or reads):
            return
        texts, apart = self._texts_to_encode(), o.bridges_apart(self.weights)
        if encoded is None:
            noise, time = self._noise(texts.tokens), self._time(o.bridge_time, texts.tokens)
            if shared:
                encoded = t2l(
                    self.denoiser,
                    *texts,
                    **self._processes(),
                    start="noise",
                    time=time,
                    noise=noise,
                )
        if encoded is not None:
            base = encoded._replace(prediction=self._read("latent", encoded.prediction)).first(p)
            error = encoded_loss(base, self.rows.need_latents()[:p], **self._latent_options())
            self._mean_latents("latent_loss", error, self.rows.has_both)
            if not reads:
                return
            z_hat = o.latent_bridge.read(encoded, o.latent_process)
        else:
            z_hat = self._bridge(texts, noise, time, teaches=not apart)
        self.metrics.update(moments(z_hat.detach()))
        if self.rows.latents is not None:
            self.metrics["latent_norm"] = mean_norm(self.rows.latents, self.rows.has_latent)
        if self._runs("cycle_text"):
            pairs, others = self._cycled(self.rows.need_texts().tokens)
            paired = p if self._encodes_all_pairs() else pairs
            tokens, mask = texts.pick(paired, pairs, others)
            nll = cycle_text_loss(
                self.denoiser,
                tokens,
                mask,
                **self._processes(),
                z_hat=pick_rows(self._read("cycle_text", z_hat), paired, pairs, others),
                bridge=o.latent_bridge,
                generator=self.generator,
                policy=constant(o.text_policy),
                reduction="none",
            )
            there = self.rows.to_cycle(o.cycle_pairs).has_text
            self.losses["cycle_text_loss"] = reduce_text(
                nll,
                o.text_process.taught(mask),
                reduction="mean",
                rows=None if there is None else pick_rows(there, p, pairs, others),
                count=self.counts.get("cycle_text_loss"),
            )
        if apart:
            z_hat = self._bridge(texts, noise, time, teaches=True)
        self._regularise(z_hat, texts)

    def _bridge(
        self, texts: Texts, noise: Latents, time: Number | Time, *, teaches: bool
    ) -> Latents:
        """The latents of some texts, with a graph where what reads them trains the encoder."""
        o, policy = self.objective, constant(self.objective.text_policy)
        if teaches and o.teaches_encoder(self.weights):
            # whatever the cycle detaches; through all passes only where it pays for that anyway
            policy = GradientPolicy("full" if policy.bridge == "full" else "last")
        elif not self._runs("cycle_text"):
            policy = STOP_GRADIENT
        return encode_text(
            self.denoiser,
            *texts,
            **self._processes(),
            bridge=o.latent_bridge,
            time=time,
            noise=noise,
            policy=policy,
        )

    def _regularise(self, z_hat: Latents, texts: Texts) -> None:
        """The terms on the aggregate of the encoder's latents."""
        o, p = self.objective, self.rows.paired
        if self._runs("prior"):
            loss = prior_loss(
                o.prior,
                o.prior_options,
                self._read("prior", z_hat),
                denoiser=self.denoiser,
                teacher=self.teacher,
                tokens=texts.tokens,
                mask=texts.mask,
                **self._processes(),
                pool=o.pool_prior,
                generator=self._common_generator(z_hat) if o.pool_prior else self.generator,
                count=self.counts.get("prior_loss"),
            )
            if self.rows.has_text is not None:
                loss = torch.where(self.rows.has_text.any(), loss, torch.zeros_like(loss))
            self.losses["prior_loss"] = loss
        if self._runs("contrastive"):
            self.losses["contrastive_loss"] = infonce_loss(
                self._read("contrastive", z_hat[:p]),
                self.rows.need_latents()[:p],
                duplicates=same_text(*texts.first(p)),
                rows=self.rows.has_both,
                **o.contrastive_options,
            )

    def _base_latent(self) -> None:
        """The base latent loss in a pass of its own, below full noise or unlike the bridge."""
        o, p = self.objective, self.rows.paired
        time = o.base_latent_time
        if time is None:
            time = TimePolicy("uniform", high=highest(o.bridge_time, self.step))
        tokens, mask = self.rows.need_texts().first(p)
        error = t2l_loss(
            self.denoiser,
            tokens,
            self.rows.need_latents()[:p],
            mask,
            text_process=o.text_process,
            time=time,
            step=self.step,
            generator=self.generator,
            **self._latent_options(),
        )
        self._mean_latents("latent_loss", error, self.rows.has_both)

    def _denoise_both(self) -> None:
        """One pass with both parts noised; a row without a partner trains the part it has."""
        o, p = self.objective, self.rows.paired
        rows = self.rows.side_by_side(self.generator)
        has_text = rows.has_text
        if o.null_rate > 0:
            device = rows.mask.device
            kept = stratified_times(p, device=device, generator=self.generator) > o.null_rate
            has_text = has_text & F.pad(kept, (0, len(has_text) - p), value=True)
        time = o.unconditional_latent_time
        loss = unconditional_loss(
            self.denoiser,
            o.text_process.pad(rows.tokens, rows.mask),
            rows.latents,
            rows.mask,
            **self._processes(),
            has_text=has_text,
            has_latent=rows.has_latent,
            latent_time=None if time is None else self._time(time, rows.tokens),
            generator=self.generator,
            text_count=self.counts.get("unconditional_text_loss"),
            latent_count=self.counts.get("unconditional_latent_loss"),
        )
        self.losses["unconditional_text_loss"] = loss.text
        self.losses["unconditional_latent_loss"] = loss.latent

    def _processes(self) -> dict[str, Any]:
        o = self.objective
        return {"text_process": o.text_process, "latent_process": o.latent_process}

    def _latent_options(self) -> dict[str, Any]:
        o = self.objective
        return {
            "latent_process": o.latent_process,
            "space": o.latent_space,
            "distance": o.latent_distance,
            "min_snr": o.min_snr,
            "reduction": "none",
        }

    def _time(self, time: Number | TimePolicy, like: Tensor) -> Number | Time:
        if not isinstance(time, TimePolicy):
            return time
        return time(len(like), step=self.step, device=like.device, generator=self.generator)

    def _noise(self, like: Tensor) -> Latents:
        return draw_noise(
            len(like),
            self.objective.latent_process,
            at=like,
            like=self.rows.latents,
            generator=self.generator,
        )

    def _common_generator(self, like: Tensor) -> torch.Generator:
        """Draws that are the same on every rank."""
        return torch.Generator(like.device).manual_seed(self.objective.seed + self.step)
