"""Is a model a denoiser, in the wrappers it will be trained in."""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cyclevae._base.precision import fp32
from cyclevae.model.denoiser import Denoiser, need_latents
from cyclevae.model.direction import check_predicts
from cyclevae.model.evaluation import evaluating
from cyclevae.model.passes import l2t, t2l
from cyclevae.model.unread import read_logits
from cyclevae.processes.latent import LatentProcess
from cyclevae.processes.text import TextProcess
from cyclevae.testing._alive import alive, moved
from cyclevae.testing._dry_run import JOINT, L2T, T2L, DryRun, Mode, fitting


def check_denoiser(
    denoiser: Denoiser,
    text_process: TextProcess,
    latent_process: LatentProcess,
    *,
    latent_shape: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    lengths: Sequence[int] | None = None,
    relaxed: bool = False,
) -> None:
    """Dry-run a denoiser as the objective will use it; call it first, on the wrapped object.

    Checks that the network is reached through its own `__call__`, and leaves its inputs as they
    are; that both directions and the joint mode return finite outputs of the right shapes; that
    `need` is honoured; that padding and other rows of the batch change nothing; that both ends of a
    text reach the latent prediction, the latent the logits of every word, and a word the logits on
    both sides of it, if on one (a causal model cannot fill in a masked text); that both outputs
    carry a gradient to the parameters that they depend on and that learn; and that its roles, if it
    has any, are true.

    Parameters whose numbers are all equal, such as a head that begins at 0, are moved meanwhile, so
    that nothing is silent because it has not learned yet. Dropout is off; other draws follow the
    global random state, which is the same for runs that are compared. Afterwards all is as it was,
    and no gradient is accumulated. What is exact zero in the trained network is not looked for, nor
    whether the order of the words matters: a network without positions passes.

    Args:
        denoiser: the denoiser, in the wrappers it will be trained in.
        text_process: the text process.
        latent_process: the latent process.
        latent_shape: of one latent, such as `(c, h, w)`; that of the process if not given.
        device: where the network lives; that of its first parameter if not given.
        dtype: of latents; that of its first floating-point parameter if not given.
        lengths: of the texts in the batch, two or more. If not given, 7, 4 and 2, or others that
            the network can take; equal ones where its forward has no `attention_mask`. Give equal
            ones, such as `(7, 7)`, for a model whose texts all have one length.
        relaxed: check also what the differentiable text bridges need: that a one-hot text
            `[b, s, v]` is read as its ids are, and that gradient reaches it.

    Raises:
        AssertionError: the denoiser breaks its contract; the message says how and what to do.
        TypeError: it has no `denoise` method, or is a module itself.
        ValueError: no latent shape is known, or lengths that are none.

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
    check_predicts("denoiser", denoiser, latent_process)
    shape = tuple(latent_shape or latent_process.shape or ())
    if not shape:
        raise ValueError("give `latent_shape`, or set `shape` on the LatentProcess")
    if lengths is not None and (len(lengths) < 2 or min(lengths) < 1):
        raise ValueError(
            f"`lengths` must be of two texts or more, each at least 1, got {tuple(lengths)!r}"
        )
    module = getattr(denoiser, "module", None)
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    if device is None:
        device = parameters[0].device if parameters else "cpu"
    if dtype is None:
        dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    learning = [p for p in parameters if p.requires_grad]
    _check_norms(module)
    forked = torch.random.fork_rng(devices), _python_random()
    with forked[0], forked[1], evaluating(module), alive(learning):
        where = torch.device(device)
        dry = fitting(partial(DryRun.of, denoiser, text_process, shape, where, dtype), lengths)
        if any(type(parameter).__name__ == "DTensor" for parameter in parameters):
            learning = []  # FSDP2 hides their gradients from autograd
        with _called(getattr(denoiser, "network", module)):
            _check_mode(dry, L2T, learning)
        _check_mode(dry, T2L, learning)
        _check_mode(dry, JOINT, learning)
        _check_both_sides(dry)
        _check_listening(dry)
        if relaxed:
            _check_relaxed(dry)
        roles = getattr(denoiser, "roles", None)
        if roles is not None and learning:
            groups = roles.groups(module)
            logits = read_logits(l2t(denoiser, dry.latents, dry.mask, text_process=text_process))
            _check_role("encoder_only", groups, "L2T", logits)
            encoded = t2l(
                denoiser,
                dry.tokens,
                dry.mask,
                latents=dry.latents,
                text_process=text_process,
                latent_process=latent_process,
            )
            _check_role("decoder_only", groups, "T2L", encoded.prediction)


def _check_norms(module: object) -> None:
    """Batch normalisation mixes rows while it trains, and the dry run evaluates."""
    for name, part in module.named_modules() if isinstance(module, nn.Module) else ():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
            raise AssertionError(
                f"{name or 'the network'} is a {type(part).__name__}, in which other rows of the "
                "batch change the outputs while it trains, and every pass of a step moves its "
                "statistics; use LayerNorm or GroupNorm, or keep it in evaluation mode"
            )


def _check_mode(dry: DryRun, mode: Mode, learning: Sequence[Tensor]) -> None:
    given = {name: getattr(dry, name).clone() for name in ("tokens", "latents", "mask")}
    try:
        full = dry.outputs(mode)
        _check_inputs(mode, dry, given)
        # of all before a parameter is moved, after which autograd would not go back
        unreached = [name for name, x in full.items() if learning and not _reached(x, learning)]
        with torch.no_grad():
            alone = dry.row().outputs(mode)
    except ValueError as error:
        raise AssertionError(f"{mode}: {error}") from error
    except RuntimeError as error:  # which ran before, without gradients
        raise AssertionError(
            f"{mode}: the network fails where gradients are on ({error}); let parts that do not "
            "learn run under torch.no_grad(), or with requires_grad_(False), and activation "
            "checkpointing with use_reentrant=False"
        ) from error
    later = torch.arange(len(dry.tokens), device=dry.tokens.device) > 0
    others = dry.other_words(later[:, None])
    others = others._replace(latents=_where(later, 0.5 - dry.latents, dry.latents))
    with torch.no_grad():
        again, repadded = dry.outputs(mode), dry.outputs(mode, padding=int(dry.tokens[0, 0]))
        beside, reseeded = others.outputs(mode), dry._replace(seed=1).outputs(mode)
    for name, value in full.items():
        if not bool(torch.isfinite(value).all()):
            raise AssertionError(f"{mode}: the {name} hold NaN or infinity")
        spread = _distance(value, again[name])  # of draws that no seed controls
        if not _close(value, repadded[name], spread):
            raise AssertionError(
                f"{mode}: the ids at padded positions change the {name}; the network must use "
                "`attention_mask` wherever positions mix. If all of its texts have one length, "
                "say so: lengths=(7, 7)"
            )
        draws = _distance(again[name], reseeded[name]) > 0  # others, for another number of rows
        same = draws or _close(value[:1], alone[name], spread)
        if not (same and _close(value[:1], beside[name][:1], spread)):
            raise AssertionError(
                f"{mode}: other rows of the batch change the {name}; a denoiser must treat rows "
                "apart (no batch normalisation over rows)"
            )
        if name in unreached:
            with torch.no_grad(), moved(learning):
                depends = not torch.equal(value, dry.outputs(mode)[name])
            if depends:  # where all that it reads is frozen, there is nothing to reach
                raise AssertionError(
                    f"{mode}: no gradient of the {name} reaches a parameter of `denoiser.module`"
                )


def _check_inputs(mode: Mode, dry: DryRun, given: Mapping[str, Tensor]) -> None:
    for name, before in given.items():
        if not torch.equal(before, getattr(dry, name)):
            raise AssertionError(
                f"{mode}: the network writes into the {name} that it is given, which other passes "
                "of a step read too; let it work on a copy"
            )


def _check_listening(dry: DryRun) -> None:
    """Each direction must depend on its condition: on both ends of a text, and at every place."""
    places = dry.text_process.chosen(dry.mask)
    row = torch.arange(len(places), device=places.device)[:, None] == 0
    changed = {
        "text": torch.ones_like(places),
        "first word": row & places & (places.cumsum(1) == 1),
        "last word": row & places & (places.flip(1).cumsum(1).flip(1) == 1),
    }
    fine = dry.latents.dtype in (torch.float32, torch.float64)  # others may round a change away
    with torch.no_grad():
        before, again = (dry.outputs(T2L)["latent_prediction"] for _ in range(2))
        for what, at in changed.items() if fine else [("text", changed["text"])]:
            other = dry.other_words(at)
            if not torch.equal(other.tokens, dry.tokens):  # there is another word
                after = other.outputs(T2L)["latent_prediction"]
                _refuse_deaf(T2L, what, "latent_prediction", before, again, after)
        before, again = (dry.outputs(L2T)["logits"] for _ in range(2))
        after = dry._replace(latents=dry.latents.roll(1, 0)).outputs(L2T)["logits"]
        _refuse_deaf(L2T, "latent", "logits", before, again, after)
        deaf = places & (before == after).all(dim=-1)
        if fine and bool(deaf.any()):
            at_those = [x[deaf] for x in (before, again, after)]
            _refuse_deaf(L2T, "latent", "logits of some places", *at_those)


_HEARING = {
    T2L: (
        "read it off words that have seen the text (a latent in front of a causal model has seen "
        "none)"
    ),
    L2T: "let every position read the latent",
}


def _refuse_deaf(
    mode: Mode, changed: str, name: str, before: Tensor, again: Tensor, after: Tensor
) -> None:
    """Refuse outputs that stay as they are, where they can be told from random draws."""
    spread = _distance(before, again)
    if spread <= 1e-3 * before.abs().max() and _distance(before, after) <= 10 * spread:
        raise AssertionError(
            f"{mode}: another {changed} changes nothing in the {name}, so this direction could "
            f"learn nothing of it; {_HEARING[mode]}"
        )


def _check_both_sides(dry: DryRun) -> None:
    """Words to the right must be heard, where those to the left are, and the other way round."""
    places = dry.text_process.chosen(dry.mask)[0].nonzero().flatten().tolist()
    if len(places) < 2:
        return
    heard = {}
    with torch.no_grad():
        before, again = (dry.outputs(JOINT)["logits"][0] for _ in range(2))
        spread = _distance(before, again)
        for side, place in (("left", places[0]), ("right", places[-1])):
            at = torch.arange(dry.tokens.shape[1], device=dry.tokens.device)
            after = dry.other_words((at == place)[None]).outputs(JOINT)["logits"][0]
            elsewhere = (at != place)[:, None]
            heard[side] = _distance(before * elsewhere, after * elsewhere) > 10 * spread
    if heard["left"] != heard["right"]:
        deaf = next(side for side, hears in heard.items() if not hears)
        raise AssertionError(
            f"{JOINT}: the logits never depend on words to their {deaf}, as under a causal mask; a "
            "masked text is filled in from both sides, so attention must be bidirectional: see "
            "docs/scope.md#an-autoregressive-decoder"
        )


def _check_role(
    role: str, groups: Mapping[str, Sequence[tuple[str, Tensor]]], other: str, output: Tensor
) -> None:
    """The parameters of one direction take no part in the other."""
    members = [(name, p) for name, p in groups[role] if p.requires_grad]
    reached = _gradients(output, [p for _, p in members])
    used = [
        name for (name, _), g in zip(members, reached, strict=True) if g is not None and g.any()
    ]
    if used:
        raise AssertionError(
            f"the roles call {', '.join(map(repr, used))} {role}, but {other} passes use them too: "
            "what both directions use is shared, so leave it out of the roles"
        )


def _check_relaxed(dry: DryRun) -> None:
    one_hot = torch.nn.functional.one_hot(dry.tokens, dry.text_process.vocab_size)
    text = one_hot.to(fp32(dry.latents).dtype).requires_grad_()
    try:
        read = need_latents(dry.denoise(T2L, text), dry.latents)
    except Exception as error:
        raise AssertionError(
            f"the network cannot read a relaxed text [b, s, v] ({type(error).__name__}: {error}); "
            "use embed_tokens(embedding.weight, tokens) in place of embedding(tokens)"
        ) from error
    with torch.no_grad():
        ids, again = (dry.outputs(T2L)["latent_prediction"] for _ in range(2))
    if not _close(read, ids, _distance(ids, again)):
        raise AssertionError(
            "a one-hot text [b, s, v] gives another latent_prediction than its ids; embed both by "
            "embed_tokens(embedding.weight, tokens)"
        )
    (reached,) = _gradients(read, [text])
    if reached is None or not bool(reached[dry.mask].any()):
        raise AssertionError(
            "no gradient of the latent_prediction reaches a relaxed text [b, s, v], so the decoder "
            "could learn nothing through a text bridge; is it detached, rounded or read as ids?"
        )


def _gradients(output: Tensor, of: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Of a random linear function of the output: that of its square is 0 where a head is."""
    if not (output.requires_grad and of):
        return [None] * len(of)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    total = (output.float() * weights.to(output.device)).sum()
    return torch.autograd.grad(total, of, retain_graph=True, allow_unused=True)


def _reached(output: Tensor, parameters: Sequence[Tensor]) -> bool:
    return any(g is not None and bool(g.any()) for g in _gradients(output, parameters))


def _distance(left: Tensor, right: Tensor) -> float:
    return (left.float() - right.float()).abs().max().item()


def _close(left: Tensor, right: Tensor, spread: float = 0.0) -> bool:
    loose = 5e-2 if left.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return torch.allclose(left.float(), right.float(), rtol=loose, atol=loose + 3 * spread)


def _where(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (one.ndim - 1)), one, other)


@contextmanager
def _python_random() -> Iterator[None]:
    """The states of the random numbers of Python and, where it is loaded, NumPy, put back."""
    numpy: Any = sys.modules.get("numpy")
    state = random.getstate(), numpy and numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        if numpy:
            numpy.random.set_state(state[1])


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
