"""profile.html: one self-contained file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastgrpo_profiling.report import ProfileReport
from fastgrpo_profiling.span import SpanEvent

from fastgrpo.profile import charts
from fastgrpo.profile.median_steps import median_steps
from fastgrpo.report.palette import PALETTE
from fastgrpo.report.templates import template


def write_page(
    path: Path,
    report: ProfileReport,
    events: Mapping[str, Sequence[SpanEvent]],
    step_seconds: Mapping[str, Sequence[float]],
) -> None:
    """Draws a profile.

    Args:
        events: side → the spans of its traced step.
        step_seconds: side → its timed steps.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(report, events, step_seconds), encoding="utf-8", errors="replace")


def render_page(
    report: ProfileReport, events: Mapping[str, Sequence[SpanEvent]], step_seconds: Mapping[str, Sequence[float]]
) -> str:
    """The page as HTML."""
    longest = max((event.start + event.seconds for one in events.values() for event in one), default=0.0)
    return template("page.html.j2", Path(__file__).parent).render(
        palette=PALETTE,
        report=report,
        ours=report.sides[report.ours],
        theirs=report.sides[report.theirs],
        median=median_steps(report),
        waterfalls=[chart for name, one in events.items() if (chart := charts.waterfall(name, one, longest))],
        ceilings=charts.against_ceilings(report),
        memory=charts.memory_over_time(events),
        steps=charts.step_times(step_seconds),
    )
