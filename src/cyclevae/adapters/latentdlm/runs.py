"""What a checkpoint of the host was trained as: from its own note, or the config of its run."""

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

# At the root of the config, where the host reads them, with its defaults.
PROCESS: dict[str, Any] = {
    "latent_parameterization": "epsilon",
    "latent_timesteps": 1000,
    "latent_beta_schedule": "cosine",
}
NOTE = "cyclevae"  # among the metadata of a state_dict, which loads as if it were not there

_log = logging.getLogger("cyclevae")


def note_of(trainer: Any, loss_type: str) -> dict[str, Any]:
    """What a checkpoint should say of itself."""
    found = {key: trainer.config.get(key, default) for key, default in PROCESS.items()}
    found["latent_parameterization"] = trainer.latent_diffusion.parameterization
    return {**found, "loss_type": loss_type}


def told_by(state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """The note in a checkpoint's weights; None in one that the host alone has written."""
    note: dict[str, Any] | None = getattr(state_dict, "_metadata", {}).get(NOTE)
    return note


def check_process(
    path: Path, state_dict: Mapping[str, Any], trainer: nn.Module, field: str, cure: str
) -> None:
    """Refuse weights that were trained to predict something else: nothing else would show it.

    Raises:
        ValueError: the first of the keys that differ.
    """
    saved = told_by(state_dict)
    if saved is None:
        try:
            config = load_config(find_config(path))
        except (OSError, ImportError, ValueError):
            _log.warning(
                "cyclevae: %s does not tell what it predicts, and no config of its run is near by: "
                "it is taken for latent_parameterization %s",
                path,
                note_of(trainer, "")["latent_parameterization"],
            )
            return
        saved = {key: config.get(key, default) for key, default in PROCESS.items()}
    here = note_of(trainer, "")
    for key in PROCESS:
        if saved[key] != here[key]:
            raise ValueError(
                f"{field}: {path} was trained with `{key}` {saved[key]!r}, and here it is "
                f"{here[key]!r}; set it to {saved[key]!r} at the root of the config{cure}"
            )


def find_config(path: Path) -> Path:
    """The config beside a checkpoint, or that of Hydra near by.

    Raises:
        FileNotFoundError: none there.
    """
    folder = (path if path.is_dir() else path.parent).absolute()
    places = [folder / "config.yaml"]
    places += [f / ".hydra" / "config.yaml" for f in (folder, *folder.parents[:2])]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"no config of the run: the host saves none with {path}, and none of "
        f"{', '.join(map(str, places))} is there; give --config, such as the .hydra/config.yaml "
        "that Hydra wrote to `hydra.run.dir`"
    )


def load_config(path: Path) -> Any:
    """The config of a run.

    Raises:
        FileNotFoundError: no such file.
        ImportError: no `omegaconf`.
        ValueError: a file that is no config of a run.
    """
    try:
        omegaconf: Any = importlib.import_module("omegaconf")
    except ImportError as error:
        raise ImportError("the host's config needs omegaconf: pip install omegaconf") from error
    if not path.is_file():
        raise FileNotFoundError(f"expected a config at {path}")
    try:
        config = omegaconf.OmegaConf.load(path)
    except Exception as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if "model" not in config:
        raise ValueError(f"{path} has no `model`: give the config of the run, whole")
    return config
