import pytest
from fastgrpo_profiling import SpanRecorder, record, span


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


def test_an_inner_block_records_alone_and_gives_the_outer_one_back(clock):
    with record(SpanRecorder(clock)) as outer:
        with record(SpanRecorder(clock)) as inner, span("a"):
            clock.now += 1
        with span("b"):
            clock.now += 1
    assert set(outer.totals) == {"b"}
    assert set(inner.totals) == {"a"}
