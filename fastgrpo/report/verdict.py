"""What the figures of a run say in words: did it learn to see, did reasoning emerge."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastgrpo.evaluation.summary import RunSummary
from fastgrpo.report.run import Floats, Metrics

PERCENT = "\N{NO-BREAK SPACE}%"
Tone = Literal["yes", "partly", "no", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """A judgement and the sentence that gives its figures."""

    tone: Tone
    label: str
    sentence: str


def judge_seeing(headline: RunSummary) -> Verdict:
    """Whether training taught the model to see, or only to answer in the asked form.

    Seeing means: accuracy among *answered* questions rises (so the rise is not one of form) and falls again when each
    question gets another question's picture (so it is not one of guessing from the words). A change counts when it
    exceeds two standard errors of the two proportions, taken as independent samples.
    """
    change = _answered_change(headline)
    if isinstance(change, Verdict):
        return change
    after, shuffled = headline.answered_accuracy_after, headline.answered_accuracy_shuffled_images
    assert after is not None, "a change has an end"
    rate = headline.answered_rate_after
    fall = None if shuffled is None else after - shuffled
    falls = (
        fall is not None and shuffled is not None and fall > _noise(after, rate, shuffled, rate, headline.num_questions)
    )
    if change.rise <= change.noise:
        return _no_gain(headline, change, falls)
    if shuffled is None or fall is None:
        rest = "; whether it looks at the pictures is open, since it was not evaluated with shuffled ones."
        return Verdict("unknown", "Better answers, cause unknown", change.text + rest)
    if not falls:
        rest = f" and stays at {percent(shuffled)} with shuffled pictures: the gain does not come from the pictures."
        return Verdict("no", "It learned to answer, not to see", change.text + rest)
    told = f"{change.text} and falls to {percent(shuffled)} with shuffled pictures: "
    if fall >= 0.5 * change.rise:
        return Verdict("yes", "It learned to see", told + "the gain comes from looking.")
    return Verdict("partly", "It learned to see in part", told + "most of the gain survives without the picture.")


@dataclass(frozen=True)
class _Change:
    """How far accuracy among answered questions rose."""

    rise: float
    noise: float
    text: str
    from_guessing: bool
    """Measured from chance, since the untrained model answered nothing."""


def _answered_change(headline: RunSummary) -> _Change | Verdict:
    """The change, or the verdict that there is none to judge."""
    before, after, chance = headline.answered_accuracy_before, headline.answered_accuracy_after, headline.chance
    rate_before, rate_after = headline.answered_rate_before, headline.answered_rate_after
    if after is None:
        return _not_known("after", rate_after)
    if before is None and rate_before == 0 and chance is not None:
        # A base model that never answers in the form has no answered accuracy; guessing is what to beat then.
        told = (
            "Before training no question was answered in the form asked for; "
            f"accuracy among those answered after it is {percent(after)} (chance {percent(chance)})"
        )
        return _Change(after - chance, _noise(chance, None, after, rate_after, headline.num_questions), told, True)
    if before is None:
        return _not_known("before", rate_before)
    told = f"Among answered questions, accuracy went from {percent(before)} to {percent(after)}"
    told += "" if chance is None else f" (chance {percent(chance)})"
    return _Change(after - before, _noise(before, rate_before, after, rate_after, headline.num_questions), told, False)


def _not_known(when: str, answered_rate: float | None) -> Verdict:
    lacking = f"There is no evaluation from {when} training to compare with."
    if answered_rate == 0:
        lacking = f"No question was answered in the form asked for {when} training, so there is nothing to compare."
    return Verdict("unknown", "Not known" if answered_rate == 0 else "Not known yet", lacking)


def _no_gain(headline: RunSummary, change: _Change, uses_pictures: bool) -> Verdict:
    """The answered accuracy did not rise; did the total?"""
    if change.rise < -change.noise and not change.from_guessing:
        return Verdict("no", "It sees less than before", f"{change.text}: training made its answers worse.")
    told = change.text + (", no better than guessing" if change.from_guessing else ", within noise")
    before, after = headline.accuracy_before, headline.accuracy_after
    already = " It does use the pictures, but did so before training." if uses_pictures else ""
    noise = _noise(before or 0.0, None, after or 0.0, None, headline.num_questions)
    if before is not None and after is not None and after - before > noise:
        total = f", while total accuracy rose from {percent(before)} to {percent(after)}"
        return Verdict(
            "no", "It learned the form, not to see", f"{told}{total}: it learned the form of an answer.{already}"
        )
    return Verdict("no", "It did not learn to see", f"{told}, and total accuracy did not rise either.{already}")


def _noise(a: float, rate_a: float | None, b: float, rate_b: float | None, questions: int | None) -> float:
    """Two standard errors of the difference of two proportions; 0.05 where the number of questions is unknown."""
    if not questions:
        return 0.05
    count_a = max(questions * (1.0 if rate_a is None else rate_a), 1.0)
    count_b = max(questions * (1.0 if rate_b is None else rate_b), 1.0)
    return 2 * math.sqrt(a * (1 - a) / count_a + b * (1 - b) / count_b)


@dataclass(frozen=True)
class Trend:
    """A metric's mean over the first and the last tenth of the steps."""

    first: float
    last: float
    noise: float
    """Two standard errors of the difference, from the spread from step to step."""

    @property
    def rose(self) -> bool:
        """Beyond noise, and by a tenth of where it began."""
        return self.last - self.first > max(self.noise, 0.1 * abs(self.first))

    @property
    def fell(self) -> bool:
        """Beyond noise, and by a tenth of where it began."""
        return self.first - self.last > max(self.noise, 0.1 * abs(self.first))


