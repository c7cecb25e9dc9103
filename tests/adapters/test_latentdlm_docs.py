"""The YAML for the host names every key, with its default."""

import logging
import re
from dataclasses import fields
from pathlib import Path

import torch
import yaml

import cyclevae as cv
from cyclevae.adapters.latentdlm import with_cycle
from cyclevae.adapters.latentdlm.config import LossKeys
from cyclevae.adapters.latentdlm.host import HostDenoiser, latent_process_of, text_process_of
from latentdlm_host import make_batch, make_host

ROOT = Path(__file__).parents[2]
RECOMMENDED = {"base_loss", "cycle_warmup_steps", "cycle_ramp_steps"}


def test_the_yaml_holds_every_key_with_its_default():
    text = (ROOT / "examples" / "latentdlm" / "cycle_vae.yaml").read_text()
    config = yaml.safe_load(text)
    loss = config["loss"]
    assert loss.pop("loss_type") == "cycle_vae"
    assert config["latent_parameterization"] == "x0"
    keys, default = LossKeys.read(loss), LossKeys()
    names = [f.name for f in fields(LossKeys)]
    assert set(loss) == set(names)
    assert {n for n in names if getattr(keys, n) != getattr(default, n)} == RECOMMENDED


def test_the_page_quotes_what_the_yaml_says(caplog):
    caplog.set_level(logging.INFO, "cyclevae")
    loss = yaml.safe_load((ROOT / "examples" / "latentdlm" / "cycle_vae.yaml").read_text())["loss"]
    trainer = with_cycle(make_host(parameterization="x0", quick=True, **loss))
    trainer(make_batch(), step=0)
    page = (ROOT / "docs" / "latentdlm.md").read_text()
    quoted = re.search("`(cyclevae: step 0: [^`]*)`", page)[1].replace("\n", " ")
    assert caplog.messages == [quoted]


def test_what_was_trained_reads_and_writes_by_the_names_of_the_page():
    trainer, batch = with_cycle(make_host(quick=True, loss_type="cycle_vae")), make_batch()
    denoiser = HostDenoiser(trainer.model)
    text, latent = text_process_of(trainer, "all"), latent_process_of(trainer, 10.0)
    processes = {"text_process": text, "latent_process": latent}
    tokens, mask, z = batch["input_ids"], batch["attention_mask"], batch["latent"]
    z_hat = cv.encode(denoiser, tokens, mask, noise=torch.randn_like(z), **processes)
    assert z_hat.shape == z.shape and z_hat.isfinite().all()
    written = cv.decode(denoiser, z, mask, text_process=text)
    best = cv.best_text(denoiser, z, mask, samples=2, **processes)
    for found in (written, best.tokens):
        assert ((found == text.pad_id) == (mask == 0)).all()
    page = (ROOT / "docs" / "use-a-trained-model.md").read_text()
    for name in (
        "HostDenoiser(trainer.model)",
        "text_process_of(trainer, ",
        "latent_process_of(tr",
    ):
        assert name in page
