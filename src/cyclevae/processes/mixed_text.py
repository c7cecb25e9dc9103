"""Text processes whose noise is random words, alone or beside the mask."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch

from cyclevae._base.types import Number, Time
from cyclevae.processes.shares import Shares
from cyclevae.processes.text import TextProcess


@dataclass(frozen=True)
class UniformTextProcess(TextProcess):
    """Words are replaced by words drawn uniformly from all ids; there is no mask.

    At time `t` each taught word was replaced with probability `t`, perhaps by itself. All taught
    positions count in a loss, since a model cannot tell which words are true.

    Attributes:
        mask_id: none: all other options are those of `TextProcess`, by name or in its order.

    Raises:
        ValueError: a mask id, or as `TextProcess`.

    Reference: Austin et al., https://arxiv.org/abs/2107.03006.

    Examples:
        >>> text = UniformTextProcess(vocab_size=6, pad_id=0)
        >>> mask = torch.tensor([[True, True, False]])
        >>> text.at_full_noise(mask, generator=torch.Generator().manual_seed(0))
        tensor([[2, 3, 0]])
    """

    _: KW_ONLY
    mask_id: int | None = None

    has_mask: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.mask_id is not None:
            raise ValueError(
                f"`mask_id` is {self.mask_id}, and uniform noise has no mask: leave it out (put it "
                "into `special_ids` if the vocabulary has one that no text should use), or mix "
                "both kinds of noise by HybridTextProcess(mask_id=..., p_uniform=...)"
            )
        super().__post_init__()

    def shares(self, time: Time) -> Shares:
        """`1 - t`, 0 and `t`."""
        return Shares(1 - time, torch.zeros_like(time), time)

    def slopes(self, time: Time) -> Shares:
        """The derivatives: -1, 0 and 1."""
        return Shares(-torch.ones_like(time), torch.zeros_like(time), torch.ones_like(time))


@dataclass(frozen=True)
class HybridTextProcess(TextProcess):
    """Masks and random words, as in GIDD: most of the random ones in mid-time, none at time 1.

    Shares of `1 - t`, `t` and `c` over `1 + c`, with `c = 2^gamma p/(1 - p) (t (1 - t))^(gamma/2)`.
    All taught positions count in a loss: a word that is no mask may be wrong. L2T starts from
    masks.

    Attributes:
        p_uniform: `p`, the share of random words at time 1/2, where it is highest; above 0 and
            below 1.
        gamma: how closely they gather about mid-time; above 0, and 2 at most.

    Raises:
        ValueError: an option out of range, or as `TextProcess`.

    Reference: von Rütte et al., https://arxiv.org/abs/2503.04482, section 4; their code's
    `p_uniform` and `gamma`.

    Examples:
        >>> text = HybridTextProcess(mask_id=2, vocab_size=6, p_uniform=0.2)
        >>> torch.stack(text.shares(torch.tensor([0.5, 1.0])))  # kept, masked, random
        tensor([[0.4000, 0.0000],
                [0.4000, 1.0000],
                [0.2000, 0.0000]])
    """

    _: KW_ONLY
    p_uniform: Number
    gamma: Number = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.p_uniform < 1:
            raise ValueError(
                f"`p_uniform` must lie between 0 and 1, got {self.p_uniform!r}: use TextProcess "
                "for masks alone, and UniformTextProcess for random words alone"
            )
        if not 0 < self.gamma <= 2:
            raise ValueError(
                f"`gamma` must be above 0 and at most 2, got {self.gamma!r}: above 2 random words "
                "would have to become true again before time 1, which no noise does"
            )
        super().__post_init__()

    def shares(self, time: Time) -> Shares:
        """`1 - t`, `t` and `c` over `1 + c`."""
        c = self._height * (time * (1 - time)) ** (self.gamma / 2)
        return Shares((1 - time) / (1 + c), time / (1 + c), c / (1 + c))

    def slopes(self, time: Time) -> Shares:
        """The derivatives: of `a/(1 + c)` it is `a'/(1 + c) - k a/(1 + c)`, `k = c'/(1 + c)`."""
        bump = time * (1 - time)
        c = self._height * bump ** (self.gamma / 2)
        k = c * (self.gamma / 2) * (1 - 2 * time) / bump / (1 + c)
        kept, masked, random = self.shares(time)
        return Shares(-1 / (1 + c) - k * kept, 1 / (1 + c) - k * masked, k - k * random)

    @property
    def _height(self) -> float:
        return 2**self.gamma * self.p_uniform / (1 - self.p_uniform)
