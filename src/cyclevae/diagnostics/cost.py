"""What a step costs: its passes, its terms, its sum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cyclevae._base.table import table


@dataclass(frozen=True)
class PassCost:
    """What one pass of a step costs.

    Attributes:
        direction: `L2T`, `T2L`, or both in one.
        term: that reads it first, at whose loss it runs.
        rows: how many.
        length: of their texts.
        learns: whether it has a backward.
        forward: FLOPs of its forward.
        backward: FLOPs of its backward, and of what is computed again there.
        live: bytes of its forward's making that are alive at the peak of the step.

    Examples:
        >>> PassCost("L2T", "text", 3, 5, True, forward=984, backward=1920, live=840).flops
        2904
    """

    direction: str
    term: str
    rows: int
    length: int
    learns: bool
    forward: int
    backward: int
    live: int

    @property
    def flops(self) -> int:
        """Of the whole pass."""
        return self.forward + self.backward


@dataclass(frozen=True)
class TermCost:
    """What a term costs: its loss, and the passes that it is the first to read.

    Attributes:
        passes: how many of these.
        forward: FLOPs of the forward.
        backward: FLOPs of the backward.
        live: bytes of their forward's making that are alive at the peak of the step.
        own: those of them that are of its loss, and not of a pass.

    Examples:
        >>> TermCost(passes=1, forward=984, backward=1920, live=1111, own=271).passes
        1
    """

    passes: int
    forward: int
    backward: int
    live: int
    own: int


@dataclass(frozen=True)
class StepCost:
    """What `step_cost` found; `str` of it is a table.

    Attributes:
        passes: in the order in which they run.
        terms: by name. What they share counts at the first of them, so that they add up.
        forward: FLOPs of matrix products, convolutions and attention before the backward.
        backward: those of the backward.
        live: bytes that are alive at the peak, beside parameters and gradients.
        on_the_way: those of them that the backward has made: gradients of activations, gradients of
            parameters that wait for those of the passes to come, and what is computed again.
        parameters: bytes of those of the network.
        gradients: bytes of those of them that learn.
        l2t: the same of one L2T step, `Text(time=1.0)` alone; None where there are no pairs.

    Examples:
        >>> from cyclevae import CycleObjective, StepModule
        >>> from cyclevae.diagnostics import step_cost
        >>> from cyclevae.testing import toy_batch, toy_denoiser
        >>> denoiser, text_process, latent_process = toy_denoiser(seed=0)
        >>> module = StepModule(denoiser, CycleObjective(text_process, latent_process))
        >>> cost = step_cost(module, toy_batch(seed=0))
        >>> [(found.direction, found.term, found.rows) for found in cost.passes]
        [('L2T', 'text', 3), ('T2L', 'latent', 6), ('L2T', 'cycle_text', 3)]
        >>> cost.flops == sum(found.forward + found.backward for found in cost.terms.values())
        True
    """

    passes: tuple[PassCost, ...]
    terms: Mapping[str, TermCost]
    forward: int
    backward: int
    live: int
    on_the_way: int
    parameters: int
    gradients: int
    l2t: "StepCost | None"

    @property
    def flops(self) -> int:
        """Of the whole step."""
        return self.forward + self.backward

    def __str__(self) -> str:
        lines = [("term", "pass", "rows", "learns", "forward", "backward", "live at the peak")]
        for name, term in self.terms.items():
            passes = [each for each in self.passes if each.term == name]
            for each in passes:
                shape, learns = f"{each.rows} x {each.length}", "yes" if each.learns else "no"
                cells = _cells(each.forward, each.backward, each.live)
                lines.append((name, each.direction, shape, learns, *cells))
            forward = term.forward - sum(each.forward for each in passes)
            backward = term.backward - sum(each.backward for each in passes)
            lines.append((name, "its loss", "", "", *_cells(forward, backward, term.own)))
        lines.append(("the backward", "", "", "", "", "", _bytes(self.on_the_way)))
        whole = _cells(self.forward, self.backward, self.live)
        lines.append(("the step", f"{len(self.passes)} passes", "", "", *whole))
        said = [
            f"beside {_bytes(self.parameters)} of parameters and {_bytes(self.gradients)} of "
            "gradients, and without the optimizer"
        ]
        if (one := self.l2t) is not None:
            cells = _cells(one.forward, one.backward, one.live)
            lines.append(("one L2T step", "", "", "", *cells))
            said.append(
                f"of one L2T step: {self.flops / max(one.flops, 1):.2f} times the FLOPs, "
                f"{self.live / one.live:.2f} times the live bytes"
            )
        return "\n".join([table(lines), "", *said])


def _cells(forward: int, backward: int, live: int) -> tuple[str, str, str]:
    return _scaled(forward, 1000, " kMGTPE"), _scaled(backward, 1000, " kMGTPE"), _bytes(live)


def _bytes(size: int) -> str:
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    """Three digits and a unit."""
    power = 0
    while number >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    return f"{number:.3g} {units[power]}".strip()
