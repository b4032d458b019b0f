"""The median step of each side, phase by phase: what the page's bars and their table are drawn from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastgrpo_profiling.phases import PHASES, UNATTRIBUTED, in_step_order
from fastgrpo_profiling.report import ProfileReport

from fastgrpo.profile.charts import COLOURS
from fastgrpo.report.palette import PALETTE
from fastgrpo.report.plots import BEFORE

_VARIABLES = {light: f"var(--plot-{name})" for name, (light, _) in PALETTE.items()}


@dataclass(frozen=True)
class PhaseCell:
    """A phase in one side's median step."""

    share: float
    """Of that step, 0..1."""
    text: str
    """Milliseconds; those of a side add up to its total as shown."""


@dataclass(frozen=True)
class PhaseRow:
    """A phase on both sides."""

    name: str
    description: str
    colour: str
    """CSS."""
    cells: tuple[PhaseCell | None, ...]
    """Of each side; None where it has no such phase."""


@dataclass(frozen=True)
class MedianSteps:
    """Each side's step whose time is the median: one step, so that its phases add up to its own total."""

    sides: tuple[str, ...]
    seconds: tuple[float, ...]
    """Of each side's step."""
    totals: tuple[str, ...]
    """The same in milliseconds, as text."""
    rows: tuple[PhaseRow, ...]

    @property
    def text(self) -> str:
        """For who cannot see the bars."""
        told = []
        for i, side in enumerate(self.sides):
            cells = [(row.name, row.cells[i]) for row in self.rows]
            phases = ", ".join(f"{name} {cell.text} ms" for name, cell in cells if cell is not None)
            told.append(f"{side}: {self.totals[i]} ms, of which {phases}.")
        return "Median step by phase. " + " ".join(told)


def median_steps(report: ProfileReport) -> MedianSteps:
    """From the phases of a profile."""
    sides = report.sides
    names = in_step_order(name for side in sides.values() for name in side.phases)
    descriptions = {phase.name: phase.description for phase in PHASES}
    descriptions[UNATTRIBUTED] = "what no leaf span covers, a parent's own time included"
    cells = [_cells(side.phases) for side in sides.values()]
    seconds = [sum(side.phases.values()) for side in sides.values()]
    rows = [
        PhaseRow(
            name,
            descriptions[name],
            _VARIABLES[COLOURS.get(name, BEFORE)],
            tuple(one.get(name) for one in cells),
        )
        for name in names
    ]
    return MedianSteps(tuple(sides), tuple(seconds), tuple(_tenths(round(1e4 * s)) for s in seconds), tuple(rows))


def _cells(phases: Mapping[str, float]) -> dict[str, PhaseCell]:
    whole = sum(phases.values())
    tenths = add_up([1e4 * seconds for seconds in phases.values()])
    return {
        name: PhaseCell(seconds / whole if whole else 0.0, _tenths(n))
        for (name, seconds), n in zip(phases.items(), tenths, strict=True)
    }


def add_up(values: Sequence[float]) -> list[int]:
    """Values rounded down or up to whole numbers that add up to the rounded sum: the largest remainders go up."""
    floors = [math.floor(value) for value in values]
    left = round(sum(values)) - sum(floors)
    largest = sorted(range(len(values)), key=lambda i: floors[i] - values[i])[:left]
    return [floor + (i in largest) for i, floor in enumerate(floors)]


def _tenths(count: int) -> str:
    return f"{count / 10:,.1f}"
