"""Which terms move which parameters, and whether they pull the same way."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from cyclevae._base.table import table
from cyclevae._base.types import Scalar
from cyclevae.gradient_policy.gate import refuse_reentrant


@dataclass(frozen=True)
class GradientLedger:
    """What `gradient_ledger` found; `str` of it is a table.

    Attributes:
        norms: of the gradient, `norms[group][term]`; 0 where a term does not reach a group.
        cosines: between the gradients of two terms, `cosines[group][term, other]`; absent where
            one of them is 0.

    Examples:
        >>> ledger = GradientLedger({"all": {"text": 2.0, "cycle": 1.0}}, {"all": {}})
        >>> ledger.as_dict()
        {'norm/all/text': 2.0, 'norm/all/cycle': 1.0}
    """

    norms: Mapping[str, Mapping[str, float]]
    cosines: Mapping[str, Mapping[tuple[str, str], float]]

    def as_dict(self) -> dict[str, float]:
        """Flat, for a logger: `norm/group/term` and `cosine/group/term/other`."""
        flat = {f"norm/{g}/{t}": norm for g, row in self.norms.items() for t, norm in row.items()}
        return flat | {
            f"cosine/{g}/{t}/{other}": cosine
            for g, row in self.cosines.items()
            for (t, other), cosine in row.items()
        }

    def __str__(self) -> str:
        terms = list(next(iter(self.norms.values())))
        rows = [["norm", *terms]]
        rows += [
            [group, *(f"{row[term]:.3g}" for term in terms)] for group, row in self.norms.items()
        ]
        blocks = [table(rows)]
        for group, found in self.cosines.items():
            if len(terms) > 1:
                rows = [[f"cosine, {group}", *terms[1:]]]
                for i, term in enumerate(terms[:-1]):
                    cells = (found.get((term, other), math.nan) for other in terms[1:])
                    shown = ["-" if math.isnan(cell) else f"{cell:+.2f}" for cell in cells]
                    rows.append([term, *[""] * i, *shown[i:]])
                blocks.append(table(rows))
        return "\n\n".join(blocks)


def gradient_ledger(
    terms: Mapping[str, Scalar], groups: Mapping[str, Iterable[Tensor]]
) -> GradientLedger:
    """Norm and pairwise cosine of the gradients of loss terms, per group of parameters.

    `||g_k||` and `<g_k, g_l> / (||g_k|| ||g_l||)`, where `g_k` is the gradient of term `k` in the
    parameters of a group. A negative cosine says that two terms pull apart there; a norm of 0 that
    a term teaches the group nothing. A weight scales the norm of its term and no cosine.

    Each term costs one backward pass, and all their gradients are held at once. The graphs are kept
    and no `.grad` is touched, so `loss.backward()` may follow. Gradients are those of this process:
    nothing is summed over ranks.

    Args:
        terms: scalar losses with a graph, by name.
        groups: parameters by the name of their role. A shared parameter may be in several groups;
            one that is named twice in a group counts once.

    Raises:
        ValueError: no terms or groups, an empty group, a term that is no scalar or has no graph,
            sharded parameters, or the aliases that `freeze` lends.
        TypeError: a group that holds anything but tensors.
        RuntimeError: if a graph holds reentrant activation checkpointing.

    Reference: conflicting gradients, https://arxiv.org/abs/2001.06782.

    Examples:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> ledger = gradient_ledger(
        ...     {"up": layer(x).sum(), "down": -2 * layer(x).sum()}, {"layer": layer.parameters()}
        ... )
        >>> print(ledger)
        norm   up  down
        layer   5    10
        <BLANKLINE>
        cosine, layer   down
        up             -1.00
    """
    members = {name: _members(name, group) for name, group in groups.items()}
    if not (terms and members):
        raise ValueError(
            f"`{'groups' if terms else 'terms'}` is empty, so there is nothing to compare"
        )
    for name, term in terms.items():
        _check_term(name, term)
    refuse_reentrant(terms.values())
    learning = {id(p): p for group in members.values() for p in group if p.requires_grad}
    gradients = {name: _gradients(term, learning) for name, term in terms.items()}

    norms: dict[str, dict[str, float]] = {}
    cosines: dict[str, dict[tuple[str, str], float]] = {}
    for name, group in members.items():
        own = {
            term: {id(p): found[id(p)] for p in group if id(p) in found}
            for term, found in gradients.items()
        }
        norms[name] = norm = {term: math.sqrt(_dot(g, g)) for term, g in own.items()}
        cosines[name] = {
            (a, b): _dot(own[a], own[b]) / (norm[a] * norm[b])
            for a, b in combinations(own, 2)
            if norm[a] and norm[b]
        }
    return GradientLedger(norms, cosines)


def _gradients(term: Tensor, learning: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The gradients of a term by parameter, without those it does not reach."""
    if not learning:
        return {}
    found = torch.autograd.grad(term, list(learning.values()), retain_graph=True, allow_unused=True)
    return {key: g for key, g in zip(learning, found, strict=True) if g is not None}


def _dot(left: Mapping[int, Tensor], right: Mapping[int, Tensor]) -> float:
    """The inner product over the parameters that both reach."""
    shared = left.keys() & right.keys()
    return math.fsum(float((left[k].float() * right[k].float()).sum()) for k in shared)


def _check_term(name: str, term: Tensor) -> None:
    if term.ndim:
        raise ValueError(
            f"`terms[{name!r}]` must be a scalar, got shape {list(term.shape)}; reduce it first"
        )
    if not term.requires_grad:
        raise ValueError(
            f"`terms[{name!r}]` has no graph; give the loss itself, not the detached metric"
        )


def _members(name: str, group: Iterable[Tensor]) -> list[Tensor]:
    members = list(group)
    if not members:
        raise ValueError(f"`groups[{name!r}]` holds no parameter")
    for entry in members:
        if not isinstance(entry, Tensor):
            raise TypeError(
                f"`groups[{name!r}]` must hold parameters, got {type(entry).__name__}; "
                "give module.parameters(), not names or modules"
            )
        if type(entry).__name__ == "DTensor":
            raise ValueError(
                f"`groups[{name!r}]` holds sharded parameters (DTensor), and FSDP2 hides their "
                "gradients from autograd: take the ledger before fully_shard"
            )
        if type(entry.grad_fn).__name__ == "_GateBackward":
            raise ValueError(
                f"`groups[{name!r}]` was taken inside freeze(), which lends aliases: take them "
                "outside"
            )
    return members
