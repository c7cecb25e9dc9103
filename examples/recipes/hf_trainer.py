"""Hugging Face `Trainer`: every term logged and evaluated, and `num_items_in_batch` honoured."""

from collections import defaultdict
from typing import Any

import task
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import cyclevae as cv


class CycleTrainer(Trainer):
    """Trains a `StepModule`; the data set yields the fields of `cyclevae.Batch`.

    Where `Trainer` counts labels over the accumulated batches and ranks, this one counts what
    each term averages over, so that gradients do not depend on how the rows are split.
    """

    def __init__(self, module: cv.StepModule, args: TrainingArguments, **options: Any) -> None:
        super().__init__(module, args, **options)
        self.model_accepts_loss_kwargs = True  # so the Trainer does not divide the loss again
        self.objective = module.objective
        module._keys_to_ignore_on_save = None  # of Hugging Face models; asked for when one loads
        self.terms, self.evaluated = defaultdict[str, list[Tensor]](list), defaultdict(list)
        self.steps: dict[str, set[int]] = defaultdict(set)  # in which each ran
        self.skips: list[Tensor] = []
        self.add_callback(LeaveOut(self.skips))

    def _prepare_inputs(self, inputs: Any) -> Any:
        if isinstance(inputs, cv.Batch):  # of a collator that makes one
            inputs = {name: part for name, part in inputs._asdict().items() if part is not None}
        return super()._prepare_inputs(inputs)

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        samples, _ = super().get_batch_samples(*arguments)
        batches = [cv.Batch(**self._prepare_inputs(fields)) for fields in samples]
        return samples, cv.pool_counts([self.objective.counts(batch) for batch in batches])

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        counts = num_items_in_batch or {}
        output = model(cv.Batch(**inputs), self.state.global_step, counts=counts)
        for name, value in output.metrics.items():
            share = name == "loss" or name in counts  # of the step's, for this part of its rows
            parts = 1 if share else self.current_gradient_accumulation_steps
            self.terms[name].append(value / parts)
            self.steps[name].add(self.state.global_step)
        if output.skip is not None:
            self.skips.append(output.skip)
        return (output.loss, output.metrics) if return_outputs else output.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # of training
            terms = {
                name: torch.stack(values).sum() / len(self.steps[name])
                for name, values in self.terms.items()
            }
            logs = {name: value.item() for name, value in terms.items()} | logs
            self.terms.clear()
            self.steps.clear()
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Every evaluation draws the same noise, and leaves that of training alone."""
        batch = cv.Batch(**self._prepare_inputs(inputs))
        evaluation, step = task.for_evaluation(self.objective), self.state.global_step
        number = len(self.evaluated["loss"]) * self.args.world_size + self.args.process_index
        generator = torch.Generator(self.args.device).manual_seed(number)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = evaluation(self.model.denoiser, batch, step=step, generator=generator)
        for name, value in output.metrics.items():
            self.evaluated[name].append(
                torch.stack([value, torch.ones_like(value)]) * len(batch.tokens)
            )
        return output.loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self.evaluated.clear()
        kwargs["metric_key_prefix"] = metric_key_prefix
        output = super().evaluation_loop(*args, **kwargs)
        for name, values in self.evaluated.items():
            total, count = self.accelerator.reduce(torch.stack(values).sum(0), "sum").tolist()
            output.metrics[f"{metric_key_prefix}_{name}"] = total / count
        return output

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A tied weight under one name: safetensors refuses two."""
        state = self.model.state_dict() if state_dict is None else state_dict
        names = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        super()._save(output_dir, {name: x for name, x in state.items() if name in names})


class LeaveOut(TrainerCallback):
    """Let a step with a term that is not finite move nothing, where `non_finite="skip"` says so."""

    def __init__(self, skips: list[Tensor]) -> None:
        self.skips = skips

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        if any(self.skips):  # waits for the device
            model.zero_grad()  # to None, which optimizers pass over
        self.skips.clear()


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
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=False,  # to be compared with the other recipes
            metric_for_best_model="text_loss",  # for True: a base loss, never one of a cycle
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=task.Mixed(data),
        eval_dataset=task.HeldOut(data),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        task.report("hf_trainer", task.measure(network, data, objective))


if __name__ == "__main__":
    main()
