"""Intervals and paired tests, against values worked out otherwise."""

import json
from typing import Any

import numpy as np
import pytest

from fastgrpo.evaluation import Evaluation, TaskScore
from fastgrpo.evaluation.comparison import bootstrap_interval, compare, mcnemar, paired_test


def evaluation(hits: list[bool], tasks: list[str] | None = None) -> Evaluation:
    named = tasks or ["all"] * len(hits)
    records: list[dict[str, Any]] = [
        {"row_id": i, "task": task, "correct": hit} for i, (hit, task) in enumerate(zip(hits, named, strict=True))
    ]
    of_task = {
        task: [hit for hit, name in zip(hits, named, strict=True) if name == task] for task in dict.fromkeys(named)
    }
    scores = {task: TaskScore(len(mine), sum(mine) / len(mine), chance=0.5) for task, mine in of_task.items()}
    return Evaluation(TaskScore(len(hits), sum(hits) / len(hits), chance=0.5), scores, records=tuple(records))


def test_the_interval_is_that_of_resampled_rows() -> None:
    values = [1.0] * 30 + [0.0] * 50 + [-1.0] * 20
    drawn = np.random.default_rng(1).choice(values, size=(20_000, 100)).mean(axis=1)
    assert bootstrap_interval(values) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.011)
    low, high = bootstrap_interval(values)
    assert (low + high) / 2 == pytest.approx(0.1, abs=0.01)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.7 / 10, rel=0.05), "1.96 standard errors, of 0.7 / √100"


def test_the_interval_is_the_same_each_time_and_open_where_nothing_varies() -> None:
    values = [True, False, True]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    # Clopper and Pearson's, as R's binom.test(5, 5) and binom.test(0, 1) have it.
    assert bootstrap_interval([True] * 5) == (pytest.approx(0.4782, abs=1e-4), 1.0)
    assert bootstrap_interval([0.0]) == (0.0, pytest.approx(0.975))
    assert bootstrap_interval([0] * 5, least=-1.0) == (
        pytest.approx(-0.5218, abs=1e-4),
        pytest.approx(0.5218, abs=1e-4),
    )


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (5, 0, 0.0625), (1, 9, 0.021484375), (59, 41, 0.088630)],
)
def test_mcnemar(only_first: int, only_second: int, p_value: float) -> None:
    """Tables of the binomial distribution: 2 · P(X ≤ 1 | 10, ½) = 22 / 1024; the last is R's binom.test(41, 100)."""
    assert mcnemar(only_first, only_second) == pytest.approx(p_value, rel=0.01)


def test_two_models_on_the_questions_both_were_asked() -> None:
    first = {1: True, 2: True, 3: False, 4: False, 5: True}
    second = {2: True, 3: True, 4: True, 5: False, 6: True}
    test = paired_test(("a", first), ("b", second))
    assert test is not None
    assert (test.first, test.second, test.count, test.only_first, test.only_second) == ("a", "b", 4, 1, 2)
    assert (test.difference, test.p_value) == (0.25, 1.0)
    assert test.low <= test.difference <= test.high
    assert paired_test(("a", {1: True}), ("b", {2: True})) is None


def test_all_pairs_and_all_tasks() -> None:
    tasks = ["Count"] * 6 + ["Depth"] * 4
    models = {
        "never": evaluation([False] * 10, tasks),
        "half": evaluation([True, False] * 5, tasks),
        "always": evaluation([True] * 10, tasks),
    }
    found = compare(models)
    assert {name: (one.count, one.value) for name, one in found.total.items()} == {
        "never": (10, 0.0), "half": (10, 0.5), "always": (10, 1.0),
    }  # fmt: skip
    assert (found.total["always"].high, found.total["never"].low) == (1.0, 0.0)
    assert {task: row["half"].count for task, row in found.by_task.items()} == {"Count": 6, "Depth": 4}
    assert [(test.first, test.second) for test in found.tests] == [
        ("never", "half"), ("never", "always"), ("half", "always"),
    ]  # fmt: skip
    assert [test.p_value for test in found.tests] == [2 / 2**5, 2 / 2**10, 2 / 2**5]
    content = json.loads(json.dumps(found.to_json()))
    assert content["accuracy"]["half"]["value"] == 0.5
    assert content["accuracy_by_task"]["Depth"]["always"]["chance"] == 0.5
    assert content["paired_tests"][1]["difference"] == 1.0


def test_one_task_is_the_total() -> None:
    assert compare({"one": evaluation([True, False])}).by_task == {}
    assert compare({"one": evaluation([True, False])}).tests == []
