"""Cycles for D-DiT, https://github.com/zijieli-Jlee/Dual-Diffusion: images and their captions.

    null = pipe.tokenizer_3(" ", padding="max_length", max_length=256, return_tensors="pt")
    step = dual_diffusion.step_module(model, pipe.text_encoder_3, null.input_ids)
    output = step(cyclevae.Batch(caption_ids, torch.ones_like(caption_ids), images), step=number)
    output.loss.backward()

Images are latents `[b, c, h, w]` of the autoencoder of `pipe`, shifted and scaled as in the host.
"""

import torch
from torch import Tensor, nn

import cyclevae as cv


class DualDiffusion(nn.Module):
    """Its `SD3JointModelFlexible` as `as_denoiser` calls it; captions have one length.

    What the model reads of a caption are embeddings by a frozen T5, of masked words too. T5 stays
    outside of this module: in no checkpoint, in no average, and in evaluation mode.
    """

    def __init__(
        self, model: nn.Module, text_encoder: nn.Module, null_tokens: Tensor, mask_id: int
    ) -> None:
        super().__init__()
        self.model, self.mask_id = model, mask_id
        self.embed = lambda tokens: text_encoder(tokens)[0]
        self.register_buffer("null_tokens", null_tokens, persistent=False)

    def forward(
        self, tokens: Tensor, latents: Tensor, *, text_time: Tensor, latent_time: Tensor
    ) -> tuple[Tensor, Tensor]:
        no_caption = (text_time == 1) & (latent_time > 0)  # an image of nothing: guidance
        with torch.no_grad():
            words = self.embed(torch.where(no_caption[:, None], self.null_tokens, tokens))
        velocity, logits = self.model(latents, words, timestep=1000 * latent_time)
        logits[..., self.mask_id] = -1e6  # as in the host's loss: the mask is no word
        return logits, velocity


def step_module(
    model: nn.Module,
    text_encoder: nn.Module,
    null_tokens: Tensor,
    *,
    mask_id: int = 32099,  # <extra_id_0> of T5, which the host has as a constant
    warmup_steps: int = 0,
) -> cv.StepModule:
    """The host's two losses and both cycles."""
    objective = cv.CycleObjective(
        cv.TextProcess(mask_id=mask_id, vocab_size=model.text_proj_out.out_features),
        cv.LatentProcess("flow", prediction="velocity"),
        terms=[
            cv.Text(weight=0.2, weighting="bound"),
            cv.Latent(time=cv.TimePolicy("logit_normal"), space="x0", weight=1.0, null_rate=0.1),
            cv.CycleText(weight=cv.ramp(0.2, warmup_steps)),
            cv.CycleLatent(weight=cv.ramp(1.0, warmup_steps)),
        ],
    )
    network = DualDiffusion(model, text_encoder, null_tokens, mask_id)
    return cv.StepModule(cv.as_denoiser(network), objective)
