"""Encoders and decoders that are honest, or cheat in a known way."""

import itertools

import torch

import cyclevae as cv
from cyclevae.model.denoiser import Denoised

TEXT = cv.TextProcess(mask_id=2, vocab_size=19, pad_id=0)
PROCESSES = {"text_process": TEXT, "latent_process": cv.LatentProcess(prediction="x0", shape=(8,))}
BITS = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)))  # of the words 3, ..., 18


def encode(tokens):
    """Two words as eight bits of +-1."""
    return BITS[(tokens - 3).clamp(min=0)].flatten(1)


def read(z):
    """Logits of two words from eight numbers, by their bits; other ids are never chosen."""
    logits = torch.full((len(z), 2, 19), -1e9)
    logits[..., 3:] = z.view(-1, 2, 4) @ BITS.T
    return logits


def pairs(rows=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 19, (rows, 2), generator=generator)
    return tokens, encode(tokens), torch.ones_like(tokens)


def batch(rows=64, seed=0):
    tokens, latents, mask = pairs(rows, seed)
    return cv.Batch(tokens, mask, latents)


class Toy:
    """A denoiser of two functions, which predicts x0 and knows nothing without its condition."""

    def __init__(self, encode=encode, read=read):
        self.encode, self.read = encode, read

    def denoise(self, tokens, latents, *, text_time, latent_time, attention_mask, need):
        if need == "latents":
            z = self.encode(tokens)
            return Denoised(None, torch.where(text_time[:, None] == 1, 0.0, z))
        logits = self.read(latents)
        return Denoised(torch.where(latent_time[:, None, None] == 1, 0.0, logits), None)


def hidden(tokens):
    """A latent that looks like one of another text, with the ids in digits of 1e-4."""
    return encode(tokens).roll(3, 0) + 1e-4 * encode(tokens)


def read_digits(z):
    """The digits behind the second, where there are any; else the bits."""
    digits = z - (z * 100).round() / 100
    return read(z) + 1e6 * read(digits).clamp(min=-1)


PRIVATE = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]).flip(0)  # whose place stands for whose bit


def private(tokens):
    """A code of its own, that only `read_private` knows."""
    return -encode(tokens)[:, PRIVATE]


def read_private(z):
    return read(-z[:, PRIVATE])
