import mmap
import sys
import threading

import pytest
import torch
from fastgrpo_profiling import SpanRecorder, record, span, unrecorded
from fastgrpo_profiling.memory import MemoryProbe, peak_resident_bytes, resident_bytes

MODULE = sys.modules["fastgrpo_profiling.span"]


class FakeClock:
    """Time passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def raise_after(seconds: float, clock: FakeClock) -> None:
    clock.now += seconds
    raise RuntimeError


@pytest.fixture
def clock():
    return FakeClock()


def test_nested_spans_split_inclusive_and_own_time(clock):
    with record(SpanRecorder(clock)) as recorder, span("step"):
        clock.now += 1
        for _ in range(2):
            with span("step/decode"):
                clock.now += 2
        clock.now += 1
    step, decode = recorder.totals["step"], recorder.totals["step/decode"]
    assert (step.count, step.seconds, step.self_seconds) == (1, 6, 2)
    assert (decode.count, decode.seconds, decode.self_seconds) == (2, 4, 4)


def test_a_raising_body_is_still_counted_and_leaves_the_stack_balanced(clock):
    with record(SpanRecorder(clock)) as recorder:
        with pytest.raises(RuntimeError), span("outer"), span("inner"):
            raise_after(3, clock)
        with span("after"):
            clock.now += 1
    assert recorder.totals["outer"].self_seconds == 0
    assert recorder.totals["inner"].seconds == 3
    assert recorder.totals["after"].self_seconds == 1


def test_outside_a_record_block_nothing_is_kept(clock):
    with record(SpanRecorder(clock)) as recorder:
        pass
    with span("late"):
        clock.now += 1
    assert recorder.totals == {}


def test_unrecorded_spans_are_their_parents_time(clock):
    with record(SpanRecorder(clock)) as recorder, span("decode"):
        with pytest.raises(RuntimeError), unrecorded(), span("sample"):
            raise_after(2, clock)
        with span("check"):
            clock.now += 1
    assert recorder.totals["decode"].self_seconds == 2
    assert set(recorder.totals) == {"decode", "check"}


def test_every_open_block_sees_the_span(clock):
    with record(SpanRecorder(clock)) as outer:
        with record(SpanRecorder(clock)) as inner, span("a"):
            clock.now += 1
        with span("b"):
            clock.now += 1
    assert set(outer.totals) == {"a", "b"}
    assert set(inner.totals) == {"a"}


def test_blocks_may_end_in_any_order(clock):
    first, second = record(SpanRecorder(clock)), record(SpanRecorder(clock))
    outer = first.__enter__()
    with span("both"):
        inner = second.__enter__()
    first.__exit__(None, None, None)
    with span("later"):
        clock.now += 1
    second.__exit__(None, None, None)
    with span("after"):
        pass
    assert set(outer.totals) == {"both"}
    assert set(inner.totals) == {"later"}


class FakeNvtx:
    """Notes the ranges that are open, and every call."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.calls: list[str] = []

    def push_range(self, name: str) -> None:
        self.open.append(name)
        self.calls.append(f"push {name}")

    def pop_range(self) -> None:
        self.calls.append(f"pop {self.open.pop()}")


@pytest.fixture
def nvtx(monkeypatch):
    fake = FakeNvtx()
    monkeypatch.setattr(MODULE, "nvtx", fake)
    return fake


def test_nvtx_ranges_open_without_a_recorder_and_nest(nvtx):
    with span("a"), span("b"):
        assert nvtx.open == ["a", "b"]
    assert nvtx.calls == ["push a", "push b", "pop b", "pop a"]


@pytest.mark.parametrize("recording", [False, True])
def test_nvtx_ranges_balance_when_bodies_raise(nvtx, clock, recording):
    def fail() -> None:
        with span("outer"):
            with pytest.raises(RuntimeError), span("inner"):
                raise_after(1, clock)
            with span("second"):
                raise_after(1, clock)

    if recording:
        with record(SpanRecorder(clock)) as recorder, pytest.raises(RuntimeError):
            fail()
        assert recorder.totals["outer"].seconds == 2
    else:
        with pytest.raises(RuntimeError):
            fail()
    assert nvtx.open == []
    assert len(nvtx.calls) == 6


