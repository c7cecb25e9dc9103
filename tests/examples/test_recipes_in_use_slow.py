"""The recipes in real use: evaluation, saving, resuming, mixed precision, `non_finite`, LoRA.

On a toy, in one process, so that each framework is imported once.
"""

import sys
from pathlib import Path

import lightning
import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForMaskedLM, TrainingArguments

import cyclevae as cv
from cyclevae.testing import ToyNetwork, assert_learns, check_denoiser, toy_batch, toy_denoiser
from cyclevae.testing._draws import SameDraws

benches = sys.modules.pop("plain", None)  # examples/bench has a file of this name too
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "recipes"))

import plain  # noqa: E402
import task  # noqa: E402
from hf_trainer import CycleTrainer  # noqa: E402
from lightning_module import CycleModule, TwoOptimizers  # noqa: E402
from masked_lm import LatentPrefix  # noqa: E402

del sys.path[0], sys.modules["plain"]
sys.modules |= {} if benches is None else {"plain": benches}

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks' own


class Tied(ToyNetwork):
    """Whose text head is the embedding, as in most language models."""

    def __init__(self):
        super().__init__(7, 4)
        self.text_head.weight = self.word.weight


def step_module(non_finite=None, terms=None):
    torch.manual_seed(0)
    terms = terms or [cv.Text(), cv.Latent(), cv.CycleText()]
    objective = cv.CycleObjective(*toy_denoiser()[1:], terms, non_finite=non_finite)
    return cv.StepModule(cv.as_denoiser(Tied()), objective)


def collate(rows):
    """A collator that returns a `Batch`."""
    return cv.Batch(**torch.utils.data.default_collate(rows))


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


# The Trainer's own accumulation


class Rows(Dataset):
    """Toy rows whose texts have 5, 4, 2 and 1 words, so that a mean of means is another mean."""

    def __init__(self):
        batch = toy_batch(seed=0, rows=4)
        mask = torch.arange(5) < torch.tensor([[5], [4], [2], [1]])
        self.batch = batch._replace(
            tokens=batch.tokens.clamp(min=3) * mask,
            attention_mask=mask,
            unpaired_tokens=batch.unpaired_tokens.clamp(min=3) * mask.flip(0),
            unpaired_attention_mask=mask.flip(0),
            pseudo_text_mask=mask,
        )

    def __len__(self):
        return 4

    def __getitem__(self, i):
        fields = self.batch._asdict()
        return {name: part[i] for name, part in fields.items() if part is not None}


PAIRS = ("tokens", "attention_mask", "latents")


class Pairs(Rows):
    """To evaluate: no text and no latent is without its partner."""

    def __getitem__(self, i):
        return {name: part for name, part in super().__getitem__(i).items() if name in PAIRS}


class SameDrawsModule(cv.StepModule):
    """Every row gets the same noise, however many there are."""

    def forward(self, *args, **kwargs):
        with SameDraws():
            return super().forward(*args, **kwargs)


def weights_after_a_step(tmp_path, batch, accumulate):
    denoiser, *processes = toy_denoiser(seed=0)
    terms = [cv.Text(time=1.0), cv.CycleLatent(), cv.Latent(), cv.CycleText()]
    objective = cv.CycleObjective(*processes, terms)
    trainer = CycleTrainer(
        SameDrawsModule(denoiser, objective),
        TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Rows(),
    )
    trainer.train()
    return trainer.state.log_history[0], list(denoiser.module.parameters())


def test_the_trainer_takes_the_same_step_however_rows_are_accumulated(tmp_path):
    expected_log, expected = weights_after_a_step(tmp_path, 4, 1)
    start = list(toy_denoiser(seed=0)[0].module.parameters())
    assert not all(torch.equal(*pair) for pair in zip(start, expected, strict=True))
    for split in ((2, 2), (1, 4), (3, 2)):
        log, weights = weights_after_a_step(tmp_path, *split)
        torch.testing.assert_close(weights, expected)
        for name in ("loss", "text_loss", "latent_loss", "cycle_text_loss"):
            assert log[name] == pytest.approx(expected_log[name], rel=1e-4), (split, name)


# Hugging Face


class Holed(Rows):
    """Whose row 2 is NaN."""

    def __init__(self):
        super().__init__()
        latents = self.batch.latents.clone()
        latents[2] = torch.nan
        self.batch = self.batch._replace(latents=latents)


