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

SMALL = 0.02
"""Phases below this share of the longer step are drawn as one."""
SMALL_NAME = "small phases"

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
    SMALL_NAME: BEFORE,
    UNATTRIBUTED: GRID,
}
"""Phase → colour; phases that follow each other differ. Others get the colour of the small phases."""


def stacked_steps(report: ProfileReport) -> Chart:
    """Both sides' median step, phase by phase, on one axis."""
    longest = max(side.step_seconds.median for side in report.sides.values())
    shown = {name: _merge_small(side.phases, longest) for name, side in report.sides.items()}
    phases = [phase.name for phase in PHASES]
    names = [n for n in (*phases, SMALL_NAME, UNATTRIBUTED) if any(n in one for one in shown.values())]

    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        left = np.zeros(len(shown))
        places = [-i for i in range(len(shown))]
        for name in names:
            seconds = np.array([one.get(name, 0.0) for one in shown.values()])
            hatch = "///" if name == UNATTRIBUTED else None
            colour = COLOURS.get(name, BEFORE)
            axes.barh(places, seconds, 0.62, left=left, color=colour, label=name, hatch=hatch, linewidth=0)
            for place, start, width in zip(places, left, seconds, strict=True):
                if width > 0.07 * longest and name != UNATTRIBUTED:
                    above = (start + width / 2, place + 0.42)
                    axes.annotate(_time(width), above, ha="center", va="center", fontsize=8.5, color=MUTED)
            left = left + seconds
        for place, side, end in zip(places, report.sides.values(), left, strict=True):
            _beside(axes, _time(side.step_seconds.median), (end, place), fontsize=10, color=INK)
        _name_rows(axes, places, list(shown))
        axes.set_xlim(0, 1.12 * longest)
        axes.set_ylim(places[-1] - 0.4, 0.6)
        axes.set_xlabel("seconds")
        legend(axes)
        return "Median step by phase. " + " ".join(_in_words(name, one) for name, one in shown.items())

    caption = (
        "Where a step goes, both sides on one axis: the median step by phase. A colour that is much longer below than "
        f"above is what the speed-up comes from. Hatched: no span names it. Phases under {SMALL:.0%} are drawn as one."
    )
    return render("stacked", (10.6, 1.5 + 0.75 * len(shown)), draw, caption)


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
        f"One step of {side} on its time line, a row for each phase. Pale bars hold others, which count by "
        "themselves (the model's passes inside generation). Gaps across all rows are unattributed. Both sides have one "
        "scale."
    )
    return render(f"waterfall-{side}", (5.3, 1.0 + 0.27 * len(rows)), draw, caption)


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
    return render("ceilings", (5.3, 1.0 + 0.42 * len(rows)), draw, caption)


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
    return render("memory", (5.3, 3.0), draw, caption)


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

    caption = "Every timed step. The sides take turns, so a disturbance of the machine shows in both lines at one turn."
    return render("steps", (5.3, 3.0), draw, caption)


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


def _merge_small(phases: Mapping[str, float], longest: float) -> dict[str, float]:
    shown = {n: s for n, s in phases.items() if s >= SMALL * longest and n != UNATTRIBUTED}
    rest = sum(seconds for name, seconds in phases.items() if name not in shown and name != UNATTRIBUTED)
    return {**shown, SMALL_NAME: rest, UNATTRIBUTED: phases.get(UNATTRIBUTED, 0.0)}


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


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


def _in_words(name: str, phases: Mapping[str, float]) -> str:
    return f"{name}: " + ", ".join(f"{phase} {_time(seconds)}" for phase, seconds in phases.items()) + "."


def _ceiling(report: ProfileReport) -> str:
    return report.ceilings.text.rsplit(", ", 1)[0]
