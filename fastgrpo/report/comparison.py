"""The page of `fastgrpo eval`: one model's accuracy, or several models' on the same questions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.atomic_files import write_aside
from fastgrpo.evaluation.comparison import Accuracy, Comparison, PairedTest
from fastgrpo.report.formats import count, percent, points, probability
from fastgrpo.report.palette import PALETTE
from fastgrpo.report.tables import Rows
from fastgrpo.report.tasks import Mark
from fastgrpo.report.templates import template

LEAD = (
    "Accuracy as a person reads the answers, in brackets its 95 % interval (bootstrap over questions, exact "
    "where all came out alike); strict: by the reward's grader; unreadable: no option could be read; "
    "answered: in the form asked for, and how many of those are right."
)
COLUMNS = ["Model", "Questions", "Accuracy", "strict", "unreadable", "Answered", "right of them", "Tokens"]


@dataclass(frozen=True)
class ModelRow:
    """One model's dot on a gauge, as the macro `task` draws it."""

    name: str
    count: int
    chance: float | None
    after: Mark
    text: str
    is_total: bool = False
    before: None = None


def write_comparison(
    comparison: Comparison, folder: Path, name: str, *, title: str, dataset: str, made: Mapping[str, str]
) -> Path:
    """Writes {name}-comparison.json (figures) and {name}-comparison.html (the page) into `folder`; returns the page.

    Args:
        title: of the page: what was asked.
        dataset: where the questions come from.
        made: by what command, when, where and with which versions.
    """
    figures = json.dumps({"dataset": dataset, **comparison.to_json()}, indent=2) + "\n"
    page = folder / f"{name}-comparison.html"
    write_page(page, _content(comparison, title, dataset, made), figures)
    return page


def write_page(page: Path, content: Mapping[str, Any], figures: str) -> None:
    """Writes a page about models and, beside it, its figures."""
    html = template("comparison.html.j2").render(palette=PALETTE, **content).strip() + "\n"
    write_aside(page.with_suffix(".json"), lambda path: path.write_text(figures))
    write_aside(page, lambda path: path.write_text(html, encoding="utf-8", errors="replace"))


def _content(comparison: Comparison, title: str, dataset: str, made: Mapping[str, str]) -> dict[str, Any]:
    names = list(comparison.evaluations)
    groups = {**comparison.by_task, "All questions": comparison.total}
    return {
        "title": title,
        "names": names,
        "facts": page_facts(dataset, [accuracy.count for accuracy in comparison.total.values()], made),
        "lead": LEAD,
        "columns": COLUMNS,
        "figures": _figures(comparison),
        "tested": "the difference of accuracies",
        "hit": "right",
        "tests": [test_row(test) for test in comparison.tests],
        "groups": {task: _model_rows(row) for task, row in groups.items()},
        "group_columns": ["Question type", "Questions", *names],
        "tasks": [_task_row(task, row, names) for task, row in groups.items()],
        "skipped": {name: one.skipped for name, one in comparison.evaluations.items() if one.skipped},
    }


def page_facts(dataset: str, counts: Sequence[int], made: Mapping[str, str]) -> list[tuple[str, str]]:
    """What stands below the title; `counts` are each model's questions."""
    least, most = min(counts), max(counts)
    questions = count(most) if least == most else f"{count(least)} to {count(most)}"
    return [("data", dataset), ("questions", questions), ("decoding", "greedy"), *made.items()]


def _figures(comparison: Comparison) -> Rows:
    """A row for each model."""
    rows = []
    for name, evaluation in comparison.evaluations.items():
        total, accuracy = evaluation.total, comparison.total[name]
        rows.append([
            name,
            count(accuracy.count),
            accuracy.text,
            *map(percent, (total.accuracy_strict, total.unreadable_rate)),
            *map(percent, (total.answered_rate, total.answered_accuracy)),
            count(evaluation.mean_length),
        ])  # fmt: skip
    return rows


def _model_rows(accuracies: Mapping[str, Accuracy]) -> list[ModelRow]:
    return [
        ModelRow(name, one.count, one.chance, Mark(one.value, one.low, one.high), percent(one.value))
        for name, one in accuracies.items()
    ]


def _task_row(task: str, accuracies: Mapping[str, Accuracy], names: list[str]) -> list[str]:
    sizes = {one.count for one in accuracies.values()}
    cells = [accuracies[name].text if name in accuracies else "–" for name in names]
    return [task, count(max(sizes)), *cells]


def test_row(test: PairedTest) -> list[str]:
    """A line of the table of paired tests."""
    return [
        f"{test.second} against {test.first}",
        count(test.count),
        f"{points(test.difference)} ({points(test.low)} to {points(test.high)})",
        count(test.only_second),
        count(test.only_first),
        probability(test.p_value),
    ]
