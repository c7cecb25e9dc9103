"""What a checkpoint of the host has learned, and which terms it can be trained on next."""

import contextlib
import importlib
import io
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence

from cyclevae.adapters.latentdlm.checkpoints import read_checkpoint
from cyclevae.adapters.latentdlm.host import HostDenoiser, latent_process_of
from cyclevae.adapters.latentdlm.trainer import rows_of
from cyclevae.base import latent_loss
from cyclevae.diagnostics._measuring import measuring, statistics
from cyclevae.diagnostics._table import table
from cyclevae.diagnostics.health import latent_health
from cyclevae.diagnostics.probes import Probe, text_probe
from cyclevae.diagnostics.verdicts import STRETCH, SURE, ignored_latent
from cyclevae.passes import draw_noise, t2l
from cyclevae.text_process import TextProcess

CAP = 0.9  # where z_hat of an epsilon model is read: at full noise it is rounding alone
TOLD = 0.1  # of the cosine that another row's text leaves open; below it z_hat tells no text
COPIED = 0.5  # cosine of a prediction and its input above which it is called a copy
PACKAGE = "latentDLM_mmdit"

_V_PARAM = """\
latent_parameterization: v_param   # at the root, where the host reads it: latent_head is retrained
"""
_CYCLE = """\
loss:
  loss_type: cycle_vae
"""
_WARM_START = """\
  cycle_warmup_steps: 5000   # base L2T and base T2L alone; then check again
"""
_CAPPED = """\
  latent_t_mode: random      # base T2L is trained at all times
  cycle_latent_t_max: {time:g}
  cycle_bridge_steps: 4
"""


class Term(NamedTuple):
    """Whether a checkpoint supports a term, why, and what to do first."""

    name: str
    supported: bool
    why: str
    first: str = ""


