"""Puts a report together: figures, charts, verdicts and examples into one HTML file that loads nothing else."""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from fastgrpo.evaluation.figures import Evaluation, TaskScore
from fastgrpo.evaluation.summary import RunSummary
from fastgrpo.report import charts
from fastgrpo.report.curves import enclosing_spans
from fastgrpo.report.examples import pick_held_out, pick_trajectories
from fastgrpo.report.markup import completion_html, picture_uri, question_of
from fastgrpo.report.plots import PALETTE
from fastgrpo.report.run import Run, flatten, read_run
from fastgrpo.report.verdict import PERCENT, Verdict, judge_reasoning, judge_seeing, percent
from fastgrpo.scoring.reflection import count_reflections

_OWN_SETTINGS = frozenset({"seed", "data_seed", "output_dir", "run_name", "logging_dir", "resume_from_checkpoint"})
"""Settings in which runs that differ by seed alone may differ."""

_SECRET = re.compile(r"(hub_token|api_key|secret|password)$")


@dataclass(frozen=True)
class Spread:
    """One figure over the runs that measured it."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """With Bessel's correction; None below two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, form: Callable[[float | None], str]) -> str:
        """The mean, with ± one standard deviation over several runs."""
        if not self.std:
            return form(self.mean)
        return f"{form(self.mean).removesuffix(PERCENT)} ± {form(self.std)}"


@dataclass(frozen=True)
class HeadlineRow:
    """A line of the table of runs."""

    title: str
    per_run: list[str]
    overall: str


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


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the report of one run, or of several side by side (seeds of one configuration, or an ablation).

    Args:
        run_dirs: run folders. What one of them lacks is said on the page.
        out: the file to write, or a folder to write `report.html` into. Default: `report.html` inside the run folder
            of a single run, in the working directory for several.

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
    out.write_text(render_page(runs), encoding="utf-8", errors="replace")
    return out


def render_page(runs: Sequence[Run]) -> str:
    """The report of the runs as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    forms = {"percent": percent, "count": format_count, "duration": format_duration}
    environment.globals.update(forms)
    environment.filters.update(
        **forms,
        signed=lambda value: f"{value:+.2f}".replace("-", "−"),
        question=question_of,
        completion=completion_html,
        picture=picture_uri,
        reflections=count_reflections,
    )
    return environment.get_template("template.html.j2").render(_content(runs)).strip() + "\n"


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything the template shows."""
    names = _names(runs)
    notes: dict[str, list[str]] = {name: list(run.missing) for name, run in zip(names, runs, strict=True)}
    shown = next((i for i, run in enumerate(runs) if run.completion_files), 0)
    trajectories = pick_trajectories(runs[shown].completion_files, notes[names[shown]])
    held_out_run = next((i for i, run in enumerate(runs) if any((run.path / "evals").glob("*.parquet"))), 0)
    held_out = pick_held_out(runs[held_out_run].path / "evals", notes[names[held_out_run]])
    seeing = [judge_seeing(run.headline) for run in runs]
    reasoning = [judge_reasoning(run.metrics) for run in runs]
    return {
        "palette": PALETTE,
        "title": _title(runs),
        "names": names,
        "facts": _facts(runs),
        "spread": {f.name: _spread(runs, f.name) for f in fields(RunSummary) if f.name not in ("torch", "by_task")},
        "pass_name": _pass_name(runs),
        "table": [] if len(runs) == 1 else _table(runs),
        "seeing": seeing,
        "reasoning": reasoning,
        "overall": [_overall(seeing), _overall(reasoning)],
        "notes": {name: lines for name, lines in notes.items() if lines},
        "differences": _differences(runs, names),
        "task_chart": charts.accuracy_by_task(runs),
        "evaluations": _evaluations(runs, names),
        "task_scores": _task_scores(runs),
        "curves": charts.curves(runs),
        "time_charts": charts.timing(runs),
        "spans": _span_rows(runs),
        "health": charts.health(runs),
        "trajectories": trajectories,
        "trajectories_of": names[shown],
        "held_out": held_out,
        "held_out_of": names[held_out_run],
        "configs": {name: _config_rows(run) for name, run in zip(names, runs, strict=True) if run.config},
    }


def _names(runs: Sequence[Run]) -> list[str]:
    """Folder names, numbered where two runs share one."""
    seen: Counter[str] = Counter(run.name for run in runs)
    return [run.name if seen[run.name] == 1 else f"{run.name} ({i + 1})" for i, run in enumerate(runs)]


def _title(runs: Sequence[Run]) -> str:
    models = dict.fromkeys(_short_name(run.setting("model_name_or_path") or run.setting("model")) for run in runs)
    return " · ".join(name for name in models if name) or runs[0].name


