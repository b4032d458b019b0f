"""A lab's evaluations before and after training, which `fastgrpo eval` made: accuracy, or how often a model refuses."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastgrpo.evaluation.figures import mapping, number
from fastgrpo.report.arms import ArmRuns
from fastgrpo.report.formats import NBSP, percent, points
from fastgrpo.report.seeds import Mean
from fastgrpo.report.tables import Rows

COLUMNS = ("Arm", "Evaluation", "Figure", "Before", "After", "Change, points", "Seeds")
FIGURES = {
    "accuracy": ("accuracy",),
    "refused of benign questions": ("benign", "total", "value"),
    "refused of harmful questions": ("contrast", "total", "value"),
}
"""Where each stands in an evaluation's file."""


def evaluation_rows(arms: Sequence[ArmRuns]) -> Rows:
    """A row for each figure of each evaluation of each arm: the untrained model's, and the mean over seeds after."""
    return [row for arm in arms for name in _names(arm) for row in _rows(arm, name)]


def _rows(arm: ArmRuns, name: str) -> Iterator[list[str]]:
    for figure, keys in FIGURES.items():
        before = _values(arm, f"{name}-before", keys)
        after = _values(arm, f"{name}-after", keys)
        if not before and not after:
            continue
        change = Mean(tuple(value - before[0] for value in after)) if before and after else None
        yield [
            arm.name,
            name,
            figure,
            percent(before[0]) if before else "–",
            percent(Mean(after).mean) if after else "–",
            "–" if change is None else _change(change),
            str(len(after)),
        ]


def _change(change: Mean) -> str:
    """Like "+2.0 (−1.0 to +5.0)"."""
    interval = change.interval
    span = "" if interval is None else f"{NBSP}({points(interval.low)} to {points(interval.high)})"
    return points(change.mean) + span


def _names(arm: ArmRuns) -> list[str]:
    folders = (folder.name for run in arm.runs.values() for folder in (run.path / "evaluations").glob("*-*"))
    return sorted({name.rpartition("-")[0] for name in folders if name.endswith(("-before", "-after"))})


def _values(arm: ArmRuns, folder: str, keys: Sequence[str]) -> tuple[float, ...]:
    """Of each seed whose evaluation has the figure."""
    found = (_value(file, keys) for run in arm.runs.values() for file in _files(run.path / "evaluations" / folder))
    return tuple(value for value in found if value is not None)


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "evals").glob("*.json"))


def _value(file: Path, keys: Sequence[str]) -> float | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    for key in keys:
        content = mapping(content).get(key)
    return number(content)
