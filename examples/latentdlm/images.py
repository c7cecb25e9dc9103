"""Cycles for the model of `latentIMG_mmdit/train_image_discrete.py` (LGDLM): texts and patches.

Its `MaskedDiffusionMMDiT` predicts tokens and patches of an image in one pass, and is trained on
the tokens alone. Here both directions train. Patches are latents, `[b, patches, width]`, and must
be given: its own `ImagePatchEncoder` learns, and latents that move while they are a target
collapse. Take those of a frozen encoder, with a variance of 1.

    step = images.step_module(MaskedDiffusionMMDiT(...), mask_id=103, vocab_size=30522, pad_id=0)
    output = step(cyclevae.Batch(caption_tokens, caption_mask, patches), step=number)
    output.loss.backward()
"""

import torch
from torch import Tensor, nn

import cyclevae as cv


class Images(nn.Module):
    """The model as `as_denoiser` calls it. It knows one time: that of the noisier side."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        *,
        text_time: Tensor,
        latent_time: Tensor,
        attention_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        logits, patches = self.model(
            text_tokens=tokens,
            image_tokens=latents,
            text_mask=attention_mask,
            timesteps=torch.maximum(text_time, latent_time),
        )
        return logits, patches


def step_module(
    model: nn.Module, *, mask_id: int, vocab_size: int, pad_id: int, warmup_steps: int = 0
) -> cv.StepModule:
    """Base losses and both cycles, whose latents are predicted as they are."""
    objective = cv.CycleObjective(
        cv.TextProcess(mask_id=mask_id, vocab_size=vocab_size, pad_id=pad_id),
        cv.LatentProcess(prediction="x0"),
        terms=[
            cv.Text(),
            cv.Latent(),
            cv.CycleText(weight=cv.ramp(1.0, warmup_steps), pairs=True),
            cv.CycleLatent(weight=cv.ramp(0.1, warmup_steps), pairs=True),
        ],
    )
    return cv.StepModule(cv.as_denoiser(Images(model)), objective)
