"""A transformer of `diffusers` as a `Denoiser`: it draws by flow matching, and now reads, too.

The sentences' latents of 32 numbers stand in for pictures `[2, 4, 4]`.
"""

from dataclasses import replace

import plain
import task
import torch
from data import Split
from diffusers import Lumina2Transformer2DModel
from torch import Tensor, nn

import cyclevae as cv
from cyclevae.testing import check_denoiser

PICTURE = 2, 4, 4


class ReadsAndDraws(nn.Module):
    """Lumina-Image 2.0's class, untouched, with embeddings for its captions and a head for words.

    Its layers take the caption and the picture as one sequence, so the head reads what the last one
    makes of the caption, which drawing leaves aside. Captions are padded on the right.
    """

    def __init__(self, model: Lumina2Transformer2DModel, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        self.words = nn.Embedding(vocab_size, model.config.cap_feat_dim)
        self.text_time = nn.Linear(1, model.config.cap_feat_dim)
        self.text_head = nn.Linear(model.config.hidden_size, vocab_size)

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        *,
        text_time: Tensor,
        latent_time: Tensor,
        attention_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        text_time = self.text_time(text_time[:, None, None].to(latents.dtype))
        hidden = []
        last = self.model.layers[-1]
        with last.register_forward_hook(lambda layer, inputs, output: hidden.append(output)):
            output = self.model(
                latents,
                timestep=1 - latent_time,  # it counts from noise to data,
                encoder_hidden_states=cv.embed_tokens(self.words.weight, tokens) + text_time,
                encoder_attention_mask=attention_mask,
                return_dict=False,
            )
        length = tokens.shape[1]  # the sequence ends with the batch's longest caption and picture
        caption = nn.functional.pad(hidden[0], (0, 0, 0, length))[:, :length]
        return self.text_head(caption), -output[0]  # and so does its velocity


def as_pictures(split: Split) -> Split:
    return replace(split, latents=split.latents.unflatten(1, PICTURE))


def main() -> None:
    data = task.sentences()
    vocab_size, length = len(data.vocabulary), data.train.tokens.shape[1]
    pictures = replace(data, train=as_pictures(data.train), test=as_pictures(data.test))
    objective = replace(
        task.make_objective(data),
        latent_process=cv.LatentProcess("flow", prediction="velocity", shape=PICTURE),
    )
    torch.manual_seed(0)
    model = Lumina2Transformer2DModel(  # or .from_pretrained(...), of bigger pictures
        in_channels=PICTURE[0],
        sample_size=PICTURE[1],
        patch_size=2,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=4,
        multiple_of=32,
        axes_dim_rope=(8, 4, 4),  # of a head's 16 numbers
        axes_lens=(length + 1, *PICTURE[1:]),
        cap_feat_dim=64,
    )
    network = ReadsAndDraws(model, vocab_size)
    check_denoiser(
        cv.as_denoiser(network), objective.text_process, objective.latent_process, relaxed=True
    )
    plain.train(network, objective, pictures)
    task.report("diffusers_transformer", task.measure(network, pictures, objective))


if __name__ == "__main__":
    main()
