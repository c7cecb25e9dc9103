"""A trained model survives its file, and nothing else is taken for one."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.testing import ToyNetwork, toy_batch, toy_denoiser

OPTIONS = {"vocab_size": 7, "latent_dim": 4}
_, TEXT, LATENT = toy_denoiser(seed=0)
OBJECTIVE = cv.CycleObjective(TEXT, LATENT, [cv.Text(weight=cv.ramp(1.0, 5)), cv.Latent()])


class Standardise(nn.Module):
    def __init__(self, train):
        super().__init__()
        self.register_buffer("mean", train.mean(dim=0))
        self.register_buffer("scale", train.std(dim=0))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.pt"


def test_what_comes_back_writes_the_same_texts(file):
    denoiser = toy_denoiser(seed=3)[0]
    standardise = Standardise(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    cv.save(file, denoiser, OBJECTIVE, options=OPTIONS, normaliser=standardise)
    other = Standardise(torch.zeros(2, 4))
    found, objective, normaliser = cv.load(file, ToyNetwork, normaliser=other)
    assert objective == OBJECTIVE and normaliser is other and not found.module.training
    assert torch.equal(other.scale, standardise.scale)
    for name, value in denoiser.module.state_dict().items():
        assert torch.equal(found.module.state_dict()[name], value)
    _, mask, z = toy_batch(seed=0)[:3]
    wanted = cv.decode(denoiser, z, mask, text_process=TEXT)
    assert torch.equal(cv.decode(found, z, mask, text_process=objective.text_process), wanted)
    assert list(file.parent.iterdir()) == [file]


def test_names_are_those_of_the_plain_network_whatever_is_around_it(file):
    network = toy_denoiser(seed=3)[0].module
    average = torch.optim.swa_utils.AveragedModel(network)
    cv.save(file, cv.as_denoiser(average), OBJECTIVE)
    other = toy_denoiser(seed=4)[0].module
    cv.load(file, other)
    assert torch.equal(other.word.weight, network.word.weight)


def test_the_direction_of_times_and_the_prediction_are_kept(file):
    network = toy_denoiser(seed=3)[0].module
    process = cv.LatentProcess("flow", prediction="velocity", shape=(4,))
    objective = cv.CycleObjective(TEXT, process)
    cv.save(file, cv.as_denoiser(network, clean_at=1), objective, options=OPTIONS)
    found = cv.load(file, ToyNetwork)
    assert (found.denoiser.clean_at, found.denoiser.predicts) == (1, "velocity")
    assert found.objective.latent_process == process and found.normaliser is None


class Loud:
    def __reduce__(self):
        return (pytest.fail, ("code of the file was run",))


def test_a_file_with_code_is_refused_and_its_code_not_run(file):
    torch.save({"format": "cyclevae", "version": 1, "network": Loud()}, file)
    with pytest.raises(ValueError, match=r"no file that cyclevae\.save wrote"):
        cv.load(file, ToyNetwork)


def test_an_older_file_stands_until_the_new_one_is_whole(file, monkeypatch):
    denoiser = toy_denoiser(seed=3)[0]
    cv.save(file, denoiser, OBJECTIVE, options=OPTIONS)
    before = file.read_bytes()

    def fail(written, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        cv.save(file, toy_denoiser(seed=4)[0], OBJECTIVE)
    assert file.read_bytes() == before


def test_numbers_of_numpy_become_plain_ones(file):
    options = {"vocab_size": 7, "latent_dim": 4, "more": [np.float64(0.5), (True, None, "a")]}
    weighed = replace(OBJECTIVE, terms=[cv.Text(weight=np.float64(0.5))])
    cv.save(file, toy_denoiser()[0], weighed, options=options)
    found = torch.load(file, weights_only=True)
    assert found["options"]["more"] == [0.5, [True, None, "a"]]
    assert type(found["objective"]["terms"]["text"]["weight"]) is float


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"code": 1}


class Sharded(nn.Module):
    """As FSDP2 leaves a network: parameters that know how to be gathered."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.weight.full_tensor = lambda: None

    def state_dict(self):
        return {"weight": self.weight}

    def forward(self, tokens, latents, **state): ...


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("given", "exception", "words"),
    [
        ({"denoiser": 3}, TypeError, "`denoiser` must be what as_denoiser makes, or a network"),
        (
            {"denoiser": cv.StepModule(toy_denoiser()[0], OBJECTIVE)},
            TypeError,
            "`denoiser` is a StepModule: give the network in it",
        ),
        (
            {"objective": OBJECTIVE.to_config()},
            TypeError,
            "`objective` must be a CycleObjective, got dict",
        ),
        ({"options": {"act": nn.GELU()}}, ValueError, "`options.act` is GELU"),
        ({"normaliser": {"mean": 0.0}}, TypeError, "`normaliser` has 'mean' of type float"),
        ({"normaliser": Stateful(1, 1)}, TypeError, "'_extra_state' of type dict"),
        ({"denoiser": Sharded()}, ValueError, "'weight' sharded over ranks: gather the state"),
    ],
)
def test_what_no_file_can_hold_is_refused_before_one_is_written(file, given, exception, words):
    arguments = {"denoiser": toy_denoiser()[0], "objective": OBJECTIVE, **given}
    with pytest.raises(exception) as caught:
        cv.save(file, **arguments)
    assert words in str(caught.value)
    assert not list(file.parent.iterdir())


def text_only(path):
    path.write_text("weights")


def other_format(path):
    torch.save({"state": torch.zeros(2)}, path)


def plain_pickle(path):
    path.write_bytes(pickle.dumps({"format": "cyclevae"}))


def later(path):
    torch.save({"format": "cyclevae", "version": 9}, path)


def part(path):
    torch.save({"format": "cyclevae", "version": 1, "network": {}}, path)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("write", "words"),
    [
        (text_only, "no file that cyclevae.save wrote"),
        (other_format, "read it by torch.load(..., weights_only=True)"),
        (plain_pickle, "no file that cyclevae.save wrote"),
        (later, "is of version 9, and this cyclevae reads 1"),
        (part, "it lacks 'objective'"),
    ],
)
def test_other_files_are_refused(file, write, words):
    write(file)
    with pytest.raises(ValueError) as caught:
        cv.load(file, ToyNetwork)
    assert words in str(caught.value)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "arguments", "exception", "words"),
    [
        (None, {"network": ToyNetwork}, ValueError, "no `options` were saved to make it by"),
        (OPTIONS, {"network": 3}, TypeError, "`network` must be a torch.nn.Module or its class"),
        (OPTIONS, {"network": dict}, TypeError, "`network(...)` must return a torch.nn.Module"),
        (
            OPTIONS,
            {"network": ToyNetwork(7, 5)},
            ValueError,
            "'word.weight' of `network` has shape",
        ),
        (OPTIONS, {"network": nn.Linear(2, 2)}, ValueError, "are not those of `network`, a Linear"),
        (
            OPTIONS,
            {"network": ToyNetwork, "normaliser": Standardise(torch.zeros(2, 4))},
            ValueError,
            "`normaliser` was given, and",
        ),
    ],
)
def test_what_does_not_fit_is_refused(file, options, arguments, exception, words):
    cv.save(file, toy_denoiser()[0], OBJECTIVE, options=options)
    with pytest.raises(exception) as caught:
        cv.load(file, **arguments)
    assert words in str(caught.value)


def test_a_missing_file_is_named_by_python(file):
    with pytest.raises(FileNotFoundError):
        cv.load(file, ToyNetwork)
