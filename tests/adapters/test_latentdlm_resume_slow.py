"""Checkpoints of the host: read without running what they hold, and resumed exactly."""

import copy
import os
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from cyclevae.adapters.latentdlm import checkpoints, resume, with_cycle
from latentdlm_host import make_batch, make_host


@dataclass
class TrainingState:
    epoch: int = 0
    epoch_start_step: int = 0
    step: int = 0


TrainingState.__module__ = "latentDLM_mmdit.checkpoints_mmdit"


@pytest.fixture
def host_modules(monkeypatch):
    for name in ("latentDLM_mmdit", TrainingState.__module__):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[TrainingState.__module__].TrainingState = TrainingState


def start(wrap=with_cycle, **options):
    trainer = wrap(make_host(loss_type="cycle_vae", dropout=0.1, **options))
    return trainer, torch.optim.AdamW(trainer.parameters(), lr=1e-2)


def train(trainer, optimizer, steps, *, by_name):
    for step in steps:
        batch = make_batch(seed=step)
        loss, _ = trainer(batch, step=step) if by_name else trainer(batch, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder, trainer, optimizer, step):
    folder.mkdir(parents=True, exist_ok=True)
    saved = {
        "model_state_dict": trainer.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "state": TrainingState(step=step),
        "config": None,
    }
    torch.save(copy.deepcopy(saved), folder / "checkpoint.pt")
    torch.save({"torch": torch.get_rng_state(), "cuda": None}, folder / "rng_state_0.pt")


@pytest.mark.parametrize("by_name", [True, False])
def test_a_resumed_run_equals_one_that_never_stopped(host_modules, tmp_path, by_name):
    whole, optimizer = start()
    torch.manual_seed(0)
    train(whole, optimizer, range(3), by_name=by_name)
    save(tmp_path / "latest", whole, optimizer, step=3)
    (tmp_path / "training_log.jsonl").write_text("a\nb\n")
    train(whole, optimizer, range(3, 6), by_name=by_name)
    resumed, optimizer = start(seed=1)
    state = resume(tmp_path / "latest", resumed, optimizer)
    assert state == TrainingState(step=3)
    torch.randn(5)  # as the host draws in shuffling its data
    with torch.no_grad():
        resumed(make_batch())  # an evaluation is no training step
    train(resumed, optimizer, range(3, 6), by_name=by_name)
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
    assert (tmp_path / "training_log-3.jsonl").read_text() == "a\nb\n"


def test_the_bare_host_resumes_too(host_modules, tmp_path):
    save(tmp_path, *start(), step=2)
    bare, optimizer = start(lambda host: host, seed=1)
    assert resume(tmp_path / "checkpoint.pt", bare, optimizer).step == 2


def test_each_rank_has_its_own_random_state_and_the_first_keeps_the_log(
    host_modules, tmp_path, monkeypatch
):
    trainer, optimizer = start()
    save(tmp_path / "latest", trainer, optimizer, step=1)
    log, kept = tmp_path / "training_log.jsonl", tmp_path / "training_log-1.jsonl"
    log.write_text("a\n")
    states = [torch.Generator().manual_seed(seed).get_state() for seed in (1, 2)]
    for rank, state in enumerate(states):
        torch.save({"torch": state}, tmp_path / "latest" / f"rng_state_{rank}.pt")
    found = []
    monkeypatch.setattr(torch, "set_rng_state", found.append)
    for rank in (1, 0):
        monkeypatch.setattr(checkpoints, "this_rank", lambda rank=rank: rank)
        resume(tmp_path / "latest" / "checkpoint.pt", trainer, optimizer)
        trainer(make_batch(), step=1)
        assert torch.equal(found.pop(), states[rank]) and not found
        assert kept.exists() == (rank == 0)
    log.write_text("")
    resume(tmp_path / "latest", trainer, optimizer)
    assert kept.read_text() == "a\n"


def test_without_a_random_state_the_rest_is_resumed(host_modules, tmp_path):
    save(tmp_path, *start(), step=2)
    (tmp_path / "rng_state_0.pt").unlink()
    trainer, optimizer = start(seed=1)
    assert resume(tmp_path, trainer, optimizer).step == 2
    assert trainer(make_batch(), step=2)[0].isfinite()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_errors(host_modules, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer, optimizer = start()
    with pytest.raises(FileNotFoundError, match="expected a checkpoint at"):
        resume(tmp_path, trainer, optimizer)
    torch.save({"model_state_dict": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        resume(tmp_path, trainer, optimizer)
    assert not (tmp_path / "evil").exists()
    for other in ({"weights": 1}, torch.zeros(2)):
        torch.save(other, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match="holds no `model_state_dict`"):
            resume(tmp_path, trainer, optimizer)
    for name, options in {"narrow": {"hidden": 16}, "clustered": {"cluster_size": 3}}.items():
        save(tmp_path / name, *start(**options), step=1)
        with pytest.raises(ValueError, match="is of another model"):
            resume(tmp_path / name, trainer, optimizer)
    save(tmp_path, trainer, optimizer, step=1)
    torch.save({"torch": Evil()}, tmp_path / "rng_state_0.pt")
    before = [parameter.clone() for parameter in trainer.parameters()]
    with torch.no_grad():
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
        for weight in saved["model_state_dict"].values():
            weight.add_(1)
    torch.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"rng_state_0\.pt cannot be read as weights alone"):
        resume(tmp_path, trainer, optimizer)
    assert all(map(torch.equal, before, trainer.parameters()))
    assert not (tmp_path / "evil").exists()
