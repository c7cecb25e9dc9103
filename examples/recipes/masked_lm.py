"""A Hugging Face masked language model as a `Denoiser`: the latent is a token before the text."""

import plain
import task
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

import cyclevae as cv
from cyclevae.testing import check_denoiser


class LatentPrefix(nn.Module):
    """Any masked language model that takes `inputs_embeds`.

    The first position holds the noised latent and both times. What the model makes of it and of the
    mean of the words becomes the latent prediction; the other positions give the logits.
    """

    def __init__(self, model: PreTrainedModel, latent_dim: int) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        if type(head) is nn.Linear:
            model.set_output_embeddings(cv.TextHead.of(head))  # no logits before they are read
        self.model = model
        width = model.get_input_embeddings().weight.shape[1]  # also of an adapter
        self.latent_in = nn.Linear(latent_dim, width)
        self.times = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width))
        self.latent_out = nn.Linear(width, latent_dim)

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        *,
        text_time: Tensor,
        latent_time: Tensor,
        attention_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        times = self.times(torch.stack([text_time, latent_time], dim=1).to(latents.dtype))
        prefix = (self.latent_in(latents) + times)[:, None]
        output = self.model(
            inputs_embeds=torch.cat([prefix, self.embed(tokens)], dim=1),
            attention_mask=nn.functional.pad(attention_mask, (1, 0), value=True).long(),
            output_hidden_states=True,
        )
        hidden, keep = output.hidden_states[-1], attention_mask[..., None]
        mean = (hidden[:, 1:] * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1)
        return output.logits[:, 1:], self.latent_out(hidden[:, 0] + mean)

    def embed(self, tokens: Tensor) -> Tensor:
        """By the embedding's own call, which an adapter such as LoRA changes; its weight is not."""
        embedding = self.model.get_input_embeddings()
        if not tokens.is_floating_point():
            return embedding(tokens)
        every_word = torch.arange(tokens.shape[-1], device=tokens.device)
        return cv.embed_tokens(embedding(every_word), tokens)  # a relaxed text


def main() -> None:
    data = task.sentences()
    sizes = task.sizes(data)
    config = BertConfig(
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=sizes["length"] + 1,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    network = LatentPrefix(BertForMaskedLM(config), sizes["latent_dim"])  # or a pretrained model
    denoiser, objective = cv.as_denoiser(network), task.make_objective(data)
    check_denoiser(denoiser, objective.text_process, objective.latent_process, relaxed=True)
    plain.train(network, objective, data)
    task.report("masked_lm", task.measure(network, data, objective))


if __name__ == "__main__":
    main()