def trainer(tmp_path, module, rows=None, **options):
    collator = options.pop("data_collator", None)
    defaults = dict(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        remove_unused_columns=False,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return CycleTrainer(
        module,
        TrainingArguments(**defaults | options),
        train_dataset=rows or Rows(),
        eval_dataset=Pairs(),
        data_collator=collator,
    )


@pytest.mark.parametrize(
    ("options", "non_finite"),
    [
        ({}, None),
        ({"bf16": True}, "zero"),
        ({"label_names": ["tokens"]}, "raise"),
        ({"data_collator": collate, "gradient_accumulation_steps": 2}, "skip"),
        ({"load_best_model_at_end": True, "metric_for_best_model": "text_loss"}, "skip"),
        ({"eval_on_start": True, "include_for_metrics": ["loss"]}, None),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, None),
        ({"prediction_loss_only": True, "eval_accumulation_steps": 1, "seed": 3}, None),
    ],
    ids=["plain", "bf16", "labels", "batches", "best", "start", "compiled", "loss only"],
)
def test_the_trainer_evaluates_saves_and_resumes(options, non_finite, tmp_path):
    """Tied weights, too: https://github.com/huggingface/transformers/issues/33807."""
    module = step_module(non_finite)
    whole = trainer(tmp_path, module, **options)
    whole.train()
    logs = whole.state.log_history
    evaluated = [entry for entry in logs if "eval_loss" in entry]
    trained = [entry for entry in logs if "loss" in entry]
    assert len(trained) == 4 and len(evaluated) == 2 + ("eval_on_start" in options)
    for entry in evaluated:
        assert entry["eval_text_loss"] > 0 and "text_loss" not in entry
        assert "eval_cycle_text_loss" not in entry
        assert entry["eval_loss"] == pytest.approx(entry["eval_loss"])
    for entry in trained:
        assert isinstance(entry["text_loss"], float) and "eval_text_loss" not in entry
    again = whole.evaluate()
    if "load_best_model_at_end" not in options:
        assert again["eval_text_loss"] == evaluated[-1]["eval_text_loss"]  # the same draws
    other = step_module(non_finite)
    predicted = whole.predict(Pairs())
    assert predicted.predictions is None and predicted.metrics["test_text_loss"] > 0
    resumed = trainer(tmp_path, other, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(weights(other), weights(module))


def test_the_trainer_leaves_out_a_step_that_is_not_finite(tmp_path):
    module = step_module("skip")
    options = {"save_strategy": "no", "eval_strategy": "no", "max_steps": 1}
    with cv.check_values(False):
        before = weights(module)
        trainer(tmp_path, module, Holed(), per_device_train_batch_size=4, **options).train()
        assert equal(weights(module), before)
        trainer(tmp_path, module, Rows(), per_device_train_batch_size=4, **options).train()
        assert not equal(weights(module), before)


# The plain loop, and Hydra's


def test_what_is_evaluated_are_base_losses():
    terms = [cv.Text(), cv.CycleLatent(), cv.Latent(), cv.CycleText()]
    objective = step_module("skip", terms).objective
    three = cv.phases(objective, latent_cycle_from=1, full_gradient_from=2)
    for each in (objective, three):
        assert [term.name for term in task.for_evaluation(each).terms] == ["text", "latent"]
    alone = step_module(terms=[cv.CycleText()]).objective
    assert task.for_evaluation(alone) == alone


def test_the_plain_loop_leaves_out_a_step_that_is_not_finite(monkeypatch):
    """As Hydra's `+objective.non_finite=skip` asks."""
    module = step_module("skip")
    before = weights(module)
    options = {"epochs": 1, "batch": 4, "learning_rate": 0.1}
    monkeypatch.setattr(task, "Mixed", lambda _: Holed())
    with cv.check_values(False):
        plain.train(module.network, module.objective, None, **options)
    assert equal(weights(module), before)
    monkeypatch.setattr(task, "Mixed", lambda _: Rows())
    plain.train(module.network, module.objective, None, **options)
    assert not equal(weights(module), before)


# Lightning


def fit(module, tmp_path, checkpoint=None, rows=None, collate_fn=None, **options):
    trainer = lightning.Trainer(
        default_root_dir=tmp_path,
        max_epochs=2,
        accelerator="cpu",
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        **options,
    )
    loaders = [DataLoader(rows or Rows(), 2, collate_fn=collate_fn), DataLoader(Pairs(), 4)]
    trainer.fit(module, *loaders, ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize(
    ("options", "non_finite"),
    [
        ({}, "skip"),
        ({"precision": "bf16-mixed"}, "zero"),
        ({"collate_fn": collate, "accumulate_grad_batches": 2}, "raise"),
    ],
    ids=["plain", "bf16", "batches"],
)
def test_lightning_validates_saves_and_loads(options, non_finite, tmp_path):
    module = CycleModule(step_module().network, step_module(non_finite).objective)
    trainer = fit(module, tmp_path, **options)
    logged = trainer.callback_metrics
    assert {"train/text_loss", "val/text_loss", "val/loss"} <= logged.keys()
    assert all(value.is_floating_point() for value in logged.values())
    before = logged["val/text_loss"].item()
    assert (
        trainer.validate(module, DataLoader(Pairs(), 4), verbose=False)[0]["val/text_loss"]
        == before
    )  # the same draws
    saved = trainer.checkpoint_callback.best_model_path
    given = {"network": Tied(), "objective": module.module.objective}
    loaded = CycleModule.load_from_checkpoint(saved, **given)
    assert equal(weights(loaded), weights(module))
    more = CycleModule(Tied(), module.module.objective)
    trainer = fit(more, tmp_path, checkpoint=saved, **options | {"max_steps": 100})
    assert more.step == module.step > 0


def test_lightning_leaves_out_a_step_that_is_not_finite(tmp_path):
    module = CycleModule(step_module().network, step_module("skip").objective)
    before = weights(module)
    with cv.check_values(False):
        fit(module, tmp_path, rows=Holed(), limit_train_batches=1, collate_fn=lambda r: collate(r))
        assert not equal(weights(module), before)  # row 2 is in the second batch
        before = weights(module)
        holed = torch.utils.data.Subset(Holed(), [2, 3])
        fit(module, tmp_path, rows=holed)
        assert equal(weights(module), before)


def test_lightning_averages_weights(tmp_path):
    """Its callback copies the whole module: the copy must read its own network."""
    module = CycleModule(step_module().network, step_module().objective)
    averaging = lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.5)
    start = weights(module)
    fit(module, tmp_path, callbacks=[averaging])
    copied = averaging._average_model.module.module
    assert copied.denoiser.network is copied.network is not module.module.network
    assert not equal(weights(module), start)


class Half(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.network, self.output = Tied(), output

    def forward(self, *inputs, **state):
        return self.network(*inputs, **state)[self.output]


def test_two_optimizers_take_turns(tmp_path):
    """`global_step` goes by two, so that a cycle of every other step would run always, or never.

    https://github.com/Lightning-AI/pytorch-lightning/issues/17958
    """
    network = cv.EncoderDecoder(Half(1), Half(0))
    terms = [cv.Text(), cv.Latent(), cv.CycleText(every=2)]
    objective = cv.CycleObjective(*toy_denoiser()[1:], terms)
    module = TwoOptimizers(network, objective)
    ran = []
    hook = module.module.register_forward_hook(
        lambda _, given, output: ran.append((given[1], "cycle_text_loss" in output.metrics))
    )
    trainer = fit(module, tmp_path, limit_val_batches=0)
    hook.remove()
    assert [step for step, _ in ran] == [0, 1, 2, 3] and trainer.global_step == 8
    cycles = [cycle for _, cycle in ran]
    assert cycles[0] == cycles[2] != cycles[1] == cycles[3]


# accelerate


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_saves_tied_weights_and_loads_them(precision, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # of the Trainers before
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    module = step_module("skip")
    prepared = accelerator.prepare(module)
    optimizer = accelerator.prepare(torch.optim.AdamW(module.parameters(), 0.01))
    for step in range(2):
        output = prepared(toy_batch(seed=step), step)
        accelerator.backward(output.loss)
        assert not output.skip and output.loss.dtype == torch.float32
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(tmp_path))
    saved = weights(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path))
    assert equal(weights(module), saved)
    assert module.network.text_head.weight is module.network.word.weight
    accelerator.free_memory()


# A masked language model


class LowRank(nn.Module):
    """What PEFT puts in the place of an embedding."""

    def __init__(self, base):
        super().__init__()
        self.base, width = base.requires_grad_(False), base.embedding_dim
        self.embedding_dim = width
        self.down = nn.Embedding(base.num_embeddings, 2)
        self.up = nn.Parameter(torch.zeros(2, width))

    @property
    def weight(self):
        return self.base.weight

    def forward(self, ids):
        return self.base(ids) + self.down(ids) @ self.up


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=7,
        max_position_embeddings=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return BertForMaskedLM(config)


def test_adapters_on_the_embeddings_of_a_masked_lm_learn():
    network = LatentPrefix(bert(), 4)
    network.model.requires_grad_(False)
    adapter = LowRank(network.model.get_input_embeddings())
    network.model.set_input_embeddings(adapter)
    denoiser, (_, *processes) = cv.as_denoiser(network), toy_denoiser()
    check_denoiser(denoiser, *processes, relaxed=True)
    full = cv.GradientPolicy("full")
    for term in (cv.Latent(), cv.CycleLatent(bridge="gumbel", policy=full)):
        loss = cv.CycleObjective(*processes, [term])(denoiser, toy_batch(), step=0).loss
        assert_learns(loss, [("up", adapter.up)])


@pytest.mark.parametrize("targets", [["word_embeddings"], ["query", "value"]])
def test_a_masked_lm_learns_by_peft(targets):
    model = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=targets))
    network = LatentPrefix(model, 4)
    denoiser, (_, *processes) = cv.as_denoiser(network), toy_denoiser()
    check_denoiser(denoiser, *processes, relaxed=True)
    output = cv.CycleObjective(*processes)(denoiser, toy_batch(), step=0)
    lora = [(n, p) for n, p in network.named_parameters() if "lora" in n]
    assert lora
    assert_learns(output.loss, lora)
