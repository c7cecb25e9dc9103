"""Hugging Face `Trainer`: every term logged, and `num_items_in_batch` honoured."""

from collections import defaultdict
from typing import Any

import task
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import cyclevae as cv


class CycleTrainer(Trainer):
    """Trains a `StepModule`; the data set yields the fields of `cyclevae.Batch`.

    Where `Trainer` counts labels over the accumulated batches and ranks, this one counts what
    each term averages over, so that gradients do not depend on how the rows are split.
    """

    def __init__(self, module: cv.StepModule, args: TrainingArguments, **options: Any) -> None:
        super().__init__(module, args, **options)
        self.model_accepts_loss_kwargs = True  # so the Trainer does not divide the loss again
        self.objective, self.terms = module.objective, defaultdict[str, list[Tensor]](list)

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        samples, _ = super().get_batch_samples(*arguments)
        batches = [cv.Batch(**self._prepare_inputs(fields)) for fields in samples]
        return samples, cv.pool_counts([self.objective.counts(batch) for batch in batches])

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        counts = num_items_in_batch or {}  # none in an evaluation
        output = model(cv.Batch(**inputs), self.state.global_step, counts=counts)
        for name, value in output.metrics.items():
            share = name == "loss" or name in counts  # of the step's, for this part of its rows
            self.terms[name].append(
                value * self.current_gradient_accumulation_steps if share else value
            )
        return (output.loss, output.metrics) if return_outputs else output.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        means = {name: torch.stack(values).mean().item() for name, values in self.terms.items()}
        self.terms.clear()
        super().log(means | logs, *args, **kwargs)


def main() -> None:
    data = task.sentences()
    network, objective = task.make_network(data), task.make_objective(data)
    trainer = CycleTrainer(
        cv.StepModule(cv.as_denoiser(network), objective),
        TrainingArguments(
            output_dir=str(task.ROOT / "runs" / "recipes" / "trainer"),
            num_train_epochs=task.EPOCHS,
            per_device_train_batch_size=task.BATCH // 2,
            gradient_accumulation_steps=2,
            learning_rate=task.LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.01,  # AdamW of the other recipes
            max_grad_norm=0.0,
            remove_unused_columns=False,  # the columns are those of `Batch`, not of `forward`
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=task.Mixed(data),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        task.report("hf_trainer", task.measure(network, data, objective))


if __name__ == "__main__":
    main()
