"""Cycles for CCDD, https://github.com/zhouc20/CCDD: a text, and a latent for each of its words.

step = ccdd.step_module(MMDIT(config, len(tokenizer)), mask_id=tokenizer.mask_token_id)
output = step(cyclevae.Batch(input_ids, torch.ones_like(input_ids), latents), step=number)
output.loss.backward()
"""

from torch import Tensor, nn

import cyclevae as cv


class CCDD(nn.Module):
    """Its `MMDIT` or `MoeDiT` as `as_denoiser` calls it, for packed texts of `max_seq_len` words.

    The two times are those of the host, `sigma` and `c_cont`. Its text head is rounded up to a
    multiple of 128; what lies behind the vocabulary is no word, and neither is the mask.
    """

    def __init__(self, model: nn.Module, mask_id: int) -> None:
        super().__init__()
        self.model, self.mask_id = model, mask_id

    def forward(
        self, tokens: Tensor, latents: Tensor, *, text_time: Tensor, latent_time: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.read(tokens, latents, text_time, c_cont=latent_time)

    def read(self, *inputs: Tensor, **options: Tensor) -> tuple[Tensor, Tensor]:
        logits, latent_prediction = self.model(*inputs, **options)
        logits = logits[..., : self.model.vocab_size]
        logits[..., self.mask_id] = -1e6  # as in the host's loss
        return logits, latent_prediction


class PaddedCCDD(CCDD):
    """The same for texts padded to `max_seq_len`, with latents as long as they.

    The model has one mask for both, so batches need masks of latents, and these equal to those of
    the texts: `latent_mask`, `unpaired_text_latent_mask`, and `pseudo_text_mask`.
    """

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        *,
        text_time: Tensor,
        latent_time: Tensor,
        attention_mask: Tensor,
        latent_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        times = {"sigma": text_time, "c_cont": latent_time}
        return self.read(tokens, latents, **times, attention_mask=latent_mask)


def vp_linear(time: Tensor) -> tuple[Tensor, Tensor]:
    """The schedule `vp_linear` of the host; its `flow_linear` is `"flow"`."""
    return (1 - time).sqrt(), time.sqrt()


def step_module(
    model: nn.Module, *, mask_id: int, padded: bool = False, warmup_steps: int = 0
) -> cv.StepModule:
    """The host's joint loss, both directions alone, and both cycles."""
    objective = cv.CycleObjective(
        cv.TextProcess(mask_id=mask_id, vocab_size=model.vocab_size),
        cv.LatentProcess(vp_linear, prediction="x0"),
        terms=[
            cv.Unconditional(),
            cv.Text(),
            cv.Latent(weight=1.0),
            cv.CycleText(weight=cv.ramp(1.0, warmup_steps)),
            cv.CycleLatent(weight=cv.ramp(1.0, warmup_steps)),
        ],
    )
    network = (PaddedCCDD if padded else CCDD)(model, mask_id)
    return cv.StepModule(cv.as_denoiser(network), objective)
