"""A batch that a denoiser is tried on, and how it is read."""

import random
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cyclevae._base.types import Need
from cyclevae.model.denoiser import Denoised, Denoiser, need_latents, need_logits
from cyclevae.model.unread import read_logits
from cyclevae.processes.text import TextProcess

# Of the longest text, until the network takes one: some have few positions, some just so many.
TRIED = (7, 6, 5, 4, 3, 2, 1, *range(8, 33), 48, 50, 64, 77, 96, 100, 128, 256, 512)
PAGE = "docs/denoiser.md#a-network-with-its-own-signature"


class Mode(NamedTuple):
    """How a denoiser is read."""

    text_time: float
    latent_time: float
    need: Need

    def __str__(self) -> str:
        return f"at text_time {self[0]:g}, latent_time {self[1]:g}, need={self.need!r}"


L2T, T2L, JOINT = Mode(1.0, 0.0, "logits"), Mode(0.0, 1.0, "latents"), Mode(0.5, 0.5, "both")


class DryRun(NamedTuple):
    """A denoiser and the batch that it is tried on."""

    denoiser: Denoiser
    text_process: TextProcess
    tokens: Tensor
    latents: Tensor
    mask: Tensor
    hidden: Tensor
    seed: int = 0

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        text_process: TextProcess,
        shape: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        lengths: Sequence[int],
    ) -> "DryRun":
        """With texts of some lengths, all of their words different from their neighbours'."""
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        generator = torch.Generator().manual_seed(0)
        words = [i for i in range(text_process.vocab_size) if i not in text_process.forbidden_ids]
        chosen = torch.randint(len(words), mask.shape, generator=generator)
        tokens = text_process.frame(torch.tensor(words)[chosen], mask).to(device)
        latents = torch.randn(len(lengths), *shape, generator=generator).to(device, dtype)
        hidden = text_process.at_full_noise(mask, generator=generator).to(device)
        return cls(denoiser, text_process, tokens, latents, mask.to(device), hidden)

    def denoise(self, mode: Mode, tokens: Tensor, padding: int | None = None) -> Denoised:
        """One forward, from one random state."""
        if mode.text_time == 1:
            tokens = self.hidden
        if padding is not None:
            tokens = tokens.masked_fill(~self.mask, padding)
        time = torch.ones(len(tokens), device=tokens.device)
        torch.manual_seed(self.seed)
        random.seed(self.seed)  # self-conditioning, stochastic depth
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(self.seed)
        return self.denoiser.denoise(
            tokens,
            self.latents,
            text_time=mode.text_time * time,
            latent_time=mode.latent_time * time,
            attention_mask=self.mask,
            need=mode.need,
        )

    def outputs(self, mode: Mode, padding: int | None = None) -> dict[str, Tensor]:
        """What was needed, by name; logits at kept positions alone."""
        denoised, found = self.denoise(mode, self.tokens, padding), {}
        if mode.need != "latents":
            logits = read_logits(need_logits(denoised, self.tokens, self.text_process.vocab_size))
            found["logits"] = logits.masked_fill(~self.mask[..., None], 0)
        if mode.need != "logits":
            found["latent_prediction"] = need_latents(denoised, self.latents)
        return found

    def row(self) -> "DryRun":
        """The first row alone."""
        one = {name: getattr(self, name)[:1] for name in ("tokens", "latents", "mask", "hidden")}
        return self._replace(**one)

    def other_words(self, places: Tensor) -> "DryRun":
        """Each chosen word at some places `[b, s]` replaced by the next one that may be chosen."""
        process = self.text_process
        words = [i for i in range(process.vocab_size) if i not in process.forbidden_ids]
        following = torch.arange(process.vocab_size)
        following[words] = torch.tensor([*words[1:], words[0]])
        places = places & process.chosen(self.mask)
        other = following.to(self.tokens.device)[self.tokens]
        return self._replace(tokens=torch.where(places, other, self.tokens))


def fitting(batch_of: Callable[[Sequence[int]], DryRun], lengths: Sequence[int] | None) -> DryRun:
    """A batch that the network can take: of given lengths, or the first that fits."""
    failed: Exception | None = None
    tried = [lengths or ()]
    if lengths is None:
        one_length = not getattr(batch_of((1, 1)).denoiser, "takes_mask", True)
        tried = [(n, n, n) if one_length else (n, (n + 1) // 2, max(1, n // 3)) for n in TRIED]
    for each in tried:
        dry = batch_of(each)
        try:
            with torch.no_grad():
                for mode in (L2T, JOINT):
                    dry.denoise(mode, dry.tokens)
            return dry
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            failed, shown = error, dry
            if isinstance(error, TypeError):  # of the signature, not of the lengths
                break
    dry = shown
    more = ", nor of any other that was tried" if lengths is None else ""
    raise AssertionError(
        f"the network does not run on tokens {list(dry.tokens.shape)} and {dry.latents.dtype} "
        f"latents {list(dry.latents.shape)}{more} ({type(failed).__name__}: {failed}). Give "
        "`lengths=` the lengths of texts that it takes, `dtype=` and `latent_shape=` those of its "
        f"latents; a network with other arguments gets a small module around it: {PAGE}"
    ) from failed
