"""How the cost of a step grows: its phases at one size and at half of it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastgrpo_profiling.compare import StepRecord
from fastgrpo_profiling.phases import UNATTRIBUTED, in_step_order, phase_seconds

WHOLE = "whole step"
LEAST_SHARE = 0.01
"""Phases with a smaller share of the larger step are left out, being mostly noise."""


@dataclass(frozen=True)
class Growth:
    """How both sides' phases grew when one size doubled."""

    doubled: str
    """Description, such as "4 → 8 completions a prompt"."""
    exponents: dict[str, dict[str, float]]
    """Side → phase → e, where the phase's time grew by 2^e: 1 is in proportion, 0 not at all."""

    @classmethod
    def of(
        cls, doubled: str, half: Mapping[str, Sequence[StepRecord]], full: Mapping[str, Sequence[StepRecord]]
    ) -> "Growth":
        """Args: half, full: side → its steps at either size."""
        return cls(doubled, {side: exponents(half[side], full[side]) for side in full})

    @property
    def rows(self) -> list[str]:
        """The phases of either side in the order of a step, the whole step last."""
        return [*in_step_order(name for one in self.exponents.values() for name in one), WHOLE]


def exponents(half: Sequence[StepRecord], full: Sequence[StepRecord]) -> dict[str, float]:
    """Phase → base-2 logarithm of its median time over that at half the size; the whole step last."""
    before, after = _median_seconds(half), _median_seconds(full)
    shown = [name for name, seconds in after.items() if name in before and seconds >= LEAST_SHARE * after[WHOLE]]
    return {name: math.log2(after[name] / before[name]) for name in shown if before[name] > 0}


def _median_seconds(steps: Sequence[StepRecord]) -> dict[str, float]:
    phases = [phase_seconds(step.own_seconds, step.seconds) for step in steps]
    names = [name for name in phases[0] if name != UNATTRIBUTED and all(name in one for one in phases)]
    medians = {name: statistics.median(one[name] for one in phases) for name in names}
    return {**medians, WHOLE: statistics.median(step.seconds for step in steps)}
