"""The page of `fastgrpo eval` holds the figures, how many questions they are of, and their intervals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.evaluation import Evaluation, TaskScore
from fastgrpo.evaluation.comparison import Comparison, compare
from fastgrpo.report.comparison import write_comparison
from fastgrpo.types import SkippedRow


def evaluation(right: int, skipped: int = 0) -> Evaluation:
    """`right` of 40 questions, half of them Count and half Depth."""
    records: list[dict[str, Any]] = [
        {"row_id": i, "task": ("Count", "Depth")[i % 2], "correct": i < right} for i in range(40)
    ]
    score = TaskScore(40, right / 40, answered_rate=0.75, answered_accuracy=0.5, chance=0.25)
    task = TaskScore(20, right / 40, chance=0.25)
    rows = tuple(SkippedRow(i, "image is missing") for i in range(skipped))
    return Evaluation(score, {"Count": task, "Depth": task}, 12.5, 0.1, skipped=rows, records=tuple(records))


@pytest.fixture
def three() -> Comparison:
    return compare({"base": evaluation(10), "sft <b>": evaluation(20, skipped=25), "grpo": evaluation(30)})


NAMED: dict[str, Any] = {
    "title": "CV-Bench", "dataset": "cv.parquet", "made": {"command": "fastgrpo eval", "torch": "2.13"},
}  # fmt: skip


def render(comparison: Comparison, folder: Path) -> str:
    return write_comparison(comparison, folder, "cvbench", **NAMED).read_text()


def cells(page: str, table: str) -> list[list[str]]:
    found = re.search(rf'<table id="{table}".*?</table>', page, re.DOTALL)
    assert found is not None
    rows = re.findall(r"<tr>(.*?)</tr>", found[0], re.DOTALL)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows[1:]]


def test_figures_intervals_and_tests(three: Comparison, tmp_path: Path) -> None:
    page = render(three, tmp_path)
    assert [row[:3] for row in cells(page, "models")] == [
        [name, "40", three.total[raw].text]
        for name, raw in (("base", "base"), ("sft &lt;b&gt;", "sft <b>"), ("grpo", "grpo"))
    ]
    assert "25.0 % (12.5 to" in cells(page, "models")[0][2]
    assert [row[:2] for row in cells(page, "tasks")] == [["Count", "20"], ["Depth", "20"], ["All questions", "40"]]
    tests = cells(page, "tests")
    assert [row[0] for row in tests] == [
        "sft &lt;b&gt; against base",
        "grpo against base",
        "grpo against sft &lt;b&gt;",
    ]
    assert [row[1] for row in tests] == ["40"] * 3
    assert tests[1][2].startswith("+50.0 (+3")
    assert [row[3:5] for row in tests] == [["10", "0"], ["20", "0"], ["10", "0"]]
    assert tests[0][5] == f"{2 / 2**10:.2g}"
    assert "not corrected for there being 3 comparisons" in page


def test_rows_left_out_are_named(three: Comparison, tmp_path: Path) -> None:
    page = render(three, tmp_path)
    assert page.count("image is missing") == 20
    assert "and 5 more, in evals/" in page


def test_one_model_is_against_none(tmp_path: Path) -> None:
    page = render(compare({"base": evaluation(10)}), tmp_path)
    assert "against each other" not in page
    assert "Rows that could not" not in page


def test_it_loads_nothing_and_is_written_with_its_figures(three: Comparison, tmp_path: Path) -> None:
    page = write_comparison(three, tmp_path, "cvbench", **NAMED)
    assert page == tmp_path / "cvbench-comparison.html"
    assert not re.search(r'(?:src|href)="(?!data:)', page.read_text())
    figures = json.loads((tmp_path / "cvbench-comparison.json").read_text())
    assert figures["dataset"] == "cv.parquet"
    assert figures["accuracy"]["grpo"]["count"] == 40
