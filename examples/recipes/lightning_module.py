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

    def training_step(self, fields: dict[str, Tensor], _: int) -> Tensor:
        output = self.module(cv.Batch(**fields), self.global_step)
        self.log_dict(
            {f"train/{name}": value for name, value in output.metrics.items()},
            sync_dist=True,  # the mean over ranks
            batch_size=len(fields["tokens"]),
        )
        return output.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), task.LEARNING_RATE)


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
