"""A denoiser without its condition, and one that is guided away from that."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.draws import seeded
from cyclevae._base.masked import only_kept
from cyclevae._base.precision import fp32
from cyclevae._base.types import AnyTokens, Latents, Need, Number, Rows
from cyclevae.model.denoiser import Denoised, Denoiser
from cyclevae.model.door import at_the_door
from cyclevae.model.unread import UnreadLogits
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess


class WithoutCondition:
    """A `Denoiser` around another one; made by `without_condition`."""

    def __init__(
        self,
        denoiser: Denoiser,
        text_process: TextProcess,
        latent_process: LatentProcess,
        rows: Rows | None,
        generator: torch.Generator | None,
    ) -> None:
        self.denoiser = denoiser
        self.text_process, self.latent_process = text_process, latent_process
        self.rows, self.generator = rows, generator

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)  # `module` and `roles`, for freeze

    def denoise(
        self, tokens: AnyTokens, latents: Latents, *, need: Need = "both", **state: Any
    ) -> Denoised:
        """One forward: see `Denoiser.denoise`."""
        _one_direction(need)
        if need == "latents":
            mask = checks.as_mask("attention_mask", state["attention_mask"])
            no_text = self.text_process.at_full_noise(mask, generator=self.generator)
            if self.rows is not None and tokens.is_floating_point():
                no_text = F.one_hot(no_text, tokens.shape[-1]).to(tokens.dtype)
            tokens, time = self._hidden(no_text, tokens), "text_time"
        else:
            noise = torch.randn(
                latents.shape, dtype=latents.dtype, device=latents.device, **seeded(self.generator)
            )
            full = torch.ones_like(state["latent_time"])
            no_latent = self.latent_process.started(noise, full)
            latents, time = self._hidden(no_latent, latents), "latent_time"
            latents = only_kept(latents, state.get("latent_mask"))
        state[time] = self._hidden(torch.ones_like(state[time]), state[time])
        return self.denoiser.denoise(tokens, latents, need=need, **state)

    def _hidden(self, nothing: Tensor, shown: Tensor) -> Tensor:
        if self.rows is None:
            return nothing
        return torch.where(self.rows.view(-1, *[1] * (shown.ndim - 1)), nothing, shown)


@at_the_door
def without_condition(
    denoiser: Denoiser,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    rows: Rows | None = None,
    generator: torch.Generator | None = None,
) -> WithoutCondition:
    """The same network without its condition: the other part is at full noise, and at time 1.

    An encoder pass (`need="latents"`) reads the null text: of the same length, at full noise, at
    `text_time` 1. A decoder pass (`need="logits"`) reads the null latent: what the encoder starts
    from, pure noise at `latent_time` 1. These are states of the process itself, and those of the
    unconditional mode, so no network needs another input; one with a null embedding of its own
    puts it where the time is 1. What is denoised stays as it is.

    In a base loss it is the dropout of conditions on which guidance stands:
    `t2l_loss(without_condition(denoiser, rows=torch.rand(b) < 0.1, ...), ...)`, which is what
    `Latent(null_rate=0.1)` does in an objective.

    Args:
        denoiser: the model.
        text_process: the text process.
        latent_process: the latent process.
        rows: `[b]`, which rows go without; all if not given.
        generator: random state of the noise.

    Reference: UniDiffuser, https://arxiv.org/abs/2303.06555. LLaDA's null prompt
    (https://arxiv.org/abs/2502.09992) and CCDD's `p_drop_discrete` mask the text likewise; CCDD's
    null latent is 0, D-DiT's a learned one.

    Examples:
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> from cyclevae import t2l
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> processes = {"text_process": text_process, "latent_process": latent_process}
        >>> batch, null = toy_batch(seed=0), without_condition(denoiser, **processes)
        >>> z_t = torch.zeros(3, 4)
        >>> one, other = (
        ...     t2l(null, tokens, batch.attention_mask, start=z_t, **processes).prediction
        ...     for tokens in (batch.tokens, batch.tokens.clamp(max=3))
        ... )
        >>> bool((one == other).all())
        True
    """
    return WithoutCondition(denoiser, text_process, latent_process, rows, generator)


class Guided:
    """A `Denoiser` around another one; made by `guided`."""

    def __init__(self, denoiser: Denoiser, null: WithoutCondition, scale: Number) -> None:
        self.denoiser, self.null, self.scale = denoiser, null, scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)  # `module` and `roles`, for freeze

    def denoise(
        self, tokens: AnyTokens, latents: Latents, *, need: Need = "both", **state: Any
    ) -> Denoised:
        """Two forwards: see `Denoiser.denoise`."""
        _one_direction(need)
        shown = self.denoiser.denoise(tokens, latents, need=need, **state)
        null = self.null.denoise(tokens, latents, need=need, **state)
        if need == "latents":
            return Denoised(None, self._between(null.latent_prediction, shown.latent_prediction))
        if isinstance(null.logits, UnreadLogits) and isinstance(shown.logits, UnreadLogits):
            # logits are linear in what their head reads, up to a bias, which drops out
            hidden = self._between(null.logits.hidden, shown.logits.hidden)
            return Denoised(shown.logits.with_hidden(hidden), None)
        return Denoised(self._between(null.logits, shown.logits), None)

    def _between(self, null: Any, shown: Any) -> Any:
        if null is None or shown is None:  # for the pass to complain of
            return None
        impossible = null.isneginf() | shown.isneginf()  # words that a model rules out
        away = torch.where(impossible, 0.0, fp32(shown) - fp32(null))
        return (fp32(shown) + (self.scale - 1) * away).to(shown.dtype)


@at_the_door
def guided(
    denoiser: Denoiser,
    scale: Number,
    *,
    text_process: TextProcess,
    latent_process: LatentProcess,
    generator: torch.Generator | None = None,
) -> Denoiser:
    """Classifier-free guidance: `null + scale (conditional - null)`, of logits and predictions.

    For L2T of logits, which means `p ~ p_null^(1 - scale) p_conditional^scale` for every word; a
    word that one of the two rules out, with a logit of minus infinity, keeps its conditional logit.
    For T2L of the prediction, in whatever space: at one `z_t` all conversions are affine, so that
    the clean latent, the noise and the score are guided alike. A forward takes two passes, and one
    at `scale` 1, which is the denoiser itself. What null means says `without_condition`.

    A maker of bridges: losses of the guided model itself would train something else.

    Args:
        denoiser: the model, trained without its condition too.
        scale: 1 for no guidance, 0 for the null; the paper's `w` is `scale - 1`.
        text_process: the text process.
        latent_process: the latent process.
        generator: random state of the noise in null latents.

    Raises:
        ValueError: a negative scale.

    Reference: Ho & Salimans, https://arxiv.org/abs/2207.12598, equation 6; of logits, as
    https://arxiv.org/abs/2306.17806.

    Examples:
        >>> from cyclevae.testing import toy_denoiser
        >>> denoiser, text, latent = toy_denoiser(seed=0)
        >>> maker = guided(denoiser, 2.0, text_process=text, latent_process=latent)
        >>> guided(denoiser, 1.0, text_process=text, latent_process=latent) is denoiser
        True
    """
    checks.check_nonnegative("scale", scale)
    if scale == 1:
        return denoiser
    null = WithoutCondition(denoiser, text_process, latent_process, None, generator)
    return Guided(denoiser, null, scale)


def _one_direction(need: Need) -> None:
    if need == "both":
        raise ValueError(
            "a pass of both directions at once has no condition that could be left out: ask for "
            "need='latents' (of a text) or need='logits' (of a latent)"
        )
