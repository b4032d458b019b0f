"""Reads a run folder into typed records. Whatever is missing, cut off or broken becomes a note, never an error."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """The step log as columns."""

    steps: NDArray[np.int64]
    """[S] optimizer steps, rising. A step logged twice (a resumed run) is there once, as logged last."""
    columns: dict[str, Floats]
    """[S] each; NaN where a step did not log the metric."""

    def get(self, name: str) -> Floats | None:
        """The column [S], or None when no step holds a finite value of it."""
        column = self.columns.get(name)
        return None if column is None or not np.isfinite(column).any() else column


@dataclass(frozen=True)
class TaskScore:
    """One question type in one evaluation; fractions 0..1."""

    count: int | None
    accuracy: float | None
    answered_accuracy: float | None
    answered_rate: float | None
    chance: float | None


@dataclass(frozen=True)
class Evaluation:
    """One scored evaluation (`evals/<name>.json`); all rates are fractions 0..1, None where not measured."""

    name: str
    step: int | None
    dataset: str | None
    num_questions: int | None
    accuracy: float | None
    answered_rate: float | None
    answered_accuracy: float | None
    answered_accuracy_shuffled_images: float | None
    chance: float | None
    mean_length: float | None
    """Tokens."""
    reflection_rate: float | None
    pass_at_k: tuple[int, float] | None
    by_task: dict[str, TaskScore]


@dataclass(frozen=True)
class TaskChange:
    """One question type before and after training; fractions 0..1."""

    before: float | None
    after: float | None
    chance: float | None
    count: int | None


@dataclass(frozen=True)
class Headline:
    """The figures a run is told by. Fractions 0..1 unless said otherwise; None where not measured."""

    accuracy_before: float | None
    accuracy_after: float | None
    answered_rate_before: float | None
    answered_rate_after: float | None
    answered_accuracy_before: float | None
    answered_accuracy_after: float | None
    answered_accuracy_shuffled_images: float | None
    chance: float | None
    pass_at_k_before: float | None
    pass_k: int | None
    """The k of pass@k."""
    mean_length_before: float | None
    """Tokens, in the held-out evaluation."""
    mean_length_after: float | None
    num_questions: int | None
    steps: int | None
    wall_s: float | None
    tokens_per_s: float | None
    seed: int | None


@dataclass(frozen=True)
class Run:
    """Everything a run folder holds that a report can show."""

    path: Path
    name: str
    config: dict[str, Any]
    metrics: Metrics
    evaluations: dict[str, Evaluation]
    """By name, in the order of their steps."""
    summary: dict[str, Any]
    completion_files: dict[int, Path]
    """One file per step, by rising step."""
    missing: tuple[str, ...] = field(default=())
    """What is not there or could not be read, one clause each."""

    @cached_property
    def headline(self) -> Headline:
        """`summary.json` first; what it lacks comes from the evaluations and the step log."""
        return _headline(self)

    @cached_property
    def by_task(self) -> dict[str, TaskChange]:
        """Before and after by question type."""
        rows = {str(task): row for task, row in _mapping(self.summary.get("accuracy_by_task")).items()}
        if rows:
            return {
                task: TaskChange(
                    before=number(_mapping(row).get("before")),
                    after=number(_mapping(row).get("after")),
                    chance=number(_mapping(row).get("chance")),
                    count=_integer(_mapping(row).get("count")),
                )
                for task, row in rows.items()
            }
        before, after = self._scores("before"), self._scores("after")
        return {
            task: TaskChange(
                before=before[task].accuracy if task in before else None,
                after=after[task].accuracy if task in after else None,
                chance=(before.get(task) or after[task]).chance,
                count=(before.get(task) or after[task]).count,
            )
            for task in dict.fromkeys([*before, *after])
        }

    def setting(self, name: str) -> Any:
        """A configuration value by the last part of its key, or None."""
        found = (value for key, value in flatten(self.config).items() if key.rsplit(".", 1)[-1] == name)
        return next(found, None)

    def _scores(self, name: str) -> dict[str, TaskScore]:
        return self.evaluations[name].by_task if name in self.evaluations else {}


def read_run(path: Path) -> Run:
    """Reads a run folder, as much of it as is there.

    Raises:
        ValueError: no such folder, or nothing in it that a run writes.
    """
    if not path.is_dir():
        raise ValueError(f"run folder {str(path)!r} does not exist: give the folder a training run wrote")
    missing: list[str] = []
    config = _read_config(path, missing)
    metrics = _read_metrics(path / "metrics.jsonl", missing)
    files = completion_files(path)
    if not files:
        missing.append("completions/ is not there: no examples from training")
    evaluations = _read_evaluations(path / "evals", missing)
    summary = _read_json(path / "summary.json", "the run did not finish, or not yet", missing)
    if not (config or len(metrics.steps) or files or evaluations or summary):
        raise ValueError(
            f"run folder {str(path)!r} holds nothing to report on: "
            "expected settings.json, metrics.jsonl, completions/, evals/ or summary.json in it"
        )
    return Run(path, path.resolve().name, config, metrics, evaluations, summary, files, tuple(missing))


def completion_files(path: Path) -> dict[int, Path]:
    """`completions/completions_00001.parquet`, … of a run folder by step, rising."""
    found = {}
    for file in (path / "completions").glob("completions_*.parquet"):
        if match := re.fullmatch(r"completions_(\d+)\.parquet", file.name):
            found[int(match[1])] = file
    return dict(sorted(found.items()))


def number(value: object) -> float | None:
    """A finite number as float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def first_known(*values: T | None) -> T | None:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _integer(value: object) -> int | None:
    as_float = number(value)
    return None if as_float is None else round(as_float)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read_json(file: Path, purpose: str, missing: list[str]) -> dict[str, Any]:
    """The object in `file`, or an empty one and a line in `missing`."""
    label = f"{file.parent.name}/{file.name}" if file.parent.name == "evals" else file.name
    if not file.is_file():
        missing.append(f"{label} is not there: {purpose}")
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        missing.append(f"{label} could not be read ({error})")
        return {}
    if not isinstance(content, dict):
        missing.append(f"{label} could not be read (not a JSON object)")
        return {}
    return content


