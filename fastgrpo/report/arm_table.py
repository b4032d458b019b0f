"""The aha page's final table: every arm's held-out figures with intervals, and paired tests against the first arm."""

import math
from collections.abc import Sequence
from statistics import fmean

from fastgrpo.report.arms import ArmRuns
from fastgrpo.report.formats import NBSP, points, probability
from fastgrpo.report.measures import MEASURES, Measure, run_answers
from fastgrpo.report.run import Run
from fastgrpo.report.seeds import Mean
from fastgrpo.report.tables import Rows

SHOWN = (
    *("held_out/accuracy", "held_out/answered_accuracy", "held_out/length", "held_out/reflective_share"),
    *("held_out/reflections_per_1k", "held_out/wrong_to_right", "held_out/right_to_wrong"),
)
COLUMNS = (
    "Arm", "Seeds", "Accuracy before", "Accuracy after", "… of answered", "Tokens", "Reflective",
    "… per 1,000 tokens", "Wrong → right", "Right → wrong",
)  # fmt: skip
TEST_COLUMNS = ("Against the first arm", "Points", "95 % over seeds", "p", "n", "95 % over questions", "p", "n")


def arm_rows(arms: Sequence[ArmRuns]) -> Rows:
    """A row for each arm: means over seeds after training, with 95 % intervals."""
    rows = []
    for arm in arms:
        accuracy, *others = (MEASURES[name] for name in SHOWN)
        before = [change.first for change in map(accuracy.of, arm.runs.values()) if change.first is not None]
        rows.append([
            arm.name,
            str(len(arm.runs)),
            accuracy.text(fmean(before)) if before else "–",
            *(_mean_text(arm, measure) for measure in (accuracy, *others)),
        ])  # fmt: skip
    return rows


def _mean_text(arm: ArmRuns, measure: Measure) -> str:
    """Like "59.5 % (57.1 to 61.9)": the mean over seeds and its 95 % interval, as far as such a figure can be."""
    last = [change.last for change in map(measure.of, arm.runs.values()) if change.last is not None]
    if not last:
        return "–"
    mean = Mean(tuple(last))
    if mean.interval is None:
        return measure.text(mean.mean)
    scale, top = (100, 100.0) if measure.is_share else (1, math.inf)
    low, high = max(scale * mean.interval.low, 0.0), min(scale * mean.interval.high, top)
    return f"{measure.text(mean.mean)} ({low:.1f}{NBSP}to{NBSP}{high:.1f})"


def paired_rows(arms: Sequence[ArmRuns]) -> Rows:
    """A row for each other arm: its held-out accuracy against the first arm's, paired."""
    first, *others = arms
    return [[arm.name, *_tested(first, arm)] for arm in others]


def _tested(first: ArmRuns, second: ArmRuns) -> list[str]:
    differences = seed_differences(first, second)
    if differences is None:
        return ["–"] * (len(TEST_COLUMNS) - 1)
    by_question = question_differences(first, second)
    cells = [points(differences.mean), *_figures(differences)]
    return [*cells, *(["–"] * 3 if by_question is None else _figures(by_question))]


def _figures(mean: Mean) -> list[str]:
    interval = mean.interval
    span = "–" if interval is None else f"{points(interval.low)} to {points(interval.high)}"
    return [span, probability(mean.p), f"{mean.n:,}"]


def seed_differences(first: ArmRuns, second: ArmRuns) -> Mean | None:
    """Held-out accuracy of the second arm − of the first, a value for each seed that both have."""
    accuracy = MEASURES["held_out/accuracy"]
    pairs = [
        (accuracy.of(first.runs[seed]).last, accuracy.of(run).last)
        for seed, run in second.runs.items()
        if seed in first.runs
    ]
    known = tuple(b - a for a, b in pairs if a is not None and b is not None)
    return Mean(known) if known else None


def question_differences(first: ArmRuns, second: ArmRuns) -> Mean | None:
    """The same by question: share of seeds that answer it right in the second arm − in the first."""
    by_question: dict[int, list[int]] = {}
    for seed, run in second.runs.items():
        if seed not in first.runs:
            continue
        was, now = _outcomes(first.runs[seed]), _outcomes(run)
        for row_id in was.keys() & now.keys():
            by_question.setdefault(row_id, []).append(int(now[row_id]) - int(was[row_id]))
    values = tuple(fmean(changes) for changes in by_question.values())
    return Mean(values) if values else None


def _outcomes(run: Run) -> dict[int, bool]:
    """Whether each held-out question was answered right after training, by row."""
    table = run_answers(run).get("after")
    if table is None or not {"row_id", "correct"} <= set(table.column_names):
        return {}
    return dict(zip(table["row_id"].to_pylist(), table["correct"].to_pylist(), strict=True))
