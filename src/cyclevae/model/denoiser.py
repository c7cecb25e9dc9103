"""What a model must do to be trained here, and the thin objects that make it so."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cyclevae._base import checks
from cyclevae._base.precision import no_autocast
from cyclevae._base.types import (
    AnyTokens,
    LatentMaskLike,
    Latents,
    MaskLike,
    Need,
    Prediction,
    Time,
)
from cyclevae.gradient_policy.roles import Roles
from cyclevae.model.direction import direction_of, direction_of_two
from cyclevae.model.dtypes import network_dtype, reading_in
from cyclevae.model.padding import tell_latent_mask
from cyclevae.model.unread import AnyLogits
from cyclevae.model.wrappers import path_inside


class Denoised(NamedTuple):
    """What one forward of a denoiser returns; only what was not asked for may be None.

    A named tuple, because FSDP2 finds tensors in tuples and overlooks those in a dataclass.

    Attributes:
        logits: `[b, s, v]`, or what `unread_logits` makes of a head.
        latent_prediction: the shape of the latents, in the process's prediction type.

    Examples:
        >>> logits, latent_prediction = Denoised(logits=None, latent_prediction=None)
    """

    logits: AnyLogits | None
    latent_prediction: Latents | None


@runtime_checkable
class Denoiser(Protocol):
    """A model of text and latents, read as a decoder (L2T) and as an encoder (T2L).

    A thin object that reaches its network through the network's own `__call__`: a method `denoise`
    on the module itself would be bypassed by DDP, FSDP2 and `torch.compile`. See `as_denoiser`.

    Examples:
        >>> from cyclevae.testing import toy_denoiser
        >>> isinstance(toy_denoiser(seed=0)[0], Denoiser)
        True
    """

    def denoise(
        self,
        tokens: AnyTokens,
        latents: Latents,
        *,
        text_time: Time,
        latent_time: Time,
        attention_mask: MaskLike,
        need: Need = "both",
    ) -> Denoised:
        """One forward on already noised tokens and latents.

        Args:
            tokens: ids `[b, s]`, masked as `text_time` says. The differentiable text bridges give
                a clean text relaxed, as floats `[b, s, v]`: `embed_tokens` takes both.
            latents: `[b, ...]`, such as `[b, d]` or `[b, c, h, w]`, noised as `latent_time` says.
            text_time: `[b]` in [0, 1]; 0 clean, 1 fully masked.
            latent_time: `[b]` in [0, 1]; 0 clean, 1 pure noise.
            attention_mask: bool `[b, s]`, True = keep.
            need: which outputs will be read; a hint that lets the model skip a head.

        Where latents have a mask, one more keyword comes: `latent_mask`, bool `[b, n]`, True =
        keep; a denoiser that takes none is then refused.
        """
        ...


class ModuleDenoiser:
    """A `Denoiser` around a module; made by `as_denoiser`.

    Latents are cast to the dtype of the module's parameters, whatever that of the batch; times come
    in fp32 or better, because bf16 knows none between 0.996 and 1.

    Attributes:
        network: the module as given (plain, DDP, FSDP2, compiled, an average, with adapters); it is
            what gets called.
        module: the plain module inside, against which parameter patterns resolve.
        roles: which of its parameters serve one direction alone, if that was said.
        clean_at: 1 where the network counts the times of latents from noise to data: it is then
            given `1 - latent_time`, and a velocity is turned round; else 0.
        predicts: what its latent head predicts, if that was said; a process of another prediction
            is refused.
        takes_mask: whether its forward has an `attention_mask`; if not, texts have one length.
        takes_latent_mask: whether it has a `latent_mask`; if not, latents have one length.
    """

    def __init__(
        self,
        network: nn.Module,
        roles: Roles | None = None,
        clean_at: Literal[0, 1] | None = None,
        predicts: Prediction | None = None,
    ) -> None:
        self._network, self._path = network, path_inside(network)
        self.roles = getattr(self.module, "roles", None) if roles is None else roles
        if self.roles is not None:
            self.roles.groups(self.module)
        self.clean_at, self.predicts = direction_of(self.module, clean_at, predicts)
        # Decided once: a wrapper's own forward takes anything, so ask the plain module.
        plain = self.module
        while "_fsdp_wrapped_module" in plain._modules:  # FSDP1, which `freeze` must still see
            plain = plain.get_submodule("_fsdp_wrapped_module")
        parameters = inspect.signature(plain.forward).parameters.values()
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters}
        self._takes_need = anything or "need" in names
        self.takes_mask = anything or "attention_mask" in names
        self.takes_latent_mask = "latent_mask" in names  # by name: nothing checks that it is read

    @property
    def network(self) -> nn.Module:
        """The module as given; another one is for another denoiser: see `with_network`."""
        return self._network

    @property
    def module(self) -> nn.Module:
        """The plain module, out of all wrappers that only hand calls on."""
        module: Any = self.network
        for name in self._path:
            module = module._modules[name]
        plain: nn.Module = module
        return plain

    def with_network(self, network: nn.Module) -> "ModuleDenoiser":
        """The same around another network, such as this one in a wrapper."""
        return ModuleDenoiser(network, self.roles, self.clean_at or None, self.predicts)

    def denoise(
        self,
        tokens: AnyTokens,
        latents: Latents,
        *,
        text_time: Time,
        latent_time: Time,
        attention_mask: MaskLike,
        latent_mask: LatentMaskLike | None = None,
        need: Need = "both",
    ) -> Denoised:
        """One forward of the network, on latents in its own dtype: see `Denoiser.denoise`."""
        more: dict[str, Any] = {"need": need} if self._takes_need else {}
        if self.takes_mask:
            more["attention_mask"] = attention_mask
        elif checks.reads_values(attention_mask) and not bool(attention_mask.all()):
            raise ValueError(
                f"the forward of {type(self.module).__name__} takes no `attention_mask`, so all "
                "texts must have one length, got some with padding: give its forward the "
                "argument, or let batches have no padding"
            )
        more |= tell_latent_mask(self, latent_mask)
        dtype = network_dtype(self)
        if dtype is not None and dtype != latents.dtype:
            latents = latents.to(dtype)
        if self.clean_at:
            latent_time = 1 - latent_time
        with reading_in(dtype):
            output = self.network(
                tokens, latents, text_time=text_time, latent_time=latent_time, **more
            )
        if not (isinstance(output, tuple) and len(output) == 2):
            raise TypeError(
                "a denoising network must return (logits, latent_prediction) or a `Denoised`, "
                f"got {type(output).__name__}; give `as_denoiser` a module whose forward does"
            )
        logits, prediction = output
        if self.clean_at and self.predicts == "velocity" and prediction is not None:
            prediction = -prediction  # from data to noise, as it is in a process
        return Denoised(logits, prediction)


def as_denoiser(
    network: nn.Module,
    *,
    roles: Roles | None = None,
    clean_at: Literal[0, 1] | None = None,
    predicts: Prediction | None = None,
) -> ModuleDenoiser:
    """Make a `Denoiser` of a module, plain or wrapped in DDP, FSDP2 or `torch.compile`.

    Other wrappers are seen through too, and any number of them: `AveragedModel`, `DataParallel`,
    PEFT's, Accelerate's, those of activation checkpointing, and whatever holds one module to which
    its `forward(*args, **kwargs)` hands all on. Arguments, names of parameters and roles are those
    of the innermost module.

    The module is called as `network(tokens, latents, text_time=, latent_time=, attention_mask=)`,
    with `need=` too if its forward takes it, and `latent_mask=` where latents have one, and returns
    `(logits, latent_prediction)`. One whose texts all have one length may do without
    `attention_mask`. A network with another signature gets a small module of one's own around it.

    Args:
        network: the module.
        roles: which parameters serve one direction alone, for policies that name them; those of an
            attribute `roles` of the plain module if not given.
        clean_at: 1 if the network counts the times of latents from noise (0) to data (1), as many
            flow-matching models do: it is given `1 - latent_time`, and the velocity that it
            predicts, which points to the data, is turned round. An attribute `clean_at` of the
            plain module says the same; what is said here is noted there, so that copies of it, as
            a `Teacher` makes one, keep it. 0 if neither is given.
        predicts: what the latent head predicts, which must then be the prediction of the latent
            process; `velocity` if not given where `clean_at` is 1. Noted as `clean_at` is.

    Raises:
        TypeError: not a module.
        ValueError: roles that do not fit the parameters, an unknown `clean_at` or `predicts`, or
            one that is not what the module says.

    Examples:
        >>> import torch
        >>> class Tiny(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.to_latent = torch.nn.Embedding(6, 4)
        ...         self.to_logits = torch.nn.Linear(4, 6)
        ...
        ...     def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
        ...         hidden = self.to_latent(tokens) + latents[:, None]
        ...         return self.to_logits(hidden), hidden.mean(dim=1)
        >>> denoiser = as_denoiser(Tiny())
        >>> tokens, time = torch.tensor([[1, 2, 3]]), torch.zeros(1)
        >>> out = denoiser.denoise(
        ...     tokens, torch.zeros(1, 4), text_time=time, latent_time=time,
        ...     attention_mask=tokens > 0,
        ... )
        >>> out.logits.shape, out.latent_prediction.shape
        (torch.Size([1, 3, 6]), torch.Size([1, 4]))
    """
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"`network` must be a torch.nn.Module, got {type(network).__name__}; "
            "an object with a `denoise` method is a Denoiser already"
        )
    return ModuleDenoiser(network, roles, clean_at, predicts)


class EncoderDecoder(nn.Module):
    """Two separate networks as one: `as_denoiser(EncoderDecoder(encoder, decoder))`.

    Each is called as `as_denoiser` says, without `need`; the encoder returns the latent prediction
    and the decoder the logits. Only what is needed runs. Both must take `latent_mask` where latents
    have one. Parameter patterns start with `encoder.` and `decoder.`, and so do its roles.
    Attributes `clean_at` (see `as_denoiser`) must be equal.

    Examples:
        >>> import torch
        >>> class Encoder(torch.nn.Embedding):
        ...     def forward(self, tokens, latents, **state):
        ...         return super().forward(tokens).mean(dim=1)
        >>> class Decoder(torch.nn.Linear):
        ...     def forward(self, tokens, latents, **state):
        ...         return super().forward(latents)[:, None].expand(-1, tokens.shape[1], -1)
        >>> denoiser = as_denoiser(EncoderDecoder(Encoder(6, 4), Decoder(4, 6)))
        >>> [name for name, _ in denoiser.module.named_parameters()]
        ['encoder.weight', 'decoder.weight', 'decoder.bias']
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        clean_at, predicts = direction_of_two(encoder, decoder)
        if clean_at:
            self.clean_at, self.predicts = clean_at, predicts
        sides = [{id(p) for p in part.parameters()} for part in (encoder, decoder)]
        if all(sides) and sides[0].isdisjoint(sides[1]):
            self.roles = Roles(encoder_only=("encoder.*",), decoder_only=("decoder.*",))

    def forward(
        self,
        tokens: AnyTokens,
        latents: Latents,
        *,
        need: Need = "both",
        latent_mask: LatentMaskLike | None = None,
        **state: Any,
    ) -> Denoised:
        """Run the networks that are needed."""
        if latent_mask is not None:
            state["latent_mask"] = latent_mask
        return Denoised(
            logits=None if need == "latents" else self.decoder(tokens, latents, **state),
            latent_prediction=None if need == "logits" else self.encoder(tokens, latents, **state),
        )


def embed_tokens(weight: Float[Tensor, "rows w"], tokens: AnyTokens) -> Float[Tensor, "b s w"]:
    """Embed a text, whether its tokens are ids or relaxed.

    Ids `[b, s]` pick their rows of `weight`, as `nn.Embedding` does; relaxed tokens `[b, s, v]` mix
    the first `v` rows: `tokens @ weight[:v]`, by which a one-hot text is read as its ids are. The
    dtype is that of `weight`, under autocast too. An embedding's `padding_idx` and `max_norm` are
    not looked at.

    Args:
        weight: a row per id, such as `embedding.weight`; further rows are never read.
        tokens: ids `[b, s]`, or floats `[b, s, v]`.

    Raises:
        ValueError: relaxed tokens over more ids than there are rows.

    Examples:
        >>> import torch
        >>> weight, ids = torch.eye(3)[:, :2], torch.tensor([[2, 0]])
        >>> embed_tokens(weight, ids)
        tensor([[[0., 0.],
                 [1., 0.]]])
        >>> embed_tokens(weight, torch.tensor([[[0.5, 0.5, 0.0]]]))
        tensor([[[0.5000, 0.5000]]])
    """
    if not tokens.is_floating_point():
        return F.embedding(tokens.long(), weight)
    ids = tokens.shape[-1]
    if ids > len(weight):
        raise ValueError(
            f"`tokens` are relaxed over {ids} ids, but `weight` has {len(weight)} rows"
        )
    with no_autocast(weight):
        return tokens.to(weight.dtype) @ weight[:ids]


def reading_relaxed(origin: str) -> AbstractContextManager[object]:
    """Where a network fails to read a relaxed text, say whence it is and what to do."""
    return nullcontext() if torch.compiler.is_compiling() else _naming(origin)


def need_logits(output: Denoised, tokens: Tensor, vocab_size: int) -> AnyLogits:
    """The logits of a forward, or an error that says what the model did wrong."""
    if output.logits is None:
        raise ValueError("the denoiser returned no logits where need='logits' or 'both' asked")
    expected = (*tokens.shape, vocab_size)
    if output.logits.shape != expected:
        raise ValueError(
            f"the denoiser's logits must have shape [b, s, v] = {list(expected)}, got "
            f"{list(output.logits.shape)}; is `text_process.vocab_size` the width of its text head?"
        )
    return output.logits


def need_latents(output: Denoised, latents: Tensor) -> Latents:
    """The latent prediction of a forward, or an error that says what the model did wrong."""
    if output.latent_prediction is None:
        raise ValueError(
            "the denoiser returned no latent prediction where need='latents' or 'both' asked"
        )
    checks.check_same_shape("latent_prediction", output.latent_prediction, "latents", latents)
    return output.latent_prediction


@contextmanager
def _naming(origin: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise TypeError(
            f"the encoder pass failed on the relaxed text [b, s, v] {origin} "
            f"({type(error).__name__}: {error}). A network reads ids and relaxed texts alike with "
            "cyclevae.embed_tokens(embedding.weight, tokens) in place of embedding(tokens), which "
            "check_denoiser(..., relaxed=True) tests; or use the bridge 'argmax' or 'categorical'"
        ) from error
