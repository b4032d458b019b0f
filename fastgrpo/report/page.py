"""Puts a report together: figures, charts, verdicts and examples into one HTML file that loads nothing else."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastgrpo.report import charts, headline, tables
from fastgrpo.report.curves import enclosing_spans
from fastgrpo.report.examples import pick_held_out, pick_trajectories
from fastgrpo.report.palette import PALETTE
from fastgrpo.report.plots import export
from fastgrpo.report.run import Run, read_run
from fastgrpo.report.run_card import run_card
from fastgrpo.report.tasks import task_rows
from fastgrpo.report.templates import template
from fastgrpo.report.trends import judge_responses
from fastgrpo.report.verdict import Verdict, judge_answers


@dataclass(frozen=True)
class SpanRow:
    """A line of the table of where time went."""

    name: str
    depth: int
    """How many of the spans around it are in the table too."""
    median_s: float | None
    """Of a step; None for what no span covers."""
    share: float
    """Of all step time, 0..1."""


def write_report(run_dirs: Sequence[Path], out: Path | None = None, figures: Path | None = None) -> Path:
    """Writes the report of one run, or of several side by side (seeds of one configuration, or an ablation).

    Args:
        run_dirs: run folders. What one of them lacks is said on the page.
        out: the file to write, or a folder to write `report.html` into. Default: `report.html` inside the run folder
            of a single run, in the working directory for several.
        figures: a folder that also gets each chart as SVG and PNG.

    Returns:
        The file written.

    Raises:
        ValueError: no run folder given, or one that does not exist or holds nothing a run writes.
    """
    if not run_dirs:
        raise ValueError("no run folder given: name at least one folder that a training run wrote")
    runs = [read_run(Path(path)) for path in run_dirs]
    if out is None:
        out = runs[0].path / "report.html" if len(runs) == 1 else Path("report.html")
    elif out.is_dir():
        out = out / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    content = _content(runs)
    page = template("page.html.j2").render(content).strip() + "\n"
    out.write_text(page, encoding="utf-8", errors="replace")
    if figures is not None:
        export([*content["curves"], *content["time_charts"], *content["health"]], figures)
    return out


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything the template shows."""
    names = _names(runs)
    notes: dict[str, list[str]] = {name: list(run.missing) for name, run in zip(names, runs, strict=True)}
    shown = next((i for i, run in enumerate(runs) if run.completion_files), 0)
    trajectories = pick_trajectories(runs[shown].completion_files, notes[names[shown]])
    held_out_run = next((i for i, run in enumerate(runs) if any((run.path / "evals").glob("*.parquet"))), 0)
    held_out = pick_held_out(runs[held_out_run].path / "evals", notes[names[held_out_run]])
    answers = [judge_answers(run.headline) for run in runs]
    responses = [judge_responses(run.metrics) for run in runs]
    return {
        "palette": PALETTE,
        "title": headline.title(runs),
        "names": names,
        "facts": headline.facts(runs),
        "spread": headline.spreads(runs),
        "certainty": headline.certainty(runs),
        "pass_name": headline.pass_name(runs),
        "headlines": [] if len(runs) == 1 else tables.headlines(runs),
        "answers": answers,
        "responses": responses,
        "overall": [_overall(answers), _overall(responses)],
        "notes": {name: lines for name, lines in notes.items() if lines},
        "differences": tables.differences(runs, names),
        "tasks": task_rows(runs),
        "evaluations": tables.evaluations(runs, names),
        "task_scores": tables.task_scores(runs),
        "curves": charts.curves(runs),
        "time_charts": charts.timing(runs),
        "spans": _span_rows(runs),
        "health": charts.health(runs),
        "trajectories": trajectories,
        "trajectories_of": names[shown],
        "held_out": held_out,
        "held_out_of": names[held_out_run],
        "cards": {name: run_card(run) for name, run in zip(names, runs, strict=True) if run.config},
        "configs": {name: tables.config_rows(run) for name, run in zip(names, runs, strict=True) if run.config},
    }


def _names(runs: Sequence[Run]) -> list[str]:
    """Folder names, numbered where two runs share one."""
    seen: Counter[str] = Counter(run.name for run in runs)
    return [run.name if seen[run.name] == 1 else f"{run.name} ({i + 1})" for i, run in enumerate(runs)]


def _overall(verdicts: Sequence[Verdict]) -> Verdict:
    """A single run's verdict; of several, how many came to which."""
    if len(verdicts) == 1:
        one = verdicts[0]
        also = " Nor that another seed would show the same: this is one run."
        return replace(one, not_claimed=one.not_claimed + also) if one.not_claimed else one
    counts = Counter(verdict.label for verdict in verdicts).most_common()
    label = f"{counts[0][0]}: {counts[0][1]} of {len(verdicts)} runs"
    rest = "; ".join(f"{name.lower()}: {count}" for name, count in counts[1:])
    tones = {verdict.tone for verdict in verdicts}
    sentence = f"The others: {rest}." if rest else "All runs agree."
    not_claimed = next((verdict.not_claimed for verdict in verdicts if verdict.not_claimed), "")
    return Verdict(verdicts[0].tone if len(tones) == 1 else "partly", label, sentence, not_claimed)


def _span_rows(runs: Sequence[Run]) -> list[SpanRow]:
    """Median milliseconds and share of all step time by span, over all steps of all runs; parts below their whole."""
    spans: dict[str, list[float]] = {}
    total = 0.0
    for run in runs:
        total += float(np.nansum(run.metrics.columns.get("step_time", np.zeros(0))))
        for name, column in run.metrics.columns.items():
            if name.startswith("time/"):
                spans.setdefault(name.removeprefix("time/"), []).extend(column[np.isfinite(column)])
    time = {name: sum(values) for name, values in spans.items() if values}
    lineages = {name: [*enclosing_spans(name, time), name] for name in time}
    order = sorted(time, key=lambda name: [(-time[part], part) for part in lineages[name]])
    rows = []
    for name in order:
        *outer, _ = lineages[name]
        label = name.removeprefix(f"{outer[-1]}/") if outer else name
        share = time[name] / total if total else math.nan
        rows.append(SpanRow(label, len(outer), statistics.median(spans[name]), share))
    if rows and total:
        covered = sum(row.share for row in rows if row.depth == 0)
        rows.append(SpanRow("other", 0, None, max(1.0 - covered, 0.0)))
    return rows
