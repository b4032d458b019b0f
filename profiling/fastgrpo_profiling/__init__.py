"""Where the time goes: named spans, their traces, and how near a step comes to what the machine can do."""

from fastgrpo_profiling.span import SpanEvent, SpanRecorder, SpanTotal, record, span, unrecorded

__all__ = ["SpanEvent", "SpanRecorder", "SpanTotal", "record", "span", "unrecorded"]