def _short_name(name: object) -> str:
    """A model's or data set's name; of a local path the last part."""
    if not isinstance(name, str):
        return ""
    return Path(name).name if Path(name).is_absolute() or name.startswith(".") else name


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The line under the title: what was run, how long it took."""
    heads = [run.headline for run in runs]
    seeds = ", ".join(str(head.seed) for head in heads if head.seed is not None)
    per_step = runs[0].setting("num_generations")
    skipped = [np.nanmax(column) for run in runs if (column := run.metrics.get("skipped_rows")) is not None]
    facts = [
        ("runs", str(len(runs)) if len(runs) > 1 else ""),
        ("dataset", _short_name(runs[0].setting("dataset_name"))),
        ("steps", _spread(runs, "steps").text(format_count)),
        ("wall time", _spread(runs, "wall_s").text(format_duration)),
        ("tokens / s", _spread(runs, "tokens_per_s").text(format_count)),
        ("seed" if len(runs) == 1 else "seeds", seeds or "–"),
        ("completions per prompt", str(per_step or "")),
        ("rows skipped", format_count(sum(skipped)) if sum(skipped) else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _spread(runs: Sequence[Run], figure: str) -> Spread:
    found = (getattr(run.headline, figure) for run in runs)
    return Spread(tuple(float(value) for value in found if value is not None))


def _pass_name(runs: Sequence[Run]) -> str:
    ks = {run.headline.pass_k for run in runs if run.headline.pass_k is not None}
    return f"pass@{ks.pop()}" if len(ks) == 1 else "pass@k"


def _table(runs: Sequence[Run]) -> list[HeadlineRow]:
    """The headline figures, a column per run and one for mean ± standard deviation."""
    rows: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("Accuracy before", "accuracy_before", percent),
        ("Accuracy after", "accuracy_after", percent),
        ("Answered in the form before", "answered_rate_before", percent),
        ("Answered in the form after", "answered_rate_after", percent),
        ("Answered accuracy before", "answered_accuracy_before", percent),
        ("Answered accuracy after", "answered_accuracy_after", percent),
        ("… with shuffled pictures", "answered_accuracy_shuffled_images", percent),
        ("Chance", "chance", percent),
        (f"{_pass_name(runs)} before", "pass_at_k_before", percent),
        ("Response length before, tokens", "mean_length_before", format_count),
        ("Response length after, tokens", "mean_length_after", format_count),
        ("Steps", "steps", format_count),
        ("Wall time", "wall_s", format_duration),
        ("Tokens per second", "tokens_per_s", format_count),
    ]
    return [
        HeadlineRow(title, [form(getattr(run.headline, figure)) for run in runs], _spread(runs, figure).text(form))
        for title, figure, form in rows
        if _spread(runs, figure).values
    ]


def _overall(verdicts: Sequence[Verdict]) -> Verdict:
    """A single run's verdict; of several, how many came to which."""
    if len(verdicts) == 1:
        return verdicts[0]
    counts = Counter(verdict.label for verdict in verdicts).most_common()
    label = f"{counts[0][0]}: {counts[0][1]} of {len(verdicts)} runs"
    rest = "; ".join(f"{name.lower()}: {count}" for name, count in counts[1:])
    tones = {verdict.tone for verdict in verdicts}
    sentence = f"The others: {rest}." if rest else "All runs agree."
    return Verdict(verdicts[0].tone if len(tones) == 1 else "partly", label, sentence)


def _differences(runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[str]]:
    """Settings in which the runs differ other than by their seed: name -> value per run."""
    configs = [flatten(run.config) for run in runs if run.config]
    if len(configs) < 2:
        return {}
    keys = dict.fromkeys(key for config in configs for key in config)
    told = {key: [_value(key, flatten(run.config).get(key)) for run in runs] for key in keys}
    return {
        key: values
        for key, values in told.items()
        if key.rsplit(".", 1)[-1] not in _OWN_SETTINGS and len(set(values)) > 1
    }


def _task_scores(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The by-type table of a single run: total and answered accuracy, before and after."""
    if len(runs) > 1:
        return []
    nothing: Mapping[str, TaskScore] = {}
    before, after = (
        runs[0].evaluations[name].by_task if name in runs[0].evaluations else nothing for name in ("before", "after")
    )
    return [
        {"task": task, "change": change, "before": before.get(task), "after": after.get(task)}
        for task, change in runs[0].headline.by_task.items()
    ]


def _evaluations(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, Evaluation]]:
    prefixes = [f"{name}: " if len(runs) > 1 else "" for name in names]
    return [(prefix + key, e) for prefix, run in zip(prefixes, runs, strict=True) for key, e in run.evaluations.items()]


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


def _config_rows(run: Run) -> list[tuple[str, str]]:
    return [(key, _value(key, value)) for key, value in sorted(flatten(run.config).items())]


def _value(key: str, value: Any) -> str:
    """A setting as text; a report is passed around, so access tokens are left out."""
    if value and _SECRET.search(key):
        return "(hidden)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def format_count(value: float | None) -> str:
    """1234567.8 as "1,234,568"; a decimal is kept below ten."""
    if value is None:
        return "–"
    return f"{value:,.1f}" if abs(value) < 10 and value != round(value) else f"{value:,.0f}"


def format_duration(seconds: float | None) -> str:
    """5025 as "1 h 23 min", 83 as "1 min 23 s", 8.34 as "8.3 s" (with no-break spaces)."""
    if seconds is None:
        return "–"
    if seconds < 59.5:
        told = f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    else:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes_left = divmod(minutes, 60)
        told = f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"
    return told.replace(" ", "\N{NO-BREAK SPACE}")