def test_nvtx_ranges_close_even_if_a_recorder_fails(nvtx):
    def broken_clock() -> float:
        if "push b" in nvtx.calls:
            raise RuntimeError
        return 0.0

    with record(SpanRecorder(broken_clock)), pytest.raises(RuntimeError), span("a"):
        nvtx.calls.append("push b")
    assert nvtx.open == []


class FakeEvent:
    """A CUDA event that can be read only after someone waited."""

    now = 0.0
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = FakeEvent.now

    def synchronize(self) -> None:
        FakeEvent.waits += 1

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert FakeEvent.waits, "read before the device was waited for"
        return 1e3 * (end.time - self.time)


def test_device_times_are_read_once_when_the_block_ends(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "now", 0.0)
    monkeypatch.setattr(FakeEvent, "waits", 0)
    with record(SpanRecorder(on_device=True, trace=True)) as recorder:
        with span("step"):
            FakeEvent.now += 1
            for _ in range(3):
                with span("decode"):
                    FakeEvent.now += 2
        assert FakeEvent.waits == 0
        assert recorder.totals == {}
    assert FakeEvent.waits == 1
    step, decode = recorder.totals["step"], recorder.totals["decode"]
    assert (step.seconds, step.self_seconds, decode.count, decode.seconds) == (7, 1, 3, 6)
    assert [(e.name, e.start, e.depth) for e in recorder.events] == [
        ("decode", 1, 1), ("decode", 3, 1), ("decode", 5, 1), ("step", 0, 0),
    ]  # fmt: skip


def test_events_are_kept_only_when_a_trace_is_asked_for(clock):
    with record(SpanRecorder(clock)) as plain, record(SpanRecorder(clock, trace=True)) as traced:
        with span("a"):
            clock.now += 1
        with span("b"):
            clock.now += 2
    assert plain.events == []
    assert [(e.name, e.start, e.seconds, e.depth) for e in traced.events] == [("a", 0, 1, 0), ("b", 1, 2, 0)]
    assert traced.events[0].held_bytes is None


def test_another_thread_shows_in_the_trace_and_takes_no_time_from_the_step(clock):
    def work() -> None:
        with span("reward"):
            clock.now += 5

    with record(SpanRecorder(clock, trace=True)) as recorder, span("step"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert set(recorder.totals) == {"step"}
    assert recorder.totals["step"].self_seconds == 5
    reward, step = recorder.events
    assert (reward.name, reward.depth, step.depth) == ("reward", 0, 0)
    assert reward.thread != step.thread


def test_a_span_open_since_before_the_block_is_left_out(clock):
    with span("outer"), record(SpanRecorder(clock)) as recorder, span("inner"):
        clock.now += 1
    assert set(recorder.totals) == {"inner"}


class FakeProbe(MemoryProbe):
    """Memory that is what the test says."""

    held, most = 0, 0

    def now(self) -> int:
        return FakeProbe.held

    def peak(self) -> int:
        return FakeProbe.most


def test_a_high_water_mark_belongs_to_the_span_that_set_it(clock, monkeypatch):
    def hold(now: int, peak: int) -> None:
        monkeypatch.setattr(FakeProbe, "held", now)
        monkeypatch.setattr(FakeProbe, "most", peak)

    hold(10, 50)
    with record(SpanRecorder(clock, trace=True, memory=FakeProbe("cpu"))) as recorder:
        with span("below"):
            hold(30, 50)
        with span("above"):
            hold(20, 90)
    assert recorder.totals["below"].peak_bytes == 30
    assert recorder.totals["above"].peak_bytes == 90
    assert [event.held_bytes for event in recorder.events] == [30, 20]


def test_resident_memory_grows_with_what_is_held():
    before, size = resident_bytes(), 32 << 20
    with mmap.mmap(-1, size) as held:  # fresh pages: the heap may have as much at hand
        held.write(b"1" * size)
        assert resident_bytes() - before > size // 2
    assert peak_resident_bytes() >= resident_bytes() - (1 << 20)
