"""The loss of a step, for each row of the matrix: an objective, and what some rows add to it."""

from dataclasses import replace

import torch
from batches import Drawn, texts_of
from data import Regime, Split
from matrix import HALF, NO_CYCLES, Row
from torch import Tensor, nn

import cyclevae as cv

Processes = tuple[cv.TextProcess, cv.LatentProcess]
OFF = {"text_weight": 0.0, "latent_weight": 0.0, "unconditional_weight": 0.0, **NO_CYCLES}


def objectives(row: Row, processes: Processes) -> list[cv.CycleObjective]:
    """The objectives of a row; more than one take turns."""
    plain = cv.CycleObjective(*processes).to_config()
    told = row.modes or (row.options,)
    return [cv.CycleObjective.from_config({**plain, **options}) for options in told]


class RowLoss:
    """The loss of a step, with what it needs beside the network."""

    def __init__(
        self,
        row: Row,
        processes: Processes,
        network: nn.Module,
        train: Split,
        seed: int,
        labels: "Labels | None" = None,
    ) -> None:
        self.row, self.train, self.labels = row, train, labels
        self.objectives = objectives(row, processes)
        device = train.latents.device
        self.noise = torch.Generator(device).manual_seed(seed)
        self.turns = torch.Generator().manual_seed(seed)
        self.passes = 0
        off = cv.CycleObjective(*processes, **OFF)
        self.teach_text = replace(off, text_weight=HALF["cycle_text_weight"]["weight"])
        self.teach_latent = replace(off, latent_weight=HALF["cycle_latent_weight"]["weight"])
        reads_teacher = any(o.prior in ("learned", "ddvi") for o in self.objectives)
        self.teacher = cv.Teacher(network) if reads_teacher else None
        self.encoder_error = 1.0  # the T2L mean squared error of the last step, averaged

    def after_step(self, network: nn.Module) -> None:
        if self.teacher is not None:
            self.teacher.update(network)

    def loss(self, denoiser: cv.Denoiser, drawn: Drawn, step: int) -> Tensor:
        batch = drawn.batch
        turn = step % len(self.objectives)
        if self.row.shuffled:
            turn = int(torch.randint(len(self.objectives), (), generator=self.turns))
        objective = self.objectives[turn]
        output = objective(
            denoiser, batch, step=step, generator=self.noise,
            teacher=self.teacher and self.teacher.denoiser,
        )  # fmt: skip
        self.passes += objective.passes(step)
        loss = output.loss
        if "latent_loss" in output.metrics:
            self.encoder_error += 0.05 * (output.metrics["latent_loss"].item() - self.encoder_error)
        if self.row.extra == "pseudo_pairs":
            text, latent = self.labels.batches(self.train, drawn.texts, drawn.latents)
            loss = loss + self._teach(self.teach_text, denoiser, text, step)
            loss = loss + self._teach(self.teach_latent, denoiser, latent, step)
        elif self.row.extra == "noised_latents":
            spread = torch.randn(batch.latents.shape, generator=self.noise).to(batch.latents)
            noised = batch.latents + self.encoder_error**0.5 * spread
            loss = loss + self._teach(self.teach_text, denoiser, (*batch[:2], noised), step)
        return loss

    def _teach(
        self, objective: cv.CycleObjective, denoiser: cv.Denoiser, pairs: tuple, step: int
    ) -> Tensor:
        self.passes += objective.passes(step)
        return objective(denoiser, cv.Batch(*pairs), step=step, generator=self.noise).loss


class Labels:
    """Pseudo-pairs, made once: a latent for every unpaired text, a text for every unpaired latent.

    The same bridges as in the cycles make them: one shot from noise, and the most probable words.
    """

    def __init__(
        self, network: nn.Module, train: Split, dealt: Regime, processes: Processes, seed: int
    ) -> None:
        text_process, latent_process = processes
        denoiser, generator = cv.as_denoiser(network.eval()), torch.Generator().manual_seed(seed)
        self.latents = torch.zeros_like(train.latents)
        self.tokens = train.tokens.new_zeros(train.tokens.shape)
        self.mask = torch.zeros_like(train.attention_mask)
        with torch.no_grad():
            for rows in dealt.unpaired_text.split(256):
                noise = torch.randn(train.latents[rows].shape, generator=generator)
                self.latents[rows] = cv.encode_text(
                    denoiser, *texts_of(train, rows), text_process=text_process,
                    latent_process=latent_process, noise=noise.to(train.latents),
                )  # fmt: skip
            for rows in dealt.unpaired_latent.split(256):
                mask = cv.draw_lengths(train.attention_mask[dealt.paired].cpu(), len(rows),
                                       generator=generator).to(train.latents.device)  # fmt: skip
                self.tokens[rows] = cv.unmask_text(
                    denoiser, train.latents[rows], mask, text_process=text_process, steps=1
                )
                self.mask[rows] = mask

    def batches(self, train: Split, texts: Tensor, latents: Tensor) -> tuple[tuple, tuple]:
        """(texts with made latents), (made texts with latents), each as tokens, mask, latents."""
        longest = int(self.mask[latents].sum(dim=1).max())
        made = self.tokens[latents, :longest], self.mask[latents, :longest]
        return (
            (*texts_of(train, texts), self.latents[texts]),
            (*made, train.latents[latents]),
        )
