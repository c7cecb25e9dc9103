"""The two forward processes: absorbing masks on text, Gaussian noise on latents."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cyclevae import _checks
from cyclevae._types import Latents, Logits, Mask, Number, Prediction, Time, Tokens

LatentSchedule = Literal["cosine", "linear", "sigmoid", "continuous_cosine"]
AlphaSigma = Callable[[Time], tuple[Time, Time]]


@dataclass(frozen=True)
class TextProcess:
    """The absorbing text process and the one home of ids.

    Attributes:
        mask_id: the id of the absorbing token, `[MASK]`.
        vocab_size: number of ids, the width of the logits.
        pad_id: the id at padded positions; the mask id where the model has none.
        special_ids: further ids that no pseudo-text may choose (the mask and padding never are).
        start_id: where texts carry a first token (`[CLS]`), it is placed there in pseudo-texts.
        end_id: where texts carry a last token (`[SEP]`).
        end: of a pseudo-text: `placed` puts `end_id` at the end of the length it was given;
            `predicted` lets the decoder choose `end_id`, and the text ends at the first one.

    Raises:
        ValueError: an id outside the vocabulary.

    Examples:
        >>> import torch
        >>> text = TextProcess(mask_id=2, vocab_size=6, pad_id=0)
        >>> text.fully_masked(torch.tensor([[True, True, False]]))
        tensor([[2, 2, 0]])
    """

    mask_id: int
    vocab_size: int
    pad_id: int | None = None
    special_ids: tuple[int, ...] = ()
    start_id: int | None = None
    end_id: int | None = None
    end: Literal["placed", "predicted"] = "placed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "special_ids", tuple(self.special_ids))
        ids = {"mask_id": self.mask_id, "pad_id": self.pad_id}
        ids |= {"start_id": self.start_id, "end_id": self.end_id}
        ids |= {f"special_ids[{i}]": value for i, value in enumerate(self.special_ids)}
        for name, value in ids.items():
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(f"`{name}` must lie in [0, {self.vocab_size}), got {value}")
        _checks.check_choice("end", self.end, ("placed", "predicted"))
        if self.end == "predicted" and self.end_id is None:
            raise ValueError("end='predicted' needs the `end_id` at which a text ends")
        if len(self.forbidden_ids) >= self.vocab_size:
            raise ValueError("every id of the vocabulary is forbidden; a pseudo-text needs words")

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "TextProcess":
        """Read the ids off a Hugging Face style tokenizer, by duck typing.

        `[CLS]` and `[SEP]` (or the beginning- and end-of-text tokens) are taken as placed where
        the tokenizer has them.

        Raises:
            ValueError: the tokenizer has no mask token.

        Examples:
            >>> class Tokenizer:  # such as transformers' AutoTokenizer gives
            ...     mask_token_id, pad_token_id, cls_token_id, sep_token_id = 4, 0, 2, 3
            ...     all_special_ids = [0, 1, 2, 3, 4]
            ...     def __len__(self):
            ...         return 100
            >>> TextProcess.from_tokenizer(Tokenizer()).forbidden_ids
            (0, 1, 2, 3, 4)
        """
        mask_id = getattr(tokenizer, "mask_token_id", None)
        if mask_id is None:
            raise ValueError(
                f"`tokenizer` ({type(tokenizer).__name__}) has no mask token; add one, as in "
                'tokenizer.add_special_tokens({"mask_token": "[MASK]"}), and resize the embedding'
            )
        start, end = (
            next((i for n in names if (i := getattr(tokenizer, n, None)) is not None), None)
            for names in (("cls_token_id", "bos_token_id"), ("sep_token_id", "eos_token_id"))
        )
        return cls(
            mask_id=mask_id,
            vocab_size=len(tokenizer),
            pad_id=getattr(tokenizer, "pad_token_id", None),
            special_ids=tuple(sorted(set(getattr(tokenizer, "all_special_ids", ())))),
            start_id=start,
            end_id=end,
        )

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """The ids that no bridge may choose."""
        named = {self.mask_id, self.pad_id, self.start_id, self.end_id, *self.special_ids}
        allowed = {None} if self.end == "placed" else {None, self.end_id}
        return tuple(sorted(i for i in named - allowed if i is not None))

    def forbid(self, logits: Logits) -> Logits:
        """Logits with the forbidden ids at minus infinity."""
        allowed = logits.clone()
        for forbidden in self.forbidden_ids:  # a few slices: an index tensor would be copied over
            allowed[..., forbidden] = -math.inf
        return allowed

    def fully_masked(self, attention_mask: Mask) -> Tokens:
        """The text at time 1: the mask id at every kept position, padding elsewhere."""
        tokens = torch.full(attention_mask.shape, self.mask_id, device=attention_mask.device)
        return self.pad(tokens, attention_mask)

    def pad(self, tokens: Tokens, attention_mask: Mask) -> Tokens:
        """Tokens with the padding id where the mask is False."""
        return tokens.masked_fill(~attention_mask, self._fill_id)

    def mask(
        self,
        tokens: Tokens,
        attention_mask: Mask,
        rate: Time,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tokens, Mask]:
        """Mask each kept token independently with its row's rate.

        Returns:
            The noised tokens `[b, s]`, and which of them were masked.
        """
        draw = torch.rand(
            tokens.shape, dtype=torch.float32, device=tokens.device, generator=generator
        )
        masked = attention_mask & (draw < rate[:, None])
        return self.pad(tokens, attention_mask).masked_fill(masked, self.mask_id), masked

    def frame(self, tokens: Tokens, attention_mask: Mask) -> Tokens:
        """Place the first and last token of a text, and its padding."""
        tokens = self.pad(tokens, attention_mask)
        if self.start_id is not None:
            first = attention_mask & (attention_mask.cumsum(1) == 1)
            tokens = tokens.masked_fill(first, self.start_id)
        if self.end_id is not None and self.end == "placed":
            last = attention_mask & (attention_mask.flip(1).cumsum(1).flip(1) == 1)
            tokens = tokens.masked_fill(last, self.end_id)
        return tokens

    def cut(self, tokens: Tokens, attention_mask: Mask) -> tuple[Tokens, Mask]:
        """End pseudo-texts at their first predicted end; unchanged where the end is placed."""
        if self.end == "placed" or self.end_id is None:
            return tokens, attention_mask
        ends = tokens.eq(self.end_id)
        attention_mask = attention_mask & (ends.cumsum(dim=1) - ends.long() == 0)
        return self.pad(tokens, attention_mask), attention_mask

    @property
    def _fill_id(self) -> int:
        return self.mask_id if self.pad_id is None else self.pad_id


def noise_latents(latents: Latents, noise: Latents, alpha: Time, sigma: Time) -> Latents:
    """Noise latents: `z_t = alpha z + sigma epsilon`."""
    alpha, sigma = _rowwise(latents, alpha, sigma)
    return alpha * latents + sigma * noise


def convert(
    value: Latents,
    z_t: Latents,
    alpha: Time,
    sigma: Time,
    *,
    source: Prediction,
    target: Prediction,
) -> Latents:
    """Convert a prediction between `epsilon`, `x0` and `v = alpha epsilon - sigma x0`.

    Computed in fp32 or better: in bf16 at full noise a perfect epsilon decodes to an error of 15.
    At `alpha = 0`, epsilon says nothing of x0, and at `sigma = 0`, x0 nothing of epsilon: these
    conversions divide by zero.

    Reference: Salimans and Ho, https://arxiv.org/abs/2202.00512, appendix D.

    Examples:
        >>> z_t, v = torch.tensor([[1.0]]), torch.tensor([[0.5]])
        >>> alpha, sigma = torch.tensor([0.6]), torch.tensor([0.8])
        >>> convert(v, z_t, alpha, sigma, source="v", target="x0")
        tensor([[0.2000]])
    """
    _checks.check_choice("source", source, get_args(Prediction))
    _checks.check_choice("target", target, get_args(Prediction))
    _checks.check_same_shape("value", value, "z_t", z_t)
    value, z_t = fp32(value), fp32(z_t)
    if source == target:
        return value
    alpha, sigma = _rowwise(value, alpha, sigma)
    match source, target:
        case "epsilon", "x0":
            return (z_t - sigma * value) / alpha
        case "epsilon", "v":
            return (value - sigma * z_t) / alpha
        case "x0", "epsilon":
            return (z_t - alpha * value) / sigma
        case "x0", "v":
            return (alpha * z_t - value) / sigma
        case "v", "x0":
            return alpha * z_t - sigma * value
        case _:
            return sigma * z_t + alpha * value


@dataclass(frozen=True)
class LatentProcess:
    """The variance-preserving latent process: a noise schedule and what the model predicts.

    The discretised schedules have 1000 steps, and time `t` in [0, 1] means step `floor(999 t)`:
    `cosine` (Nichol and Dhariwal, https://arxiv.org/abs/2102.09672, betas clipped to
    [1e-4, 0.9999]), `linear` and `sigmoid` (betas from 1e-4 to 0.02). `continuous_cosine` is
    `alpha = cos(pi t / 2)`, exactly 0 at full noise. A callable `t -> (alpha, sigma)` brings a
    schedule of one's own.

    Attributes:
        schedule: the noise schedule.
        prediction: what the latent head predicts.
        max_gain: refuse to read a clean latent off an epsilon prediction where `sigma / alpha`,
            which multiplies the prediction's error, is above this.
        shape: of one latent, `(d,)` or `(n, d)`; needed only where noise must be drawn and the
            batch holds no latents.

    Raises:
        ValueError: an unknown schedule or prediction, or a bad `max_gain`.

    Examples:
        >>> import torch
        >>> process = LatentProcess("cosine", prediction="epsilon")
        >>> process.gain(torch.tensor([0.5, 0.9, 1.0])).round(decimals=2).tolist()
        [1.00999..., 6.36999..., 641...]
    """

    schedule: LatentSchedule | AlphaSigma = "cosine"
    prediction: Prediction = "v"
    max_gain: Number = 10.0
    shape: tuple[int, ...] | None = None
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str):
            _checks.check_choice("schedule", self.schedule, get_args(LatentSchedule))
        _checks.check_choice("prediction", self.prediction, get_args(Prediction))
        _checks.check_positive("max_gain", self.max_gain)
        if self.shape is not None:
            shape = tuple(self.shape) if isinstance(self.shape, Iterable) else (self.shape,)
            if len(shape) not in (1, 2) or not all(isinstance(n, int) and n > 0 for n in shape):
                raise ValueError(f"`shape` must be (d,) or (n, d), got {self.shape!r}")
            object.__setattr__(self, "shape", shape)
        if callable(self.schedule):
            alpha, sigma = self.schedule(torch.linspace(0, 1, 5))
            if self.prediction == "v" and not torch.allclose(
                alpha**2 + sigma**2, torch.ones(5), atol=1e-3
            ):
                raise ValueError(
                    "a `v` prediction needs a variance preserving `schedule`: alpha^2 + sigma^2 "
                    f"must be 1, got {(alpha**2 + sigma**2).tolist()} at times 0, 1/4, ..., 1; "
                    "predict `x0` or `epsilon`"
                )
        elif self.schedule != "continuous_cosine":
            self.alpha_sigma(torch.zeros(1, device="cpu"))  # so that no table is made while tracing

    def alpha_sigma(self, time: Time) -> tuple[Time, Time]:
        """Signal and noise amplitudes at a time, `[b]` each, fp32 or better.

        Raises:
            ValueError: a time outside [0, 1].
        """
        time = _checks.as_time("time", time, time)
        if callable(self.schedule):
            return self.schedule(time)
        if self.schedule == "continuous_cosine":
            quarter = math.pi / 2
            return torch.sin(quarter * (1 - time)), torch.sin(quarter * time)
        key = time.device, time.dtype
        if key not in self._tables:  # float64 ends on the CPU: some devices have none
            alpha_bar = _discrete_alpha_bar(self.schedule)
            table = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()])
            self._tables[key] = table.to(time.dtype).to(time.device)
        alpha, sigma = self._tables[key][:, (time * 999).long()]
        return alpha, sigma

    def gain(self, time: Time) -> Time:
        """`sigma / alpha` `[b]`, by which x0-from-epsilon multiplies the prediction's error."""
        alpha, sigma = self.alpha_sigma(time)
        return sigma / alpha

    def noised(self, latents: Latents, noise: Latents, time: Time) -> Latents:
        """Latents at a time, in their own dtype."""
        _checks.check_same_shape("noise", noise, "latents", latents)
        return noise_latents(latents, noise, *self.alpha_sigma(time)).to(latents.dtype)

    def target(self, latents: Latents, noise: Latents, time: Time) -> Latents:
        """What the model should predict, fp32 or better."""
        _checks.check_same_shape("noise", noise, "latents", latents)
        match self.prediction:
            case "epsilon":
                return fp32(noise)
            case "x0":
                return fp32(latents)
            case "v":
                alpha, sigma = _rowwise(latents, *self.alpha_sigma(time))
                return alpha * noise - sigma * latents

    def to_x0(self, prediction: Latents, z_t: Latents, time: Time) -> Latents:
        """The clean latents a prediction means, in the dtype of `z_t`.

        Raises:
            ValueError: an epsilon prediction where `gain` is above `max_gain`.

        Examples:
            >>> process, time = LatentProcess(prediction="v"), torch.tensor([0.5])
            >>> z, noise = torch.ones(1, 2), torch.zeros(1, 2)
            >>> v, z_t = process.target(z, noise, time), process.noised(z, noise, time)
            >>> process.to_x0(v, z_t, time).round(decimals=3)
            tensor([[1., 1.]])
        """
        _checks.check_same_shape("prediction", prediction, "z_t", z_t)
        self.refuse_ill_conditioned(time)
        alpha, sigma = self.alpha_sigma(time)
        x0 = convert(prediction, z_t, alpha, sigma, source=self.prediction, target="x0")
        return x0.to(z_t.dtype)

    def refuse_ill_conditioned(self, time: Number | Time) -> None:
        """Refuse times at which an epsilon prediction says nothing of the clean latent.

        A number is always checked, a tensor where values are (see `check_values`).

        Raises:
            ValueError: the gain is above `max_gain`; the message lists the cures.
        """
        if self.prediction != "epsilon" or torch.compiler.is_compiling():
            return
        if not isinstance(time, Tensor):
            time = torch.tensor([time], dtype=torch.float64)
        elif not _checks.reads_values(time):
            return
        gain = float(self.gain(time).max()) if len(time) else 0.0
        if gain > self.max_gain:
            raise ValueError(
                f"an epsilon prediction at time {float(time.max()):g} has a gain of {gain:.4g}, "
                f"above max_gain = {self.max_gain:g}: its error would be multiplied by that much "
                "and the latent would be garbage that losses do not show. Ways out: predict `v` or "
                "`x0` (the only full cure); or start the bridge at a capped time such as 0.9 with "
                "the base T2L trained at random times up to that cap, and take a few DDIM steps "
                "under no_grad, the last one differentiable"
            )


