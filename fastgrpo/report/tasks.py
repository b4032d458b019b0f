"""Accuracy by question type before and after training: the rows that the page draws as gauges."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fastgrpo.evaluation.summary import TaskChange
from fastgrpo.report.formats import percent
from fastgrpo.report.intervals import Proportion
from fastgrpo.report.run import Run


@dataclass(frozen=True)
class Mark:
    """A dot on a gauge, with the line through it; fractions 0..1."""

    value: float
    """Of one run, or the mean of several."""
    low: float | None = None
    """Of the line: a 95 % interval for one run, ± one standard deviation for several; None where not known."""
    high: float | None = None
    runs: tuple[float, ...] = ()
    """Of each run, where there are several."""

    @classmethod
    def of(cls, values: Sequence[float | None], n: int | None) -> "Mark | None":
        """From each run's value; None where no run has one. `n`: questions of a single run."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        if len(known) == 1:
            single = Proportion.known(known[0], n)
            interval = None if single is None else single.interval
            return cls(known[0], *((interval.low, interval.high) if interval else (None, None)))
        mean, std = statistics.fmean(known), statistics.stdev(known)
        return cls(mean, max(mean - std, 0.0), min(mean + std, 1.0), tuple(known))


@dataclass(frozen=True)
class TaskRow:
    """One question type, or all of them."""

    name: str
    is_total: bool
    count: int | None
    """Questions."""
    chance: float | None
    before: Mark | None
    after: Mark | None

    @property
    def text(self) -> str:
        """Like "21.2 % → 67.7 %"."""
        return " → ".join("–" if mark is None else percent(mark.value) for mark in (self.before, self.after))


def task_rows(runs: Sequence[Run]) -> list[TaskRow]:
    """A row for each question type where there are several, and one for all."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.headline.by_task))
    rows = []
    for task in tasks if len(tasks) > 1 else []:
        rows.append(_row(task, [run.headline.by_task[task] for run in runs if task in run.headline.by_task]))
    heads = [run.headline for run in runs]
    totals = [TaskChange(h.accuracy_before, h.accuracy_after, h.chance, h.num_questions) for h in heads]
    rows.append(_row("All questions", totals, is_total=True))
    return [row for row in rows if row.before or row.after]


def _row(name: str, changes: Sequence[TaskChange], *, is_total: bool = False) -> TaskRow:
    count = next((change.count for change in changes if change.count is not None), None)
    return TaskRow(
        name,
        is_total,
        count,
        next((change.chance for change in changes if change.chance is not None), None),
        Mark.of([change.before for change in changes], count),
        Mark.of([change.after for change in changes], count),
    )
