"""Lightning: a `LightningModule` whose training step is a step of the objective."""

import lightning
import task
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

import cyclevae as cv


class CycleModule(lightning.LightningModule):
    """Any network that `as_denoiser` takes, trained by any objective."""

    def __init__(self, network: torch.nn.Module, objective: cv.CycleObjective) -> None:
        super().__init__()
        self.module = cv.StepModule(cv.as_denoiser(network), objective)

    @property
    def step(self) -> int:
        """The step of training: `global_step` counts those of every optimizer, two by twos."""
        optimizers = self.optimizers()
        return self.global_step // (len(optimizers) or 1 if isinstance(optimizers, list) else 1)

    def training_step(self, fields: dict[str, Tensor] | cv.Batch, _: int) -> Tensor | None:
        output = self.module(task.as_batch(fields), self.step)
        self.log_terms("train", output, fields)
        if output.skip is not None and output.skip:  # non_finite="skip"; waits for the device
            return None  # no update
        if not self.automatic_optimization:  # several optimizers: all of them after each backward
            self.manual_backward(output.loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
        return output.loss

    def validation_step(self, fields: dict[str, Tensor] | cv.Batch, number: int) -> None:
        """Each validation draws the same noise, and leaves that of training alone."""
        generator = torch.Generator(self.device).manual_seed(number)
        evaluation, batch = task.for_evaluation(self.module.objective), task.as_batch(fields)
        output = evaluation(self.module.denoiser, batch, step=self.step, generator=generator)
        self.log_terms("val", output, fields)

    def log_terms(
        self, kind: str, output: cv.StepOutput, fields: dict[str, Tensor] | cv.Batch
    ) -> None:
        self.log_dict(
            {f"{kind}/{name}": value for name, value in output.metrics.items()},
            sync_dist=True,  # the mean over ranks
            batch_size=max(len(part) for part in task.as_batch(fields) if part is not None),
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), task.LEARNING_RATE)


class TwoOptimizers(CycleModule):
    """An `EncoderDecoder` of which each half has an optimizer of its own."""

    def __init__(self, network: cv.EncoderDecoder, objective: cv.CycleObjective) -> None:
        super().__init__(network, objective)
        self.automatic_optimization = False  # as Lightning wants for more than one

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        halves = self.module.network.encoder, self.module.network.decoder
        return [torch.optim.AdamW(half.parameters(), task.LEARNING_RATE) for half in halves]


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    data = task.sentences()
    network, objective = task.make_network(data), task.make_objective(data)
    trainer = lightning.Trainer(
        max_epochs=task.EPOCHS,
        logger=CSVLogger(task.ROOT / "runs" / "recipes", name="lightning"),
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    trainer.fit(
        CycleModule(network, objective), DataLoader(task.Mixed(data), task.BATCH, shuffle=True)
    )
    if trainer.is_global_zero:
        task.report("lightning", task.measure(network, data, objective))


if __name__ == "__main__":
    main()
