"""One step as a term sees it: its passes, each run once and read by every term that asks for it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclevae._base.types import (
    AnyTokens,
    Count,
    LatentMask,
    Latents,
    Mask,
    Number,
    Rows,
    Time,
    Tokens,
)
from cyclevae.bridges.latent import encode_text
from cyclevae.bridges.text import TextBridge, pseudo_text
from cyclevae.bridges.words import argmax_of_rest
from cyclevae.gradient_policy.gate import refuse_reentrant
from cyclevae.gradient_policy.policy import GradientPolicy
from cyclevae.model.denoiser import Denoiser
from cyclevae.model.guidance import without_condition
from cyclevae.model.maker import Maker
from cyclevae.model.passes import T2L, l2t, l2t_and_t2l, t2l
from cyclevae.model.teacher import check_frozen
from cyclevae.model.unread import UnreadLogits, in_the_graph
from cyclevae.objective.plan import Plan
from cyclevae.objective.ran import Decoded, Ran
from cyclevae.objective.requests import Decode, Encode
from cyclevae.objective.rows import Arranged, Texts, pick_rows
from cyclevae.objective.statistics import mean_norm, moments
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.noise import draw_noise
from cyclevae.processes.text import TextProcess
from cyclevae.processes.times import TimePolicy, refuse_clean, stratified_times
from cyclevae.scale.non_finite import Verdict


class Setting(NamedTuple):
    """What all terms of an objective share.

    Attributes:
        text_process: the text process.
        latent_process: the latent process.
        reads_teacher: whether some term reads a frozen copy of the network.
        reads_null_text: whether some term reads a network without a text.
        seed: of draws that ranks must share.
    """

    text_process: TextProcess
    latent_process: LatentProcess
    reads_teacher: bool
    reads_null_text: bool
    seed: int


class Step(NamedTuple):
    """One step of an objective, as one of its terms sees it.

    A named tuple: dynamo compiles anew for a number that a plain object is given as attribute.

    Attributes:
        setting: what all terms share.
        name: of the term that looks.
        number: of the step.
        denoiser: the model; a pass that a term runs by itself is named as `Own` in its `passes`.
        teacher: a frozen copy of it, if one was given.
        rows: the batch, per direction; a row that lacks a text has borrowed one.
        generator: random state of all draws.
        counts: denominators by metric name, as they were given.
        metrics: what is reported beside the losses; detached 0-d tensors may be added.
        plan: which passes serve which terms.
        ran: what has run so far.
        verdicts: by term; empty where a term that is not finite keeps its gradient.

    Examples:
        >>> import cyclevae as cv
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> class Loud(cv.Text):
        ...     def loss(self, step):
        ...         print(step.name, step.number, step.rows.paired)
        ...         return super().loss(step)
        >>> denoiser, *processes = toy_denoiser(seed=0)
        >>> output = cv.CycleObjective(*processes, [Loud()])(denoiser, toy_batch(seed=0), step=7)
        loud 7 3
    """

    setting: Setting  # first, as dynamo looks at arguments that are plain until one is not
    name: str
    number: int
    denoiser: Denoiser
    teacher: Denoiser | None
    rows: Arranged
    generator: torch.Generator | None
    counts: Mapping[str, Count]
    metrics: dict[str, Tensor]
    plan: Plan
    ran: Ran
    verdicts: Mapping[str, Verdict]

    # What was asked for

    def decoded(self, request: Decode) -> Decoded:
        """The L2T pass of the rows of a request."""
        place = self.plan.serving(request)
        whole = self._decoded(place)
        latents, mask = [self._pick(part, request, place) for part in whole[:2]]
        logits = whole.logits
        if isinstance(logits, UnreadLogits):
            picked = logits.with_hidden(self._pick(logits.hidden, request, place))
            owned = picked.map(lambda part: self._own(part, request))
            return Decoded(latents, mask, owned)
        return Decoded(latents, mask, self._own(self._pick(logits, request, place), request))

    def encoded(self, request: Encode) -> T2L:
        """The T2L pass of the rows of a request of one pass, before a latent is read off it."""
        place = self.plan.serving(request)
        whole: T2L = self._encoded(place)
        prediction, z_t, noise, time = [self._pick(part, request, place) for part in whole[:4]]
        stated_time = time if isinstance(whole.stated_time, Tensor) else whole.stated_time
        kept = self.latent_mask(request)
        return T2L(self._own(prediction, request), z_t, noise, time, stated_time, kept)

    def z_hat(self, request: Encode) -> Latents:
        """The latents that the encoder makes of the texts of a request, behind the guards."""
        place = self.plan.serving(request)
        whole = self._guarded(place, request)
        return self._own(self._pick(whole, request, place), request)

    def texts(self, request: Encode) -> Texts:
        """The texts of a request."""
        texts = self.rows.need_texts()
        return texts.pick(self.rows.paired, *self.rows.numbers(request.rows, texts.tokens))

    def latent_mask(self, request: Decode | Encode) -> LatentMask | None:
        """What is kept of the latents that a request reads or makes, `[b, n]`; all if None."""
        mask = self.rows.latent_mask
        if isinstance(request, Encode):
            mask = self.rows.text_latent_mask
        return None if mask is None else self.rows.pick(mask, request.rows)

    def pseudo_text(self, request: Decode, bridge: TextBridge) -> AnyTokens:
        """The text that a bridge makes of the logits of a request; equal ones are made once.

        Raises:
            ValueError: ids, of a bridge that was to have a gradient.
        """
        for asked, how, text in self.ran.pseudo_texts:
            if how == bridge and asked == request:
                return self._own(text, request)
        decoded = self._replace(verdicts={}).decoded(request)
        text = self._written(decoded, request, bridge)
        if request.learns and not text.is_floating_point():
            raise ValueError(
                f"the {str(bridge)!r} bridge of `{self.name}` returned {text.dtype} ids, which have"
                " no gradient: let it return a relaxed text [b, s, v], or detach it"
            )
        self.ran.pseudo_texts.append((request, bridge, text))
        return self._own(text, request)

    def met(self, request: Decode, words: Tokens, where: Mask) -> None:
        """Keep the most probable words that a loss met on its way through unread logits.

        The `argmax` of the same pass need not run its head there again. Of first rows and
        positions of the pass, as those of a loss are that counts pairs alone.
        """
        place = self.plan.serving(request)
        decoded: Decoded = self.ran.passes[place]
        unread = isinstance(decoded.logits, UnreadLogits) and words.device.type == "cpu"
        if unread and not torch.compiler.is_compiling():  # elsewhere all positions are computed
            sizes = zip(decoded.mask.shape, words.shape, strict=True)
            rows, length = (whole - part for whole, part in sizes)
            padding = 0, length, 0, rows
            self.ran.words[place] = F.pad(words, padding), F.pad(where, padding)

    def let_go(self, terms: int) -> None:
        """Forget what none of the terms after the first so many reads: logits are large."""
        left = self.plan.read_after(terms)
        for place in [place for place in self.ran.passes if place not in left]:
            del self.ran.passes[place]
        texts = self.ran.pseudo_texts
        texts[:] = [made for made in texts if self.plan.serving(made[0]) in left]

    # What a term needs beside its passes

    @property
    def text_process(self) -> TextProcess:
        """The text process."""
        return self.setting.text_process

    @property
    def latent_process(self) -> LatentProcess:
        """The latent process."""
        return self.setting.latent_process

    @property
    def processes(self) -> dict[str, Any]:
        """Both, as the losses take them."""
        return {"text_process": self.text_process, "latent_process": self.latent_process}

    def denominator(self, part: str = "") -> Count | None:
        """The denominator that was given for a loss of this term."""
        return self.counts.get(f"{self.name}_{part}_loss" if part else f"{self.name}_loss")

    def time(self, time: Number | TimePolicy, like: Tensor) -> Number | Time:
        """A time as it is, or drawn for each row."""
        if not isinstance(time, TimePolicy):
            return time
        return time(len(like), step=self.number, device=like.device, generator=self.generator)

    def noise(self, like: Tensor) -> Latents:
        """Standard normal noise for as many latents."""
        return draw_noise(
            len(like),
            self.latent_process,
            at=like,
            like=self.rows.latents,
            generator=self.generator,
        )

    def need_teacher(self, reader: str) -> None:
        """An error where a reader lacks its teacher, or that is none."""
        if self.teacher is None:
            raise ValueError(
                f"{reader} reads a frozen copy of the network, and none was given: make one by "
                "`teacher = Teacher(network)`, give it to StepModule, or its `.denoiser` to the "
                "objective, and call teacher.update(network) after each optimizer step"
            )
        check_frozen(self.teacher)

    def made_by(self, maker: Maker) -> Denoiser:
        """The denoiser that makes a bridge."""
        return maker.denoiser(
            self.denoiser, self.teacher, **self.processes, generator=self.generator
        )

    def null_rows(self, rate: Number, like: Tensor) -> Rows | None:
        """Which rows of a base loss go without their condition; None where all have it."""
        if rate == 0:
            return None
        return stratified_times(len(like), device=like.device, generator=self.generator) <= rate

    def without_condition(self, rows: Rows | None) -> Denoiser:
        """The denoiser, which in some rows is not shown its condition."""
        if rows is None:
            return self.denoiser
        return without_condition(
            self.denoiser, **self.processes, rows=rows, generator=self.generator
        )

    def common_generator(self, like: Tensor) -> torch.Generator:
        """Draws that are the same on every rank."""
        return torch.Generator(like.device).manual_seed(self.setting.seed + self.number)

    # How passes run

    def _own(self, output: Tensor, request: Decode | Encode) -> Tensor:
        """What this term reads of a pass that others read too, who must not suffer from it."""
        if not request.learns:
            return output.detach()
        return self.verdicts[self.name].gate(output) if self.verdicts else output

    def _written(self, decoded: Decoded, request: Decode, bridge: TextBridge) -> AnyTokens:
        logits, mask = decoded.logits, decoded.mask
        place = self.plan.serving(request)
        if bridge.name == "argmax" and place in self.ran.words:
            words, where = [self._pick(part, request, place) for part in self.ran.words[place]]
            return argmax_of_rest(words, where, logits, mask, text_process=self.text_process)
        text: AnyTokens = pseudo_text(
            logits,
            mask,
            text_process=self.text_process,
            bridge=bridge,
            generator=self.generator,
        )
        return text

    def _pick(self, values: Tensor, request: Decode | Encode, place: int) -> Tensor:
        """The rows of a request among those of the pass that serves it."""
        all_rows = self.rows.all_of(request.direction)
        paired = self.rows.numbers(self.plan.shared[place].rows, all_rows)[0]
        return pick_rows(values, paired, *self.rows.numbers(request.rows, all_rows))

    def _decoded(self, place: int) -> Decoded:
        if place not in self.ran.passes:
            if self.plan.joined and self.plan.shared[place].joins:
                self._run_joined()
            else:
                request = self.plan.shared[place]
                latents, mask = self._to_decode(place)
                with self._policy(place).bridge_pass(self.denoiser):
                    logits = l2t(
                        self.made_by(request.maker),
                        latents,
                        mask,
                        text_process=self.text_process,
                        generator=self.generator,
                        latent_mask=self.latent_mask(request),
                    )
                if request.freeze:
                    refuse_reentrant([in_the_graph(logits)])
                self.ran.passes[place] = Decoded(latents, mask, logits)
        decoded: Decoded = self.ran.passes[place]
        return decoded

    def _to_decode(self, place: int) -> tuple[Latents, Mask]:
        request = self.plan.shared[place]
        latents = self.rows.need_latents()
        if request.rows.others:
            if not self.ran.lengths:
                self.ran.lengths.append(self.rows.lengths_to_decode(self.generator))
            mask = self.rows.pick(self.ran.lengths[0], request.rows)
        else:
            mask = self.rows.need_texts().mask
            mask = mask[: self.rows.numbers(request.rows, latents)[0]]
        return self.rows.pick(latents, request.rows), mask

    def _encoded(self, place: int) -> Any:
        """A T2L pass, or what several have made."""
        if place not in self.ran.passes:
            request = self.plan.shared[place]
            if self.plan.joined and request.joins:
                self._run_joined()
            elif isinstance(request, Encode):
                self.ran.passes[place] = self._encode(place, request)
        return self.ran.passes[place]

    def _encode(self, place: int, request: Encode) -> T2L | Latents:
        noise, time = self._start(request)
        texts, maker = self.texts(request), self.made_by(request.maker)
        kept = self.latent_mask(request)
        if request.bridge.steps > 1:
            return encode_text(
                maker,
                *texts,
                **self.processes,
                bridge=request.bridge.on_the_way,
                time=time,
                noise=noise,
                policy=self._policy(place),
                latent_mask=kept,
            )
        with self._policy(place).bridge_pass(self.denoiser):
            encoded = t2l(
                maker,
                *texts,
                **self.processes,
                start="noise",
                time=time,
                noise=noise,
                latent_mask=kept,
            )
        if request.freeze:
            refuse_reentrant([encoded.prediction], bridge=noise)
        return encoded

    def _start(self, request: Encode) -> tuple[Latents, Number | Time]:
        """The noise and the times of a pass: those of all passes that compute the same."""
        rows, tokens = self.plan.rows_of(request), self.rows.need_texts().tokens
        begun = [start for start in self.ran.starts if start[0].same_computation(request)]
        if not begun:
            like = self.rows.pick(tokens, rows)
            begun = [(request, self.noise(like), self.time(request.time, like))]
            self.ran.starts.append(begun[0])
        _, noise, time = begun[0]
        numbers = self.rows.numbers(rows, tokens)[0], *self.rows.numbers(request.rows, tokens)
        picked = pick_rows(time, *numbers) if isinstance(time, Tensor) else time
        return pick_rows(noise, *numbers), picked

    def _run_joined(self) -> None:
        """One pass for a decoder's and an encoder's."""
        places = [i for i, p in enumerate(self.plan.shared) if p.joins]
        one, other = places
        decode, encode = (one, other) if isinstance(self.plan.shared[one], Decode) else (other, one)
        latents, mask = self._to_decode(decode)
        asked = self.plan.shared[encode]
        if not isinstance(asked, Encode):
            raise TypeError(f"one pass of each direction joins, got {asked!r}")
        noise, _ = self._start(asked)
        logits, encoded = l2t_and_t2l(
            self.denoiser,
            latents,
            mask,
            *self.texts(asked),
            **self.processes,
            noise=noise,
            generator=self.generator,
            latent_mask=self.latent_mask(self.plan.shared[decode]),
            text_latent_mask=self.latent_mask(asked),
        )
        self.ran.passes[decode] = Decoded(latents, mask, logits)
        self.ran.passes[encode] = encoded

    def _guarded(self, place: int, request: Encode) -> Latents:
        """The latents of a whole pass behind the guards of a request, which read them once."""
        for at, bridge, z_hat in self.ran.z_hats:
            if at == place and bridge == request.bridge:
                return z_hat
        ran, kept = self._encoded(place), self.latent_mask(self.plan.shared[place])
        if request.bridge.steps > 1:
            z_hat = request.bridge.normed(ran, kept)
        else:
            z_hat = request.bridge.read(ran, self.latent_process)
        self.ran.z_hats.append((place, request.bridge, z_hat))
        if "latent_pred_norm" not in self.metrics:
            self.metrics.update(moments(z_hat.detach(), kept))
            if self.rows.latents is not None:
                self.metrics["latent_norm"] = mean_norm(self.rows.latents, self.rows.has_latent)
        return z_hat

    def _policy(self, place: int) -> GradientPolicy:
        """Who learns from a shared pass."""
        request = self.plan.shared[place]
        return GradientPolicy(request.through, (), request.freeze if request.learns else ())


def highest(time: Number | TimePolicy, step: int = 0) -> Number:
    """The highest time that may come at a step, which may not be 0."""
    if not isinstance(time, TimePolicy):
        return time
    cap = time.highest(step)
    if not torch.compiler.is_compiling():  # there it is symbolic, as the step is
        refuse_clean(f"time.high({step})", cap)
    return cap


def between(time: Number | TimePolicy) -> Time:
    """A hundred times, from the lowest to the highest that may come at step 0."""
    high = highest(time)
    low = time.lowest() if isinstance(time, TimePolicy) else high
    return torch.linspace(low, high, 100, dtype=torch.float64, device="cpu")
