"""The shape vocabulary. Annotations are documentation; the test run turns them into checks."""

from collections.abc import Callable
from typing import Literal

from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor

Tokens = Integer[Tensor, "b s"]
RelaxedTokens = Float[Tensor, "b s v"]  # one-hot rows that carry a gradient, or mixtures
AnyTokens = Tokens | RelaxedTokens
Mask = Bool[Tensor, "b s"]
MaskLike = Shaped[Tensor, "b s"]  # True = keep; integers and 0/1 floats are made bool at the door
Logits = Float[Tensor, "b s v"]
Latents = Float[Tensor, "b *n d"]  # [b, d], [b, n, d], [b, c, h, w], ...
LatentMask = Bool[Tensor, "b n"]  # which vectors of latents [b, n, d] are kept
LatentMaskLike = Shaped[Tensor, "b n"]
Rows = Bool[Tensor, " b"]
Time = Float[Tensor, " b"]  # 0 clean, 1 full noise
Scalar = Float[Tensor, ""]
Loss = Float[Tensor, "..."]  # a scalar, or per element with reduction="none"

Prediction = Literal["epsilon", "x0", "v", "velocity"]
Need = Literal["both", "logits", "latents"]
Estimator = Literal["unbiased", "biased"]
Reduction = Literal["mean", "sum", "none", "nats"]
TextWeighting = Literal["mean", "bound"]
Number = int | float  # beartype does not take an int for a float
Count = Number | Shaped[Tensor, ""]
Schedule = Callable[[int], Number]  # a weight as a function of the step
