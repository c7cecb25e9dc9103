"""The loss of a step, for each row of the matrix: an objective, and what some rows add to it."""

import torch
from batches import Drawn, texts_of
from data import Split
from matrix import PLAIN, Row, merged
from torch import Tensor, nn

import cyclevae as cv

CYCLE = PLAIN["cycle_text"]
CROSSING = CYCLE["bridge"]["noise"]
Processes = tuple[cv.TextProcess, cv.LatentProcess]


def objectives(row: Row, processes: Processes) -> list[cv.CycleObjective]:
    """The objectives of a row; more than one take turns."""
    given = dict(zip(("text_process", "latent_process"), processes, strict=True))
    return [
        cv.CycleObjective.from_config({**given, "terms": merged(terms)})
        for terms in row.modes or (row.terms,)
    ]


class RowLoss:
    """The loss of a step, with what it needs beside the network."""

    def __init__(
        self,
        row: Row,
        processes: Processes,
        network: nn.Module,
        train: Split,
        seed: int,
        labels: Tensor | None = None,
    ) -> None:
        self.row, self.train, self.labels = row, train, labels
        self.objectives = objectives(row, processes)
        device = train.latents.device
        self.noise = torch.Generator(device).manual_seed(seed)
        self.turns = torch.Generator().manual_seed(seed)
        self.passes = 0
        self.processes = dict(zip(("text_process", "latent_process"), processes, strict=True))
        weight = CYCLE["weight"]
        if row.extra != "teacher_bridge":
            weight = weight["weight"]  # there is no waiting for what is there from the start
        taught = {"text": {"weight": weight}, "latent": None}
        (self.teach,) = objectives(Row("", taught), processes)
        (self.distil,) = objectives(Row("", {"text": None}), processes)
        self.teacher = None
        if row.extra == "teacher_bridge":
            self.teacher = cv.Teacher(network, decay=0.98)
        elif any(objective.setting.reads_teacher for objective in self.objectives):
            self.teacher = cv.Teacher(network)
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
            texts, labels = texts_of(self.train, drawn.texts), self.labels[drawn.texts]
            latents = self._noised(labels, CROSSING)
            loss = loss + self._teach(denoiser, *texts, latents, step)
            if self.row.distilled:
                loss = loss + self._run(self.distil, denoiser, *texts, labels, step)
        elif self.row.extra == "teacher_bridge" and self.teach.weights(step):
            self.passes += 1
            texts = batch.unpaired_tokens, batch.unpaired_attention_mask
            with torch.no_grad():
                latents = cv.encode_text(
                    self.teacher.denoiser, *texts, **self.processes, generator=self.noise
                )
            latents = self._noised(latents, CROSSING)
            loss = loss + self._teach(denoiser, *texts, latents, step)
        elif self.row.extra == "noised_latents":
            latents = self._noised(batch.latents, self.encoder_error**0.5)
            loss = loss + self._teach(denoiser, *batch[:2], latents, step)
        return loss

    def _noised(self, latents: Tensor, by: float) -> Tensor:
        noise = torch.randn(latents.shape, generator=self.noise, device=latents.device)
        return latents + by * noise

    def _teach(
        self, denoiser: cv.Denoiser, tokens: Tensor, mask: Tensor, latents: Tensor, step: int
    ) -> Tensor:
        """The base decoder loss on such pairs, weighted as the cycle is."""
        return self._run(self.teach, denoiser, tokens, mask, latents, step)

    def _run(
        self,
        objective: cv.CycleObjective,
        denoiser: cv.Denoiser,
        tokens: Tensor,
        mask: Tensor,
        latents: Tensor,
        step: int,
    ) -> Tensor:
        self.passes += objective.passes(step)
        batch = cv.Batch(tokens, mask, latents)
        return objective(denoiser, batch, step=step, generator=self.noise).loss