@dataclass(frozen=True)
class Check:
    """What `check` measured; `str` of it is the report.

    Attributes:
        rows: pairs that were read.
        tokens: kept tokens per text, on average.
        prediction: the host's name of the parameterisation.
        gain: by which reading a latent at full noise multiplies the error of the prediction.
        time: at which `z_hat` is read, from pure noise.
        copied: cosine of the prediction at full noise and the noise it was shown.
        text: the probe of L2T, in nats per text.
        cosine: of `z_hat` and the true latents, from the right text.
        shuffled_cosine: from another row's text.
        cosine_gap_error: standard error of the difference of the two.
        error: squared error of `z_hat` as a share of the latents' variance, from the right text.
        shuffled_error: from another row's text.
        norm: mean length of `z_hat`.
        target_norm: root mean square length of the latents.
    """

    rows: int
    tokens: float
    prediction: str
    gain: float
    time: float
    copied: float
    text: Probe
    cosine: float
    shuffled_cosine: float
    cosine_gap_error: float
    error: float
    shuffled_error: float
    norm: float
    target_norm: float

    @property
    def decodes(self) -> bool:
        """L2T reads the latent."""
        return bool(ignored_latent(self.text.gap, self.text.gap_error, self.text.shuffled).ok)

    @property
    def encodes(self) -> bool:
        """`z_hat` depends on its text, by more than an untrained head makes it."""
        gap = self.cosine - self.shuffled_cosine
        return gap > SURE * self.cosine_gap_error and gap > TOLD * (1 - self.shuffled_cosine)

    @property
    def copies(self) -> bool:
        """An epsilon prediction that has learned to return its input, which at full noise is right.

        Such a head says nothing of the text, and a base loss near 0 hides it.
        """
        return self.prediction == "epsilon" and self.copied > COPIED

    @property
    def terms(self) -> tuple[Term, ...]:
        """Each term of `cycle_vae`: a base term is supported where it has been learned."""
        gap = f"{self.text.gap:.2g} +- {self.text.gap_error:.1g} nats"
        cosine = f"{self.cosine:.2g}, {self.shuffled_cosine:.2g} from another text"
        warm = "v_param, warm start" if self.prediction == "epsilon" else "warm start"
        if self.decodes:
            l2t = Term("base L2T", True, f"another row's latent costs {gap} per text")
        else:
            l2t = Term("base L2T", False, f"the latent is not read: {gap} per text", "warm start")
        if self.encodes:
            base = Term("base T2L", True, f"z_hat has cosine {cosine}")
        elif self.copies:
            why = f"the prediction is a copy of the noise, cosine {self.copied:.2g}"
            base = Term("base T2L", False, why, warm)
        else:
            base = Term("base T2L", False, f"z_hat tells no text: cosine {cosine}", warm)

        capped = f"cap {self.time:g}, bridge steps" if self.prediction == "epsilon" else ""
        ready = ", ".join(filter(None, [capped, "cycle_bridge_norm" if self._stretched else ""]))

        def after(name: str, *needed: Term) -> Term:
            lacking = [term for term in needed if not term.supported]
            if not lacking:
                return Term(name, True, "what it needs has been learned", ready)
            why = " and ".join(term.name for term in lacking) + " must be learned before"
            return Term(name, False, why, max((term.first for term in lacking), key=len))

        return (
            l2t,
            base,
            after("cycle_text", base, l2t),
            after("cycle_latent", base, l2t),
            after("prior", base),
        )

    @property
    def config(self) -> str:
        """The lines of the config that the terms call for, as YAML."""
        warm = "" if self.decodes and self.encodes else _WARM_START
        norm = ""
        if self.encodes and self._stretched:
            norm = f"  cycle_bridge_norm: {self.target_norm:.3g}   # the length of the latents\n"
        if self.prediction != "epsilon":
            return _CYCLE + warm + norm
        capped = _CYCLE + warm + _CAPPED.format(time=self.time) + norm
        if self.encodes:
            return capped
        other = "".join(f"# {line}\n" for line in capped.splitlines())
        return _V_PARAM + _CYCLE + warm + "# or, which keeps epsilon:\n" + other

    @property
    def _stretched(self) -> bool:
        return not 1 / STRETCH <= self.norm / self.target_norm <= STRETCH

    def __str__(self) -> str:
        gap, error = self.text.gap / self.tokens, self.text.gap_error / self.tokens
        right, shuffled = self.text.right / self.tokens, self.text.shuffled / self.tokens
        told = self.cosine - self.shuffled_cosine
        rows = [
            ["", "right", "shuffled", "gap"],
            ["L2T, nats per token", _g(right), _g(shuffled), f"{_g(gap)} +- {error:.1g}"],
            [
                "T2L, cosine of z_hat and latents",
                _g(self.cosine),
                _g(self.shuffled_cosine),
                f"{_g(told)} +- {self.cosine_gap_error:.1g}",
            ],
            [
                "T2L, error as share of variance",
                _g(self.error),
                _g(self.shuffled_error),
                _g(self.shuffled_error - self.error),
            ],
        ]
        verdicts = [("term", "supported", "why", "what to do first")]
        verdicts += [(t.name, "yes" if t.supported else "no", t.why, t.first) for t in self.terms]
        blocks = [
            f"{self.rows} pairs; the model predicts {self.prediction}; reading a latent at full "
            f"noise multiplies its error by {_g(self.gain)}",
            table(rows),
            f"z_hat is read at time {self.time:g} from noise; its length is {_g(self.norm)}, that "
            f"of the latents {_g(self.target_norm)}",
            f"at full noise, prediction and input have cosine {_g(self.copied)}: a copy explains "
            f"{self.copied**2:.0%} of the prediction",
            _left(verdicts),
            "config:\n" + self.config.rstrip("\n"),
        ]
        return "\n\n".join(blocks)


