"""Intervals of proportions against published values."""

import pytest

from fastgrpo.report.intervals import Proportion, difference


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # R. G. Newcombe, Stat. Med. 17 (1998) 857, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson(right: int, n: int, low: float, high: float) -> None:
    found = Proportion(right / n, n).interval
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize(
    ("a", "m", "b", "n", "low", "high"),
    [
        # R. G. Newcombe, Stat. Med. 17 (1998) 873, table II, method 10.
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (10, 10, 0, 10, 0.6075, 1.0),
    ],
)
def test_difference(a: int, m: int, b: int, n: int, low: float, high: float) -> None:
    found = difference(Proportion(b / n, n), Proportion(a / m, m))
    assert found.value == pytest.approx(a / m - b / n)
    assert (found.interval.low, found.interval.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert found.is_rise
    assert not found.is_fall


def test_difference_from_a_known_value() -> None:
    after = Proportion(0.6, 100)
    found = difference(0.5, after)
    assert found.interval.low == pytest.approx(after.interval.low - 0.5)
    assert found.interval.high == pytest.approx(after.interval.high - 0.5)


def test_what_was_not_measured_has_no_interval() -> None:
    assert Proportion.known(None, 10) is None
    assert Proportion.known(0.5, None) is None
    assert Proportion.known(0.5, 0) is None
