"""Denoisers whose latent prediction is optimal and known in closed form."""

import itertools

import torch

from cyclevae.model.denoiser import Denoised


class Optimal:
    """The optimal latent prediction for latents of a mixture of isotropic Gaussians.

    With one component of mean `m` and variance `v` per dimension it is linear in `z_t`:
    `eps = sigma (z_t - alpha m) / (alpha^2 v + sigma^2)`. Where `given` is set, a pass that sees a
    clean text (text_time 0) takes the moments of `given` in place of its own.
    """

    def __init__(self, process, means=(0.0,), variances=(1.0,), weights=None, given=None):
        self.process, self.given = process, given
        self.means, self.variances = list(means), list(variances)
        self.weights = [1 / len(self.means)] * len(self.means) if weights is None else weights
        self.calls = 0

    def denoise(self, tokens, latents, *, text_time, latent_time, attention_mask, need="both"):
        self.calls += 1
        optimal = self if self.given is None or bool((text_time == 1).all()) else self.given
        return Denoised(None, optimal.predict(latents, latent_time))

    def predict(self, z_t, time):
        scales = self.process.alpha_sigma(time)
        alpha, sigma = (x.to(z_t.dtype).view(-1, *[1] * (z_t.ndim - 1)) for x in scales)
        logs, noises = [], []
        for mean, variance, weight in zip(self.means, self.variances, self.weights, strict=True):
            total = alpha**2 * variance + sigma**2
            off = z_t - alpha * mean
            logs.append(torch.tensor(weight).log() - ((off**2 / total + total.log()) / 2).sum(-1))
            noises.append(sigma * off / total)
        share = torch.stack(logs).softmax(0)[..., None]
        epsilon = (share * torch.stack(noises)).sum(0)
        x0 = (z_t - sigma * epsilon) / alpha
        match self.process.prediction:
            case "epsilon":
                return epsilon
            case "x0":
                return x0
            case _:
                return alpha * epsilon - sigma * x0


class Perfect:
    """The optimal denoiser of a small language whose texts `y` have latents `N(mean_y, variance)`.

    Texts of one length have the chances of `priors` among each other. It predicts x0: the mean of
    the means of the texts that the shown words leave, whatever the noised latent, so that it is
    optimal at full noise alone.
    """

    def __init__(self, words=(3, 4, 5), longest=2, dim=3, variance=0.5, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.words, self.variance, self.calls = words, variance, 0
        self.texts, self.priors, self.means = {}, {}, {}
        for n in range(1, longest + 1):
            self.texts[n] = torch.tensor(list(itertools.product(words, repeat=n)))
            shape, options = len(self.texts[n]), {"generator": generator, "dtype": torch.float64}
            draws = torch.rand(shape, **options) + 0.1
            self.priors[n] = draws / draws.sum()
            self.means[n] = torch.randn(shape, dim, **options)

    def denoise(self, tokens, latents, *, text_time, latent_time, attention_mask, need="both"):
        self.calls += 1
        logits = torch.full((*tokens.shape, max(self.words) + 1), -1e9, dtype=torch.float64)
        predicted = torch.zeros_like(latents)
        for n, texts in self.texts.items():
            rows = attention_mask.sum(dim=1) == n
            shown = tokens[rows, None, :n]
            fits = (shown == texts) | ~torch.isin(shown, torch.tensor(self.words))
            chances = self.priors[n] * fits.all(dim=2)
            predicted[rows] = chances / chances.sum(dim=1, keepdim=True) @ self.means[n]
            off = (latents[rows, None] - self.means[n]).square().sum(dim=2)
            seen = (latent_time[rows] == 0)[:, None]
            chances = torch.where(seen, chances * (-off / (2 * self.variance)).exp(), chances)
            chances = chances / chances.sum(dim=1, keepdim=True)
            for word in self.words:
                here = chances @ (texts == word).double()
                logits[:, :n, word] = logits[:, :n, word].index_put((rows,), here.log())
        return Denoised(logits.clamp(min=-1e9), predicted)
