"""Intervals of a model's accuracy, and tests between models that were asked the same questions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from fastgrpo.evaluation.figures import Evaluation

DRAWS = 10_000
"""Of a bootstrap."""


def bootstrap_interval(values: Sequence[float], seed: int = 0, least: float = 0.0) -> tuple[float, float]:
    """95 % interval of the mean of independent values, one at least: B. Efron, Ann. Stat. 7 (1979) 1, by percentiles.

    Resamples are drawn as counts of the distinct values, which is the same and takes no memory. Where all values are
    alike, so are the resamples; the interval is then the exact one, of values between `least` and 1: with n alike, more
    than 1 − 0.025^(1/n) are seldom unlike (C. Clopper, E. Pearson, Biometrika 26 (1934) 404).
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    n = len(values)
    if len(distinct) == 1:
        unlike = 1 - 0.025 ** (1 / n)
        return max(float(distinct[0]) - unlike, least), min(float(distinct[0]) + unlike, 1.0)
    means = np.random.default_rng(seed).multinomial(n, counts / n, size=DRAWS) @ distinct / n
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two models are right equally often (Q. McNemar, Psychometrika 12 (1947) 153).

    Args:
        only_first: questions that only the first is right on.
        only_second: questions that only the second is right on. Those with the same outcome say nothing.
    """
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


@dataclass(frozen=True)
class PairedTest:
    """Two models on the questions that both were asked."""

    first: str
    second: str
    count: int
    """Questions."""
    only_first: int
    """Questions that the first alone is right on."""
    only_second: int
    difference: float
    """Accuracy of the second − of the first, on these questions."""
    low: float
    """Of the difference's 95 % interval, by bootstrap over questions."""
    high: float
    p_value: float
    """McNemar's, exact."""

    @property
    def text(self) -> str:
        """The finding in one line."""
        points = f"{100 * self.difference:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"
        alone = f"{self.only_second} it alone, {self.only_first} the other alone"
        return f"{self.second} against {self.first}: {points}, p = {self.p_value:.2g} (n = {self.count}; {alone})"


def paired_test(
    first: tuple[str, Mapping[int, bool]], second: tuple[str, Mapping[int, bool]], seed: int = 0
) -> PairedTest | None:
    """Compares two models, each (name, {row: whether right}); None where no question was asked of both."""
    (first_name, first_hits), (second_name, second_hits) = first, second
    shared = first_hits.keys() & second_hits.keys()
    changes = [int(second_hits[row]) - int(first_hits[row]) for row in shared]
    if not changes:
        return None
    only_first, only_second = changes.count(-1), changes.count(1)
    return PairedTest(
        first_name,
        second_name,
        len(shared),
        only_first,
        only_second,
        sum(changes) / len(shared),
        *bootstrap_interval(changes, seed, least=-1.0),
        mcnemar(only_first, only_second),
    )


@dataclass(frozen=True)
class Accuracy:
    """Of one model on one kind of question, with its 95 % bootstrap interval."""

    count: int
    value: float
    low: float
    high: float
    chance: float | None
    """Of even guessing among the options; None where there are none."""

    @property
    def text(self) -> str:
        """Like "59.5 % (55.0 to 63.9)"."""
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"

    @classmethod
    def of(cls, hits: Sequence[bool], chance: float | None, seed: int = 0) -> "Accuracy":
        """From the outcome on each question, of which there is one at least."""
        return cls(len(hits), sum(hits) / len(hits), *bootstrap_interval(hits, seed), chance)


@dataclass(frozen=True)
class Comparison:
    """Models that were asked the same questions."""

    evaluations: Mapping[str, Evaluation]
    """By model, with their records."""
    total: Mapping[str, Accuracy]
    """By model."""
    by_task: Mapping[str, Mapping[str, Accuracy]]
    """By task and model; empty where there is one task."""
    tests: Sequence[PairedTest]
    """Every two models on all questions, in the order given."""

    def to_json(self) -> dict[str, Any]:
        """The figures, without the responses."""
        return {
            "models": {name: evaluation.to_json() for name, evaluation in self.evaluations.items()},
            "accuracy": _to_json(self.total),
            "accuracy_by_task": {task: _to_json(row) for task, row in self.by_task.items()},
            "paired_tests": [asdict(test) for test in self.tests],
        }


def compare(evaluations: Mapping[str, Evaluation], seed: int = 0) -> Comparison:
    """Intervals of all, by task and in total, and a paired test of every two.

    Args:
        seed: of the bootstrap.
    """
    tasks = dict.fromkeys(task for one in evaluations.values() for task in one.by_task)
    by_task = {}
    for task in tasks if len(tasks) > 1 else ():
        scores = {name: one.by_task[task].chance for name, one in evaluations.items() if task in one.by_task}
        asked = {name: [r for r in evaluations[name].records if r["task"] == task] for name in scores}
        by_task[task] = {name: Accuracy.of(_hits(asked[name]), chance, seed) for name, chance in scores.items()}
    total = {name: Accuracy.of(_hits(one.records), one.total.chance, seed) for name, one in evaluations.items()}
    outcomes = {name: {r["row_id"]: bool(r["correct"]) for r in one.records} for name, one in evaluations.items()}
    tests = [paired_test(*pair, seed) for pair in combinations(outcomes.items(), 2)]
    return Comparison(evaluations, total, by_task, [test for test in tests if test is not None])


def _hits(records: Sequence[Mapping[str, Any]]) -> list[bool]:
    return [bool(record["correct"]) for record in records]


def _to_json(accuracies: Mapping[str, Accuracy]) -> dict[str, Any]:
    return {name: asdict(one) for name, one in accuracies.items()}
