"""Costs in words: exponents, turning points, and what they are told as; and that a step can be measured."""

import json
import sys
from pathlib import Path

import bench_scaling
import pytest
from scaling_fit import Axis, doubling, exponent, growth, ranks_sentence, sentence, turning_point

VALUES = (2, 4, 8, 16, 32)


def axis(*seconds: float, **phases: tuple[float, ...]) -> Axis:
    return Axis("G", "completions of a prompt", VALUES, seconds, phases)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_that_power(power):
    assert exponent(VALUES, [3 * value**power for value in VALUES]) == pytest.approx(power, abs=1e-9)


def test_what_is_shared_stops_paying_where_doublings_cost_double():
    shared = axis(*(10 + value for value in (1, 2, 40, 90, 190)))
    assert doubling(shared, 2) == pytest.approx(2.0)
    assert turning_point(shared) == 4
    assert "It stops scaling at G = 4" in sentence(shared)


def test_one_late_cheap_doubling_means_it_still_scales():
    late = axis(1, 2, 4, 8, 9)
    assert turning_point(late) is None
    assert "It still scales at G = 32" in sentence(late)


@pytest.mark.parametrize(
    ("slope", "told"), [(0.1, "hardly at all"), (0.5, "as G^0.50"), (1.0, "in proportion"), (1.6, "as G^1.60")]
)
def test_exponents_in_words(slope, told):
    assert growth(slope, "G") == told


def test_phases_are_told_apart_and_negligible_ones_left_out():
    told = sentence(axis(2, 4, 8, 16, 32, prefill=(1,) * 5, decode=(1, 2, 4, 8, 16), sync=(0.01,) * 5))
    assert "16 times as many take 16 times as long" in told
    assert "prefill hardly at all; decode in proportion" in told
    assert "sync" not in told


def test_ranks_name_what_is_not_divided():
    told = ranks_sentence(
        {1: 4.0, 2: 2.5}, {1: {"decode": 3.0, "optimizer": 1.0}, 2: {"decode": 1.5, "optimizer": 1.0}}
    )
    assert "1.60 times as fast, 80% of the ideal" in told
    assert told.endswith("Not divided: optimizer.")


def run(out: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict:
    monkeypatch.setattr(
        sys, "argv", ["bench_scaling.py", "--device", "cpu", "--rounds", "1", "--out", str(out), *flags]
    )
    assert bench_scaling.main() == 0
    return json.loads(out.read_text())


def test_an_axis_is_measured_and_drawn(monkeypatch, tmp_path):
    record = run(tmp_path / "scaling.json", monkeypatch, "--only", "pictures", "--points", "2")
    figures = record["figures"]["pictures"]
    assert figures["values"] == [1.0, 2.0]
    assert all(seconds > 0 for seconds in figures["seconds"])
    assert figures["phases"].keys() >= {"vision", "prefill", "decode", "sync", "reference", "forward", "backward"}
    assert record["checks"] == {"pictures: sampler and update agree": True}
    assert len(record["figures"]["sentences"]) == 1
    assert (tmp_path / "scaling.png").stat().st_size > 1000


@pytest.mark.slow
def test_two_ranks_do_the_same_step(monkeypatch, tmp_path):
    record = run(tmp_path / "scaling.json", monkeypatch, "--only", "ranks")
    assert record["checks"] == {"ranks: the same loss": True}
    assert set(record["figures"]["ranks"]["seconds"]) == {"1", "2"}
