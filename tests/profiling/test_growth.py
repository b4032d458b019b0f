import pytest
from fastgrpo_profiling.compare import StepRecord
from fastgrpo_profiling.growth import WHOLE, Growth, exponents


def steps(decode: float, vision: float, sync: float = 0.0) -> list[StepRecord]:
    """Three steps around these seconds, the median among them."""
    return [
        StepRecord(
            (decode + vision + sync) * noise,
            1,
            0.0,
            0,
            {"rollout/decode": decode * noise, "rollout/vision": vision * noise, "rollout/sync": sync * noise},
        )
        for noise in (0.9, 1.0, 1.5)
    ]


def test_a_phase_that_doubles_has_exponent_one_and_one_that_stays_has_zero():
    found = exponents(steps(1.0, 2.0), steps(2.0, 2.0))
    assert found == {"decode": pytest.approx(1), "vision": pytest.approx(0), WHOLE: pytest.approx(0.415, abs=1e-3)}


def test_what_is_next_to_nothing_is_left_out():
    assert "sync" in exponents(steps(1.0, 2.0, 0.5), steps(2.0, 2.0, 1.0))
    assert "sync" not in exponents(steps(1.0, 2.0, 0.5), steps(2.0, 2.0, 0.01))
    assert "sync" not in exponents(steps(1.0, 2.0), steps(2.0, 2.0, 1.0))


def test_sides_grow_apart():
    both = Growth.of("4 to 8", {"a": steps(1, 1), "b": steps(1, 1)}, {"a": steps(2, 1), "b": steps(4, 1)})
    assert both.exponents["a"]["decode"] == pytest.approx(1)
    assert both.exponents["b"]["decode"] == pytest.approx(2)
    assert both.rows == ["vision", "decode", WHOLE]