def trend(column: Floats | None) -> Trend | None:
    """First against last tenth of a column [S]; None when it has fewer than 20 finite values."""
    values = np.empty(0) if column is None else column[np.isfinite(column)]
    if len(values) < 20:
        return None
    size = len(values) // 10
    # Variance from successive differences: blind to the trend itself, and defined where a tenth is a single step.
    variance = float(np.mean(np.diff(values) ** 2)) / 2
    return Trend(float(values[:size].mean()), float(values[-size:].mean()), 2 * math.sqrt(2 * variance / size))


def judge_reasoning(metrics: Metrics) -> Verdict:
    """Whether reasoning emerged: longer responses, more reflective phrases, and more right answers, all three."""
    length = trend(metrics.get("completions/mean_length"))
    reflection = trend(metrics.get("reflection_rate"))
    accuracy_name = accuracy_metric(metrics)
    accuracy = trend(metrics.get(accuracy_name)) if accuracy_name else None
    if length is None or reflection is None:
        return Verdict(
            "unknown",
            "Too little to tell",
            "Fewer than 20 steps logged response length and reflective phrases.",
        )
    told = (
        f"From the first to the last tenth of training, responses went from {length.first:.0f} to {length.last:.0f} "
        f"tokens and those with a reflective phrase from {percent(reflection.first)} to {percent(reflection.last)}"
    )
    if accuracy is not None:
        told += f", while the accuracy reward went from {accuracy.first:.2f} to {accuracy.last:.2f}"
    clipped = trend(metrics.get("completions/clipped_ratio"))
    if length.rose and clipped is not None and clipped.last > 0.2:
        told += f" ({percent(clipped.last)} of the last ones were cut off at the limit)"
    if length.rose and reflection.rose:
        if accuracy is None or not accuracy.rose:
            return Verdict("partly", "Longer and more reflective, not more right", told + ".")
        return Verdict("yes", "Reasoning emerged", told + ".")
    if reflection.rose:
        return Verdict("partly", "More reflective, not longer", told + ".")
    if length.rose:
        return Verdict("no", "Longer, not more reflective", told + ": length without reflection is not reasoning.")
    if length.fell:
        return Verdict("no", "No reasoning emerged", told + ": responses became shorter and no more reflective.")
    return Verdict("no", "No reasoning emerged", told + ": neither changed beyond noise.")


def accuracy_metric(metrics: Metrics) -> str | None:
    """The name of the accuracy reward's column, or None."""
    names = (name for name in metrics.columns if name.startswith("rewards/") and name.endswith("/mean"))
    return next((name for name in names if "accuracy" in name), None)


def percent(fraction: float | None) -> str:
    """A fraction as "59.5 %" (with a no-break space), or "–" where it was not measured."""
    return "–" if fraction is None else f"{100 * fraction:.1f}{PERCENT}"