def check(
    model: nn.Module,
    diffusion: Any,
    text_process: TextProcess,
    batch: Mapping[str, Tensor],
    *,
    cap: float = CAP,
    seed: int = 0,
) -> Check:
    """Does each direction of the host's model depend on its condition; seven passes, no graph.

    Args:
        model: the host's, or one called as it is.
        diffusion: the host's noise tables, with their `parameterization`.
        text_process: its ids.
        batch: as the host's collate makes it; rows that lack a part are left out.
        cap: the time at which `z_hat` of an epsilon model is read; others are read at full noise.
        seed: of the noise.

    Raises:
        ValueError: fewer than 2 pairs, latents that are all equal, wrong shapes or values.
    """
    kept: Any = rows_of(batch)  # with every part, marked where it is broken
    pairs = (kept.has_text & kept.has_latent).nonzero()[:, 0]
    if len(pairs) < 2:
        raise ValueError(f"the batch must hold at least 2 pairs to compare, got {len(pairs)}")
    tokens, mask, latents = (x[pairs] for x in (kept.tokens, kept.attention_mask, kept.latents))
    host = SimpleNamespace(model=model, latent_diffusion=diffusion)
    process = latent_process_of(host, sys.float_info.max)  # nothing is refused: it is measured
    denoiser = HostDenoiser(model)
    generator = torch.Generator(latents.device).manual_seed(seed)
    noise = draw_noise(len(latents), process, at=latents, like=latents, generator=generator)
    processes: dict[str, Any] = {"text_process": text_process, "latent_process": process}
    time = cap if process.prediction == "epsilon" else 1.0

    def encode(shift: int, time: float) -> Any:
        return t2l(
            denoiser,
            tokens.roll(shift, 0),
            mask.roll(shift, 0),
            start="noise",
            time=time,
            noise=noise,
            **processes,
        )

    with measuring(denoiser):
        full = encode(0, 1.0)
        right, shuffled = (encode(shift, time).z_hat(process).float() for shift in (0, 1))
    variance = statistics(latents)[1].sum()

    def error(z_hat: Tensor) -> float:
        square = latent_loss(z_hat, latents, reduction="none").cpu().double()
        return (square.sum(dim=1).mean() / variance).item()

    cosines = [cosine_similarity(z, latents, dim=1).double() for z in (right, shuffled)]
    health = latent_health(right)
    alpha, sigma = process.alpha_sigma(torch.ones(1, device=latents.device))
    return Check(
        rows=len(pairs),
        tokens=mask.sum().item() / len(pairs),
        prediction=diffusion.parameterization,
        gain={"epsilon": (sigma / alpha).item(), "v": sigma.item()}.get(process.prediction, 1.0),
        time=time,
        copied=cosine_similarity(full.prediction.float(), noise, dim=1).mean().item(),
        text=text_probe(denoiser, tokens, latents, mask, noise=noise, **processes),
        cosine=cosines[0].mean().item(),
        shuffled_cosine=cosines[1].mean().item(),
        cosine_gap_error=(cosines[0] - cosines[1]).std().item() / math.sqrt(len(pairs)),
        error=error(right),
        shuffled_error=error(shuffled),
        norm=health.norm,
        target_norm=latents.double().square().sum(dim=1).mean().sqrt().item(),
    )


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
        data: a folder with `tokens` and `latents`; the config's own if not given.
        rows: pairs to read.
        seed: of their choice, and of the noise.

    Raises:
        FileNotFoundError: no checkpoint, config or data.
        ImportError: no `omegaconf`, or no host here.
        ValueError: files that do not fit.
    """
    saved = read_checkpoint(path)["model_state_dict"]
    where = config or _find_config(path)
    settings = _load(where)
    model, diffusion = _build(saved, settings, where)
    batch = _read_pairs(*_folders(settings, data), rows=rows, seed=seed)
    wide: Any = model
    if wide.latent_dim != (width := batch["latent"].shape[1]):
        raise ValueError(
            f"the model's latents have {wide.latent_dim} numbers and those of the data {width}: "
            "give --data, the folder that the model was trained on"
        )
    report = check(model, diffusion, _text_process(saved, model, batch), batch, seed=seed)
    lines = [f"checkpoint {path}, config {where}"]
    stated = settings.model.get("latent_parameterization")
    if stated not in (None, diffusion.parameterization):
        lines.append(
            f"warning: `model.latent_parameterization` is {stated}, which the host does not read; "
            f"`latent_parameterization` at the root counts, and means {diffusion.parameterization}"
        )
    return "\n".join([*lines, str(report)])


def _find_config(path: Path) -> Path:
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


def _load(path: Path) -> Any:
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


def _build(saved: Mapping[str, Tensor], config: Any, where: Path) -> tuple[nn.Module, Any]:
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
            num_timesteps=config.get("latent_timesteps", 1000),
            beta_schedule=config.get("latent_beta_schedule", "cosine"),
            parameterization=config.get("latent_parameterization", "epsilon"),
            device="cpu",
        )
    return model, diffusion


def _folders(config: Any, data: Path | None) -> tuple[Path, Path]:
    """Where tokens and latents lie."""
    if data is not None:
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


def _g(value: float) -> str:
    return f"{value:.3g}"


def _left(rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns, all to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
