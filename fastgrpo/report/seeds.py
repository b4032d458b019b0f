"""Means over seeds, or over questions, with Student's 95 % interval and test."""

import math
import statistics
from dataclasses import dataclass
from functools import lru_cache

from fastgrpo.report.intervals import Interval


@dataclass(frozen=True)
class Mean:
    """Of independent values: a figure of each seed, or of each question."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def half_width(self) -> float:
        """Half of Student's 95 % interval of the mean; infinite for one value."""
        if self.n < 2:
            return math.inf
        return t_quantile(self.n - 1) * statistics.stdev(self.values) / math.sqrt(self.n)

    @property
    def interval(self) -> Interval | None:
        """Student's 95 % interval of the mean; None for one value."""
        half = self.half_width
        return None if math.isinf(half) else Interval(self.mean - half, self.mean + half)

    @property
    def p(self) -> float | None:
        """Of the two-sided one-sample t test that the mean is zero (of paired differences: the paired t test).

        None for one value, or where all values are equal.
        """
        if self.n < 2 or not (std := statistics.stdev(self.values)):
            return None
        return t_tail(abs(self.mean) / (std / math.sqrt(self.n)), self.n - 1)


def t_tail(t: float, df: int) -> float:
    """P(|T| > t) of Student's distribution with `df` degrees of freedom.

    Finite series for whole df: Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(df))
    cosine = math.cos(angle)
    if df % 2:
        total, term = 0.0, cosine
        for k in range(1, df - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        inside = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        total, term = 0.0, 1.0
        for k in range(0, df - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        inside = math.sin(angle) * total
    return max(1.0 - inside, 0.0)


@lru_cache
def t_quantile(df: int, tail: float = 0.05) -> float:
    """The t that |T| exceeds with probability `tail`."""
    low, high = 0.0, 1.0
    while t_tail(high, df) > tail:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > tail else (low, middle)
    return (low + high) / 2
