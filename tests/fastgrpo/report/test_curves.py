"""Curves over several runs: alignment, mean and spread, time shares."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastgrpo.report.charts import curves, response_length, reward, time_spent
from fastgrpo.report.curves import curve, enclosing_spans, rolling_mean, time_shares
from fastgrpo.report.plots import SERIES
from fastgrpo.report.run import Metrics, Run


def run(steps: list[int], **columns: list[float]) -> Run:
    named = {name.replace("__", "/"): np.array(values, dtype=float) for name, values in columns.items()}
    return Run(Path("."), "run", {}, Metrics(np.array(steps), named), {}, {}, {})


def test_runs_are_lined_up_by_step() -> None:
    found = curve([run([1, 2, 3], reward=[1, 2, 3]), run([2, 3, 4], reward=[4, np.nan, 9])], "reward")
    assert found is not None
    assert found.steps.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(found.mean, [1, 3, 3, 9])
    np.testing.assert_allclose(found.std, [np.nan, np.std([2, 4], ddof=1), np.nan, np.nan])
    assert found.shared.tolist() == [False, True, False, False]
    assert curve([run([1], kl=[np.nan])], "kl") is None


def test_a_run_without_the_metric_does_not_count() -> None:
    found = curve([run([1, 2], kl=[1, 2]), run([1, 2], reward=[0, 0])], "kl")
    assert found is not None
    np.testing.assert_allclose(found.mean, [1, 2])
    assert found.shared.all()


def test_the_band_of_lengths_is_what_was_logged() -> None:
    spiky = [5.0, 90.0, 4.0] * 20
    logged = run(list(range(1, 61)), completions__max_length=spiky)
    found = curve([logged, run([1, 2, 3], completions__max_length=[7, 8, np.nan])], "completions/max_length")
    assert found is not None
    np.testing.assert_allclose(found.greatest, [7, 90, 4, *spiky[3:]])
    np.testing.assert_allclose(found.least, [5, 8, 4, *spiky[3:]])
    lengths = {"completions__mean_length": [10.0] * 60, "completions__min_length": [2.0] * 60}
    chart = response_length([run(list(range(1, 61)), completions__max_length=spiky, **lengths)])
    assert chart is not None
    # It reaches each step's longest: twenty peaks of one height.
    heights = [float(y) for y in re.findall(r"L [\d.]+ (-?[\d.]+)", band_of(chart.svg))]
    top = min(heights)
    assert sum(height == pytest.approx(top, abs=0.01) for height in heights) == 20


def band_of(svg: str) -> str:
    """The path of the first filled area."""
    found = re.search(r'id="[^"]*FillBetween[^"]*".*?<path [^>]*d="([^"]*)"', svg, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_rolling_mean(window: int) -> None:
    values = np.array([1.0, np.nan, 3.0, 7.0, 2.0, 2.0])
    left, right = window // 2, window - window // 2 - 1
    windows = [values[max(0, i - left) : i + right + 1] for i in range(6)]
    expected = [np.nan if np.isnan(part).all() else np.nanmean(part) for part in windows]
    expected[1] = np.nan
    np.testing.assert_allclose(rolling_mean(values, window), expected)


def test_time_shares_count_no_span_twice() -> None:
    logged = run(
        [1, 2], step_time=[4, 6], time__rollout=[2, 2], time__rollout__generate=[1, 1], time__update__forward=[1, 2]
    )
    shares = time_shares([logged])
    assert shares is not None
    assert list(shares.seconds) == ["rollout", "update/forward", "other"]
    np.testing.assert_allclose(shares.seconds["other"], [1, 2])
    np.testing.assert_allclose(shares.edges, [0.5, 1.5, 2.5])
    assert time_shares([run([1], step_time=[1])]) is None


def test_small_spans_are_drawn_as_one() -> None:
    spans = {"time__rollout": [9, 9], "time__log": [0.05, 0.05], "time__update__clip": [0.04, 0.04]}
    chart = time_spent([run([1, 2], step_time=[10, 10], **spans)])
    assert chart is not None
    assert "rollout 90 %, small spans 1 %, other 9 %." in chart.svg
    one = time_spent([run([1, 2], step_time=[10, 10], time__rollout=[9, 9], time__log=[0.05, 0.05])])
    assert one is not None
    assert "log 0 %" in one.svg


def test_spans_beyond_the_colours_are_drawn_as_one() -> None:
    spans = {f"time__part{i}": [9 - i, 9 - i] for i in range(len(SERIES) + 1)}
    chart = time_spent([run([1, 2], step_time=[50, 50], **spans)])
    assert chart is not None
    assert "part6 6 %, small spans 4 %, other 12 %." in chart.svg


def test_the_loss_is_drawn_of_supervised_runs_alone() -> None:
    supervised = replace(run([1, 2], loss=[3, 2]), config={"train_on_prompt": False})
    assert [chart.name for chart in curves([supervised])] == ["loss"]
    assert curves([run([1, 2], loss=[3, 2])]) == []


def test_a_long_name_is_cut_in_a_legend() -> None:
    name = "reward" * 30
    chart = reward([run([1, 2], reward=[1, 2], **{f"rewards__{name}__mean": [1, 2]})])
    assert chart is not None
    assert f">{name[:44]}…<" in chart.svg


def test_enclosing_spans() -> None:
    names = ["a", "a/b/c", "a/b/c/d", "ab"]
    assert enclosing_spans("a/b/c/d", names) == ["a", "a/b/c"]
    assert enclosing_spans("ab", names) == []
