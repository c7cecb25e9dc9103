"""A batch, checked and arranged by direction."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from cyclevae._base import checks
from cyclevae._base.masked import as_latent_mask, only_kept
from cyclevae._base.reduce import only_present
from cyclevae._base.types import LatentMask, Latents, Rows
from cyclevae.objective.batch import Batch
from cyclevae.objective.rows import Arranged, Texts, stack_masks
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess


def arrange(batch: Batch, text_process: TextProcess, latent_process: LatentProcess) -> Arranged:
    """Check a batch and concatenate its rows per direction.

    Raises:
        ValueError: a part without its companion, wrong shapes, or values out of range.
        TypeError: wrong dtypes.
    """
    if not isinstance(batch, Batch):
        cure = {dict: "use Batch(**batch)", tuple: "use Batch(*batch)"}.get(type(batch))
        raise TypeError(
            f"`batch` must be a Batch, got {type(batch).__name__}; "
            f"{cure or 'put its tensors into Batch(tokens=..., attention_mask=..., latents=...)'}"
        )
    for name, part in batch._asdict().items():
        if part is not None:
            checks.check_tensor(f"batch.{name}", part)
    if (batch.tokens is None) != (batch.latents is None):
        given, missing = "tokens", "latents"
        if batch.tokens is None:
            given, missing = missing, given
        raise ValueError(
            f"`batch.{given}` came without `batch.{missing}`: pairs need both; "
            f"put rows without a partner into `batch.unpaired_{given}`"
        )
    _check_devices(batch)
    batch = _only_kept(_only_present(batch), latent_process)
    shape = latent_process.shape
    parts = [
        _texts("", batch.tokens, batch.attention_mask, text_process, batch.has_text),
        _texts("unpaired_", batch.unpaired_tokens, batch.unpaired_attention_mask, text_process),
    ]
    for name in ("latents", "unpaired_latents"):
        if (latents := getattr(batch, name)) is not None:
            checks.check_latents(f"batch.{name}", latents, shape)
    if batch.tokens is not None and batch.latents is not None:
        checks.check_rows("batch.tokens", batch.tokens, "batch.latents", batch.latents)
    pseudo_text_mask = batch.pseudo_text_mask
    if pseudo_text_mask is not None:
        if batch.unpaired_latents is None:
            raise ValueError("`batch.pseudo_text_mask` came without `batch.unpaired_latents`")
        checks.check_rows(
            "batch.pseudo_text_mask",
            pseudo_text_mask,
            "batch.unpaired_latents",
            batch.unpaired_latents,
        )
        pseudo_text_mask = checks.as_mask("batch.pseudo_text_mask", pseudo_text_mask)
        checks.check_kept("batch.pseudo_text_mask", pseudo_text_mask)
    return Arranged(
        paired=0 if batch.tokens is None else len(batch.tokens),
        texts=_stack_texts([part for part in parts if part is not None], text_process),
        latents=_stack_latents(batch.latents, batch.unpaired_latents),
        pseudo_text_mask=pseudo_text_mask,
        has_text=_stack_rows(batch.has_text, batch.unpaired_tokens),
        has_latent=_stack_rows(batch.has_latent, batch.unpaired_latents),
        latent_mask=_stack_latent_masks(batch.latent_mask, batch.unpaired_latent_mask),
        text_latent_mask=_stack_latent_masks(batch.latent_mask, batch.unpaired_text_latent_mask),
    )


def _only_present(batch: Batch) -> Batch:
    """The batch with zeros, and no kept token, where a paired row lacks a part."""
    tokens, mask, latents = batch[:3]
    if batch.has_text is None and batch.has_latent is None:
        return batch
    if tokens is None or mask is None or latents is None:
        raise ValueError(
            "`batch.has_text` and `batch.has_latent` say which paired rows lack a part, and the "
            "batch has no pairs"
        )
    everyone = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    has_text = everyone if batch.has_text is None else batch.has_text
    has_latent = everyone if batch.has_latent is None else batch.has_latent
    checks.check_row_mask("batch.has_text", has_text, tokens)
    checks.check_row_mask("batch.has_latent", has_latent, latents)
    return batch._replace(
        tokens=only_present(tokens, has_text, 0),
        attention_mask=only_present(mask, has_text, 0),
        latents=only_present(latents, has_latent),
        has_text=has_text,
        has_latent=has_latent,
    )


_MASKED = {  # the masks of latents, and which part of a batch is of no use without
    "latent_mask": "latents",
    "unpaired_latent_mask": "unpaired_latents",
    "unpaired_text_latent_mask": "unpaired_tokens",
}


def _only_kept(batch: Batch, latent_process: LatentProcess) -> Batch:
    """The batch with zeros where masks of latents keep nothing, and these masks as bool."""
    masks = {name: getattr(batch, name) for name in _MASKED}
    if all(mask is None for mask in masks.values()):
        return batch
    changed: dict[str, Tensor] = {}
    for name, of in _MASKED.items():
        part, mask = getattr(batch, of), masks[name]
        if part is None and mask is not None:
            raise ValueError(f"`batch.{name}` came without `batch.{of}`")
        if part is not None and mask is None:
            cure = "torch.ones where nothing is padded"
            if name == "unpaired_text_latent_mask":
                cure = (
                    "`unpaired_attention_mask` where a latent is as long as its text, else how "
                    "long a latent the encoder is to write for each text"
                )
            raise ValueError(
                f"a mask of latents is given, and none for `batch.{of}`: give `batch.{name}`, "
                f"{cure}"
            )
        if part is None:
            continue
        if of != "unpaired_tokens":
            shape = part.shape
        else:
            known = [x.shape[1:] for x in (batch.latents, batch.unpaired_latents) if x is not None]
            one = known[0] if known else latent_process.shape
            if one is None:
                raise ValueError(
                    f"`batch.{name}` is of latents whose shape nothing tells: set `shape` on the "
                    "LatentProcess, as in LatentProcess(shape=(32, 64))"
                )
            shape = torch.Size((len(part), *one))
        kept = as_latent_mask(f"batch.{name}", mask, shape, rows=_must_keep(batch, name))
        if name == "latent_mask" and batch.has_latent is not None:
            kept = kept | (~batch.has_latent & ~kept.any(dim=1))[:, None]
        changed[name] = kept
        if of != "unpaired_tokens":
            changed[of] = only_kept(part, kept)
    return batch._replace(**changed)


def _must_keep(batch: Batch, name: str) -> Rows | None:
    return batch.has_latent if name == "latent_mask" else None


def _stack_latent_masks(paired: Tensor | None, unpaired: Tensor | None) -> LatentMask | None:
    if paired is None or unpaired is None:
        return unpaired if paired is None else paired
    return torch.cat([paired, unpaired])


def _stack_rows(paired: Rows | None, unpaired: Tensor | None) -> Bool[Tensor, " all"] | None:
    """Which rows of a direction are there; those without a partner all are."""
    if paired is None or unpaired is None:
        return paired
    return F.pad(paired, (0, len(unpaired)), value=True)


def _check_devices(batch: Batch) -> None:
    devices = {name: part.device for name, part in batch._asdict().items() if part is not None}
    for name, device in devices.items():
        first = next(iter(devices))
        if device != devices[first]:
            raise ValueError(
                f"`batch.{name}` is on {device} and `batch.{first}` on {devices[first]}; "
                "move the whole batch to one device"
            )


def _texts(
    prefix: str,
    tokens: Tensor | None,
    mask: Tensor | None,
    text_process: TextProcess,
    rows: Rows | None = None,
) -> Texts | None:
    tokens_name, mask_name = f"batch.{prefix}tokens", f"batch.{prefix}attention_mask"
    if tokens is None:
        if mask is not None:
            raise ValueError(f"`{mask_name}` came without `{tokens_name}`")
        return None
    if mask is None:
        raise ValueError(
            f"`{tokens_name}` came without `{mask_name}`: padding must never count; "
            "give torch.ones_like(tokens) where nothing is padded"
        )
    return Texts(*text_process.as_text(tokens, mask, prefix=f"batch.{prefix}", rows=rows))


def _stack_texts(parts: list[Texts], text_process: TextProcess) -> Texts | None:
    if not parts:
        return None
    mask = stack_masks(*(part.mask for part in parts))
    tokens = [F.pad(part.tokens, (0, mask.shape[1] - part.tokens.shape[1])) for part in parts]
    return Texts(text_process.pad(torch.cat(tokens), mask), mask)


def _stack_latents(paired: Tensor | None, unpaired: Tensor | None) -> Latents | None:
    if paired is None or unpaired is None:
        return unpaired if paired is None else paired
    if paired.shape[1:] != unpaired.shape[1:]:
        raise ValueError(
            "`batch.latents` and `batch.unpaired_latents` must hold latents of one shape, "
            f"got {list(paired.shape[1:])} and {list(unpaired.shape[1:])}"
        )
    return torch.cat([paired, unpaired])
