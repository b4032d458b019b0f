"""Reads a run folder into typed records. Whatever is missing, cut off or broken becomes a note, never an error."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgrpo.evaluation.figures import Evaluation, integer, mapping, number
from fastgrpo.evaluation.summary import RunSummary
from fastgrpo.safe_text.redaction import redacted

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
    def headline(self) -> RunSummary:
        """`summary.json` first; what it lacks comes from the evaluations and the step log."""
        return RunSummary.read(self.summary).filled_from(self.of_files)

    @cached_property
    def of_files(self) -> RunSummary:
        """The figures from the evaluations and the step log alone."""
        seconds = self.metrics.get("step_time")
        train_s = None if seconds is None else float(np.nansum(seconds))
        return RunSummary.of(
            self.evaluations.get("before"),
            self.evaluations.get("after"),
            steps=int(self.metrics.steps[-1]) if len(self.metrics.steps) else None,
            wall_s=train_s,
            train_s=train_s,
            tokens_per_s=_mean_tokens_per_s(self.metrics),
            seed=integer(self.setting("seed")),
        )

    def setting(self, name: str) -> Any:
        """A configuration value by the last part of its key, or None."""
        found = (value for key, value in flatten(self.config).items() if key.rsplit(".", 1)[-1] == name)
        return next(found, None)


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
    if not files and not is_supervised(config):
        missing.append("completions/ is not there: no examples from training")
    evaluations = _read_evaluations(path / "evals", missing)
    summary = _read_json(path / "summary.json", "the run did not finish, or not yet", missing)
    if not (config or len(metrics.steps) or files or evaluations or summary):
        raise ValueError(
            f"run folder {str(path)!r} holds nothing to report on: "
            "expected settings.json, metrics.jsonl, completions/, evals/ or summary.json in it"
        )
    return Run(path, path.resolve().name, config, metrics, evaluations, summary, files, tuple(missing))


def is_supervised(config: Mapping[str, Any]) -> bool:
    """Whether the settings are those of `fastgrpo sft`, which draws no completions."""
    return "train_on_prompt" in config


def completion_files(path: Path) -> dict[int, Path]:
    """`completions/completions_00001.parquet`, … of a run folder by step, rising."""
    found = {}
    for file in (path / "completions").glob("completions_*.parquet"):
        if match := re.fullmatch(r"completions_(\d+)\.parquet", file.name):
            found[int(match[1])] = file
    return dict(sorted(found.items()))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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
    return redacted(config)  # a report is passed around


def _read_metrics(file: Path, missing: list[str]) -> Metrics:
    """The step log; lines a crash cut off are left out and counted."""
    lines = file.read_bytes().splitlines() if file.is_file() else []
    by_step: dict[int, Mapping[str, Any]] = {}
    unreadable = 0
    for line in lines:
        try:
            record = mapping(json.loads(line))
        except ValueError:
            record = {}
        step = integer(record.get("step"))
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
            evaluations.append(Evaluation.read(file.stem, content))
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


def _mean_tokens_per_s(metrics: Metrics) -> float | None:
    """All tokens over all step time, from the steps that logged both."""
    step_time, rate = metrics.get("step_time"), metrics.get("tokens_per_second")
    if step_time is None or rate is None:
        return None
    both = np.isfinite(step_time) & np.isfinite(rate)
    seconds = float(step_time[both].sum())
    return float((rate * step_time)[both].sum()) / seconds if seconds > 0 else None
