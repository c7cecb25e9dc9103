"""The forward process of text: an absorbing mask, and what other processes have in common."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cyclevae._base.draws import seeded
from cyclevae._base.types import Mask, Number, Time, Tokens
from cyclevae.processes.ids import TextIds
from cyclevae.processes.shares import Shares, check_shares, derivatives, inside
from cyclevae.processes.times import TimePolicy


class Noised(NamedTuple):
    """A noised text.

    Attributes:
        tokens: `[b, s]`.
        counted: `[b, s]`, the positions that a loss counts: the masked ones, or all that are taught
            where noise is also random words, which are not told from true ones.

    Examples:
        >>> text = TextProcess(mask_id=2, vocab_size=6)
        >>> tokens = torch.tensor([[3, 4]])
        >>> text.noised(tokens, tokens > 0, torch.ones(1)).counted
        tensor([[True, True]])
    """

    tokens: Tokens
    counted: Mask


@dataclass(frozen=True)
class TextProcess(TextIds):
    """The absorbing text process and the one home of ids.

    A subclass may have a schedule of its own, by `shares`, which the weights of the bound follow,
    or a noise of its own, by `noised`; it then says by `weigh` what errors weigh in the bound.

    Attributes:
        mask_id: the id of the absorbing token, `[MASK]`; an integer, in this process.
        vocab_size: number of ids, the width of the logits.
        pad_id: the id at padded positions; the mask id where the model has none.
        special_ids: further ids that no pseudo-text may choose (the mask and padding never are).
        start_id: where texts carry a first token (`[CLS]`), it is placed there in pseudo-texts.
        end_id: where texts carry a last token (`[SEP]`).
        end: of a pseudo-text: `placed` puts `end_id` at the end of the length it was given;
            `predicted` lets the decoder choose `end_id`, and the text ends at the first one.
        taught_padding: padded positions behind a text that the decoder's losses count, with
            `pad_id` as their token: `none` of them, the `first`, so that the decoder learns to end
            a text, or `all`, as trainers do whose sampler writes padding behind it. Padding in
            front of a text is never taught.

    Raises:
        ValueError: an id outside the vocabulary, padding to be taught without a `pad_id`, or shares
            of a subclass that are no noise.

    Examples:
        >>> import torch
        >>> text = TextProcess(mask_id=2, vocab_size=6, pad_id=0)
        >>> text.fully_masked(torch.tensor([[True, True, False]]))
        tensor([[2, 2, 0]])

        A schedule of one's own: few words are masked at first.

        >>> from cyclevae import Shares
        >>> class Late(TextProcess):
        ...     def shares(self, time):
        ...         return Shares(1 - time**2, time**2, torch.zeros_like(time))
        >>> Late(mask_id=2, vocab_size=6).weigh(torch.ones(1, 1), torch.tensor([0.5]))  # 2 / t
        tensor([[4.]])
    """

    replaces: bool = field(init=False, repr=False, compare=False)  # noise is also random words
    _written: bool = field(init=False, repr=False, compare=False)
    _linear: bool = field(init=False, repr=False, compare=False)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "mask" in vars(cls):
            raise TypeError(
                f"{cls.__name__} has a `mask` of its own, which no loss would call: name it "
                "`noised`, and say by `weigh` what errors weigh in the bound"
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        written = self.slopes if self._defined("slopes") <= self._defined("shares") else None
        masks, replaces, linear = check_shares(type(self).__name__, self.shares, written)
        object.__setattr__(self, "_written", written is not None)
        object.__setattr__(self, "replaces", replaces)
        object.__setattr__(self, "_linear", linear)
        if masks and self.mask_id is None:
            raise ValueError(
                f"`shares` of {type(self).__name__} mask words, and it has no mask: derive it from "
                "TextProcess or HybridTextProcess, which have a `mask_id`"
            )

    # Noise

    def shares(self, time: Time) -> Shares:
        """The shares of kept, masked and random words at times: `1 - t`, `t` and 0.

        Smooth, and by operations of torch alone: the weights of the bound are its derivatives.
        """
        return Shares(1 - time, time, torch.zeros_like(time))

    def slopes(self, time: Time) -> Shares:
        """The derivatives of `shares`, written out.

        A subclass with shares of its own need not: they are then found by forward differentiation,
        for which `torch.compile` makes a graph for each number of rows.
        """
        return Shares(-torch.ones_like(time), torch.ones_like(time), torch.zeros_like(time))

    def derivatives(self, time: Time) -> Shares:
        """How fast the shares grow, at times between 0 and 1."""
        return self.slopes(time) if self._written else derivatives(self.shares, time)

    def noised(
        self,
        tokens: Tokens,
        attention_mask: Mask,
        time: Time,
        *,
        generator: torch.Generator | None = None,
    ) -> Noised:
        """Noise each taught token independently, as its row's time says.

        Examples:
            >>> text = TextProcess(mask_id=2, vocab_size=6, pad_id=0)
            >>> tokens, mask = torch.tensor([[3, 4, 0]]), torch.tensor([[True, True, False]])
            >>> text.noised(tokens, mask, torch.ones(1)).tokens
            tensor([[2, 2, 0]])
        """
        now, taught = self.shares(time), self.taught(attention_mask)
        draw = torch.rand(
            tokens.shape, dtype=torch.float32, device=tokens.device, **seeded(generator)
        )
        hidden = taught & (draw < (now.masked + now.random)[:, None])
        noise = self.noise(attention_mask, time, generator=generator)
        tokens = torch.where(hidden, noise.to(tokens.dtype), self.pad(tokens, attention_mask))
        return Noised(tokens, taught if self.replaces else hidden)

    def noise(
        self, attention_mask: Mask, time: Time, *, generator: torch.Generator | None = None
    ) -> Tokens:
        """What noise puts at the taught positions at a time, and padding elsewhere."""
        noise = torch.full(attention_mask.shape, self.null_id, device=attention_mask.device)
        if self.replaces:
            draws: Any = {"device": noise.device, **seeded(generator)}
            random = torch.randint(self.noise_ids, noise.shape, **draws)
            if self.mask_id is not None:  # all ids but the mask
                random = random + (random >= self.mask_id)
            now = self.shares(time)
            masked = torch.rand(noise.shape, dtype=torch.float32, **draws) * (1 - now.kept)[:, None]
            noise = torch.where(masked < now.masked[:, None], noise, random)
        return self.pad(noise, self.taught(attention_mask))

    def at_full_noise(
        self, attention_mask: Mask, *, generator: torch.Generator | None = None
    ) -> Tokens:
        """The text at time 1, of which nothing is left: what L2T starts from."""
        time = torch.ones(len(attention_mask), dtype=torch.float32, device=attention_mask.device)
        return self.noise(attention_mask, time, generator=generator)

    def fully_masked(self, attention_mask: Mask) -> Tokens:
        """The mask id at every taught position, padding elsewhere: the text at time 1.

        Raises:
            ValueError: a process without a mask.
        """
        self._need_mask("at_full_noise")
        tokens = torch.full(attention_mask.shape, self.null_id, device=attention_mask.device)
        return self.pad(tokens, self.taught(attention_mask))

    def mask(
        self,
        tokens: Tokens,
        attention_mask: Mask,
        rate: Time,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tokens, Mask]:
        """`noised`, by the name that it has where noise is masks.

        Raises:
            ValueError: a process without a mask.
        """
        self._need_mask("noised")
        return self.noised(tokens, attention_mask, rate, generator=generator)

    @property
    def noise_ids(self) -> int:
        """The number of ids that random words are drawn from: all but the mask."""
        return self.vocab_size - (self.mask_id is not None)

    def time_of(self, hidden: Time) -> Time:
        """The times at which these shares of the words are noise."""
        if self._linear:
            return hidden
        low, high = torch.zeros_like(hidden), torch.ones_like(hidden)
        for _ in range(24):  # to the precision of fp32
            middle = (low + high) / 2
            more = self._hidden(middle) < hidden
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        return high

    def counted_share(self, time: Number | TimePolicy) -> Number | None:
        """The share of taught positions that count, at a time or in the mean over a policy's.

        None where the cap of the policy moves with the step.
        """
        if self.replaces:
            return 1.0
        if isinstance(time, TimePolicy):
            return time.average(None if self._linear else self._hidden)
        if self._linear:
            return time
        return self._hidden(torch.tensor([time], dtype=torch.float64, device="cpu")).item()

    def _hidden(self, time: Time) -> Time:
        return 1 - self.shares(time).kept

    def weigh(self, errors: Float[Tensor, "b s"], time: Time) -> Float[Tensor, "b s"]:
        """The errors of masked words as the bound weighs them: `1/t`, at most 1000, for the mask.

        In general `masked'/masked`, the slope of the share over the share. It has no finite
        variance at time 0; what is left out there masks next to nothing. Where noise is random
        words, the shares alone say what a bound weighs.
        """
        flow = self.derivatives(inside(time)).masked
        return errors * flow[:, None] / self.shares(time).masked.clamp(min=1e-3)[:, None]

    def check_bound(self) -> None:
        """Refuse noise of one's own whose weights in the bound are those of another.

        Raises:
            ValueError: a class with a `noised` or `noise` of its own, and a `weigh` that it
                inherits; or one whose noise is random words, which are weighed by `shares` alone.
        """
        kinds, weigh = type(self).__mro__, self._defined("weigh")
        own = min(self._defined("noised"), self._defined("noise"))
        shared = kinds.index(TextProcess)
        if own < (shared if self.replaces else weigh):
            mend = "" if self.replaces else "write its `weigh`, or "
            raise ValueError(
                f"{kinds[own].__name__} has a noise of its own, and weighs errors in the bound as "
                f"{kinds[shared if self.replaces else weigh].__name__}, whose noise is another: "
                f"{mend}say how it differs by `shares` alone, which noise and weights both follow"
            )

    def _defined(self, name: str) -> int:
        """How far up the classes of this process a method is defined."""
        return next(i for i, kind in enumerate(type(self).__mro__) if name in vars(kind))

    def _need_mask(self, other: str) -> None:
        if self.mask_id is None:
            raise ValueError(f"{type(self).__name__} has no mask: use `{other}`")