def _read_config(folder: Path, missing: list[str]) -> dict[str, Any]:
    """`settings.json`; else `config.json`, unless that is the model's, which a saved model puts in the same place."""
    unread: list[str] = []
    config = _read_json(folder / "settings.json", "the configuration is unknown", unread)
    if not config:
        config = _read_json(folder / "config.json", "", [])
        config = {} if "model_type" in config else config
    missing += [] if config else unread
    return config


def _read_metrics(file: Path, missing: list[str]) -> Metrics:
    """The step log; lines a crash cut off are left out and counted."""
    lines = file.read_bytes().splitlines() if file.is_file() else []
    by_step: dict[int, Mapping[str, Any]] = {}
    unreadable = 0
    for line in lines:
        try:
            record = _mapping(json.loads(line))
        except ValueError:
            record = {}
        step = _integer(record.get("step"))
        if step is None:
            unreadable += bool(line.strip())
        else:
            by_step[step] = record
    if not by_step:
        missing.append("metrics.jsonl is not there or holds no step: no training curves")
    if unreadable:
        plural = "line" if unreadable == 1 else "lines"
        missing.append(f"metrics.jsonl: {unreadable} {plural} cut off or unreadable, left out")
    steps = sorted(by_step)
    names = dict.fromkeys(name for step in steps for name in by_step[step])
    columns = {
        name: np.array([_or_nan(number(by_step[step].get(name))) for step in steps], dtype=np.float64)
        for name in names
        if name != "step"
    }
    return Metrics(np.array(steps, dtype=np.int64), columns)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _read_evaluations(folder: Path, missing: list[str]) -> dict[str, Evaluation]:
    evaluations = []
    for file in sorted(folder.glob("*.json")):
        if content := _read_json(file, "", missing):
            evaluations.append(_evaluation(file.stem, content))
    names = {evaluation.name for evaluation in evaluations}
    for name, what in (("before", "the untrained model's score"), ("after", "the trained model's score")):
        if name not in names and not (folder / f"{name}.json").is_file():
            missing.append(f"evals/{name}.json is not there: {what} is unknown")
        elif not (folder / f"{name}.parquet").is_file():
            missing.append(f"evals/{name}.parquet is not there: no held-out examples from it")
    return {evaluation.name: evaluation for evaluation in sorted(evaluations, key=_by_step)}


def _by_step(evaluation: Evaluation) -> tuple[float, bool, str]:
    return (
        math.inf if evaluation.step is None else evaluation.step,
        evaluation.name != "before",
        evaluation.name,
    )


