"""Which parameters serve one direction alone, and which both: groups named once, by role."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import Tensor, nn

Role = Literal["encoder_only", "decoder_only", "shared"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Roles:
    """The parameters of a network by role: of the encoder alone, of the decoder alone, shared.

    `freeze` and the policies take the names of the roles as patterns. A parameter is `shared`
    unless a pattern says that only one direction uses it. The decoder *reads* latents, so the
    projection by which they enter belongs to both sides; so do word embeddings, and a text head
    that is tied to them.

    A network may carry its own as an attribute `roles`, as `EncoderDecoder` does; or give them to
    `as_denoiser`. `cyclevae.testing.check_denoiser` tests that they are true.

    Args:
        encoder_only: shell patterns on the names of the parameters that only T2L passes use.
        decoder_only: those that only L2T passes use.

    Examples:
        >>> network = nn.ModuleDict({"trunk": nn.Linear(2, 2), "text_head": nn.Linear(2, 7)})
        >>> roles = Roles(encoder_only=(), decoder_only=("text_head.*",))
        >>> [name for name, _ in roles.groups(network)["shared"]]
        ['trunk.weight', 'trunk.bias']
    """

    encoder_only: tuple[str, ...]
    decoder_only: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("encoder_only", "decoder_only"):
            patterns = getattr(self, name)
            if not isinstance(patterns, tuple) or not all(isinstance(p, str) for p in patterns):
                raise ValueError(
                    f"`{name}` must be a tuple of shell patterns on parameter names such as "
                    f"('text_head.*',), got {patterns!r}"
                )

    def groups(self, module: nn.Module) -> dict[str, list[tuple[str, Tensor]]]:
        """The named parameters of each role.

        Raises:
            ValueError: as `members`.
        """
        members = self.members(list(module.named_parameters(remove_duplicate=False)))
        return {
            role: [(name, p) for name, p in module.named_parameters() if id(p) in members[role]]
            for role in ROLES
        }

    def members(self, named: Sequence[tuple[str, Tensor]]) -> dict[str, set[int]]:
        """Which parameters, by identity, are of a role; a tied one is where any of its names is.

        Raises:
            ValueError: a pattern that matches nothing, or a parameter in two roles.
        """
        names, found = tuple([name for name, _ in named]), {}
        for role in ("encoder_only", "decoder_only"):
            ids = set()
            for pattern in getattr(self, role):
                hits = matches(names, pattern)
                if not hits:
                    raise ValueError(_not_found(role, pattern, names))
                ids |= {id(named[hit][1]) for hit in hits}
            found[role] = ids
        for name, parameter in named:
            if all(id(parameter) in ids for ids in found.values()):
                raise ValueError(
                    f"the parameter {name!r} is both encoder_only and decoder_only: one that both "
                    "directions use is shared, so leave it out of the roles"
                )
        return {
            **found,
            "shared": {id(p) for _, p in named} - found["encoder_only"] - found["decoder_only"],
        }


def matches(names: tuple[str, ...], pattern: str) -> tuple[int, ...]:
    """Which of the names a shell pattern matches, by their numbers."""
    return tuple([i for i, name in enumerate(names) if fnmatchcase(name, pattern)])


# What torch.compiler.assume_constant_result does, less its import of dynamo, which takes a second:
# dynamo cannot trace fnmatch, but the answer is a constant of the names.
matches._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _not_found(role: str, pattern: str, names: Sequence[str]) -> str:
    near = get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:5]
    return (
        f"the pattern {pattern!r} of the role {role!r} matches no parameter; nearest: "
        f"{', '.join(map(repr, near))}"
    )
