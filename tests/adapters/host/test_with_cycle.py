"""The adapter in a checkout of the host: its own entry point, its own trainer classes."""

import importlib
import json
import math
import sys

import pytest
import torch
from launch import KEEP, WITH_CYCLE

from cyclevae.adapters.latentdlm import with_cycle

ENTRIES = ["train_mmdit_stable.py", "train_mmdit.py"]
X0 = {"latent_parameterization": "x0"}
CYCLE = {"loss.loss_type": "cycle_vae", **X0}
RESUME = "from cyclevae.adapters.latentdlm import resume, with_cycle"


@pytest.fixture
def train_cycle(train):
    def call(overrides=None, block=WITH_CYCLE, **options):
        return train(block=block, overrides=CYCLE | (overrides or {}), **options)

    return call


def column(run, name):
    return [row[name] for row in run.log]


# Training


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cycles_train(train_cycle, dtype):
    # at 3e-3 single steps of the host's own text loss jump too
    values = {"training.dtype": dtype, "logging.eval_freq": 15, "optimizer.lr": 1e-3}
    run = train_cycle(values, steps=40, batch=16)
    assert column(run, "step") == list(range(40))
    for name in ("loss", "text_loss", "latent_loss", "cycle_text_loss", "cycle_latent_loss"):
        assert all(map(math.isfinite, column(run, name))), name
    losses = column(run, "cycle_text_loss")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    assert run.output.count("cyclevae: step 0") == 1
    assert "Eval" in run.output
    assert not any(column(run, "non_finite_terms"))
    assert all(value.isfinite().all() for value in run.weights().values())


def test_the_other_trainer_file_trains(train_cycle):
    run = train_cycle(entry="train_mmdit.py")
    assert all(math.isfinite(row["cycle_text_loss"] + row["loss"]) for row in run.log)
    assert len(run.log) == 4
    assert "cyclevae: step 0" in run.output


def test_random_modes_run(train):
    """In LGDLM they crash without: its log takes the name of a mode for a tensor."""
    run = train(block=WITH_CYCLE, overrides={"loss.loss_type": "random"}, steps=6)
    assert column(run, "step") == list(range(6))
    assert all(map(math.isfinite, column(run, "loss")))


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_modes_of_the_host_stay_bit_for_bit(train, entry):
    values = {"loss.loss_type": "l2t"}
    alone = train(overrides=values, entry=entry)
    beside = train(block=WITH_CYCLE, overrides=values, entry=entry)
    assert beside.log == alone.log
    ours, theirs = beside.weights(), alone.weights()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"latent_parameterization": "epsilon"}, "latent_parameterization: x0"),
        ({"loss.cycle_text_wieght": 1.0}, "cycle_text_weight"),
        ({"loss.loss_type": "cycle_vea"}, "cycle_vae"),
    ],
)
def test_it_stops(train_cycle, overrides, message):
    run = train_cycle(overrides, check=False, steps=1)
    assert run.returncode != 0
    error = run.output[run.output.rindex("ValueError") :]
    assert message in error
    assert not run.log


def test_the_default_of_the_host_is_refused(train):
    values = {"loss.loss_type": "cycle_vae"}
    run = train(block=WITH_CYCLE, overrides=values, check=False, steps=1)
    assert run.returncode != 0
    assert "latent_parameterization: x0" in run.output[run.output.rindex("ValueError") :]


# Checkpoints


def test_checkpoints_are_those_of_the_host(train, train_cycle):
    alone, beside = train(overrides={"loss.loss_type": "unconditional", **X0}), train_cycle()
    ours, theirs = beside.weights(), alone.weights()
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}
    for block, other in ((WITH_CYCLE, alone), ("", beside)):
        load = f"saved = torch.load({str(other.checkpoint)!r}, weights_only=False)"
        loads = [load, "print('LOADED', trainer.load_state_dict(saved['model_state_dict']))"]
        run = train_cycle(block="\n".join([block, *loads]), steps=1, check=False)
        assert "LOADED <All keys matched successfully>" in run.output


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("values", [CYCLE, {"loss.loss_type": "unconditional"}])
def test_a_resumed_run_equals_one_that_never_stopped(train, entry, values):
    """In the first epoch of one process. The model has the dropout of the host's config.

    Both evaluate, before the checkpoint and after it.
    """
    values = values | {"logging.save_freq": 3, "logging.eval_freq": 2}
    whole = train(block=f"{WITH_CYCLE}\n{KEEP}", overrides=values, steps=6, entry=entry)
    expected = whole.weights()
    saved = whole.checkpoint.parents[1]
    log = saved / "training_log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]))  # as a run that stopped there leaves it

    go_on = f"state = resume({str(saved / 'latest-3')!r}, trainer, optimizer)"
    values = values | {"logging.save_dir": str(saved.parent)}  # the run goes on in its folder
    train(block=f"{WITH_CYCLE}\n{go_on}", imports=RESUME, overrides=values, steps=6, entry=entry)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 4, 5]
    for row, uninterrupted in zip(rows, whole.log[3:], strict=True):
        for moving in ("ema_loss", "loss_std"):  # of a fork's loop, which starts them anew
            row.pop(moving, None), uninterrupted.pop(moving, None)
        assert row == uninterrupted
    ours = whole.weights()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert (saved / "training_log-3.jsonl").read_text() == "".join(lines[:3])


