"""The text bridges, one function each: from the decoder's logits to a pseudo-text.

Ids have no gradient: such a pseudo-text is data to the pass behind it, as in back-translation.
A relaxed text `[b, s, v]` has one. Only that of `soft_text` is exact, and it is of a text unlike
any; how the others are biased is said where they are made. Theirs is for
one backward pass: second derivatives, which would be of nothing, are refused.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from cyclevae._base.checks import as_mask, check_positive
from cyclevae._base.derivatives import once
from cyclevae._base.draws import seeded
from cyclevae._base.precision import fp32
from cyclevae._base.types import Logits, Mask, MaskLike, Number, RelaxedTokens, Tokens
from cyclevae.model.chunks import chunk_of
from cyclevae.model.door import at_the_door
from cyclevae.model.linear_cross_entropy import each_nll
from cyclevae.model.sweep import over_rows
from cyclevae.model.unread import AnyLogits, UnreadLogits, read_logits, readable
from cyclevae.processes.text import TextProcess

_BLOCK = 256  # words: near the square root of usual vocabularies


@at_the_door
def argmax_text(
    logits: AnyLogits, attention_mask: MaskLike, *, text_process: TextProcess
) -> Tokens:
    """The most probable pseudo-text `[b, s]`, without forbidden ids, framed and padded.

    Raises:
        ValueError: logits that do not fit the mask or the vocabulary.

    Examples:
        >>> import torch
        >>> text = TextProcess(mask_id=2, vocab_size=4, pad_id=0)
        >>> logits = torch.tensor([[[9.0, 1.0, 9.0, 3.0], [0.0, 2.0, 0.0, 1.0]]])
        >>> argmax_text(logits, torch.tensor([[True, True]]), text_process=text)
        tensor([[3, 1]])
    """
    attention_mask = check_logits(logits, attention_mask, text_process)
    return text_process.frame(_most_probable(logits, attention_mask, text_process), attention_mask)


def argmax_of_rest(
    words: Tokens,
    known: Mask,
    logits: AnyLogits,
    attention_mask: Mask,
    *,
    text_process: TextProcess,
) -> Tokens:
    """`argmax_text`, some of whose words are known: the head is run at the other positions alone.

    A known word that is forbidden is looked for again.
    """
    allowed = text_process.forbid(torch.zeros(text_process.vocab_size, device=words.device)) == 0
    known = known & allowed[words]
    rest = text_process.chosen(attention_mask) & ~known
    found = _most_probable(logits, rest, text_process)
    return text_process.frame(torch.where(known, words, found), attention_mask)


@at_the_door
def categorical_text(
    logits: AnyLogits,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    temperature: Number = 1.0,
    generator: torch.Generator | None = None,
) -> Tokens:
    """A pseudo-text `[b, s]` sampled from `softmax(logits / temperature)` per position.

    Forbidden ids are never sampled. By inverse CDF, first of a block of words and then within it,
    from two uniform numbers per position; without a host synchronisation, and without a copy of the
    logits in fp32.

    Raises:
        ValueError: a temperature that is not a finite number above 0, or as `argmax_text`.

    Examples:
        >>> import torch
        >>> text = TextProcess(mask_id=2, vocab_size=4, pad_id=0)
        >>> logits, mask = torch.zeros(1, 5, 4), torch.ones(1, 5, dtype=torch.bool)
        >>> seed = torch.Generator().manual_seed(0)
        >>> categorical_text(logits, mask, text_process=text, generator=seed)
        tensor([[...]])
    """
    check_positive("temperature", temperature)
    attention_mask = check_logits(logits, attention_mask, text_process)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    positions = attention_mask.numel()
    uniform = torch.rand(positions, 2, dtype=dtype, device=logits.device, **seeded(generator))

    def draw(x: Tensor, u: Tensor) -> Tensor:
        return _draw(fp32(x) / temperature, u, text_process)

    return text_process.frame(_words(logits, attention_mask, draw, uniform), attention_mask)


@at_the_door
def straight_through_text(
    logits: AnyLogits,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    sample: bool = False,
    temperature: Number = 1.0,
    generator: torch.Generator | None = None,
) -> RelaxedTokens:
    """A pseudo-text `[b, s, v]` whose value is one-hot and whose gradient is that of `P`.

    `onehot(y) + P - stop_gradient(P)` with `P = softmax(logits / temperature)`, where `y` is the
    most probable word, or a word drawn from `P`. With `sample` the gradient is unbiased if what
    follows is linear in the text; of the squared error of something linear it lacks, on average,
    just the gradient of its variance over `P`: nothing then rewards a decoder for being sure.

    Args:
        logits: `[b, s, v]`.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process. Padding and placed tokens are constant.
        sample: draw the words instead of taking the most probable ones.
        temperature: divides the logits.
        generator: random state of the draw.

    Raises:
        ValueError: a temperature that is not a finite number above 0, or as `argmax_text`.

    Reference: Bengio et al., https://arxiv.org/abs/1308.3432; in a cycle, ITIT,
    https://arxiv.org/abs/2310.03734.

    Examples:
        >>> import torch
        >>> text = TextProcess(mask_id=2, vocab_size=4, pad_id=0)
        >>> logits = torch.tensor([[[9.0, 1.0, 9.0, 3.0]]], requires_grad=True)
        >>> y_hat = straight_through_text(logits, torch.ones(1, 1), text_process=text)
        >>> y_hat.tolist(), y_hat.requires_grad
        ([[[0.0, 0.0, 0.0, 1.0]]], True)
    """
    check_positive("temperature", temperature)
    attention_mask = check_logits(logits, attention_mask, text_process)
    plain, chosen = read_logits(logits), text_process.chosen(attention_mask)
    soft = word_logits(plain, chosen, text_process, temperature).softmax(dim=-1)
    words = (
        categorical_text(
            plain,
            attention_mask,
            text_process=text_process,
            temperature=temperature,
            generator=generator,
        )
        if sample
        else argmax_text(plain, attention_mask, text_process=text_process)
    )
    return _one_hot(words, soft)


@at_the_door
def gumbel_text(
    logits: AnyLogits,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    temperature: Number = 1.0,
    generator: torch.Generator | None = None,
) -> RelaxedTokens:
    """A sampled pseudo-text `[b, s, v]`: one-hot in value, with the gradient of a soft sample.

    `onehot(argmax s) + s - stop_gradient(s)` with `s = softmax((logits + g) / temperature)` and
    Gumbel noise `g`. The words are drawn from `softmax(logits)` whatever the temperature, which
    trades the bias of the gradient against its variance. For one position, three words of logits 0,
    1 and 2, and the function `y_1 + 2 y_2` of the text, its mean is off by 24, 8 and 0.4 % of the
    true gradient's norm at 1, 0.5 and 0.1, and its variance at 0.1 is 37 times that at 1. Of other
    functions and logits it is off by other shares: by 10 to 28 % at 1 for single words of these.

    Args:
        logits: `[b, s, v]`.
        attention_mask: `[b, s]`, True = keep.
        text_process: the text process. Padding and placed tokens are constant.
        temperature: divides logits and noise.
        generator: random state of the noise.

    Raises:
        ValueError: a temperature that is not a finite number above 0, or as `argmax_text`.

    Reference: Jang et al., https://arxiv.org/abs/1611.01144.

    Examples:
        >>> import torch
        >>> text = TextProcess(mask_id=2, vocab_size=4, pad_id=0)
        >>> logits, mask = torch.zeros(2, 3, 4, requires_grad=True), torch.ones(2, 3)
        >>> seed = torch.Generator().manual_seed(0)
        >>> y_hat = gumbel_text(logits, mask, text_process=text, generator=seed)
        >>> sorted(y_hat.detach().unique().tolist()), y_hat.requires_grad
        ([0.0, 1.0], True)
    """
    check_positive("temperature", temperature)
    attention_mask = check_logits(logits, attention_mask, text_process)
    chosen = text_process.chosen(attention_mask)
    words = word_logits(read_logits(logits), chosen, text_process)
    noisy = words - _log_race(words, generator)
    soft = _tempered(noisy, temperature).softmax(dim=-1)
    words = noisy.detach().max(dim=-1).indices  # as in argmax_text
    return _one_hot(text_process.frame(words, attention_mask), soft)


@at_the_door
def soft_text(
    logits: AnyLogits,
    attention_mask: MaskLike,
    *,
    text_process: TextProcess,
    temperature: Number = 1.0,
) -> RelaxedTokens:
    """The probabilities `softmax(logits / temperature)` themselves, `[b, s, v]`.

    Its gradient is exact, but of a mixture of words, which no encoder was trained to read.

    Raises:
        ValueError: a temperature that is not a finite number above 0, or as `argmax_text`.

    Examples:
        >>> import torch
        >>> text = TextProcess(mask_id=2, vocab_size=4, pad_id=0)
        >>> soft_text(torch.zeros(1, 2, 4), torch.tensor([[True, False]]), text_process=text)
        tensor([[[0.0000, 0.5000, 0.0000, 0.5000],
                 [1.0000, 0.0000, 0.0000, 0.0000]]])
    """
    check_positive("temperature", temperature)
    attention_mask = check_logits(logits, attention_mask, text_process)
    plain = read_logits(logits)
    soft = word_logits(plain, attention_mask, text_process, temperature).softmax(dim=-1)
    return text_process.frame(soft, attention_mask)


def check_logits(logits: AnyLogits, attention_mask: MaskLike, text_process: TextProcess) -> Mask:
    """The mask as bool, where the logits fit it and the vocabulary."""
    if logits.ndim != 3 or logits.shape[-1] != text_process.vocab_size:
        raise ValueError(
            f"`logits` must be [b, s, v] over text_process.vocab_size = {text_process.vocab_size} "
            f"ids, got {list(logits.shape)}"
        )
    return as_mask("attention_mask", attention_mask, logits.shape[:2])


def word_logits(
    logits: Logits, chosen: Mask, text_process: TextProcess, temperature: Number = 1.0
) -> Logits:
    """The logits a word is drawn from, fp32 or better: forbidden ids are at minus infinity."""
    logits = _tempered(fp32(logits), temperature)
    fixed = text_process.forbid(logits.new_zeros(logits.shape[-1]))
    # What is discarded has the gradient 0 * softmax, which is NaN where its logits are
    return torch.where(chosen[..., None] & (fixed == 0), logits, fixed)


def _tempered(logits: Logits, temperature: Number) -> Logits:
    return logits if temperature == 1 else logits / temperature


def word_log_probs(
    logits: AnyLogits,
    words: Integer[Tensor, "b s k"],
    attention_mask: Mask,
    text_process: TextProcess,
    temperature: Number = 1.0,
) -> Float[Tensor, "b s k"]:
    """The log-probabilities of `k` words at each kept position, as they are drawn."""
    logits = readable(logits)
    if isinstance(logits, Tensor):
        log_p = word_logits(logits, attention_mask, text_process, temperature).log_softmax(dim=-1)
        return log_p.gather(-1, words)
    bias = logits.weight.new_zeros(len(logits.weight)) if logits.bias is None else logits.bias
    allowed = UnreadLogits(
        logits.hidden / temperature, logits.weight, text_process.forbid(bias / temperature)
    )
    return -each_nll(allowed, words, attention_mask)


def _most_probable(logits: AnyLogits, mask: Mask, text_process: TextProcess) -> Tokens:
    """Several times faster than argmax on a CPU."""
    return _words(logits, mask, lambda x: text_process.forbid(x).max(dim=1).indices)


def _words(logits: AnyLogits, mask: Mask, choose: Callable[..., Tensor], *more: Tensor) -> Tokens:
    """An id per position, at kept ones at least."""
    logits = readable(logits)
    if isinstance(logits, UnreadLogits):
        return over_rows(logits, mask, choose, *more)
    return _by_chunks(choose, logits.detach().flatten(0, 1), *more).view(mask.shape)


def _by_chunks(choose: Callable[..., Tensor], *rows: Tensor) -> Integer[Tensor, " n"]:
    """An id per row: no copy of all logits is made."""
    size = len(rows[0]) if torch.compiler.is_compiling() else chunk_of(rows[0])
    parts = zip(*(torch.split(part, max(size, 1)) for part in rows), strict=True)
    return torch.cat([choose(*part) for part in parts])


def _draw(
    logits: Float[Tensor, "n v"], uniform: Float[Tensor, "n 2"], text_process: TextProcess
) -> Integer[Tensor, " n"]:
    """A word per row, drawn from the softmax of what is not forbidden."""
    logits = text_process.forbid(logits)
    mass = (logits - logits.amax(dim=1, keepdim=True)).exp()
    for forbidden in text_process.forbidden_ids:
        mass[:, forbidden] = 0.0  # also in a row with a NaN
    blocks = -(-mass.shape[1] // _BLOCK)
    mass = F.pad(mass, (0, blocks * _BLOCK - mass.shape[1])).view(-1, blocks, _BLOCK)
    block = _inverse_cdf(mass.sum(dim=2), uniform[:, 0])
    inside = mass.gather(1, block[:, None, None].expand(-1, 1, _BLOCK)).squeeze(1)
    return block * _BLOCK + _inverse_cdf(inside, uniform[:, 1])


def _inverse_cdf(mass: Float[Tensor, "n k"], uniform: Float[Tensor, " n"]) -> Integer[Tensor, " n"]:
    """An index per row, drawn in proportion to `mass`."""
    total = mass.cumsum(dim=1)
    target = uniform[:, None] * total[:, -1:]
    index = torch.searchsorted(total, target, right=True).clamp(max=mass.shape[1] - 1)
    # A parallel sum may be rounded upwards past an index without mass
    index = torch.where(mass.gather(1, index) > 0, index, mass.argmax(dim=1, keepdim=True))
    return index.squeeze(1)


def _log_race(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Minus Gumbel noise: the argmax of `logits - noise` is a draw from their softmax."""
    race = torch.empty_like(like).exponential_(**seeded(generator))
    # An infinite noise would make a NaN of a forbidden id's minus infinity, and that one win
    return race.clamp_(min=torch.finfo(race.dtype).tiny).log_()


def _one_hot(words: Tokens, soft: RelaxedTokens) -> RelaxedTokens:
    """One-hot words with the gradient of `soft`."""
    own = soft.detach().gather(-1, words[..., None])
    one_hot = torch.zeros_like(soft).scatter_(-1, words[..., None], 1 + (own - own))  # or NaN
    return once(soft, "a straight-through text", value=one_hot)
