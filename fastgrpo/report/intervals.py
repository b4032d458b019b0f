"""95 % intervals of proportions, and of the difference of two."""

import math
from dataclasses import dataclass

from fastgrpo.report.formats import percent, points

Z = 1.959964
"""Of a normal distribution, 95 % lies within so many standard deviations."""


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`."""

    low: float
    high: float


@dataclass(frozen=True)
class Proportion:
    """A share of `n` questions."""

    value: float
    n: int

    @classmethod
    def known(cls, value: float | None, n: int | None) -> "Proportion | None":
        """None where value or n is not known, or n is 0."""
        return None if value is None or not n else cls(value, n)

    @property
    def interval(self) -> Interval:
        """Wilson's score interval: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209."""
        p, n = self.value, self.n
        middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(max(p * (1 - p), 0.0) / n + Z**2 / (4 * n**2))
        return Interval(max(middle - half, 0.0), min(middle + half, 1.0))

    @property
    def text(self) -> str:
        """Like "59.5 % (55.0 to 63.9, n = 400)"."""
        return f"{percent(self.value)} ({self.interval_text}, n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{self.n:,})"

    @property
    def interval_text(self) -> str:
        """Like "55.0 to 63.9", in percent."""
        return f"{100 * self.interval.low:.1f} to {100 * self.interval.high:.1f}"


@dataclass(frozen=True)
class Difference:
    """Of two proportions, or of one and a known value."""

    value: float
    interval: Interval

    @property
    def is_rise(self) -> bool:
        """The whole interval is above zero."""
        return self.interval.low > 0

    @property
    def is_fall(self) -> bool:
        """The whole interval is below zero."""
        return self.interval.high < 0

    @property
    def text(self) -> str:
        """Like "+12.3 points, 95 % interval +5.1 to +19.2"."""
        low, high = points(self.interval.low), points(self.interval.high)
        return f"{points(self.value)} points, 95\N{NO-BREAK SPACE}% interval {low} to {high}"


def difference(a: Proportion | float, b: Proportion | float) -> Difference:
    """b − a, the two taken as independent samples; a number is a known value.

    Newcombe's hybrid score interval: R. G. Newcombe, Stat. Med. 17 (1998) 873, method 10. Two evaluations share their
    questions, which makes the true interval narrower, seldom wider.
    """
    (p, p_range), (q, q_range) = _value_and_interval(a), _value_and_interval(b)
    rise = q - p
    low = rise - math.hypot(q - q_range.low, p_range.high - p)
    high = rise + math.hypot(q_range.high - q, p - p_range.low)
    return Difference(rise, Interval(low, high))


def _value_and_interval(given: Proportion | float) -> tuple[float, Interval]:
    return (given.value, given.interval) if isinstance(given, Proportion) else (given, Interval(given, given))
