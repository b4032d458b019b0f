"""A comparison's figures in one record: the content of profile.json, and the source of tables and pages."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastgrpo_profiling.compare import Comparison, Spread, StepRecord, median_phases, paired_ratio, unattributed_share
from fastgrpo_profiling.growth import Growth
from fastgrpo_profiling.kernels import KINDS, OTHER_KERNELS
from fastgrpo_profiling.roofline import (
    Ceilings,
    ModelShape,
    StepWork,
    Update,
    Utilisation,
    decode_bytes,
    step_flops,
    utilisation,
)


@dataclass(frozen=True)
class SideFigures:
    """One side's steps in figures; medians unless said otherwise."""

    step_seconds: Spread
    tokens_per_s: Spread
    tokens: float
    reward: float
    """Mean over all steps."""
    peak_bytes: int
    """At the end."""
    peak_bytes_above_start: int
    """Beyond the memory held once its model was loaded."""
    phases: dict[str, float]
    """Seconds by phase of the median step; unattributed time last."""
    unattributed: float
    """Share of a step, the median over all."""
    spans_per_step: float
    utilisation: Utilisation | None
    """None if the model's cost formula is unknown."""


@dataclass(frozen=True)
class InsideDecode:
    """Kernels inside some decode spans of one further step, where spans cannot look."""

    told_apart_by: str
    shares: dict[str, dict[str, float]]
    """Side → kind of kernel (`kernels.KINDS`) → share of the time."""

    @classmethod
    def of(cls, seconds: Mapping[str, Mapping[str, float]], device: str) -> "InsideDecode":
        """Args: seconds: side → kind → seconds (`StepRecord.inside`)."""
        shares = {
            side: {kind: one / sum(kinds.values()) for kind, one in kinds.items()} for side, kinds in seconds.items()
        }
        names = "names of the GPU's kernels" if device == "cuda" else "names of PyTorch's operators"
        return cls(f"{names}, from torch.profiler", shares)

    @property
    def kinds(self) -> list[str]:
        """Those of either side."""
        return [kind for kind in (*KINDS, OTHER_KERNELS) if any(kind in one for one in self.shares.values())]


@dataclass(frozen=True)
class ProfileReport:
    """What `fastgrpo profile` found."""

    ours: str
    theirs: str
    sides: dict[str, SideFigures]
    speedup: Spread
    """Step time of theirs / ours, turn by turn."""
    ceilings: Ceilings
    gate: dict[str, float]
    """Quantity compared before timing → difference."""
    span_off_seconds: float
    """Cost of a span while not recording."""
    span_off_share: float
    """That cost × spans in a step ÷ step time."""
    facts: dict[str, str] = field(default_factory=dict)
    inside_decode: InsideDecode | None = None
    growth: Growth | None = None


@dataclass(frozen=True)
class Cost:
    """Converts lengths to FLOPs and bytes."""

    shape: ModelShape
    ceilings: Ceilings
    bytes_per_value: int
    update: Update


def side_figures(
    steps: Sequence[StepRecord],
    held_at_start: int,
    cost: Cost | None,
    works: Sequence[tuple[StepWork, StepWork | None]],
) -> SideFigures:
    """Sums up one side.

    Args:
        held_at_start: bytes its process held once its model was loaded.
        cost: None if the model's sizes could not be read.
        works: per step, what it drew and the part of it with a gradient; empty if unknown.
    """
    phases = median_phases(steps)
    used = None
    if cost is not None and works:
        flops = [step_flops(cost.shape, drawn, cost.update, trained) for drawn, trained in works]
        traffic = [decode_bytes(cost.shape, drawn, bytes_per_value=cost.bytes_per_value) for drawn, _ in works]
        used = utilisation(
            {phase: statistics.fmean(one[phase] for one in flops) for phase in flops[0]},
            statistics.fmean(traffic),
            [step.seconds for step in steps],
            phases,
            cost.ceilings,
        )
    peak = max(step.peak_bytes for step in steps)
    return SideFigures(
        step_seconds=Spread.of([step.seconds for step in steps]),
        tokens_per_s=Spread.of([step.tokens / step.seconds for step in steps]),
        tokens=statistics.median(step.tokens for step in steps),
        reward=statistics.fmean(step.reward for step in steps),
        peak_bytes=peak,
        peak_bytes_above_start=peak - held_at_start,
        phases=phases,
        unattributed=unattributed_share(steps),
        spans_per_step=statistics.median(step.span_count for step in steps),
        utilisation=used,
    )


def profile_report(
    comparison: Comparison,
    held_at_start: dict[str, int],
    cost: Cost | None,
    ceilings: Ceilings,
    gate: dict[str, float],
    span_off_seconds: float,
    facts: dict[str, str],
    inside_decode: InsideDecode | None = None,
    growth: Growth | None = None,
) -> ProfileReport:
    """The figures of two sides, the first of them ours.

    A side that does not report its lengths is assumed to have done our work, scaled to its tokens.
    """
    ours, theirs = comparison.steps
    sides = {}
    for name, steps in comparison.steps.items():
        turns = zip(steps, comparison.steps[ours], strict=True)
        works = [_work_of(step, our_step) for step, our_step in turns if our_step.work is not None]
        sides[name] = side_figures(steps, held_at_start[name], cost, works)
    step = sides[ours].step_seconds.median
    return ProfileReport(
        ours,
        theirs,
        sides,
        paired_ratio(comparison.steps[theirs], comparison.steps[ours]),
        ceilings,
        gate,
        span_off_seconds,
        sides[ours].spans_per_step * span_off_seconds / step,
        facts,
        inside_decode,
        growth,
    )


def _work_of(step: StepRecord, ours: StepRecord) -> tuple[StepWork, StepWork | None]:
    if step.work is not None:
        return step.work, step.trained
    assert ours.work is not None
    each = round(step.tokens / max(sum(map(len, ours.work.completions)), 1))
    return _of_length(ours.work, each), None if ours.trained is None else _of_length(ours.trained, each)


def _of_length(work: StepWork, each: int) -> StepWork:
    """The same prompts, with completions of `each` tokens."""
    return StepWork(work.prompts, work.pictures, [[each] * len(group) for group in work.completions])
