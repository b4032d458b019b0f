"""Student's interval and test, against published tables and values computed by hand."""

import math

import numpy as np
import pytest

from fastgrpo.report.arm_charts import band_half_width
from fastgrpo.report.curves import Curve
from fastgrpo.report.seeds import Mean, t_quantile, t_tail

TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 29: 2.0452, 399: 1.9659}
"""Two-sided 5 % points of Student's t, as in any table of it."""


@pytest.mark.parametrize("df", TABLE)
def test_quantile(df):
    assert t_quantile(df) == pytest.approx(TABLE[df], abs=1e-4)
    assert t_tail(TABLE[df], df) == pytest.approx(0.05, abs=1e-5)


def test_paired_test_by_hand():
    """Differences 1, 2, 3, 4: mean 2.5, standard error 0.6455, t = 3.873 on 3 degrees of freedom."""
    found = Mean((1.0, 2.0, 3.0, 4.0))
    assert found.interval.low == pytest.approx(2.5 - 3.18245 * 0.645497, abs=1e-4)
    assert found.interval.high == pytest.approx(2.5 + 3.18245 * 0.645497, abs=1e-4)
    assert found.p == pytest.approx(0.030466, abs=1e-6)  # scipy.stats.ttest_1samp
    assert Mean((0.01, -0.02, 0.04)).p == pytest.approx(0.622036, abs=1e-6)  # t = 1 / √3, 2 degrees


def test_one_value_has_no_interval():
    assert Mean((0.5,)).interval is None
    assert Mean((0.5,)).p is None
    assert math.isinf(Mean((0.5,)).half_width)


def test_equal_values_have_an_interval_of_no_width():
    assert Mean((0.5, 0.5)).interval.low == Mean((0.5, 0.5)).interval.high == 0.5


def test_band_is_the_interval_at_each_step_of_the_runs_that_have_it():
    values = np.array([[1.0, 1.0, 5.0], [2.0, 3.0, np.nan], [3.0, np.nan, np.nan]])
    half = band_half_width(Curve(np.arange(3), values))
    assert half[0] == pytest.approx(4.3027 * 1.0 / math.sqrt(3), abs=1e-4)
    assert half[1] == pytest.approx(12.7062 * math.sqrt(2) / math.sqrt(2), abs=1e-4)
    assert np.isnan(half[2])
