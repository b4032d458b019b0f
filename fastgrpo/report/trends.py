"""What the step log says in words: did responses grow longer, more reflective, and more often right."""

import math
from dataclasses import dataclass

import numpy as np

from fastgrpo.report.formats import PERCENT, percent, signed
from fastgrpo.report.intervals import Interval, Z
from fastgrpo.report.run import Floats, Metrics
from fastgrpo.report.verdict import Verdict

MIN_STEPS = 20
"""Logged steps below which no trend is judged."""

NOT_REASONING = (
    "that the model reasons. A response counts as reflective by its words alone, also where training only spread a "
    "habit of phrase."
)


@dataclass(frozen=True)
class Trend:
    """A metric's mean over the first and the last tenth of the steps."""

    first: float
    last: float
    half_width: float
    """Half the 95 % interval of the difference, from the spread from step to step."""
    steps: int
    """Of each tenth."""

    @property
    def interval(self) -> Interval:
        """95 %, of last − first."""
        change = self.last - self.first
        return Interval(change - self.half_width, change + self.half_width)

    @property
    def rose(self) -> bool:
        """Beyond the interval, and by a tenth of where it began."""
        return self.last - self.first > max(self.half_width, 0.1 * abs(self.first))

    @property
    def fell(self) -> bool:
        """Beyond the interval, and by a tenth of where it began."""
        return self.first - self.last > max(self.half_width, 0.1 * abs(self.first))

    def change(self, *, scale: float = 1.0, digits: int = 1, unit: str = "") -> str:
        """Like "(+9.1, 8.0 to 10.2 tokens)"."""
        low, high = (signed(scale * end, digits) for end in (self.interval.low, self.interval.high))
        return f"({signed(scale * (self.last - self.first), digits)}{unit}, 95{PERCENT} interval {low} to {high})"


def trend(column: Floats | None) -> Trend | None:
    """First against last tenth of a column [S]; None when it has fewer than `MIN_STEPS` finite values."""
    values = np.empty(0) if column is None else column[np.isfinite(column)]
    if len(values) < MIN_STEPS:
        return None
    size = len(values) // 10
    # Variance from successive differences: blind to the trend itself, and defined where a tenth is a single step.
    variance = float(np.mean(np.diff(values) ** 2)) / 2
    half_width = Z * math.sqrt(2 * variance / size)
    return Trend(float(values[:size].mean()), float(values[-size:].mean()), half_width, size)


def judge_responses(metrics: Metrics) -> Verdict:
    """Whether responses grew longer, more reflective and more often right over training: all three, or which."""
    length = trend(metrics.get("completions/mean_length"))
    reflection = trend(metrics.get("reflection_rate"))
    accuracy_name = accuracy_metric(metrics)
    accuracy = trend(metrics.get(accuracy_name)) if accuracy_name else None
    if not {"completions/mean_length", "reflection_rate"} <= metrics.columns.keys():
        return Verdict("unknown", "Not measured", "No step logged response length and reflective phrases.")
    if length is None or reflection is None:
        told = f"Fewer than {MIN_STEPS} steps logged response length and reflective phrases."
        return Verdict("unknown", "Not enough steps", told)
    steps = "step" if length.steps == 1 else f"{length.steps} steps"
    told = (
        f"From the first to the last {steps} of training, responses went from {length.first:.0f} to {length.last:.0f} "
        f"tokens {length.change()} and those with a reflective phrase from {percent(reflection.first)} to "
        f"{percent(reflection.last)} {reflection.change(scale=100, unit=' points')}"
    )
    if accuracy is not None:
        told += f", the accuracy reward from {accuracy.first:.2f} to {accuracy.last:.2f} {accuracy.change(digits=2)}"
    clipped = trend(metrics.get("completions/clipped_ratio"))
    if length.rose and clipped is not None and clipped.last > 0.2:
        told += f"; {percent(clipped.last)} of the last ones were cut off at the limit"
    told += "."
    better, worse = (trend(metrics.get(f"self_correction/{kind}")) for kind in ("wrong_to_right", "right_to_wrong"))
    if better is not None and worse is not None:
        told += (
            f" Answers that differ from the option proposed first went from {percent(better.first)} to "
            f"{percent(better.last)} for the better {better.change(scale=100, unit=' points')}, from "
            f"{percent(worse.first)} to {percent(worse.last)} for the worse."
        )
    if length.rose and reflection.rose:
        if accuracy is None:
            return Verdict("partly", "Longer and more reflective; no accuracy reward to tell more", told, NOT_REASONING)
        if not accuracy.rose:
            return Verdict("partly", "Longer and more reflective, not clearly more often right", told, NOT_REASONING)
        if better is not None and not better.rose:
            label = "Longer, more reflective, more often right; no clear rise in self-correction"
            return Verdict("partly", label, told, NOT_REASONING)
        return Verdict("yes", "Longer, more reflective, and more often right", told, NOT_REASONING)
    if reflection.rose:
        return Verdict("partly", "More reflective, not clearly longer", told, NOT_REASONING)
    if length.rose:
        return Verdict("no", "Longer, not clearly more reflective", told)
    if length.fell:
        return Verdict("no", "Shorter, and not clearly more reflective", told)
    return Verdict("no", "Neither clearly longer nor clearly more reflective", told)


def accuracy_metric(metrics: Metrics) -> str | None:
    """The name of the accuracy reward's column, or None."""
    names = (name for name in metrics.columns if name.startswith("rewards/") and name.endswith("/mean"))
    return next((name for name in names if "accuracy" in name), None)
