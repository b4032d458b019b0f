"""The figures at the top of the page: of one run with their intervals, or of several with mean and spread."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from fastgrpo.evaluation.summary import RunSummary
from fastgrpo.report.formats import NBSP, PERCENT, count, duration
from fastgrpo.report.intervals import Proportion
from fastgrpo.report.run import Run
from fastgrpo.report.verdict import Answered

Form = Callable[[float | None], str]
_NO_FIGURES = ("torch", "environment", "by_task")


@dataclass(frozen=True)
class Spread:
    """One figure over the runs that measured it."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """With Bessel's correction; None below two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, form: Form) -> str:
        """The mean, with ± one standard deviation over several runs."""
        if not self.std:
            return form(self.mean)
        return f"{form(self.mean).removesuffix(PERCENT)} ± {form(self.std)}"


def spreads(runs: Sequence[Run]) -> dict[str, Spread]:
    """Every figure of the runs' summaries by name."""
    return {f.name: spread(runs, f.name) for f in fields(RunSummary) if f.name not in _NO_FIGURES}


def spread(runs: Sequence[Run], figure: str) -> Spread:
    """A figure over runs."""
    found = (getattr(run.headline, figure) for run in runs)
    return Spread(tuple(float(value) for value in found if value is not None))


def certainty(runs: Sequence[Run]) -> dict[str, str]:
    """What stands below a figure: 95 % intervals and n of one run; how many runs and questions of several."""
    head = runs[0].headline
    if len(runs) > 1:
        asked = sorted({run.headline.num_questions for run in runs if run.headline.num_questions is not None})
        questions = f" on {' or '.join(f'{n:,}' for n in asked)} questions each" if asked else ""
        told = f"Mean ± standard deviation of {len(runs)} runs{questions}."
        return dict.fromkeys(("accuracy", "answered", "shuffled", "pass_at_k"), told)
    n, answered = head.num_questions, Answered.of(head)
    before, after = (Proportion.known(value, n) for value in (head.accuracy_before, head.accuracy_after))
    return {
        "accuracy": _interval_text(before, after),
        "answered": _interval_text(answered.before, answered.after),
        "shuffled": _interval_text(answered.shuffled),
        "pass_at_k": _interval_text(Proportion.known(head.pass_at_k_before, n)),
    }


def _interval_text(*proportions: Proportion | None) -> str:
    known = [one for one in proportions if one is not None]
    if not known:
        return ""
    sizes = dict.fromkeys(f"{one.n:,}" for one in known)
    intervals = " → ".join(one.interval_text for one in known)
    return f"95{PERCENT} interval{'s' * (len(known) > 1)} {intervals}; n{NBSP}={NBSP}{f'{NBSP}→{NBSP}'.join(sizes)}."


def pass_name(runs: Sequence[Run]) -> str:
    """pass@8 for k = 8."""
    ks = {run.headline.pass_k for run in runs if run.headline.pass_k is not None}
    return f"pass@{ks.pop()}" if len(ks) == 1 else "pass@k"


def title(runs: Sequence[Run]) -> str:
    """The models' names."""
    models = dict.fromkeys(_short_name(run.setting("model_name_or_path") or run.setting("model")) for run in runs)
    return " · ".join(name for name in models if name) or runs[0].name


def _short_name(name: object) -> str:
    """A model's or data set's name; of a local path the last part."""
    if not isinstance(name, str):
        return ""
    return Path(name).name if Path(name).is_absolute() or name.startswith(".") else name


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The lines under the title: what was run, on what, with what, and how long it took."""
    heads = [run.headline for run in runs]
    seeds = ", ".join(str(head.seed) for head in heads if head.seed is not None)
    skipped = [np.nanmax(column) for run in runs if (column := run.metrics.get("skipped_rows")) is not None]
    found = [
        ("runs", str(len(runs)) if len(runs) > 1 else ""),
        ("dataset", _short_name(runs[0].setting("dataset_name"))),
        ("steps", spread(runs, "steps").text(count)),
        ("wall time", spread(runs, "wall_s").text(duration)),
        ("tokens / s", spread(runs, "tokens_per_s").text(count)),
        ("seed" if len(runs) == 1 else "seeds", seeds or "–"),
        ("completions per prompt", str(runs[0].setting("num_generations") or "")),
        ("rows skipped", count(sum(skipped)) if sum(skipped) else ""),
        ("hardware", _of_runs(runs, "hardware")),
        ("date", _of_runs(runs, "date")),
        ("commit", _of_runs(runs, "commit")),
        ("versions", ", ".join(versions_of(runs))),
    ]
    return [(name, value) for name, value in found if value]


def versions_of(runs: Sequence[Run]) -> list[str]:
    """Like "torch 2.13.0"."""
    named = dict.fromkeys(name for run in runs for name in run.headline.environment)
    return [_of_runs(runs, name, label=True) for name in named if name not in ("date", "commit", "hardware")]


def _of_runs(runs: Sequence[Run], name: str, *, label: bool = False) -> str:
    """An entry of the runs' environments; each that occurs."""
    values = dict.fromkeys(run.headline.environment.get(name, "") for run in runs)
    told = " and ".join(value for value in values if value)
    return f"{name} {told}" if label else told
