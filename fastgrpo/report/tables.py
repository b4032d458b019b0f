"""The page's tables as rows of text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastgrpo.evaluation.figures import TaskScore
from fastgrpo.report.formats import count, duration, percent
from fastgrpo.report.headline import Form, pass_name, spread
from fastgrpo.report.run import Run, flatten

_OWN_SETTINGS = frozenset(
    {"seed", "data_seed", "output_dir", "run_name", "run_id", "logging_dir", "resume_from_checkpoint"}
)
"""Settings in which runs that differ by seed alone may differ."""
Rows = list[list[str]]


def headlines(runs: Sequence[Run]) -> Rows:
    """Title, the figure of each run, mean ± standard deviation."""
    rows: list[tuple[str, str, Form]] = [
        ("Questions", "num_questions", count),
        ("Accuracy before", "accuracy_before", percent),
        ("Accuracy after", "accuracy_after", percent),
        ("Accuracy by the reward's grader before", "accuracy_strict_before", percent),
        ("Accuracy by the reward's grader after", "accuracy_strict_after", percent),
        ("No option readable before", "unreadable_rate_before", percent),
        ("No option readable after", "unreadable_rate_after", percent),
        ("Answered in the form before", "answered_rate_before", percent),
        ("Answered in the form after", "answered_rate_after", percent),
        ("Answered accuracy before", "answered_accuracy_before", percent),
        ("Answered accuracy after", "answered_accuracy_after", percent),
        ("… with shuffled pictures", "answered_accuracy_shuffled_images", percent),
        ("Chance", "chance", percent),
        (f"{pass_name(runs)} before", "pass_at_k_before", percent),
        (f"{pass_name(runs)} of guessing", "pass_at_k_chance", percent),
        ("Response length before, tokens", "mean_length_before", count),
        ("Response length after, tokens", "mean_length_after", count),
        ("Steps", "steps", count),
        ("Wall time", "wall_s", duration),
        ("Tokens per second", "tokens_per_s", count),
    ]
    return [
        [title, *(form(getattr(run.headline, figure)) for run in runs), spread(runs, figure).text(form)]
        for title, figure, form in rows
        if spread(runs, figure).values
    ]


def differences(runs: Sequence[Run], names: Sequence[str]) -> Rows:
    """Settings in which the runs differ other than by their seed: name, and the value of each run."""
    configs = [flatten(run.config) for run in runs if run.config]
    if len(configs) < 2:
        return []
    keys = dict.fromkeys(key for config in configs for key in config)
    told = ([key, *(_value(flatten(run.config).get(key)) for run in runs)] for key in keys)
    return [row for row in told if row[0].rsplit(".", 1)[-1] not in _OWN_SETTINGS and len(set(row[1:])) > 1]


def task_scores(runs: Sequence[Run]) -> Rows:
    """By question type of a single run: questions, chance, total and answered accuracy before and after."""
    if len(runs) > 1:
        return []
    nothing: Mapping[str, TaskScore] = {}
    scores = [
        runs[0].evaluations[name].by_task if name in runs[0].evaluations else nothing for name in ("before", "after")
    ]
    return [
        [
            task,
            count(change.count),
            *map(percent, (change.chance, change.before, change.after)),
            *(text for score in scores for text in _answered(score.get(task, TaskScore()))),
        ]
        for task, change in runs[0].headline.by_task.items()
    ]


def _answered(score: TaskScore) -> tuple[str, str]:
    return percent(score.answered_rate), percent(score.answered_accuracy)


def evaluations(runs: Sequence[Run], names: Sequence[str]) -> Rows:
    """Every evaluation of every run."""
    rows = []
    for name, run in zip(names, runs, strict=True):
        for key, one in run.evaluations.items():
            total, tries = one.total, one.pass_at_k
            rows.append([
                f"{name}: {key}" if len(runs) > 1 else key,
                count(one.step),
                one.dataset or "–",
                count(total.count),
                *map(percent, (total.accuracy, total.accuracy_strict, total.unreadable_rate)),
                *map(percent, (total.answered_rate, total.answered_accuracy)),
                percent(one.answered_accuracy_shuffled_images),
                "–" if tries is None else f"{percent(tries.value)} (k = {tries.k}; guessing {percent(tries.chance)})",
                count(one.mean_length),
                percent(one.reflection_rate),
            ])  # fmt: skip
    return rows


def config_rows(run: Run) -> Rows:
    """The settings of a run by name."""
    return [[key, _value(value)] for key, value in sorted(flatten(run.config).items())]


def _value(value: Any) -> str:
    """A setting as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
