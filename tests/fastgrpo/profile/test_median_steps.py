"""The bars and the table of the median step add up."""

from fastgrpo_profiling.compare import Comparison, StepRecord
from fastgrpo_profiling.report import profile_report
from fastgrpo_profiling.roofline import Ceilings

from fastgrpo.profile.median_steps import MedianSteps, add_up, median_steps
from fastgrpo.profile.page import render_page


def steps(*seconds: float) -> list[StepRecord]:
    shares = {"data": 0.0333, "rollout/decode": 0.3333, "update/forward": 0.1111, "update/backward": 0.4444}
    return [StepRecord(s, 8, 0.0, 0, {name: share * s for name, share in shares.items()}) for s in seconds]


def found(ours: list[StepRecord], plain: list[StepRecord]) -> MedianSteps:
    return median_steps(report(ours, plain))


def report(ours: list[StepRecord], plain: list[StepRecord]):
    comparison = Comparison({"ours": ours, "plain": plain}, {})
    return profile_report(comparison, {"ours": 0, "plain": 0}, None, Ceilings(1e9, 1e9, "float32"), {}, 1e-7, {})


def test_phases_and_total_are_of_one_step() -> None:
    # The median of four steps, 2.5 s, is nobody's time; the lower of the two in the middle took 2 s.
    median = found(steps(1.0, 2.0, 3.0, 4.0), steps(*4 * [7.0]))
    assert median.sides == ("ours", "plain")
    assert median.totals == ("2,000.0", "7,000.0")
    for side, total in enumerate((2000.0, 7000.0)):
        shown = [float(row.cells[side].text.replace(",", "")) for row in median.rows if row.cells[side]]
        assert round(sum(shown), 6) == total
        assert abs(sum(row.cells[side].share for row in median.rows if row.cells[side]) - 1) < 1e-9


def test_labels_add_up_where_rounding_each_would_not() -> None:
    assert add_up([0.4, 0.4, 0.4]) == [1, 0, 0]
    assert add_up([1.5, 2.5, 3.0]) == [2, 2, 3]
    assert add_up([2.0, 0.0]) == [2, 0]
    assert add_up([]) == []


def test_the_page_shows_the_total_that_its_phases_add_up_to() -> None:
    ours, plain = steps(1.0, 2.0, 3.0, 4.0), steps(7.0, 7.0, 7.0, 7.0)
    page = render_page(report(ours, plain), {"ours": [], "plain": []}, {"ours": [1.0], "plain": [7.0]})
    assert '<div class="total">2,000.0 ms</div>' in page
    assert "2,500" not in page
    assert "ours: 2,000.0 ms, of which data 66.6 ms, decode 666.6 ms" in page
