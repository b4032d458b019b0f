"""Writes spans as a trace for Perfetto (ui.perfetto.dev) and chrome://tracing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgrpo_profiling.span import SpanEvent

Trace = dict[str, Any]
"""The Trace Event Format's JSON object."""


def chrome_trace(sides: Mapping[str, Sequence[SpanEvent]]) -> Trace:
    """Each side's events as one process, on a common time line; memory as a counter track.

    Times are whole nanoseconds, written in microseconds as the format requires. Spans end no later than their parent.
    """
    events: list[dict[str, Any]] = []
    for pid, (side, spans) in enumerate(sides.items(), start=1):
        events.append({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": side}})
        threads = {thread: tid for tid, thread in enumerate(dict.fromkeys(s.thread for s in spans), start=1)}
        for span in sorted(spans, key=lambda s: (s.start, s.depth)):
            start = round(max(span.start, 0.0) * 1e9)
            end = max(start, round((span.start + span.seconds) * 1e9))
            place = {"pid": pid, "tid": threads[span.thread]}
            events.append({"name": span.name, "ph": "X", "ts": start / 1e3, "dur": (end - start) / 1e3, **place})
            if span.held_bytes is not None:
                held = {"MiB": round(span.held_bytes / 2**20, 1)}
                events.append({"name": "memory", "ph": "C", "ts": end / 1e3, "args": held, "pid": pid, "tid": 0})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(path: Path, sides: Mapping[str, Sequence[SpanEvent]]) -> None:
    """Writes `chrome_trace` of the sides to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(chrome_trace(sides), allow_nan=False) + "\n")


def problems(trace: Trace) -> list[str]:
    """What a viewer would draw wrongly: negative times, overlapping spans of a thread that are not nested, negative
    counters, processes without a name."""
    found = []
    named = {event["pid"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    found += [f"process {pid} has no name" for pid in sorted({e["pid"] for e in trace["traceEvents"]} - named)]
    for event in trace["traceEvents"]:
        if event["ph"] == "C" and not (event["ts"] >= 0 and all(amount >= 0 for amount in event["args"].values())):
            found.append(f"counter {event['name']} has a negative time or amount")
    by_thread: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] != "X":
            continue
        start, length = round(event["ts"] * 1e3), round(event["dur"] * 1e3)  # [ns]
        if start < 0 or length < 0:
            found.append(f"{event['name']} has a negative time")
        by_thread.setdefault((event["pid"], event["tid"]), []).append((start, start + length, event["name"]))
    for spans in by_thread.values():
        around: list[tuple[int, int, str]] = []
        for start, end, name in sorted(spans, key=lambda s: (s[0], -s[1])):
            while around and around[-1][1] <= start:
                around.pop()
            if around and end > around[-1][1]:
                found.append(f"{name} outlasts {around[-1][2]}, in which it began")
            around.append((start, end, name))
    return found
