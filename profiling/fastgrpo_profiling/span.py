"""Named spans of time: `with span("rollout/decode"): ...`.

Outside a `record()` block a span only opens an NVTX range, and without the nvtx package it does nothing at all, so
spans stay in the code for good. Times are host times: they do not synchronise a device.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

try:
    import nvtx
except ImportError:
    nvtx = None


@dataclass
class SpanTotal:
    """What all spans of one name add up to."""

    count: int = 0
    seconds: float = 0.0
    """Inclusive of nested spans."""
    self_seconds: float = 0.0
    """Exclusive of nested spans."""


@dataclass
class SpanRecorder:
    """Sums spans by name, nested spans known to their parent."""

    clock: Callable[[], float] = time.perf_counter
    totals: dict[str, SpanTotal] = field(default_factory=dict)
    _nested_seconds: list[float] = field(default_factory=list)
    """One entry for each open span: the time its closed children took."""

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self._nested_seconds.append(0.0)
        start = self.clock()
        try:
            yield
        finally:
            seconds = self.clock() - start
            nested = self._nested_seconds.pop()
            if self._nested_seconds:
                self._nested_seconds[-1] += seconds
            total = self.totals.setdefault(name, SpanTotal())
            total.count += 1
            total.seconds += seconds
            total.self_seconds += seconds - nested


_OFF: AbstractContextManager[None] = nullcontext()
# NVTX ranges mean something only to a profiler attached to a CUDA process.
_NVTX = nvtx is not None and torch.cuda.is_available()
_recorder: SpanRecorder | None = None


def span(name: str) -> AbstractContextManager[None]:
    """A span named by its path (`"rollout/decode"`), closed and counted even when its body raises."""
    if _recorder is None:
        return nvtx.annotate(name) if _NVTX else _OFF
    return _annotated(_recorder, name) if _NVTX else _recorder.span(name)


@contextmanager
def _annotated(recorder: SpanRecorder, name: str) -> Iterator[None]:
    with nvtx.annotate(name), recorder.span(name):
        yield


@contextmanager
def record(recorder: SpanRecorder | None = None) -> Iterator[SpanRecorder]:
    """Collects every span of the block into `recorder` (a new one by default). Blocks nest: the inner one records."""
    global _recorder
    outer, _recorder = _recorder, recorder or SpanRecorder()
    try:
        yield _recorder
    finally:
        _recorder = outer
