"""Metrics of one or several runs lined up by step, smoothed and averaged."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fastgrpo.report.run import Floats, Run


@dataclass(frozen=True)
class Curve:
    """One metric over the steps of R runs."""

    steps: NDArray[np.int64]
    """[S], the union of the runs' steps."""
    values: Floats
    """[R, S]; NaN where a run has no such step or did not log it."""

    @property
    def mean(self) -> Floats:
        """[S], over the runs that have the step."""
        counts = np.isfinite(self.values).sum(0)
        return np.where(counts > 0, np.nansum(self.values, 0) / np.maximum(counts, 1), np.nan)

    @property
    def std(self) -> Floats:
        """[S], over runs, with Bessel's correction; NaN where fewer than two runs have the step."""
        counts = np.isfinite(self.values).sum(0)
        squares = np.nansum((self.values - self.mean) ** 2, 0)
        return np.where(counts > 1, np.sqrt(squares / np.maximum(counts - 1, 1)), np.nan)

    @property
    def least(self) -> Floats:
        """[S], of any run; NaN where no run has the step."""
        return self._reduced(np.fmin)

    @property
    def greatest(self) -> Floats:
        """[S], of any run; NaN where no run has the step."""
        return self._reduced(np.fmax)

    def _reduced(self, pick: np.ufunc) -> Floats:
        found: Floats = pick.reduce(self.values, axis=0)
        return found

    @property
    def shared(self) -> NDArray[np.bool_]:
        """[S], the steps of every run that logged the metric at all: where a mean over runs has no jumps."""
        known = np.isfinite(self.values)
        return np.all(known[known.any(1)], axis=0, keepdims=True)[0]

    @property
    def smooth(self) -> "Curve":
        """Each run's rolling mean over a twentieth of its steps, centred."""
        window = max(1, self.values.shape[1] // 20)
        return Curve(self.steps, np.stack([rolling_mean(row, window) for row in self.values]))


def curve(runs: Sequence[Run], metric: str) -> Curve | None:
    """A metric of all runs, or None when no run logged it."""
    columns = [run.metrics.get(metric) for run in runs]
    if all(column is None for column in columns):
        return None
    steps = np.unique(np.concatenate([run.metrics.steps for run in runs]))
    values = np.full((len(runs), len(steps)), np.nan)
    for row, run, column in zip(values, runs, columns, strict=True):
        if column is not None:
            row[np.searchsorted(steps, run.metrics.steps)] = column
    return Curve(steps, values)


def rolling_mean(values: Floats, window: int) -> Floats:
    """Mean of the finite values within the window around each place; shorter windows at the ends. [S] -> [S]"""
    known = np.isfinite(values)
    ones = np.ones(window)
    sums = np.convolve(np.where(known, values, 0.0), ones, mode="full")
    counts = np.convolve(known.astype(float), ones, mode="full")
    start = (window - 1) // 2
    part = slice(start, start + len(values))
    return np.where(known, sums[part] / np.maximum(counts[part], 1), np.nan)


@dataclass(frozen=True)
class TimeShares:
    """Where the steps' time went, averaged over runs and over bins of neighbouring steps."""

    edges: Floats
    """[B + 1] step numbers between bins."""
    seconds: dict[str, Floats]
    """[B] mean seconds a step by span, largest first, and "other": step time that no span covers."""


def enclosing_spans(name: str, names: Collection[str]) -> list[str]:
    """Those of `names` that a span lies in, outermost first: "a" and "a/b" for "a/b/c"."""
    parts = name.split("/")
    outer = ("/".join(parts[:i]) for i in range(1, len(parts)))
    return [path for path in outer if path in names]


def time_shares(runs: Sequence[Run], max_bins: int = 60) -> TimeShares | None:
    """The outermost `time/<span>` metrics and the rest of the step; None when no span was logged."""
    logged = dict.fromkeys(name for run in runs for name in run.metrics.columns if name.startswith("time/"))
    spans = [name.removeprefix("time/") for name in logged]
    means = {
        name: np.nan_to_num(found.mean)
        for name in spans
        if not enclosing_spans(name, spans) and (found := curve(runs, f"time/{name}")) is not None
    }
    if not means:
        return None
    step_time = curve(runs, "step_time")
    covered = np.sum(list(means.values()), axis=0)
    if step_time is not None:
        means["other"] = np.maximum(np.nan_to_num(step_time.mean) - covered, 0.0)
    steps = np.unique(np.concatenate([run.metrics.steps for run in runs]))
    bins = np.array_split(np.arange(len(steps)), min(max_bins, len(steps)))
    middles = [(steps[left[-1]] + steps[right[0]]) / 2 for left, right in pairwise(bins)]
    binned = {name: np.array([values[part].mean() for part in bins]) for name, values in means.items()}
    order = sorted(binned, key=lambda name: (name == "other", -binned[name].sum()))
    edges = np.array([steps[0] - 0.5, *middles, steps[-1] + 0.5])
    return TimeShares(edges, {name: binned[name] for name in order})
