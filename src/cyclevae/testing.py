"""For users' own tests: is a model a denoiser, and which parameters learn from a loss."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cyclevae._precision import fp32
from cyclevae._types import Need
from cyclevae.batch import Batch
from cyclevae.denoiser import (
    Denoised,
    Denoiser,
    ModuleDenoiser,
    as_denoiser,
    embed_tokens,
    need_latents,
    need_logits,
)
from cyclevae.gradient_policy import refuse_reentrant
from cyclevae.latent_process import LatentProcess
from cyclevae.roles import Roles
from cyclevae.text_process import TextProcess


def assert_frozen(loss: Tensor, parameters: Iterable[Tensor | tuple[str, Tensor]]) -> None:
    """Assert that no gradient of `loss` reaches any of `parameters`.

    Exact, whatever the model did: it asks autograd, without touching any `.grad`.

    Args:
        loss: a scalar with a graph, which is kept.
        parameters: tensors, or `(name, tensor)` pairs such as `module.named_parameters()` gives
            outside of `freeze`.

    Raises:
        AssertionError: names the parameters that would learn.
        RuntimeError: if the graph holds reentrant activation checkpointing.
        ValueError: if nothing would be tested: no graph, no parameters, or
            sharded ones, or the aliases that `freeze` lends.

    Examples:
        >>> from cyclevae.gradient_policy import freeze
        >>> layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
        >>> with freeze(layer):
        ...     y = layer(x)
        >>> assert_frozen(y.sum(), layer.named_parameters())
        >>> assert_frozen(layer(x).sum(), layer.named_parameters())
        Traceback (most recent call last):
        AssertionError: expected no gradient, but these would learn: weight, bias
    """
    leaking = [name for name, gradient in _gradients(loss, parameters) if gradient is not None]
    if leaking:
        raise AssertionError(f"expected no gradient, but these would learn: {', '.join(leaking)}")


def assert_learns(loss: Tensor, parameters: Iterable[Tensor | tuple[str, Tensor]]) -> None:
    """Assert that a gradient of `loss` reaches all `parameters` and is not zero in all of them.

    Args:
        loss: a scalar with a graph, which is kept.
        parameters: as `assert_frozen`.

    Raises:
        AssertionError: names the parameters that the gradient does not reach.
        RuntimeError: if the graph holds reentrant activation checkpointing.
        ValueError: if nothing would be tested: no graph, no parameters, or
            sharded ones, or the aliases that `freeze` lends.

    Examples:
        >>> layer = torch.nn.Linear(2, 2)
        >>> assert_learns(layer(torch.ones(1, 2)).sum(), layer.named_parameters())
    """
    gradients = _gradients(loss, parameters)
    missed = [name for name, gradient in gradients if gradient is None]
    if missed:
        raise AssertionError(f"expected a gradient, but none reaches: {', '.join(missed)}")
    if not any(gradient.any() for _, gradient in gradients if gradient is not None):
        names = ", ".join(name for name, _ in gradients)
        raise AssertionError(f"expected a gradient, but it is zero in all of: {names}")


def _gradients(
    loss: Tensor, parameters: Iterable[Tensor | tuple[str, Tensor]]
) -> list[tuple[str, Tensor | None]]:
    named = [
        (f"parameter {i}", entry) if isinstance(entry, Tensor) else entry
        for i, entry in enumerate(parameters)
    ]
    if not named:
        raise ValueError("`parameters` is empty, so nothing would be tested")
    if not loss.requires_grad:
        raise ValueError("`loss` has no graph, so nothing would be tested; was it detached?")
    if any(type(tensor.grad_fn).__name__ == "_GateBackward" for _, tensor in named):
        raise ValueError(
            "`parameters` were taken inside freeze(), which holds aliases: take them outside"
        )
    if any(type(tensor).__name__ == "DTensor" for _, tensor in named):
        raise ValueError(
            "`parameters` are sharded, and FSDP2 hides their gradients from autograd: test the "
            "model before fully_shard"
        )
    refuse_reentrant([loss])
    # autograd.grad refuses tensors that do not require grad; they learn nothing.
    learning = [tensor for _, tensor in named if tensor.requires_grad]
    found = iter(
        torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True)
        if learning
        else ()
    )
    return [(name, next(found) if tensor.requires_grad else None) for name, tensor in named]


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
    other rows of the batch change nothing; and that both outputs carry a gradient to the
    parameters. No gradient is accumulated, and the global random state is left alone.

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
    with torch.random.fork_rng(devices), _evaluating(module):
        check = partial(_check_mode, denoiser, text_process, tokens, latents, mask)
        with _called(getattr(denoiser, "network", module)):
            check(1.0, 0.0, "logits", parameters)
        check(0.0, 1.0, "latents", parameters)
        check(0.5, 0.5, "both", parameters)
        if relaxed:
            _check_relaxed(denoiser, text_process, tokens, latents, mask)


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


@contextmanager
def _evaluating(module: object) -> Iterator[None]:
    """Dropout off, then every submodule back as it was, and sharded again where FSDP2 shards it."""
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    modes = [m.training for m in modules]
    for m in modules:
        m.training = False
    try:
        yield
    finally:
        for m, mode in zip(modules, modes, strict=True):
            m.training = mode
            # A root unit stays unsharded until its backward, and an optimizer made meanwhile would
            # hold the wrong parameters. By name, because torch.distributed may be missing.
            if any(base.__name__ == "FSDPModule" for base in type(m).__mro__):
                reshard: Any = m.reshard
                reshard()


class ToyNetwork(nn.Module):
    """The smallest network that reads both parts in both directions: for examples and tests.

    Examples:
        >>> ToyNetwork(vocab_size=7, latent_dim=4).text_head.out_features
        7
    """

    def __init__(self, vocab_size: int, latent_dim: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, latent_dim)
        self.times = nn.Linear(2, latent_dim)
        self.shared = nn.Linear(latent_dim, latent_dim)
        self.text_head = nn.Linear(latent_dim, vocab_size)
        self.latent_head = nn.Linear(latent_dim, latent_dim)
        self.roles = Roles(encoder_only=("latent_head.*",), decoder_only=("text_head.*",))

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        *,
        text_time: Tensor,
        latent_time: Tensor,
        attention_mask: Tensor,
        need: Need = "both",
    ) -> Denoised:
        """Mix the mean of the words with the latent."""
        words = embed_tokens(self.word.weight, tokens)
        keep = attention_mask.to(words)
        weight = keep / keep.sum(dim=1, keepdim=True).clamp(min=1)
        times = torch.stack([text_time, latent_time], dim=1).to(latents)
        mean = (weight[..., None] * words).sum(dim=1)
        hidden = self.shared((mean + latents + self.times(times)).tanh()).tanh()
        return Denoised(
            logits=None if need == "latents" else self.text_head(words + hidden[:, None]),
            latent_prediction=None if need == "logits" else self.latent_head(hidden),
        )


def toy_denoiser(seed: int = 0) -> tuple[ModuleDenoiser, TextProcess, LatentProcess]:
    """A denoiser of `ToyNetwork`, 7 ids (padding 0, mask 2) and latents of 4 dimensions.

    Examples:
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> latent_process.shape
        (4,)
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = ToyNetwork(vocab_size=7, latent_dim=4)
    text_process = TextProcess(mask_id=2, vocab_size=7, pad_id=0)
    return as_denoiser(network), text_process, LatentProcess(shape=(4,))


def toy_batch(seed: int = 0, rows: int = 3) -> Batch:
    """A batch for `toy_denoiser`, with pairs, unpaired texts and unpaired latents.

    Examples:
        >>> toy_batch(seed=0).unpaired_latents.shape
        torch.Size([3, 4])
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (2, rows, 1), generator=generator)
    mask = torch.arange(5) < lengths
    tokens = torch.randint(3, 7, (2, rows, 5), generator=generator) * mask
    latents = torch.randn(2, rows, 4, generator=generator)
    return Batch(tokens[0], mask[0], latents[0], tokens[1], mask[1], latents[1])
