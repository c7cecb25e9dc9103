"""The bound on the negative log-likelihood of a text, under each kind of noise."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cyclevae._base.precision import fp32
from cyclevae._base.reduce import divided, reduce_text
from cyclevae._base.types import (
    AnyTokens,
    Count,
    Logits,
    Loss,
    Mask,
    Reduction,
    RelaxedTokens,
    Time,
    Tokens,
)
from cyclevae.losses.token_loss import nll
from cyclevae.model.linear_cross_entropy import swept
from cyclevae.model.unread import AnyLogits, UnreadLogits, read_logits, readable
from cyclevae.processes.shares import inside, rates
from cyclevae.processes.text import Noised, TextProcess


def reduced_bound(
    logits: AnyLogits,
    tokens: AnyTokens,
    noised: Noised,
    time: Time,
    mask: Mask,
    *,
    text_process: TextProcess,
    reduction: Reduction,
    count: Count | None = None,
) -> Loss:
    """`text_bound` of the words that a mask keeps, reduced."""
    logits = readable(logits)
    at_once = reduction != "none" and not (text_process.replaces or tokens.is_floating_point())
    if isinstance(logits, UnreadLogits) and at_once:
        weight = bound_weights(logits, time, text_process)
        total = swept(logits, tokens, noised.counted & mask, weight).total
        return divided(total, mask, reduction=reduction, count=count)
    bound = text_bound(logits, tokens, noised, time, text_process=text_process)
    return reduce_text(bound, mask, reduction=reduction, count=count)


def bound_weights(
    logits: UnreadLogits, time: Time, text_process: TextProcess
) -> Float[Tensor, "b s"]:
    """By what the bound multiplies the cross-entropy of a masked word."""
    ones = torch.ones_like(logits.hidden[..., 0])
    return text_process.weigh(fp32(ones), time)


def text_bound(
    logits: AnyLogits, tokens: AnyTokens, noised: Noised, time: Time, *, text_process: TextProcess
) -> Float[Tensor, "b s"]:
    """What each counted position adds to the bound at its row's time; 0 elsewhere.

    Its mean over uniform times and noise, summed over a text, bounds `-log p(text)`. Masks:
    `masked'/masked` times the cross-entropy of a masked word. With random words: see `_divergence`.

    Args:
        logits: `[b, s, v]`, of the clean words.
        tokens: the clean ids `[b, s]`, or a relaxed text `[b, s, v]`, whose words' bounds are
            averaged.
        noised: what the model read, and the positions that count.
        time: `[b]`.
        text_process: the process that made it.
    """
    if text_process.replaces:
        return _divergence(read_logits(logits), tokens, noised, time, text_process)
    if tokens.is_floating_point():
        errors = _expected_nll(read_logits(logits), tokens, noised.counted)
    else:
        errors = nll(logits, tokens, noised.counted)
    return text_process.weigh(errors, time)


def _divergence(
    logits: Logits, tokens: AnyTokens, noised: Noised, time: Time, text_process: TextProcess
) -> Float[Tensor, "b s"]:
    """`w_t(z, x) (KL(q || q_hat) + q(z)/q_hat(z) - log(q(z)/q_hat(z)) - 1)` at each position.

    `q(y) = kept [y = x] + noise(y)` are the chances of a word `y` at that time if the true one is
    `x`, `q_hat` is their mean under the model's `p(x)`, and `z` is the word that the model read.
    `w_t(z, x)` is the rate of noise into `z`, over `q(z)`. Times are at least 1e-4 from 0 and 1.

    With `k` for the chance of one random word, `log(q_hat(y)/k)` is
    `softplus(log p(y) + log(kept/k))`, of which nothing is lost near either end.

    Reference: von Rütte et al., https://arxiv.org/abs/2503.04482, theorem 3.1 and section 4.
    """
    time, ids = inside(time), text_process.noise_ids
    shares = text_process.shares(time)
    slopes = text_process.derivatives(time)
    to_mask, to_words = (x[:, None] for x in rates(shares, slopes))
    kept, masked, word = (x[:, None] for x in (shares.kept, shares.masked, shares.random / ids))

    z, counted = noised.tokens.long(), noised.counted
    is_mask = torch.zeros_like(counted)
    logits = fp32(logits).masked_fill(~counted[..., None], 0.0)
    if text_process.mask_id is not None:  # which is never a true word
        is_mask = z == text_process.mask_id
        no_word = torch.arange(logits.shape[-1], device=logits.device) == text_process.mask_id
        logits = logits.masked_fill(no_word, -torch.inf)
    snr = (kept / word).log()
    log_odds = F.softplus(logits.log_softmax(dim=-1) + snr[..., None])  # log(q_hat/word)
    highest = F.softplus(snr)  # that of a model that is sure of the word
    at_z = _at(log_odds, z)
    if tokens.is_floating_point():
        text = torch.where(counted[..., None], fp32(tokens), 0.0)
        at_x, shown = (text * log_odds).sum(dim=-1), _at(text, z)
    else:
        at_x, shown = _at(log_odds, tokens.long()), (z == tokens).to(log_odds.dtype)
    shown = shown.masked_fill(is_mask, 0.0)

    level = (kept + word) * highest - word * log_odds.sum(dim=-1)  # KL is this, less kept at_x
    true = to_words / ids / (kept + word)
    false = torch.where(is_mask, to_mask / masked, to_words / shares.random[:, None])
    bound = true * shown * (level - kept * at_z + _itakura_saito(highest - at_z))
    distance = _itakura_saito(-at_z).masked_fill(is_mask, 0.0)
    bound = bound + false * ((1 - shown) * (level + distance) - kept * (at_x - shown * at_z))
    return bound.masked_fill(~counted, 0.0)


def _itakura_saito(log_ratio: Tensor) -> Tensor:
    return log_ratio.expm1() - log_ratio


def _at(values: Float[Tensor, "b s v"], ids: Tokens) -> Float[Tensor, "b s"]:
    return values.gather(-1, ids[..., None]).squeeze(-1)


def _expected_nll(logits: Logits, tokens: RelaxedTokens, counted: Mask) -> Float[Tensor, "b s"]:
    log_p = fp32(logits).log_softmax(dim=-1)
    log_p = log_p.clamp(min=torch.finfo(log_p.dtype).min)  # 0 times minus infinity is NaN
    words = torch.where(counted[..., None], fp32(tokens), 0.0)
    return -(words * torch.where(counted[..., None], log_p, 0.0)).sum(dim=-1)
