"""A checkpoint, the config and the pairs of a run of the host, read from its files, and checked."""

import contextlib
import importlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cyclevae.adapters.latentdlm.check import check
from cyclevae.adapters.latentdlm.checkpoints import read_checkpoint
from cyclevae.adapters.latentdlm.runs import PROCESS, find_config, load_config, told_by
from cyclevae.processes.text import TextProcess

PACKAGE = "latentDLM_mmdit"


def check_checkpoint(
    path: Path,
    config: Path | None = None,
    data: Path | None = None,
    *,
    rows: int = 64,
    seed: int = 0,
) -> str:
    """The report on a file of the host, by the host's own model, in its checkout.

    Args:
        path: the checkpoint, or its folder.
        config: the config of the run; looked for beside the checkpoint if not given.
        data: a folder with `tokens` and `latents`, or these of a split `test` or `train` in them,
            as `examples/latentdlm/data.py` writes; the config's own if not given.
        rows: pairs to read.
        seed: of their choice, and of the noise.

    Raises:
        FileNotFoundError: no checkpoint, config or data.
        ImportError: no `omegaconf`, or no host here.
        ValueError: files that do not fit.
    """
    found = read_checkpoint(path)
    saved = found["model_state_dict"]
    where = config or find_config(path)
    settings = load_config(where)
    own = told_by(saved)
    process = {key: (own or settings).get(key, default) for key, default in PROCESS.items()}
    model, diffusion = _build(saved, settings, process, where)
    folders = _folders(settings, data)
    batch = _read_pairs(*folders, rows=rows, seed=seed)
    wide: Any = model
    if wide.latent_dim != (width := batch["latent"].shape[1]):
        raise ValueError(
            f"the model's latents have {wide.latent_dim} numbers and those of the data {width}: "
            "give --data, the folder that the model was trained on"
        )
    texts = _text_process(saved, model, batch)
    step = getattr(found.get("state"), "step", 0)
    report = check(model, diffusion, texts, batch, seed=seed, step=step)
    lines = [f"checkpoint {path}, config {where}, data {folders[0]}"]
    lines += [
        f"warning: the checkpoint was trained with `{key}` {process[key]}, and the config now says "
        f"{settings.get(key, default)}"
        for key, default in PROCESS.items()
        if settings.get(key, default) != process[key]
    ]
    stated = settings.model.get("latent_parameterization")
    if stated not in (None, diffusion.parameterization):
        lines.append(
            f"warning: `model.latent_parameterization` is {stated}, which the host does not read; "
            f"`latent_parameterization` at the root counts, and means {diffusion.parameterization}"
        )
    return "\n".join([*lines, str(report)])


def _build(
    saved: Mapping[str, Tensor], config: Any, process: Mapping[str, Any], where: Path
) -> tuple[nn.Module, Any]:
    """The host's model with the weights, in fp32, and its noise tables."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the host prints as it is imported
            models = importlib.import_module(f"{PACKAGE}.models.multimodal_mmdit")
            diffusions = importlib.import_module(f"{PACKAGE}.continuous_diffusion")
    except ImportError as error:
        raise ImportError(
            f"cannot import the host's {PACKAGE} ({error}): run this in the checkout of the host, "
            "with the packages that it needs"
        ) from error
    weights = {n.removeprefix("model."): w for n, w in saved.items() if n.startswith("model.")}
    last = [n for n in weights if n.startswith("latent_head.") and n.endswith(".weight")]
    if "text_head.weight" not in weights or not last:
        raise ValueError("the checkpoint has no `text_head` and `latent_head`: is it of the host?")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = models.MultimodalMMDiT(
                config=config.model,
                vocab_size=len(weights["text_head.weight"]),
                latent_dim=len(weights[last[-1]]),
                cluster_size=int("text_head_clusters.weight" in weights),
            )
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"the weights do not fit `model` in {where}: give the config of the run, with what "
            f"its command line set: {error}"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):
        diffusion = diffusions.ContinuousDiffusion(
            num_timesteps=process["latent_timesteps"],
            beta_schedule=process["latent_beta_schedule"],
            parameterization=process["latent_parameterization"],
            device="cpu",
        )
    return model, diffusion


def _folders(config: Any, data: Path | None) -> tuple[Path, Path]:
    """Where tokens and latents lie."""
    if data is not None:
        for split in ("", "test", "train"):  # held-out rows before those of training
            tokens, latents = data / "tokens" / split, data / "latents" / split
            if next(tokens.glob("*.npz"), None) is not None:
                return tokens, latents
        return data / "tokens", data / "latents"
    named = [config.get("data", {}).get(f"{kind}_dir") for kind in ("token", "latent")]
    if None in named:
        raise ValueError("the config has no `data.token_dir` and `data.latent_dir`: give --data")
    return Path(named[0]), Path(named[1])


def _read_pairs(tokens: Path, latents: Path, *, rows: int, seed: int) -> dict[str, Tensor]:
    """A batch as the host's collate makes it, of files drawn at random, cut to its longest text."""
    import numpy as np

    names = {p: p.name.removesuffix(".npz").removesuffix("_tokens") for p in tokens.glob("*.npz")}
    pairs = [(p, latents / f"{names[p]}.npy") for p in sorted(names)]
    pairs = [pair for pair in pairs if pair[1].is_file()]
    if len(pairs) < 2:
        raise FileNotFoundError(
            f"expected pairs NAME_tokens.npz in {tokens} and NAME.npy in {latents}, found "
            f"{len(pairs)}: give --data FOLDER, which holds tokens/ and latents/"
        )
    generator = torch.Generator().manual_seed(seed)
    ids, masks, vectors = [], [], []
    for i in torch.randperm(len(pairs), generator=generator)[:rows].tolist():
        try:
            with np.load(pairs[i][0], allow_pickle=False) as row:
                ids.append(torch.from_numpy(row["input_ids"].astype("int64")))
                masks.append(torch.from_numpy(row["attention_mask"].astype("bool")))
            vector = np.load(pairs[i][1], allow_pickle=False).astype("float32")
            vectors.append(torch.from_numpy(vector.reshape(-1, vector.shape[-1])[0]))
        except Exception as error:
            raise ValueError(f"cannot read {pairs[i][0]} and its latent: {error}") from error
    mask = pad_sequence(masks, batch_first=True)
    length = max(2, int(mask.any(dim=0).nonzero().max()) + 1 if mask.any() else 0)
    return {
        "input_ids": pad_sequence(ids, batch_first=True)[:, :length],
        "attention_mask": mask[:, :length],
        "latent": torch.stack(vectors),
    }


def _text_process(
    saved: Mapping[str, Tensor], model: nn.Module, batch: Mapping[str, Tensor]
) -> TextProcess:
    """Its ids without the tokenizer: the mask from the noise schedule, padding from the data."""
    prior = saved.get("text_noise_schedule.log_prior")
    if prior is None:
        raise ValueError("the checkpoint has no `text_noise_schedule.log_prior`, the id of [MASK]")
    padding = batch["input_ids"][~batch["attention_mask"].bool()]
    head: Any = model.text_head
    return TextProcess(
        mask_id=int(prior.argmax()),
        vocab_size=head.out_features,
        pad_id=int(padding.mode().values) if len(padding) else None,
        taught_padding="all" if len(padding) else "none",
    )
