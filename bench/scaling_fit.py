"""Measured costs in words: exponents on log-log axes, and where a doubling begins to cost double."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NEGLIGIBLE = 0.03
"""Phases below this share of the largest step are not spoken of."""
FLAT, IN_PROPORTION = 0.15, (0.85, 1.15)
"""Exponents that are called no growth, and growth in proportion."""


@dataclass(frozen=True)
class Axis:
    """What was varied, and the seconds of a step and of its phases at each value."""

    name: str
    """For tables: G."""
    what: str
    """In words: completions of a prompt."""
    values: Sequence[float]
    """Ascending."""
    seconds: Sequence[float]
    """Of the whole step."""
    phases: Mapping[str, Sequence[float]]


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """b of the least-squares fit seconds = a · value^b."""
    x, y = ([math.log(max(v, 1e-9)) for v in series] for series in (values, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    along = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return along / sum((a - mean_x) ** 2 for a in x)


def doubling(axis: Axis, i: int) -> float:
    """How many times the step's time a doubling costs between values i and i + 1."""
    return float(2 ** exponent(axis.values[i : i + 2], axis.seconds[i : i + 2]))


def turning_point(axis: Axis, cost: float = 1.8) -> float | None:
    """The value from which on every doubling costs `cost` times or more; None: not within the values."""
    found = None
    for i in reversed(range(len(axis.values) - 1)):
        if doubling(axis, i) < cost:
            break
        found = axis.values[i]
    return found


def growth(slope: float, name: str) -> str:
    """An exponent in words."""
    if slope < FLAT:
        return "hardly at all"
    if IN_PROPORTION[0] <= slope <= IN_PROPORTION[1]:
        return "in proportion"
    return f"as {name}^{slope:.2f}"


def sentence(axis: Axis) -> str:
    """How the cost grows along an axis, phase by phase, and where it stops scaling."""
    low, high = axis.values[0], axis.values[-1]
    whole = exponent(axis.values, axis.seconds)
    told = [
        f"**{axis.name}**, {axis.what}, {low:,.0f} to {high:,.0f}: {high / low:,.3g} times as many take "
        f"{axis.seconds[-1] / axis.seconds[0]:.3g} times as long; the step grows {growth(whole, axis.name)}."
    ]
    by_growth: dict[str, list[str]] = {}
    for phase, seconds in axis.phases.items():
        if max(seconds) >= NEGLIGIBLE * max(axis.seconds):
            by_growth.setdefault(growth(exponent(axis.values, seconds), axis.name), []).append(phase)
    told.append("By phase: " + "; ".join(f"{', '.join(phases)} {way}" for way, phases in by_growth.items()) + ".")
    turn, costs = turning_point(axis), f"a doubling costs {doubling(axis, len(axis.values) - 2):.2f} times"
    if turn is None:
        told.append(f"It still scales at {axis.name} = {high:,.0f}, where {costs}.")
    else:
        told.append(f"It stops scaling at {axis.name} = {turn:,.0f}: at the end {costs}.")
    return " ".join(told)


def ranks_sentence(seconds: Mapping[int, float], phases: Mapping[int, Mapping[str, float]]) -> str:
    """What sharing one step's work between ranks saves, and what it does not."""
    ranks = max(seconds)
    speedup = seconds[1] / seconds[ranks]
    undivided = [
        phase
        for phase, one in phases[1].items()
        if one >= NEGLIGIBLE * seconds[1] and phases[ranks].get(phase, 0.0) > 0.8 * one
    ]
    gain = f"{speedup:.2f} times as fast, {speedup / ranks:.0%} of the ideal"
    told = f"**Ranks**, 1 to {ranks}, the same prompts in all: {gain}."
    return told + (f" Not divided: {', '.join(undivided)}." if undivided else " Every phase of weight is divided.")