# The base losses, in this process


@pytest.fixture
def make_trainer(checkout, toy, monkeypatch):
    """A real trainer of one of the two files, in evaluation mode, which has no dropout."""
    pytest.importorskip("mmdit")
    from omegaconf import OmegaConf
    from transformers import BertTokenizer

    monkeypatch.syspath_prepend(str(checkout))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    host = "latentDLM_mmdit."

    def make(file, parameterization, loss):
        parts = {
            "model": {
                "hidden_size": 32, "cond_dim": 32, "n_blocks": 1, "n_heads": 2, "dropout": 0.1,
                "max_seq_len": 32, "latent_dim": 32, "num_residual_streams": 2,
                "qk_rmsnorm": True, "use_multimodal": True, "cluster_size": 0, "t_eps": 1e-4,
            },
            "training": {"low_discrepancy_sampling": True},
            "latent_parameterization": parameterization,
            "loss": loss,
        }  # fmt: skip
        config = OmegaConf.create(parts)
        tokenizer = BertTokenizer.from_pretrained(toy / "tokenizer")
        torch.manual_seed(0)
        models = importlib.import_module(f"{host}models.multimodal_mmdit")
        model = models.MultimodalMMDiT(
            config=config.model, vocab_size=len(tokenizer), latent_dim=32, cluster_size=0
        )
        for parameter in model.parameters():  # some start at 0, and hide what depends on them
            torch.nn.init.normal_(parameter, std=0.1)
        schedule = importlib.import_module(f"{host}diffusion_process").MaskedDiffusion(tokenizer)
        module = importlib.import_module(host + file)
        # A fork draws the times at which LGDLM has 1: one objective at 1 stands for both.
        if hasattr(module, "sample_t"):
            monkeypatch.setattr(module, "sample_t", lambda c, n, **options: torch.ones(n))
        trainer = module.MultimodalDiffusionTrainer_new(
            model=model,
            tokenizer=tokenizer,
            text_noise_schedule=schedule,
            dtype=torch.float32,
            config=config,
        )
        monkeypatch.setattr(
            trainer.latent_diffusion,
            "sample_continuous_timesteps",
            lambda n, device=None: torch.ones(n),
        )
        return trainer.eval()

    return make


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 30, (6, 12), generator=generator)
    mask = (torch.arange(12) < torch.tensor([12, 9, 7, 12, 5, 3])[:, None]).float()
    ids = torch.where(mask.bool(), ids, 0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "latent": torch.randn(6, 32, generator=generator),
    }


@pytest.mark.filterwarnings("ignore")  # of what the host imports
@pytest.mark.parametrize("parameterization", ["v_param", "x0", "epsilon"])
@pytest.mark.parametrize("file", ["improved_trainer_stable", "improved_trainer"])
@pytest.mark.parametrize("mode", ["l2t", "t2l"])
def test_base_losses_are_those_of_the_host(make_trainer, file, mode, parameterization):
    alone = make_trainer(file, parameterization, {"loss_type": mode, "latent_loss_weight": 0.1})
    off = {"cycle_text_weight": 0.0, "cycle_latent_weight": 0.0, "latent_loss_weight": 0.1}
    if mode == "t2l":
        off["text_loss_weight"] = 0.0  # the draws are those of one direction
    ours = with_cycle(make_trainer(file, parameterization, {"loss_type": "cycle_vae", **off}))
    assert all(map(torch.equal, alone.state_dict().values(), ours.state_dict().values()))
    outputs = []
    for trainer in (alone, ours):
        torch.manual_seed(2)
        loss, metrics = trainer(batch(), step=1)
        loss.backward()
        outputs.append((loss, dict(metrics.items()), trainer))
    (loss, theirs, _), (total, found, _) = outputs
    name, rtol = {"l2t": ("text_loss", 1e-5), "t2l": ("latent_loss", 1e-3)}[mode]
    assert found[name] == pytest.approx(theirs[name], rel=rtol)
    if mode == "t2l":  # in l2t ours adds the term of the latents, which has its own weight
        assert total.item() == pytest.approx(loss.item(), rel=rtol)
        grads = [
            {n: p.grad for n, p in t.named_parameters() if p.grad is not None}
            for _, _, t in outputs
        ]
        assert any(grad.abs().max() > 0 for grad in grads[0].values())
        for key, grad in grads[0].items():
            torch.testing.assert_close(grads[1][key], grad, rtol=1e-2, atol=1e-5)
