"""The YAML for the host names every key, with its default."""

import logging
import re
from dataclasses import fields
from pathlib import Path

import yaml

from cyclevae.adapters.latentdlm import with_cycle
from cyclevae.adapters.latentdlm.config import LossKeys
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
