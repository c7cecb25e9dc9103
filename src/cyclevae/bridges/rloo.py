"""RLOO: an unbiased gradient through a sampled text, from the errors it leads to."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.derivatives import once
from cyclevae._base.precision import fp32
from cyclevae._base.types import MaskLike, Number
from cyclevae.bridges.words import check_logits, word_log_probs
from cyclevae.model.door import at_the_door
from cyclevae.model.unread import AnyLogits
from cyclevae.processes.text import TextProcess


@at_the_door
def rloo_surrogate(
    log_probs: Float[Tensor, "k b"], rewards: Float[Tensor, "k b"]
) -> Float[Tensor, " b"]:
    """A loss per row whose gradient estimates that of minus the expected reward, without bias.

    `-1/k sum_i stop_gradient(R_i - mean_{j != i} R_j) log p_i` over `k` independent samples of the
    very distribution, temperature included, that `log p` is of. What parameters do to a reward
    otherwise than by the sample is not in it, and is added as a loss of its own. Each sample is
    compared with the others only: a mean that includes it would shrink the gradient by
    `(k-1)/k`. The value means nothing; the gradient is minus the unbiased sample covariance of
    rewards and scores, so a constant added to all rewards of a row changes nothing. Its variance
    falls with `k`, and grows with the length of the texts. It is for one backward pass: second
    derivatives, which would not be those of the expected reward, are refused.

    Args:
        log_probs: log-probabilities of the samples `[k, b]`, with a graph: see `text_log_prob`.
        rewards: of the samples `[k, b]`; no gradient flows into them.

    Raises:
        ValueError: unequal shapes, or fewer than 2 samples.
        RuntimeError: in a second backward pass.

    Reference: Kool et al. 2019, https://openreview.net/forum?id=r1lgTGL5DE; Ahmadian et al.,
    https://arxiv.org/abs/2402.14740.

    Examples:
        >>> import torch
        >>> log_probs = torch.full((2, 1), 0.5).log().requires_grad_()
        >>> rloo_surrogate(log_probs, torch.tensor([[3.0], [1.0]])).sum().backward()
        >>> log_probs.grad.tolist()  # the better sample becomes more likely
        [[-1.0], [1.0]]
    """
    checks.check_same_shape("rewards", rewards, "log_probs", log_probs)
    samples = len(log_probs)
    if log_probs.ndim != 2 or samples < 2:
        raise ValueError(
            "`log_probs` must be [k, b] with k of at least 2, because the baseline of a sample is "
            f"the mean of the others, got {list(log_probs.shape)}"
        )
    cure = "take them by text_log_prob of logits that have one"
    checks.warn_without_graph("log_probs", log_probs, cure=cure)
    rewards = fp32(rewards.detach())
    rewards = rewards - rewards[:1]  # near rewards far from 0 lose nothing by this, much by a sum
    others = (rewards.sum(dim=0) - rewards) / (samples - 1)
    return once(-((rewards - others) * log_probs).mean(dim=0), "rloo_surrogate")


@at_the_door
def text_log_prob(
    logits: AnyLogits,
    tokens: Integer[Tensor, "*k b s"],
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    temperature: Number = 1.0,
) -> Float[Tensor, "*k b"]:
    """The log-probability of pseudo-texts under the distribution `categorical_text` draws from.

    `sum_l log softmax(logits_l / temperature)[y_l]` over the words that were drawn, in fp32 or
    better. Forbidden ids have no probability. Padding and placed tokens do not count. Where the end
    is predicted, neither do the words behind the first end, which are cut off: what is left is the
    probability of the text that remains.

    Args:
        logits: of one pass, `[b, s, v]`.
        tokens: pseudo-texts `[b, s]`, or several for the same logits `[k, b, s]`; before or after
            `TextProcess.cut`.
        attention_mask: `[b, s]`, True = keep, as the texts were drawn under.
        text_process: the text process.
        temperature: that of the draw.

    Raises:
        ValueError: wrong shapes or values, or a temperature that is not a finite number above 0.

    Examples:
        >>> import torch
        >>> text = TextProcess(mask_id=2, vocab_size=4, pad_id=0)
        >>> logits, mask = torch.zeros(1, 3, 4), torch.tensor([[True, True, False]])
        >>> text_log_prob(logits, torch.tensor([[3, 1, 0]]), mask, text_process=text)  # -2 log 2
        tensor([-1.3863])
    """
    checks.check_positive("temperature", temperature)
    mask = check_logits(logits, attention_mask, text_process)
    texts = tokens if tokens.ndim == 3 else tokens[None]
    for text in texts:
        checks.as_tokens("tokens", text, text_process.vocab_size)
        checks.as_mask("attention_mask", mask, text.shape)
    words = texts.long().movedim(0, -1)
    drawn = word_log_probs(logits, words, mask, text_process, temperature).movedim(-1, 0)
    kept = [text_process.chosen(mask) & text_process.cut(text, mask)[1] for text in texts]
    total = torch.where(torch.stack(kept), drawn, 0.0).sum(dim=-1)
    return total if tokens.ndim == 3 else total[0]
