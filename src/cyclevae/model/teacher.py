"""A teacher: a frozen copy of a network that follows it slowly."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cyclevae._base.types import Number
from cyclevae.model.denoiser import Denoiser, as_denoiser


class Teacher(nn.Module):
    """A frozen copy of a network whose weights are a moving average of the network's.

    `teacher <- decay teacher + (1 - decay) network`, once per `update`; it starts as an exact copy,
    and buffers are copied at each update. No parameter requires a gradient, and it stays in eval
    mode whatever mode its parent is set to. Its `state_dict` holds the average, so training resumes
    exactly.

    Under FSDP2 make it of the plain network, before `fully_shard`, and shard `teacher.network`
    in the same way (FSDP2 modules cannot be copied). FSDP1 is not supported.

    Args:
        network: what `as_denoiser` takes: plain, or wrapped in DDP or `torch.compile`. The plain
            module inside is copied.
        decay: of the average, in [0, 1]; 0 copies at each update, 1 never moves.

    Attributes:
        network: the copy.
        denoiser: a `Denoiser` around the copy, which is what the losses take.

    Raises:
        TypeError: not a module.
        ValueError: a `decay` outside [0, 1], or weights in half precision, which cannot move by a
            thousandth.

    Reference: Tarvainen and Valpola, mean teachers, https://arxiv.org/abs/1703.01780.

    Examples:
        >>> from cyclevae.testing import toy_denoiser
        >>> network = toy_denoiser(seed=0)[0].module
        >>> teacher = Teacher(network, decay=0.9)
        >>> with torch.no_grad():
        ...     _ = network.shared.bias.add_(1.0)
        >>> teacher.update(network)
        >>> (network.shared.bias - teacher.network.shared.bias).tolist()
        [0.8999..., 0.8999..., 0.8999..., 0.8999...]
    """

    def __init__(self, network: nn.Module, decay: Number = 0.999) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"`decay` must lie in [0 (copy), 1 (never move)], got {decay!r}")
        source = as_denoiser(network).module
        for name, parameter in source.named_parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16) and 0 < decay < 1:
                raise ValueError(
                    f"`network` holds {name!r} in {parameter.dtype}, too coarse for an average "
                    f"with decay {decay:g}: its small steps would be rounded away; keep the "
                    "weights in float32 and use autocast"
                )
        self.decay = decay
        self.network = copy.deepcopy(source, _computed(source)).requires_grad_(False)
        self.train(False)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "network":  # which may be wrapped in place
            self.denoiser = as_denoiser(value)

    def update(self, network: nn.Module) -> None:
        """Move towards a network, plain or wrapped; call it after each optimizer step.

        Raises:
            ValueError: a network whose parameters and buffers are not those of the copy.
        """
        source = as_denoiser(network).module
        own, others = (
            [(n, t.shape) for n, t in (*module.named_parameters(), *module.named_buffers())]
            for module in (self.network, source)
        )
        if own != others:
            raise ValueError(
                "`network` is not the one this teacher copies: parameters and buffers differ in "
                f"name or shape ({len(own)} here, {len(others)} there)"
            )
        # not AveragedModel, which reads its counter from the device for each parameter
        ema: Any = get_ema_multi_avg_fn  # which has no annotations
        ema(self.decay)(
            *([p.detach() for p in module.parameters()] for module in (self.network, source)), None
        )
        with torch.no_grad():
            for buffer, other in zip(self.network.buffers(), source.buffers(), strict=True):
                buffer.copy_(other)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode: a teacher has no dropout."""
        return super().train(False)


def _computed(module: nn.Module) -> dict[int, Any]:
    """Copies of weights that the last forward computed, as `weight_norm` does: they cannot be."""
    kept = [value for part in module.modules() for value in vars(part).values()]
    return {id(x): x.detach().clone() for x in kept if isinstance(x, Tensor) and x.grad_fn}


def check_frozen(teacher: Denoiser) -> None:
    """Refuse a teacher that would learn from what it judges, or that judges with dropout."""
    if not hasattr(teacher, "denoise"):
        raise TypeError(
            f"`teacher` must be a Denoiser, got {type(teacher).__name__}; of a Teacher, give its "
            "`.denoiser`"
        )
    module = getattr(teacher, "module", None)
    if not isinstance(module, nn.Module):
        return
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            raise ValueError(
                f"`teacher` must be frozen, and its parameter {name!r} requires a gradient: prior "
                "and encoder would learn to agree; use Teacher(network).denoiser, or call "
                "requires_grad_(False) on a copy of the network"
            )
    if any(part.training for part in module.modules()):
        raise ValueError(
            "`teacher` must be in eval mode; use Teacher(network).denoiser, which always is, or "
            "call .eval() on it"
        )
