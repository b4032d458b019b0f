"""Named spans of time: `with span("rollout/decode"): ...`.

Outside of a `record()` block a span only opens an NVTX range, and nothing without a CUDA device, so spans can stay in
the code.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import torch

from fastgrpo_profiling.memory import MemoryProbe

try:
    import nvtx
except ImportError:
    nvtx = None
if not torch.cuda.is_available():
    nvtx = None  # its ranges mean something only to a profiler attached to a CUDA process


@dataclass
class SpanTotal:
    """Totals of all spans of one name."""

    count: int = 0
    seconds: float = 0.0
    """Inclusive of nested spans."""
    self_seconds: float = 0.0
    """Exclusive of nested spans."""
    peak_bytes: int = 0
    """Peak memory seen within them; 0 without a memory probe."""


@dataclass(frozen=True)
class SpanEvent:
    """One span on its recorder's time line."""

    name: str
    start: float
    """Seconds since the recorder began."""
    seconds: float
    depth: int
    """Spans open around it on its thread."""
    thread: int
    held_bytes: int | None = None
    """Memory held at its end."""


class SpanListener(Protocol):
    """Notified when spans open and close, on any thread."""

    def enter(self, name: str) -> None: ...
    def exit(self) -> None: ...


@dataclass
class _OpenSpan:
    name: str
    parent: "_OpenSpan | None"
    depth: int
    start: Any
    """A reading of the clock, or a CUDA event."""
    end: Any = None
    nested_seconds: float = 0.0
    peak_at_start: int = 0
    peak_bytes: int = 0
    held_bytes: int | None = None


@dataclass
class SpanRecorder:
    """Sums up spans by name, with and without nested spans.

    On a CUDA device, times come from events on the current stream, read when the `record` block ends, so nothing waits
    earlier. Elsewhere they are the host's. `totals` only hold spans of the thread that opened the block, since other
    threads take no time from the step; theirs are in `events`.

    Args:
        clock: the host's clock, in seconds.
        on_device: time with CUDA events.
        trace: keep every span in `events`.
        memory: read memory at the start and end of every span.
    """

    clock: Callable[[], float] = time.perf_counter
    on_device: bool = False
    trace: bool = False
    memory: MemoryProbe | None = None
    totals: dict[str, SpanTotal] = field(default_factory=dict)
    events: list[SpanEvent] = field(default_factory=list)
    _innermost: dict[int, _OpenSpan | None] = field(default_factory=dict)
    """By thread."""
    _closed: list[tuple[int, _OpenSpan]] = field(default_factory=list)
    """Spans whose CUDA events have not been read."""
    _thread: int = 0
    _origin: Any = None

    def begin(self) -> None:
        """Starts the time line; `record` calls it."""
        self._thread, self._origin = threading.get_ident(), self._now()

    def end(self) -> None:
        """Reads the remaining CUDA events; `record` calls it."""
        self._innermost.clear()  # a generator dropped half-way leaves its span open
        for last in dict(self._closed).values():  # of each thread, which may have a stream of its own
            last.end.synchronize()
        for thread, span in self._closed:
            self._add(thread, span)
        self._closed.clear()

    def enter(self, name: str) -> None:
        """Opens a span inside the thread's innermost open one."""
        thread = threading.get_ident()
        parent = self._innermost.get(thread)
        opened = _OpenSpan(name, parent, parent.depth + 1 if parent else 0, None)
        if self.memory is not None:
            opened.peak_at_start, opened.peak_bytes = self.memory.peak(), self.memory.now()
        self._innermost[thread] = opened
        opened.start = self._now()

    def exit(self) -> None:
        """Closes the thread's innermost open span."""
        end = self._now()
        thread = threading.get_ident()
        span = self._innermost.get(thread)
        if span is None:
            return  # opened before the block began
        span.end = end
        self._innermost[thread] = span.parent
        if self.memory is not None:
            self._note_memory(self.memory, span)
        if self.on_device:
            self._closed.append((thread, span))
        else:
            self._add(thread, span)

    def _now(self) -> Any:
        if not self.on_device:
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.on_device else end - start

    def _note_memory(self, memory: MemoryProbe, span: _OpenSpan) -> None:
        span.held_bytes, peak = memory.now(), memory.peak()
        # A peak that rose was reached inside this span; one that did not gives only an upper bound.
        span.peak_bytes = peak if peak > span.peak_at_start else max(span.peak_bytes, span.held_bytes)

    def _add(self, thread: int, span: _OpenSpan) -> None:
        """Children come before their parent."""
        seconds = self._between(span.start, span.end)
        if span.parent is not None:
            span.parent.nested_seconds += seconds
        if thread == self._thread:
            total = self.totals.setdefault(span.name, SpanTotal())
            total.count += 1
            total.seconds += seconds
            total.self_seconds += seconds - span.nested_seconds
            total.peak_bytes = max(total.peak_bytes, span.peak_bytes)
        if self.trace:
            start = self._between(self._origin, span.start)
            self.events.append(SpanEvent(span.name, start, seconds, span.depth, thread, span.held_bytes))


class _Off:
    """A span without recorders or listeners."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


class _Span:
    """A span with recorders or listeners."""

    __slots__ = ("listeners", "name")

    def __init__(self, name: str, listeners: tuple[SpanListener, ...]) -> None:
        self.name = name
        self.listeners = listeners

    def __enter__(self) -> None:
        if nvtx is not None:
            nvtx.push_range(self.name)
        for listener in self.listeners:
            listener.enter(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            for listener in self.listeners:
                listener.exit()
        finally:
            if nvtx is not None:
                nvtx.pop_range()


_OFF = _Off()
_listeners: tuple[SpanListener, ...] = ()


def span(name: str) -> AbstractContextManager[None]:
    """A span named by its path (`"rollout/decode"`), closed and counted even when its body raises."""
    return _Span(name, _listeners) if _listeners or nvtx is not None else _OFF


@contextmanager
def listen(listener: SpanListener) -> Iterator[None]:
    """Notifies `listener` of spans in this block. Blocks may end in any order."""
    global _listeners
    _listeners = (*_listeners, listener)
    try:
        yield
    finally:
        _listeners = tuple(other for other in _listeners if other is not listener)


@contextmanager
def record(recorder: SpanRecorder | None = None) -> Iterator[SpanRecorder]:
    """Collects every span of the block into `recorder`, by default a new one that times the current device.

    Every open block sees the span, and blocks may end in any order. Totals are complete when the block has ended.
    """
    recorder = recorder or SpanRecorder(on_device=torch.cuda.is_available())
    recorder.begin()
    try:
        with listen(recorder):
            yield recorder
    finally:
        recorder.end()


@contextmanager
def unrecorded() -> Iterator[None]:
    """Spans opened in this block are not recorded: a CUDA graph's capture would capture a recorder's events."""
    global _listeners
    outer, _listeners = _listeners, ()
    try:
        yield
    finally:
        _listeners = outer
