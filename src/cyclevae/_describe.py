"""Who learns from what, as a table."""

from typing import NamedTuple

from cyclevae._plan import Planned
from cyclevae._table import table
from cyclevae.gradient_policy import GradientPolicy
from cyclevae.policies import constant
from cyclevae.roles import ROLES

_ENCODER, _DECODER = ("encoder_only", "shared"), ("decoder_only", "shared")


class _Pass(NamedTuple):
    """A pass that a term may teach: what it does, who takes part, and who does not learn."""

    does: str
    roles: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    detached: bool = False

    def learns(self) -> str:
        left = [role for role in self.roles if role not in self.frozen]
        if self.detached or "*" in self.frozen or not left:
            return "nobody"
        apart = [pattern for pattern in self.frozen if pattern not in ROLES]
        return ", ".join(left) + (f" except {', '.join(apart)}" if apart else "")


def describe(objective: Planned, step: int) -> str:
    """The passes of the terms of a step, aligned: see `CycleObjective.describe`."""
    objective = objective.at(step)
    passes = _passes(objective, constant(objective.text_policy), constant(objective.latent_policy))
    lines = [("term", "weight", "pass", "learns", "frozen")]
    for term, weight in objective.weights(step).items():
        names = [(term, f"{weight:g}")] + [("", "")] * (len(passes[term]) - 1)
        for name, part in zip(names, passes[term], strict=True):
            lines.append((*name, part.does, part.learns(), ", ".join(part.frozen) or "-"))
    return table(lines, left=True)


def _passes(o: Planned, text: GradientPolicy, latent: GradientPolicy) -> dict[str, list[_Pass]]:
    makes_z = _Pass("T2L makes z_hat", _ENCODER)
    makes_y = _Pass("L2T makes y_hat", _DECODER, latent.freeze_bridge, latent.bridge == "detach")
    return {
        "text": [_Pass("L2T of the latent", _DECODER)],
        "latent": [_Pass("T2L of the text", _ENCODER)],
        "unconditional": [_Pass("both parts noised", ROLES)],
        "cycle_text": [
            makes_z._replace(frozen=text.freeze_bridge, detached=text.bridge == "detach"),
            _Pass("L2T reads z_hat", _DECODER, text.freeze),
        ],
        "cycle_latent": [makes_y, _Pass("T2L reads y_hat", _ENCODER, latent.freeze)],
        "prior": [_Pass("T2L of the text", _ENCODER) if o.prior == "ddvi" else makes_z],
        "sleep": [_Pass("T2L reads a dreamt text", _ENCODER)],
        "contrastive": [makes_z],
        "text_marginal": [makes_y],
    }
