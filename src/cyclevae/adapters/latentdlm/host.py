"""The host's model and processes as the library's own; its quirks end here."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cyclevae._base import checks
from cyclevae._base.types import Latents, Mask, Need, Prediction, Time, Tokens
from cyclevae.gradient_policy.roles import Roles, matches
from cyclevae.model.denoiser import Denoised
from cyclevae.model.unread import AnyLogits, left_unread
from cyclevae.processes.ids import TaughtPadding
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "x0": "x0", "v_param": "v"}
_HEADS = ("text_head", "text_head_clusters")
_ENCODER_ONLY, _DECODER_ONLY = ("latent_head.*",), ("text_head.*", "text_head_clusters.*")


def this_rank() -> int:
    """The number of this process in the host's group; 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class HostDenoiser:
    """A `Denoiser` around the host's model, called by its own names.

    Times stay in fp32 up to the call, where they are rounded as the host rounds them. The text
    heads run on no position: 18 % of the host's FLOPs at a vocabulary of 30,522, in a pass whose
    logits nobody reads. Of the others the losses read what the head was given, and its weight.

    Attributes:
        network: the model.
        module: the same, for parameter patterns.
        roles: the heads of each direction, where the model has the host's names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.network = self.module = model
        names = tuple([name for name, _ in model.named_parameters()])
        self.roles = Roles(
            *(
                tuple([pattern for pattern in patterns if matches(names, pattern)])
                for patterns in (_ENCODER_ONLY, _DECODER_ONLY)
            )
        )
        self.dtype = next(model.parameters()).dtype
        self.unread = False
        self.read: Tensor | None = None  # what the head was given
        self.head: nn.Linear | None = None  # of which logits may be left unread
        for name in _HEADS:
            head = getattr(model, name, None)
            if isinstance(head, nn.Linear):
                plain = type(head) is nn.Linear and not (
                    head._forward_hooks or head._forward_pre_hooks
                )
                if name == _HEADS[0] and plain:
                    self.head = head
                head.register_forward_pre_hook(self._skip)

    def denoise(
        self,
        tokens: Tokens,
        latents: Latents,
        *,
        text_time: Time,
        latent_time: Time,
        attention_mask: Mask,
        need: Need = "both",
    ) -> Denoised:
        """One forward of the model: see `Denoiser.denoise`."""
        if tokens.is_floating_point():
            raise TypeError("the host's text encoder reads ids, and a relaxed text is none")
        self.unread, self.read = need == "latents" or self.head is not None, None
        try:
            output = self.network(
                text_tokens=tokens,
                latents=latents[:, None],
                text_timesteps=text_time.to(self.dtype),
                latent_timesteps=latent_time.to(self.dtype),
                attention_mask=attention_mask,
            )
        finally:
            self.unread = False
        prediction = output[1]  # a third output are logits of clusters
        if prediction.ndim == 3:
            prediction = prediction.squeeze(1)
        logits: AnyLogits | None = None
        if need != "latents":
            logits = output[0]
            if self.head is not None and self.read is not None:
                logits, self.read = left_unread(self.head, self.read), None
        return Denoised(logits, None if need == "logits" else prediction)

    def _skip(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if head is self.head:
            self.read = inputs[0]
        return (inputs[0][:, :0],) if self.unread else None


class HostSchedule:
    """The host's own noise tables; its lookup asks the device whether times are above 1."""

    def __init__(self, diffusion: Any) -> None:
        amplitudes = (diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod)
        self._table = torch.stack([a.detach().float().cpu() for a in amplitudes])
        self._tables: dict[torch.device, Tensor] = {}

    def __call__(self, time: Time) -> tuple[Time, Time]:
        """Signal and noise amplitudes at a time: those of step `floor((steps - 1) t)`."""
        if time.device not in self._tables:
            self._tables[time.device] = self._table.to(time.device)
        table = self._tables[time.device]
        alpha, sigma = table[:, (time * (table.shape[1] - 1)).long()]
        return alpha, sigma


def latent_process_of(trainer: Any, max_gain: float) -> LatentProcess:
    """The trainer's own latent process, whatever its config says elsewhere.

    Raises:
        ValueError: a parameterisation that the host does not know.
    """
    diffusion = trainer.latent_diffusion
    name = diffusion.parameterization
    if name not in PREDICTIONS:
        raise ValueError(
            f"`latent_parameterization` is {name!r}; {checks.nearest(name, PREDICTIONS)}"
        )
    process = LatentProcess(HostSchedule(diffusion), PREDICTIONS[name], max_gain)
    process.alpha_sigma(torch.zeros(1, device=next(trainer.model.parameters()).device))
    return process


def text_process_of(trainer: Any, taught_padding: TaughtPadding) -> TextProcess:
    """The ids of the trainer's tokenizer, as wide as the model's text head.

    The decoder chooses `[CLS]` and `[SEP]` itself, as the host's sampler lets it.
    """
    tokenizer = trainer.tokenizer
    known = len(tokenizer)
    width = getattr(getattr(trainer.model, "text_head", None), "out_features", known)
    return TextProcess(
        mask_id=trainer.mask_token_id,
        vocab_size=width,
        pad_id=tokenizer.pad_token_id,
        special_ids=tuple(range(known, width)),  # columns of the head that stand for no token
        taught_padding=taught_padding,
    )
