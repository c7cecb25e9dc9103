"""Wrappers of networks, seen through to the module inside."""

import inspect
from contextlib import suppress

import torch
from torch import nn


def path_inside(module: nn.Module) -> tuple[str, ...]:
    """The names that lead through wrappers to the plain module."""
    path: list[str] = []
    while (name := _handed_to(module)) is not None:
        path.append(name)
        module = module.get_submodule(name)
    return tuple(path)


def refuse_unused(denoiser: object) -> None:
    """Refuse a network whose DDP looks for unused parameters, where several passes learn from it.

    DDP takes what the last pass does not reach for unused, and fails at the gradient of another.
    """
    network = getattr(denoiser, "network", None)
    if not isinstance(network, nn.parallel.DistributedDataParallel) or network.static_graph:
        return
    if network.find_unused_parameters and torch.is_grad_enabled():
        raise ValueError(
            "the denoiser's network is in DistributedDataParallel(find_unused_parameters=True), "
            "and this step runs several passes of it, the last of which need not reach every "
            "parameter: PyTorch would fail with 'marked as ready twice'. Wrap the whole step, "
            "DistributedDataParallel(StepModule(denoiser, objective), ...), or set "
            "find_unused_parameters=False"
        )


def _handed_to(module: nn.Module) -> str | None:
    """The child to which a wrapper hands every call, or None where it is no wrapper."""
    # Names, not imports: torch.distributed may be missing and dynamo is slow to import.
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        if name in module._modules:
            return name
    children = {name: child for name, child in module._modules.items() if child is not None}
    if module._parameters or "_fsdp_wrapped_module" in children or not _takes_anything(module):
        return None
    for name, child in children.items():
        inside = set(child.modules())
        if all(other in inside for other in children.values()) and _can_be_called(child):
            return name
    return None


def _takes_anything(module: nn.Module) -> bool:
    kinds = {p.kind for p in inspect.signature(module.forward).parameters.values()}
    return kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def _can_be_called(module: nn.Module) -> bool:
    """Whether a module takes what a denoiser is called with."""
    for mask in ({"attention_mask": 0}, {}):  # which it may do without
        with suppress(TypeError):
            inspect.signature(module.forward).bind(
                "tokens", "latents", text_time=0, latent_time=0, **mask
            )
            return True
    return False
