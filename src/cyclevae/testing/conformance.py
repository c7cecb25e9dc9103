"""Is a model a denoiser, in the wrappers it will be trained in."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from cyclevae._base.precision import fp32
from cyclevae._base.types import Need
from cyclevae.diagnostics._measuring import evaluating
from cyclevae.model.denoiser import Denoised, Denoiser, need_latents, need_logits
from cyclevae.model.passes import l2t, t2l
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess


def check_denoiser(
    denoiser: Denoiser,
    text_process: TextProcess,
    latent_process: LatentProcess,
    *,
    latent_shape: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    lengths: Sequence[int] = (7, 4, 2),
    relaxed: bool = False,
) -> None:
    """Dry-run a denoiser as the objective will use it; call it first, on the wrapped object.

    Checks that the network is reached through its own `__call__`; that both directions and the
    joint mode return finite outputs of the right shapes; that `need` is honoured; that padding and
    other rows of the batch change nothing; that both outputs carry a gradient to the parameters;
    and that its roles, if it has any, are true. No gradient is accumulated, and the global random
    state is left alone.

    Args:
        denoiser: the denoiser, in the wrappers it will be trained in.
        text_process: the text process.
        latent_process: the latent process.
        latent_shape: of one latent, `(d,)` or `(n, d)`; that of the process if not given.
        device: where the network lives; that of its first parameter if not given.
        dtype: of latents; float32 if not given.
        lengths: of the texts in the batch, longest first, no longer than the model can take.
        relaxed: check also what the differentiable text bridges need: that a one-hot text
            `[b, s, v]` is read as its ids are, and that gradient reaches it.

    Raises:
        AssertionError: the denoiser breaks its contract; the message says how and what to do.
        TypeError: it has no `denoise` method, or is a module itself.
        ValueError: no latent shape is known.

    Examples:
        >>> from cyclevae.testing import toy_denoiser
        >>> check_denoiser(*toy_denoiser(seed=0), relaxed=True)
    """
    if isinstance(denoiser, nn.Module):
        raise TypeError(
            f"{type(denoiser).__name__} is a module with a method of its own, which DDP, FSDP2 and "
            "torch.compile bypass; give its forward the signature and use as_denoiser(module)"
        )
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"{type(denoiser).__name__} has no `denoise` method; see as_denoiser")
    shape = tuple(latent_shape or latent_process.shape or ())
    if not shape:
        raise ValueError("give `latent_shape`, or set `shape` on the LatentProcess")
    module = getattr(denoiser, "module", None)
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    if device is None:
        device = parameters[0].device if parameters else torch.device("cpu")
    if any(type(parameter).__name__ == "DTensor" for parameter in parameters):
        parameters = []  # FSDP2 hides their gradients from autograd
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    words = [i for i in range(text_process.vocab_size) if i not in text_process.forbidden_ids]
    chosen = torch.randint(len(words), mask.shape, generator=generator)
    tokens = text_process.frame(torch.tensor(words)[chosen], mask).to(device)
    latents = torch.randn(len(lengths), *shape, generator=generator).to(device, dtype)
    mask = mask.to(device)
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices), evaluating(module):
        check = partial(_check_mode, denoiser, text_process, tokens, latents, mask)
        with _called(getattr(denoiser, "network", module)):
            check(1.0, 0.0, "logits", parameters)
        check(0.0, 1.0, "latents", parameters)
        check(0.5, 0.5, "both", parameters)
        if relaxed:
            _check_relaxed(denoiser, text_process, tokens, latents, mask)
        roles = getattr(denoiser, "roles", None)
        if roles is not None and parameters:
            groups = roles.groups(module)
            logits = l2t(denoiser, latents, mask, text_process=text_process)
            _check_role("encoder_only", groups, "L2T", logits)
            encoded = t2l(
                denoiser,
                tokens,
                mask,
                latents=latents,
                text_process=text_process,
                latent_process=latent_process,
            )
            _check_role("decoder_only", groups, "T2L", encoded.prediction)


def _check_role(
    role: str, groups: Mapping[str, Sequence[tuple[str, Tensor]]], other: str, output: Tensor
) -> None:
    """The parameters of one direction take no part in the other."""
    members = [(name, p) for name, p in groups[role] if p.requires_grad]
    if not members:
        return
    reached = torch.autograd.grad(
        output.float().square().sum(), [p for _, p in members], allow_unused=True
    )
    used = [
        name for (name, _), g in zip(members, reached, strict=True) if g is not None and g.any()
    ]
    if used:
        raise AssertionError(
            f"the roles call {', '.join(map(repr, used))} {role}, but {other} passes use them too: "
            "what both directions use is shared, so leave it out of the roles"
        )


def _check_relaxed(
    denoiser: Denoiser, text_process: TextProcess, tokens: Tensor, latents: Tensor, mask: Tensor
) -> None:
    def encode(text: Tensor) -> Tensor:
        time = torch.ones(len(text), device=text.device)
        output = denoiser.denoise(
            text,
            latents,
            text_time=0 * time,
            latent_time=time,
            attention_mask=mask,
            need="latents",
        )
        return need_latents(output, latents)

    one_hot = torch.nn.functional.one_hot(tokens, text_process.vocab_size)
    text = one_hot.to(fp32(latents).dtype).requires_grad_()
    try:
        read = encode(text)
    except Exception as error:
        raise AssertionError(
            f"the network cannot read a relaxed text [b, s, v] ({type(error).__name__}: {error}); "
            "use embed_tokens(embedding.weight, tokens) in place of embedding(tokens)"
        ) from error
    with torch.no_grad():
        ids = encode(tokens)
    if not _close(read, ids):
        raise AssertionError(
            "a one-hot text [b, s, v] gives another latent_prediction than its ids; embed both by "
            "embed_tokens(embedding.weight, tokens)"
        )
    (reached,) = (
        torch.autograd.grad(read.float().square().sum(), [text], allow_unused=True)
        if read.requires_grad
        else (None,)
    )
    if reached is None or not bool(reached[mask].any()):
        raise AssertionError(
            "no gradient of the latent_prediction reaches a relaxed text [b, s, v], so the decoder "
            "could learn nothing through a text bridge; is it detached, rounded or read as ids?"
        )


def _check_mode(
    denoiser: Denoiser,
    text_process: TextProcess,
    tokens: Tensor,
    latents: Tensor,
    mask: Tensor,
    text_time: float,
    latent_time: float,
    need: Need,
    parameters: Sequence[Tensor],
) -> None:
    def run(rows: slice = slice(None), padding: int | None = None) -> Denoised:
        noised = text_process.fully_masked(mask[rows]) if text_time == 1 else tokens[rows]
        if padding is not None:
            noised = noised.masked_fill(~mask[rows], padding)
        time = torch.ones(len(noised), device=tokens.device)
        return denoiser.denoise(
            noised,
            latents[rows],
            text_time=text_time * time,
            latent_time=latent_time * time,
            attention_mask=mask[rows],
            need=need,
        )

    def outputs(denoised: Denoised, rows: slice = slice(None)) -> dict[str, Tensor]:
        found = {}
        if need != "latents":
            logits = need_logits(denoised, tokens[rows], text_process.vocab_size)
            found["logits"] = logits * mask[rows][..., None]
        if need != "logits":
            found["latent_prediction"] = need_latents(denoised, latents[rows])
        return found

    mode = f"at text_time {text_time:g}, latent_time {latent_time:g}, need={need!r}"
    try:
        full = outputs(run())
    except ValueError as error:
        raise AssertionError(f"{mode}: {error}") from error
    with torch.no_grad():
        repadded = outputs(run(padding=int(tokens[0, 0])))
        alone = outputs(run(slice(1)), slice(1))
    for name, value in full.items():
        if not bool(torch.isfinite(value).all()):
            raise AssertionError(f"{mode}: the {name} hold NaN or infinity")
        if not _close(value, repadded[name]):
            raise AssertionError(
                f"{mode}: the ids at padded positions change the {name}; the network must use "
                "`attention_mask` wherever positions mix"
            )
        if not _close(value[:1], alone[name]):
            raise AssertionError(
                f"{mode}: other rows of the batch change the {name}; a denoiser must treat rows "
                "apart (no batch normalisation over rows)"
            )
        reached = (
            torch.autograd.grad(
                value.float().square().sum(), parameters, retain_graph=True, allow_unused=True
            )
            if parameters and value.requires_grad
            else ()
        )
        if parameters and not any(g is not None and bool(g.any()) for g in reached):
            raise AssertionError(
                f"{mode}: no gradient of the {name} reaches a parameter of `denoiser.module`"
            )


def _close(left: Tensor, right: Tensor) -> bool:
    loose = 5e-2 if left.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return torch.allclose(left.float(), right.float(), rtol=loose, atol=loose)


@contextmanager
def _called(network: object) -> Iterator[None]:
    """Assert that a network is reached through its own call, where the wrappers do their work."""
    calls: list[object] = []
    if not isinstance(network, nn.Module):
        yield
        return
    handle = network.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise AssertionError(
            "the denoiser does not reach its network through the network's own __call__, so DDP, "
            "FSDP2 and torch.compile would be bypassed: call `network(...)`, not `.forward(...)`"
        )
