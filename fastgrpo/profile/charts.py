"""The charts of the profile page, each with a caption that says what to look for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastgrpo_profiling.phases import PHASE_OF, PHASES, UNATTRIBUTED
from fastgrpo_profiling.report import ProfileReport
from fastgrpo_profiling.span import SpanEvent
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastgrpo.report.plots import BEFORE, GRID, INK, MUTED, SERIES, Chart, legend, render

_BLUE, _ORANGE, _GREEN, _VIOLET, _PINK, _GOLD, _CYAN = SERIES
COLOURS = {
    "data": _CYAN,
    "images": _GOLD,
    "vision": _VIOLET,
    "prefill": _GREEN,
    "decode": _BLUE,
    "sampling": _GOLD,
    "generation": _CYAN,
    "advantages": _PINK,
    "reference": _GOLD,
    "forward": _ORANGE,
    "head": _VIOLET,
    "backward": _PINK,
    "optimizer": _GREEN,
    "metrics": _GOLD,
    UNATTRIBUTED: GRID,
}
"""Phase → colour; phases that follow each other differ. Others, which take little time, get `BEFORE`."""


def waterfall(side: str, events: Sequence[SpanEvent], until: float) -> Chart | None:
    """The traced step on a time line of `until` seconds, a row for each phase."""
    spans = [event for event in events if event.name in PHASE_OF]
    if not spans:
        return None
    present = {PHASE_OF[event.name] for event in spans}
    rows = [phase.name for phase in PHASES if phase.name in present]
    around = _names_around_others(spans)

    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        for i, row in enumerate(rows):
            colour = COLOURS.get(row, BEFORE)
            for name in sorted({event.name for event in spans if PHASE_OF[event.name] == row}):
                bars = [(e.start, max(e.seconds, until / 1500)) for e in spans if e.name == name]
                alpha = 0.3 if name in around else 1.0
                axes.broken_barh(bars, (-i - 0.36, 0.72), color=colour, linewidth=0, alpha=alpha)
        _name_rows(axes, [-i for i in range(len(rows))], rows)
        axes.set_xlim(0, until)
        axes.set_ylim(-len(rows) + 0.5, 0.5)
        axes.set_xlabel("seconds since the step began")
        return f"Time line of one step of {side}: {len(spans)} spans in {len(rows)} phases."

    caption = (
        "On its time line, a row for each phase. Pale bars hold others, which count by "
        "themselves (the model's passes inside generation). Gaps across all rows are unattributed. Both sides have one "
        "scale."
    )
    return render(f"waterfall-{side}", f"One step of {side}", (5.0, 1.0 + 0.27 * len(rows)), draw, caption)


def against_ceilings(report: ProfileReport) -> Chart | None:
    """Model FLOPs per second of each phase as a share of the measured matrix product."""
    used = {name: side.utilisation for name, side in report.sides.items() if side.utilisation is not None}
    if not used:
        return None
    phases = [p.name for p in PHASES if any(p.name in one.by_phase for one in used.values())]
    rows = ["whole step", *phases]

    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        said = []
        for k, (name, one) in enumerate(used.items()):
            values = [one.mfu, *(one.by_phase.get(phase, 0.0) for phase in phases)]
            places = [-i + (0.19 if k == 0 else -0.19) for i in range(len(rows))]
            axes.barh(places, [100 * v for v in values], 0.36, color=(SERIES[0], BEFORE)[k % 2], label=name)
            for place, value in zip(places, values, strict=True):
                if value:
                    _beside(axes, f"{value:.1%}", (100 * value, place), fontsize=8.5, color=MUTED)
            said.append(f"{name}: {one.mfu:.1%} of the ceiling over the whole step.")
        _name_rows(axes, [-i for i in range(len(rows))], rows)
        axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
        axes.set_xlabel(f"of the measured {_ceiling(report)}")
        legend(axes)
        return "Model FLOPs against the measured ceiling. " + " ".join(said)

    caption = (
        "Model FLOPs per second against a large matrix product measured in this run. Work is counted once for both "
        "sides, so work done twice lowers the bar. Decode is bound by memory, not by arithmetic."
    )
    return render("ceilings", "Arithmetic", (5.0, 1.0 + 0.42 * len(rows)), draw, caption)


def memory_over_time(events: Mapping[str, Sequence[SpanEvent]]) -> Chart | None:
    """Memory held at the end of every span of the traced step."""
    lines = {
        name: sorted((e.start + e.seconds, e.held_bytes) for e in one if e.held_bytes is not None)
        for name, one in events.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None

    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        said = []
        for k, (name, points) in enumerate(lines.items()):
            times, held = zip(*points, strict=True)
            mebibytes = np.array(held) / 2**20
            axes.step(times, mebibytes, where="post", color=(SERIES[0], BEFORE)[k % 2], label=name)
            said.append(f"{name}: at most {mebibytes.max():.0f} MiB.")
        axes.set_ylim(0, 1.15 * max(held for points in lines.values() for _, held in points) / 2**20)
        axes.set_xlim(left=0)
        axes.set_ylabel("MiB")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel("seconds since the step began")
        legend(axes)
        return "Memory over one step. " + " ".join(said)

    caption = (
        "Memory held, read at the edges of spans: the process's on a CPU, the allocator's on a GPU. What rises and "
        "falls within a span does not show; the peak above does see it."
    )
    return render("memory", "Memory over one step", (5.0, 2.9), draw, caption)


def step_times(seconds: Mapping[str, Sequence[float]]) -> Chart:
    """Every timed step of both sides, in turn."""

    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        for k, (name, times) in enumerate(seconds.items()):
            axes.plot(range(1, len(times) + 1), times, "o-", color=(SERIES[0], BEFORE)[k % 2], label=name, markersize=4)
        axes.set_ylim(0, 1.1 * max(max(times) for times in seconds.values()))
        axes.yaxis.set_major_formatter("{x:g} s")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel("turn")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(axes)
        return f"Step times of {', '.join(seconds)}."

    caption = "The sides take turns, so a disturbance of the machine shows in both lines at one turn."
    return render("steps", "Every timed step", (5.0, 2.9), draw, caption)


def _names_around_others(spans: Sequence[SpanEvent]) -> set[str]:
    """Names of spans in which spans of another name are nested."""
    names: set[str] = set()
    opened: dict[int, list[SpanEvent]] = {}
    for span in sorted(spans, key=lambda s: (s.start, s.depth)):
        stack = opened.setdefault(span.thread, [])
        while stack and stack[-1].depth >= span.depth:
            stack.pop()
        if stack and stack[-1].name != span.name and span.start < stack[-1].start + stack[-1].seconds:
            names.add(stack[-1].name)
        stack.append(span)
    return names


def _name_rows(axes: Any, places: Sequence[float], names: Sequence[str]) -> None:
    axes.set_yticks(places, names)
    for label in axes.get_yticklabels():
        label.set_color(INK)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    axes.spines["left"].set_visible(False)


def _beside(axes: Any, text: str, end: tuple[float, float], **style: Any) -> None:
    """Writes to the right of a bar's end."""
    axes.annotate(text, end, xytext=(5, 0), textcoords="offset points", va="center", **style)


def _ceiling(report: ProfileReport) -> str:
    return report.ceilings.text.rsplit(", ", 1)[0]
