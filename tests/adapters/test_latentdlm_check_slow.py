"""The verdicts on checkpoints that were trained in one direction, in both, and on a copy."""

import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn.functional import cosine_similarity, normalize, one_hot

from cyclevae.adapters.latentdlm import files, with_cycle
from cyclevae.adapters.latentdlm.__main__ import main
from cyclevae.adapters.latentdlm.check import Check, check
from cyclevae.adapters.latentdlm.host import text_process_of
from cyclevae.diagnostics.probes import Probe
from latentdlm_host import Config, Diffusion, HostModel, make_host

WORDS, LENGTH, DIM = 12, 6, 8


def learnable(rows, seed):
    """Texts of two words twice, and latents that are a projection of the bag of words."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(5, 5 + WORDS, (rows, 2), generator=generator).sort(dim=1).values
    ids = torch.zeros(rows, LENGTH, dtype=torch.long)
    ids[:, 0], ids[:, 1:3], ids[:, 3] = 2, words, 3
    bags = one_hot(words - 5, WORDS).sum(1).float()
    projection = torch.randn(WORDS, DIM, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(LENGTH) < 4).float().expand(rows, LENGTH)
    return {"input_ids": ids, "attention_mask": mask, "latent": normalize(bags @ projection)}


def trained(loss_type, parameterization="v_param", steps=300, flavour="stable"):
    """A report on a host that was trained for a moment."""
    host = make_host(
        loss_type=loss_type,
        parameterization=parameterization,
        flavour=flavour,
        latent_dim=DIM,
        length=LENGTH,
        vocab=5 + WORDS,
        cycle_warmup_steps=steps // 2,
        latent_loss_weight=1.0,
        quick=True,
    )
    trainer = with_cycle(host)
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=3e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in range(steps):
            optimizer.zero_grad()
            trainer(learnable(32, seed=step + 1), step=step)[0].backward()
            torch.nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
            optimizer.step()
    process = text_process_of(host, "all")
    return check(host.model, host.latent_diffusion, process, learnable(128, seed=10_000))


def supported(report):
    return {term.name for term in report.terms if term.supported}


ALL = {"base L2T", "base T2L", "cycle_text", "cycle_latent", "prior"}


def test_l2t_alone_leaves_the_latent_head_untrained():
    report = trained("l2t")
    assert supported(report) == {"base L2T"}, report
    assert {t.first for t in report.terms if not t.supported} == {"warm start"}
    assert "cycle_warmup_steps: 5000" in report.config
    assert "latent_parameterization: v_param" in report.config


def test_l2t_alone_of_an_epsilon_host_needs_another_parameterisation_too():
    report = trained("l2t", "epsilon")
    assert supported(report) == {"base L2T"}, report
    assert not report.copies
    assert report.config.startswith("latent_parameterization: x0")
    assert "cycle_latent_t_max: 0.9" in report.config


def test_t2l_alone_leaves_the_decoder_deaf():
    report = trained("t2l")
    assert supported(report) == {"base T2L", "prior"}, report
    assert "cycle_warmup_steps: 5000" in report.config


def test_the_cycle_supports_everything():
    report = trained("cycle_vae", steps=500)
    assert supported(report) == ALL, report
    assert "cycle_warmup_steps" not in report.config
    assert report.cosine > 0.5 > abs(report.shuffled_cosine)


def test_epsilon_at_full_noise_learns_a_copy():
    report = trained("t2l", "epsilon")
    assert report.copies and report.gain > 1e4 and report.time == 0.9
    assert supported(report) == set(), report
    base = next(term for term in report.terms if term.name == "base T2L")
    assert "copy of the noise" in base.why
    assert base.first == "x0, warm start"


DEAF = Probe(right=7.9, shuffled=8.0, empty=8.0, gap_error=0.1)


def measured(**changes):
    values = {
        "rows": 64,
        "tokens": 4.0,
        "prediction": "v_param",
        "gain": 1.0,
        "time": 1.0,
        "copied": 0.0,
        "text": Probe(right=2.0, shuffled=8.0, empty=5.0, gap_error=0.1),
        "cosine": 0.8,
        "shuffled_cosine": 0.0,
        "cosine_gap_error": 0.02,
        "error": 0.3,
        "shuffled_error": 1.5,
        "norm": 5.0,
        "target_norm": 5.6,
    }
    return Check(**{**values, **changes})


def test_a_gap_that_may_be_chance_is_none():
    assert supported(measured()) == ALL
    assert supported(measured(cosine_gap_error=0.5)) == {"base L2T"}
    assert supported(measured(cosine=0.05, cosine_gap_error=0.001)) == {"base L2T"}
    assert supported(measured(cosine=0.97, shuffled_cosine=0.9)) == ALL  # of the 0.1 that is left
    assert supported(measured(text=DEAF)) == {"base T2L", "prior"}


def test_only_epsilon_is_said_to_copy():
    for prediction, why in {"epsilon": "a copy of the noise", "v_param": "tells no text"}.items():
        base = measured(prediction=prediction, copied=0.9, cosine=0.0).terms[1]
        assert why in base.why


def test_the_larger_cure_comes_first():
    report = measured(prediction="epsilon", cosine=0.0, text=DEAF, time=0.9, norm=20.0)
    firsts = {term.name: term.first for term in report.terms}
    assert firsts.pop("base L2T") == "warm start"
    assert set(firsts.values()) == {"x0, warm start"}
    assert "cycle_bridge_norm" not in report.config  # the length of a latent that tells nothing
    now, later = report.config.split("# or, which keeps epsilon:\n")
    keys = yaml.safe_load(now)
    assert keys.pop("latent_parameterization") == "x0"
    kept = {"latent_t_mode": "random", "cycle_latent_t_max": 0.9, "cycle_bridge_steps": 4}
    lines = [line.removeprefix("# ") for line in later.splitlines()]
    assert all(line.startswith("# ") for line in later.splitlines())
    other = {"latent_parameterization": "epsilon", "loss": {**keys["loss"], **kept}}
    assert yaml.safe_load("\n".join(lines)) == other


def test_epsilon_that_reads_its_text_at_the_cap_keeps_it():
    report = measured(prediction="epsilon", time=0.9, copied=0.99, gain=6e4)
    assert supported(report) == ALL
    assert yaml.safe_load(report.config)["latent_parameterization"] == "epsilon"
    assert "cycle_bridge_steps: 4" in report.config
    assert report.terms[-1].first == "cap 0.9, bridge steps"


def test_a_wrong_length_asks_for_a_norm():
    for norm in (1.0, 20.0):
        report = measured(norm=norm)
        assert report.terms[-1].first == "cycle_bridge_norm"
        assert "cycle_bridge_norm: 5.6 " in report.config
    assert "cycle_bridge_norm" not in measured().config


def test_the_report_names_every_number():
    lines = str(measured(copied=0.7)).splitlines()
    assert lines[0].startswith("64 pairs; the model predicts v_param")
    assert [" ".join(line.split()) for line in lines[3:6]] == [
        "L2T, nats per token 0.5 2 1.5 +- 0.03",
        "T2L, cosine of z_hat and latents 0.8 0 0.8 +- 0.02",
        "T2L, error as share of variance 0.3 1.5 1.2",
    ]
    assert lines[9].endswith("have cosine 0.7: a copy explains 49% of the prediction")
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if "|" in line]
    assert [row[:2] for row in rows] == [
        ["term", "supported"],
        ["base L2T", "yes"],
        ["base T2L", "yes"],
        ["cycle_text", "yes"],
        ["cycle_latent", "yes"],
        ["prior", "yes"],
    ]


@pytest.mark.parametrize("prediction", ["epsilon", "v_param", "x0"])
@pytest.mark.parametrize("learned", [True, False])
def test_the_config_says_what_the_checkpoint_predicts(prediction, learned):
    report = measured(prediction=prediction, **({} if learned else {"cosine": 0.0}))
    keeps = learned or prediction != "epsilon"  # else x0, with a head that is trained anew
    config = yaml.safe_load(report.config)
    assert config["latent_parameterization"] == (prediction if keeps else "x0")
    assert ("latent_head" in report.config) is not keeps


def test_a_warm_up_says_what_the_step_makes_of_it():
    for step, told in {0: None, 3000: "after 2000 steps", 9000: "at once"}.items():
        report = measured(text=DEAF, step=step)
        assert ("resume" in report.config) is (told is not None)
        if told:
            assert f"or the cycles begin {told}:\n#   cycle_start_step: {step}" in report.config
            assert str(report).startswith(f"step {step}; 64 pairs")
    assert "resume" not in measured(step=9000).config  # nothing to warm up


def test_a_prior_is_told_the_variance_of_the_latents():
    assert "prior_options" not in measured(variance=1.2).config
    for report in (measured(variance=1 / 32), measured(variance=1 / 32, text=DEAF)):
        options = yaml.safe_load(report.config)["loss"]["prior_options"]
        assert options == {"variance": 0.0312}


class Bags(nn.Module):
    """Predicts the mean embedding of the kept words; or at full noise its input."""

    def __init__(self, *, copies=False):
        super().__init__()
        self.words, self.copies = nn.Embedding(5 + WORDS, DIM), copies

    def encode(self, tokens, mask):
        return (self.words(tokens) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, text_tokens, latents, text_timesteps, latent_timesteps, attention_mask):
        bags = self.encode(text_tokens, attention_mask)[:, None]
        noise = (latent_timesteps == 1)[:, None, None]
        logits = latents.new_zeros(*text_tokens.shape, 5 + WORDS)
        return logits, torch.where(noise & self.copies, latents, bags)


def rows(number=6):
    batch = learnable(number, seed=0)
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][0, 2:] = 0
    return batch


def test_the_numbers_are_those_of_the_formulas():
    torch.manual_seed(0)
    model, host, batch = Bags(), make_host(parameterization="x0", vocab=5 + WORDS), rows()
    batch["latent"] = 2 * batch["latent"]
    report = check(model, host.latent_diffusion, text_process_of(host, "all"), batch)
    ids, mask, z = batch["input_ids"], batch["attention_mask"], batch["latent"]
    right = model.encode(ids, mask).detach()
    shuffled = right.roll(1, 0)  # another row's text has its own length
    near, far = (cosine_similarity(x, z, dim=1) for x in (right, shuffled))
    variance = z.var(dim=0).sum()
    expected = {
        "rows": 6,
        "tokens": (5 * 4 + 2) / 6,
        "gain": 1.0,
        "time": 1.0,
        "cosine": near.mean(),
        "shuffled_cosine": far.mean(),
        "cosine_gap_error": (near - far).std() / math.sqrt(6),
        "error": (right - z).square().sum(1).mean() / variance,
        "shuffled_error": (shuffled - z).square().sum(1).mean() / variance,
        "norm": right.norm(dim=1).mean(),
        "target_norm": z.square().sum(1).mean().sqrt(),
        "variance": variance / DIM,
    }
    found = {name: getattr(report, name) for name in expected}
    assert found == pytest.approx({n: float(x) for n, x in expected.items()}, rel=1e-5)


def test_what_is_read_at_full_noise_and_what_below_the_cap():
    torch.manual_seed(0)
    model, batch = Bags(copies=True), rows()
    gains = {}
    for prediction in ("epsilon", "v_param"):
        host = make_host(parameterization=prediction, vocab=5 + WORDS)
        process = text_process_of(host, "all")
        report = check(model, host.latent_diffusion, process, batch, cap=0.999)
        assert report.time == {"epsilon": 0.999, "v_param": 1.0}[prediction]
        assert report.copied == pytest.approx(1.0)
        gains[prediction] = report.gain
    alpha, sigma = host.latent_diffusion.get_schedule_values(torch.ones(1))
    assert gains == pytest.approx({"epsilon": (sigma / alpha).item(), "v_param": sigma.item()})


def test_a_seed_repeats_the_noise_and_another_does_not():
    host = make_host(latent_dim=DIM, length=LENGTH, vocab=5 + WORDS)
    parts = host.model, host.latent_diffusion, text_process_of(host, "all"), rows()
    first, again, other = (check(*parts, seed=seed).copied for seed in (1, 1, 2))
    assert first == again != other


def test_rows_without_a_part_are_left_out():
    host = make_host(latent_dim=DIM, length=LENGTH, vocab=5 + WORDS)
    process, batch = text_process_of(host, "all"), rows(9)
    batch["latent"][0] = 0.0
    batch["attention_mask"][1] = 0.0
    before = {n: p.clone() for n, p in host.model.state_dict().items()}
    state = torch.get_rng_state()
    assert check(host.model, host.latent_diffusion, process, batch).rows == 7
    assert torch.equal(torch.get_rng_state(), state) and host.model.training
    assert all(torch.equal(p, before[n]) for n, p in host.model.state_dict().items())
    batch["latent"][:-1] = 0.0
    with pytest.raises(ValueError, match="at least 2 pairs"):
        check(host.model, host.latent_diffusion, process, batch)


# The command


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "saved" / "run" / "latest"
    folder.mkdir(parents=True)
    path = folder / "checkpoint.pt"
    torch.save({"model_state_dict": make_host().state_dict()}, path)
    return path


def test_no_checkpoint(tmp_path, capsys):
    assert main(["check", str(tmp_path / "none.pt")]) == 1
    assert "expected a checkpoint at" in capsys.readouterr().err


def test_no_config(checkpoint, capsys):
    assert main(["check", str(checkpoint)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no config of the run") and "--config" in error


def test_a_config_needs_omegaconf(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    config = checkpoint.parents[1] / ".hydra" / "config.yaml"
    config.parent.mkdir()
    config.write_text("model: {hidden_size: 32}\n")
    assert main(["check", str(checkpoint)]) == 1
    assert "pip install omegaconf" in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    path.write_text("text")
    assert main(["check", str(path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_too_few_rows(checkpoint, capsys):
    with pytest.raises(SystemExit):
        main(["check", str(checkpoint), "--rows", "1"])
    assert "--rows must be at least 2" in capsys.readouterr().err


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "cyclevae.adapters.latentdlm", "check", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: expected a checkpoint at")


# The files of a run


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Writes the files of a run of the stand-in, whose modules get the host's names."""

    def model(config, **sizes):
        vocab, latent_dim = sizes.pop("vocab_size"), sizes.pop("latent_dim")
        return HostModel(vocab, latent_dim, hidden=config.hidden_size, **sizes)

    def load(path):
        return Config(yaml.safe_load(path.read_text()))

    modules = {
        "omegaconf": {"OmegaConf": SimpleNamespace(load=load)},
        "latentDLM_mmdit.models.multimodal_mmdit": {"MultimodalMMDiT": model},
        "latentDLM_mmdit.continuous_diffusion": {"ContinuousDiffusion": Diffusion},
    }
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))

    def write(lengths=(2, 3, 5, 4), size=8, **options):
        """Row i has the id 5 + i throughout, and a latent of i + 1, above another."""
        for kind in ("tokens", "latents"):
            (tmp_path / kind).mkdir()
        for i, length in enumerate(lengths):
            mask = np.arange(size) < length
            row = {"input_ids": np.where(mask, 5 + i, 0), "attention_mask": mask}
            np.savez(tmp_path / "tokens" / f"{i}_tokens.npz", **row)
            latents = np.stack([np.full(8, i + 1.0), np.full(8, -1.0)])
            np.save(tmp_path / "latents" / f"{i}.npy", latents)
        saved = {"model_state_dict": make_host(**options).state_dict()}
        torch.save(saved, tmp_path / "checkpoint.pt")
        config = {
            "model": {"hidden_size": 32, "latent_parameterization": "x0"},
            "data": {f"{kind}_dir": str(tmp_path / f"{kind}s") for kind in ("token", "latent")},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return tmp_path

    return write


@pytest.fixture
def checked(monkeypatch):
    """What reaches `check`, instead of its report."""
    found = []

    def note(model, diffusion, process, batch, *, seed, step):
        found.append(SimpleNamespace(process=process, seed=seed, step=step, **batch))
        return measured()

    monkeypatch.setattr(files, "check", note)
    return found


@pytest.mark.parametrize("clusters", [0, 3])
def test_a_run_is_read_as_the_host_wrote_it(run, capsys, clusters):
    folder = run(cluster_size=clusters, seed=1)
    assert main(["check", str(folder), "--rows", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    where = f"config {folder / 'config.yaml'}, data {folder / 'tokens'}"
    assert lines[0] == f"checkpoint {folder}, {where}"
    assert lines[1].startswith("warning: `model.latent_parameterization` is x0, which the host")
    assert lines[1].endswith("means epsilon")
    assert lines[2].startswith("3 pairs; the model predicts epsilon;")


def test_pairs_belong_together(run, checked):
    folder = run()
    (folder / "latents" / "3.npy").unlink()  # a text without a latent
    files.check_checkpoint(folder / "checkpoint.pt")
    (found,) = checked
    ids, mask, latents = found.input_ids, found.attention_mask, found.latent
    assert ids.shape == mask.shape == (3, 5)  # as long as the longest text that is kept
    assert sorted(mask.sum(1).tolist()) == [2, 3, 5]
    assert torch.equal(ids, torch.where(mask, 4 + latents[:, :1].long(), 0))
    assert (latents == latents[:, :1]).all() and sorted(latents[:, 0].tolist()) == [1, 2, 3]
    assert (found.process.mask_id, found.process.vocab_size, found.process.pad_id) == (4, 40, 0)
    assert found.process.taught_padding == "all"


def test_texts_without_padding_teach_none(run, checked):
    files.check_checkpoint(run(lengths=(8, 8)))
    assert (checked[0].process.pad_id, checked[0].process.taught_padding) == (None, "none")


def test_a_seed_chooses_the_rows(run, checked):
    folder = run(lengths=[3] * 20)
    for seed in (1, 1, 2):
        files.check_checkpoint(folder, rows=5, seed=seed)
    first, again, other = (set(found.latent[:, 0].tolist()) for found in checked)
    assert len(first) == 5 and first == again != other
    assert [found.seed for found in checked] == [1, 1, 2]


def test_data_of_another_place(run, checked):
    folder = run()
    (folder / "moved").mkdir()
    for kind in ("tokens", "latents"):
        (folder / kind).rename(folder / "moved" / kind)
    with pytest.raises(FileNotFoundError, match="found 0: give --data FOLDER"):
        files.check_checkpoint(folder)
    files.check_checkpoint(folder, data=folder / "moved")
    assert len(checked[0].latent) == 4


@pytest.mark.parametrize("splits", [("train",), ("train", "test")])
def test_data_as_the_example_writes_them(run, checked, splits):
    folder = run()
    for kind in ("tokens", "latents"):
        whole = folder / f"{kind}.npz-files"
        (folder / kind).rename(whole)
        for split in splits:
            shutil.copytree(whole, folder / kind / split)
    report = files.check_checkpoint(folder, data=folder)
    assert len(checked[0].latent) == 4
    assert report.splitlines()[0].endswith(f"data {folder / 'tokens' / splits[-1]}")


def test_a_checkpoint_knows_what_it_predicts_and_where_it_stands(run, checked):
    folder = run()
    trainer = with_cycle(make_host(loss_type="cycle_vae", parameterization="x0"))
    torch.save({"model_state_dict": trainer.state_dict()}, folder / "checkpoint.pt")
    lines = files.check_checkpoint(folder).splitlines()
    assert lines[1].startswith("warning: the checkpoint was trained with `latent_parameterization`")
    assert checked[0].step == 0  # it holds none


def test_padding_is_the_id_most_padded_places_have(run, checked):
    folder = run()
    path = folder / "tokens" / "0_tokens.npz"
    with np.load(path) as row:
        ids, mask = row["input_ids"], row["attention_mask"]
    ids[2] = 9  # behind the text
    np.savez(path, input_ids=ids, attention_mask=mask)
    files.check_checkpoint(folder)
    assert checked[0].process.pad_id == 0


def test_where_a_config_is_looked_for(run, checked):
    folder = run()
    text = (folder / "config.yaml").read_text()
    latest = folder / "saved" / "latest"
    latest.mkdir(parents=True)
    (folder / "checkpoint.pt").rename(latest / "checkpoint.pt")
    (folder / "config.yaml").unlink()
    for place in (folder, folder / "saved", latest):  # the nearer, the sooner
        (place / ".hydra").mkdir()
        (place / ".hydra" / "config.yaml").write_text(text)
        report = files.check_checkpoint(latest)
        assert report.startswith(f"checkpoint {latest}, config {place / '.hydra'}")
    (latest / "config.yaml").write_text(text)
    assert f"config {latest / 'config.yaml'}," in files.check_checkpoint(latest)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": {"hidden_size": 16}}, "the weights do not fit `model` in"),
        ({"model": None}, "has no `model`"),
        ({"data": {}}, "has no `data.token_dir` and `data.latent_dir`: give --data"),
        ({"data": {"token_dir": "."}}, "has no `data.token_dir` and `data.latent_dir`"),
    ],
)
def test_configs_that_do_not_fit(run, change, match):
    folder = run()
    path = folder / "config.yaml"
    config = {**yaml.safe_load(path.read_text()), **change}
    path.write_text(yaml.safe_dump({name: x for name, x in config.items() if x is not None}))
    with pytest.raises(ValueError, match=match):
        files.check_checkpoint(folder)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_data_that_do_not_fit(run):
    folder = run(latent_dim=4)
    with pytest.raises(ValueError, match="latents have 4 numbers and those of the data 8"):
        files.check_checkpoint(folder)
    np.save(folder / "latents" / "0.npy", np.array([Evil(folder / "evil")]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"cannot read .* and its latent"):
        files.check_checkpoint(folder)
    assert not (folder / "evil").exists()
    for path in (folder / "latents").glob("[1-3].npy"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="found 1: give --data FOLDER"):
        files.check_checkpoint(folder)
