"""What a run is measured by, at its beginning and at its end: from its training steps, and on held-out questions.

Training figures are of answers drawn at the run's temperature: the first tenth of its steps against the last. Held-out
figures are of greedy answers: before against after training. Both are of one run; intervals are taken over seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastgrpo.report.formats import count, percent, points, signed
from fastgrpo.report.run import Run
from fastgrpo.report.trends import accuracy_metric

HELD_OUT = "held_out/"


@dataclass(frozen=True)
class Change:
    """A measure of one run; None where it was not measured."""

    first: float | None
    last: float | None


@dataclass(frozen=True)
class Measure:
    """A figure that claims and tables may name."""

    name: str
    title: str
    of: Callable[[Run], Change]
    is_share: bool = False
    """A fraction 0..1, told in percent."""
    unit: str = ""
    digits: int = 1

    def text(self, value: float | None) -> str:
        """Like "59.5 %" or "21.3"."""
        if value is None:
            return "–"
        return percent(value) if self.is_share else count(value) if self.digits == 1 else f"{value:.{self.digits}f}"

    def difference_text(self, value: float) -> str:
        """Like "+12.3 points" or "+9.1 tokens", without the unit's space broken."""
        return points(value) if self.is_share else signed(value, self.digits)

    @property
    def difference_unit(self) -> str:
        return "points" if self.is_share else self.unit


def _logged(column: str) -> Callable[[Run], Change]:
    """Mean of a metric over the first and the last tenth of the steps that logged it."""

    def of(run: Run) -> Change:
        return _ends(run, column)

    return of


def _ends(run: Run, column: str | None) -> Change:
    values = None if column is None else run.metrics.get(column)
    if values is None:
        return Change(None, None)
    values = values[np.isfinite(values)]
    size = max(1, len(values) // 10)
    return Change(float(values[:size].mean()), float(values[-size:].mean()))


def _rewarded(run: Run) -> Change:
    return _ends(run, accuracy_metric(run.metrics))


def _net_correction(run: Run) -> Change:
    better, worse = (_ends(run, f"self_correction/{kind}") for kind in ("wrong_to_right", "right_to_wrong"))
    return Change(_minus(better.first, worse.first), _minus(better.last, worse.last))


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _evaluated(figure: str) -> Callable[[Run], Change]:
    """A figure of the evaluations before and after."""

    def of(run: Run) -> Change:
        return Change(getattr(run.headline, f"{figure}_before"), getattr(run.headline, f"{figure}_after"))

    return of


def _answers(figure: Callable[[pa.Table], float | None]) -> Callable[[Run], Change]:
    """A figure of the responses before and after."""

    def of(run: Run) -> Change:
        return Change(*(figure(table) if table else None for table in map(run_answers(run).get, ("before", "after"))))

    return of


def run_answers(run: Run) -> dict[str, pa.Table]:
    """The tables of the held-out responses before and after that can be read, without pictures and prompts."""
    wanted = ("row_id", "correct", "length", "reflections", "correction")
    tables = {}
    for name in ("before", "after"):
        file = run.path / "evals" / f"{name}.parquet"
        try:
            kept = [column for column in wanted if column in pq.read_schema(file).names]
            tables[name] = pq.read_table(file, columns=kept)
        except (pa.ArrowException, OSError):
            continue
    return tables


def _per_1k_tokens(table: pa.Table) -> float | None:
    if not {"reflections", "length"} <= set(table.column_names):
        return None
    return 1000 * sum(table["reflections"].to_pylist()) / max(sum(table["length"].to_pylist()), 1)


def _corrected(kind: str) -> Callable[[pa.Table], float | None]:
    def share(table: pa.Table) -> float | None:
        if "correction" not in table.column_names or not len(table):
            return None
        return table["correction"].to_pylist().count(kind) / len(table)

    return share


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("training/accuracy", "accuracy reward in training", _rewarded, is_share=True),
        Measure("training/length", "response length in training", _logged("completions/mean_length"), unit="tokens"),
        Measure("training/reflective_share", "responses with a reflective phrase in training",
                _logged("reflection_rate"), is_share=True),
        Measure("training/reflections_per_1k", "reflective phrases per 1,000 tokens in training",
                _logged("reflections_per_1k_tokens"), unit="per 1,000 tokens"),
        Measure("training/wrong_to_right", "self-corrections wrong → right in training",
                _logged("self_correction/wrong_to_right"), is_share=True),
        Measure("training/right_to_wrong", "self-corrections right → wrong in training",
                _logged("self_correction/right_to_wrong"), is_share=True),
        Measure("training/net_correction", "self-corrections wrong → right less right → wrong, in training",
                _net_correction, is_share=True),
        Measure("training/entropy", "entropy in training", _logged("entropy"), unit="nats", digits=3),
        Measure("training/kl", "KL from the starting model", _logged("kl"), unit="nats", digits=3),
        Measure("held_out/accuracy", "held-out accuracy", _evaluated("accuracy"), is_share=True),
        Measure("held_out/accuracy_strict", "held-out accuracy as the reward reads it", _evaluated("accuracy_strict"),
                is_share=True),
        Measure("held_out/answered_rate", "held-out questions answered in the form", _evaluated("answered_rate"),
                is_share=True),
        Measure("held_out/answered_accuracy", "held-out accuracy among answered questions",
                _evaluated("answered_accuracy"), is_share=True),
        Measure("held_out/length", "held-out response length", _evaluated("mean_length"), unit="tokens"),
        Measure("held_out/reflective_share", "held-out responses with a reflective phrase",
                _evaluated("reflection_rate"), is_share=True),
        Measure("held_out/reflections_per_1k", "reflective phrases per 1,000 tokens, held-out",
                _answers(_per_1k_tokens), unit="per 1,000 tokens"),
        Measure("held_out/wrong_to_right", "held-out self-corrections wrong → right",
                _answers(_corrected("wrong to right")), is_share=True),
        Measure("held_out/right_to_wrong", "held-out self-corrections right → wrong",
                _answers(_corrected("right to wrong")), is_share=True),
    )
}  # fmt: skip
"""By name."""
