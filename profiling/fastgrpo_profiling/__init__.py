"""Where the time goes: named spans, on the host clock and as NVTX ranges."""

from fastgrpo_profiling.span import SpanRecorder, SpanTotal, record, span

__all__ = ["SpanRecorder", "SpanTotal", "record", "span"]