def _evaluation(name: str, content: Mapping[str, Any]) -> Evaluation:
    pass_at_k = _mapping(content.get("pass_at_k"))
    k, value = _integer(pass_at_k.get("k")), number(pass_at_k.get("value"))
    return Evaluation(
        name=name,
        step=_integer(content.get("step")),
        dataset=_text(content.get("dataset")),
        num_questions=_integer(content.get("num_questions")),
        accuracy=number(content.get("accuracy")),
        answered_rate=number(content.get("answered_rate")),
        answered_accuracy=number(content.get("answered_accuracy")),
        answered_accuracy_shuffled_images=number(content.get("answered_accuracy_shuffled_images")),
        chance=number(content.get("chance")),
        mean_length=number(content.get("mean_length")),
        reflection_rate=number(content.get("reflection_rate")),
        pass_at_k=None if k is None or value is None else (k, value),
        by_task={
            str(task): TaskScore(
                count=_integer(_mapping(row).get("count")),
                accuracy=number(_mapping(row).get("accuracy")),
                answered_accuracy=number(_mapping(row).get("answered_accuracy")),
                answered_rate=number(_mapping(row).get("answered_rate")),
                chance=number(_mapping(row).get("chance")),
            )
            for task, row in _mapping(content.get("accuracy_by_task")).items()
        },
    )


def _headline(run: Run) -> Headline:
    before, after = run.evaluations.get("before"), run.evaluations.get("after")

    def told(key: str) -> float | None:
        return number(run.summary.get(key))

    def scored(evaluation: Evaluation | None, name: str) -> float | None:
        return None if evaluation is None else getattr(evaluation, name)

    pass_k, pass_at_k = _pass_at_k(run)
    step_time = run.metrics.get("step_time")
    measured_wall = None if step_time is None else float(np.nansum(step_time))
    last_step = int(run.metrics.steps[-1]) if len(run.metrics.steps) else None
    return Headline(
        accuracy_before=first_known(told("accuracy_before"), scored(before, "accuracy")),
        accuracy_after=first_known(told("accuracy_after"), scored(after, "accuracy")),
        answered_rate_before=first_known(told("answered_rate_before"), scored(before, "answered_rate")),
        answered_rate_after=first_known(told("answered_rate_after"), scored(after, "answered_rate")),
        answered_accuracy_before=first_known(told("answered_accuracy_before"), scored(before, "answered_accuracy")),
        answered_accuracy_after=first_known(told("answered_accuracy_after"), scored(after, "answered_accuracy")),
        answered_accuracy_shuffled_images=first_known(
            told("answered_accuracy_shuffled_images"), scored(after, "answered_accuracy_shuffled_images")
        ),
        chance=first_known(told("chance"), scored(after, "chance"), scored(before, "chance")),
        pass_at_k_before=pass_at_k,
        pass_k=pass_k,
        mean_length_before=first_known(told("mean_length_before"), scored(before, "mean_length")),
        mean_length_after=first_known(told("mean_length_after"), scored(after, "mean_length")),
        num_questions=_integer(first_known(scored(after, "num_questions"), scored(before, "num_questions"))),
        steps=_integer(first_known(told("steps"), last_step)),
        wall_s=first_known(told("wall_s"), measured_wall),
        tokens_per_s=first_known(told("tokens_per_s"), _mean_tokens_per_s(run.metrics)),
        seed=_integer(first_known(run.summary.get("seed"), run.setting("seed"))),
    )


def _pass_at_k(run: Run) -> tuple[int | None, float | None]:
    """k and the untrained model's pass@k: `pass_at_<k>_before` of the summary, else what its evaluation says."""
    for key in run.summary:
        if (match := re.fullmatch(r"pass_at_(\d+)_before", key)) and number(run.summary[key]) is not None:
            return int(match[1]), number(run.summary[key])
    before = run.evaluations.get("before")
    return (before.pass_at_k if before else None) or (None, None)


def _mean_tokens_per_s(metrics: Metrics) -> float | None:
    """All tokens over all step time, from the steps that logged both."""
    step_time, rate = metrics.get("step_time"), metrics.get("tokens_per_second")
    if step_time is None or rate is None:
        return None
    both = np.isfinite(step_time) & np.isfinite(rate)
    seconds = float(step_time[both].sum())
    return float((rate * step_time)[both].sum()) / seconds if seconds > 0 else None
