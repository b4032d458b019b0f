import json
import random

import pytest
from fastgrpo_profiling import SpanEvent, SpanRecorder, record, span
from fastgrpo_profiling.trace import chrome_trace, problems, write_trace


def random_spans(rng: random.Random, depth: int = 0) -> None:
    for _ in range(rng.randint(0, 3)):
        with span(f"depth {depth}"):
            if depth < 4:
                random_spans(rng, depth + 1)


def test_a_recorded_trace_nests_and_has_no_negative_times(tmp_path):
    rng = random.Random(0)
    with record(SpanRecorder(trace=True)) as recorder, span("step"):
        for _ in range(20):
            random_spans(rng)
    path = tmp_path / "folder" / "trace.json"
    write_trace(path, {"ours": recorder.events, "theirs": recorder.events})
    trace = json.loads(path.read_text())
    assert problems(trace) == []
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == 2 * len(recorder.events) > 100
    assert {event["pid"] for event in spans} == {1, 2}
    assert [e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"] == ["ours", "theirs"]


def test_times_are_microseconds_and_memory_is_a_counter():
    events = [SpanEvent("child", 0.25, 0.5, 1, 7, 3 << 20), SpanEvent("parent", 0.0, 1.0, 0, 7)]
    trace = chrome_trace({"ours": events})["traceEvents"]
    spans = {event["name"]: (event["ts"], event["dur"]) for event in trace if event["ph"] == "X"}
    assert spans == {"parent": (0, 1e6), "child": (250_000, 500_000)}
    assert [(e["ts"], e["args"]) for e in trace if e["ph"] == "C"] == [(750_000, {"MiB": 3.0})]


def test_threads_have_rows_of_their_own():
    events = [SpanEvent("a", 0.0, 1.0, 0, 7), SpanEvent("b", 0.5, 1.0, 0, 8)]
    trace = chrome_trace({"ours": events})
    assert problems(trace) == []
    assert len({event["tid"] for event in trace["traceEvents"] if event["ph"] == "X"}) == 2


def test_a_device_clock_that_reads_backwards_is_drawn_as_nothing():
    trace = chrome_trace({"ours": [SpanEvent("a", -1e-9, -2e-9, 0, 7)]})
    assert problems(trace) == []


def test_problems_are_found():
    crossing = [SpanEvent("a", 0.0, 1.0, 0, 7), SpanEvent("b", 0.5, 1.0, 1, 7)]
    assert problems(chrome_trace({"ours": crossing})) == ["b outlasts a, in which it began"]
    backwards = {"ph": "X", "name": "a", "ts": 0, "dur": -1, "pid": 1, "tid": 1}
    less_than_nothing = {"ph": "C", "name": "memory", "ts": 0, "args": {"MiB": float("nan")}, "pid": 1, "tid": 0}
    assert problems({"traceEvents": [backwards, less_than_nothing]}) == [
        "process 1 has no name",
        "counter memory has a negative time or amount",
        "a has a negative time",
    ]


def test_a_trace_is_json_that_every_viewer_reads(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_trace(tmp_path / "trace.json", {"ours": [SpanEvent("a", 0.0, 1.0, 0, 7, float("inf"))]})