def _discrete_alpha_bar(schedule: str, steps: int = 1000) -> Tensor:
    low, high = 1e-4, 0.02
    match schedule:
        case "cosine":
            grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu")
            alpha_bar = torch.cos((grid + 0.008) / 1.008 * math.pi / 2).square()
            betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(1e-4, 0.9999)
        case "linear":
            betas = torch.linspace(low, high, steps, dtype=torch.float64, device="cpu")
        case _:
            logistic = torch.linspace(-6, 6, steps, dtype=torch.float64, device="cpu").sigmoid()
            betas = logistic * (high - low) + low
    return torch.cumprod(1 - betas, dim=0)


def stratified_times(
    rows: int,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Time:
    """Uniform times `[rows]` in (0, 1], one in each of `rows` strata, in random order.

    Reference: variational diffusion models, https://arxiv.org/abs/2107.00630, appendix I.
    """
    jitter = torch.rand(1, dtype=torch.float32, device=device, generator=generator)
    order = torch.randperm(rows, device=device, generator=generator)
    return (1 - (order + jitter) / max(rows, 1)).clamp(min=1e-7)


def fp32(tensor: Tensor) -> Tensor:
    """A tensor in fp32 or better."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _rowwise(like: Tensor, *scales: Tensor) -> Iterable[Tensor]:
    shape = (-1,) + (1,) * (like.ndim - 1)
    return (scale.view(shape) for scale in scales)
