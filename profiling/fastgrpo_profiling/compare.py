"""Runs the same steps in two programs by turns, so that a noisy machine disturbs both alike."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastgrpo_profiling.phases import UNATTRIBUTED, phase_seconds
from fastgrpo_profiling.roofline import StepWork
from fastgrpo_profiling.span import SpanEvent


@dataclass(frozen=True)
class StepRecord:
    """One step of one side."""

    seconds: float
    tokens: int
    """Completion tokens drawn."""
    reward: float
    """Mean over the step's completions."""
    peak_bytes: int
    """Peak memory of the side's process since its start."""
    own_seconds: dict[str, float] = field(default_factory=dict)
    """Span → its seconds, nested spans excluded."""
    span_count: int = 0
    events: list[SpanEvent] = field(default_factory=list)
    work: StepWork | None = None
    trained: StepWork | None = None
    """The part of it that had a gradient; None: all."""
    inside: dict[str, float] = field(default_factory=dict)
    """For a step profiled inside a span: kind of kernel (`kernels.KINDS`) → seconds."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "StepRecord":
        """The inverse of `dataclasses.asdict`."""
        events = [SpanEvent(**event) for event in record.get("events", ())]
        works = {name: StepWork(**record[name]) for name in ("work", "trained") if record.get(name)}
        return cls(**{**record, "events": events, **works})


class Side(Protocol):
    """A program that trains step by step when told to."""

    name: str

    def step(self, trace: bool) -> StepRecord:
        """Runs the next step; with `trace` the record holds every span."""
        ...


@dataclass(frozen=True)
class Spread:
    """A figure over several steps."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median, least and greatest of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Comparison:
    """The steps of two sides; those of one index ran one after the other."""

    steps: dict[str, list[StepRecord]]
    traced: dict[str, StepRecord]
    """One more step of each, not timed, since tracing and reading memory cost time."""


def alternate(
    sides: Sequence[Side],
    *,
    warmup: int,
    steps: int,
    progress: Callable[[str, int, StepRecord], None] | None = None,
) -> Comparison:
    """`warmup` untimed steps of each side, `steps` timed ones, taking turns, and one with a trace.

    The order of sides alternates each round. `progress` is called with each timed step's side, index and record.
    """
    taken: dict[str, list[StepRecord]] = {side.name: [] for side in sides}
    for _ in range(warmup):
        for side in sides:
            side.step(False)
    for i in range(steps):
        for side in sides if i % 2 == 0 else reversed(sides):
            taken[side.name].append(side.step(False))
            if progress:
                progress(side.name, i, taken[side.name][-1])
    return Comparison(taken, {side.name: side.step(True) for side in sides})


def paired_ratio(theirs: Sequence[StepRecord], ours: Sequence[StepRecord]) -> Spread:
    """Ratios of step times, turn by turn: how many times faster we are."""
    return Spread.of([t.seconds / o.seconds for t, o in zip(theirs, ours, strict=True)])


def median_phases(steps: Sequence[StepRecord]) -> dict[str, float]:
    """Seconds by phase of the step with the median time (the lower of two), so that they add up to it."""
    step = sorted(steps, key=lambda step: step.seconds)[(len(steps) - 1) // 2]
    return phase_seconds(step.own_seconds, step.seconds)


def unattributed_share(steps: Sequence[StepRecord]) -> float:
    """The median share of a step that no leaf span covers."""
    shares = (phase_seconds(step.own_seconds, step.seconds)[UNATTRIBUTED] / step.seconds for step in steps)
    return statistics.median(shares)
