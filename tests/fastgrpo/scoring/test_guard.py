"""Reward functions that misbehave: each is told as what it is."""

import asyncio
import io
import logging
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastgrpo.rewards import per_group
from fastgrpo.scoring.guard import Watch
from fastgrpo.scoring.rewards import call_functions

PLACES = [(0, 0), (0, 1)]


def call(function: Callable[..., Any], timeout: float | None = None) -> torch.Tensor:
    arguments = {"completions": ["a", "b"], "log_extra": None, "log_metric": None}
    return call_functions([function], arguments, PLACES, timeout=timeout)


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def raising(error: BaseException) -> Callable[..., Any]:
    def misbehaving(**_: Any) -> Any:
        raise error

    return misbehaving


def raising_later(error: BaseException) -> Callable[..., Any]:
    async def misbehaving(**_: Any) -> Any:
        await asyncio.sleep(0)
        raise error

    return misbehaving


@pytest.mark.parametrize("marked", [as_it_is, per_group])
@pytest.mark.parametrize("make", [raising, raising_later])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SystemExit(), r"called exit\(None\): raise an exception"),
        (SystemExit(0), r"called exit\(0\): raise an exception"),
        (KeyboardInterrupt(), "raised KeyboardInterrupt, though nobody interrupted it"),
        (asyncio.CancelledError(), "was cancelled"),
        (KeyError("x"), "failed on 2 completions: KeyError: 'x'"),
        (TimeoutError("its own"), "failed on 2 completions: TimeoutError: its own"),
    ],
)
def test_what_ends_a_process_does_not_end_the_run_unsaid(
    make: Callable[[BaseException], Any], error: BaseException, told: str, marked: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=f"reward function 'misbehaving' {told}"):
        call(marked(make(error)))

    async def fine(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    assert call(marked(fine)).tolist() == [[1.0], [1.0]], "the event loop lives on"


def test_the_users_own_interrupt_stays_one() -> None:
    def interrupted() -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), Watch("f").calling():
        interrupted()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background
    with Watch("f").calling():
        interrupted()
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("marked", [as_it_is, per_group])
def test_a_function_that_takes_too_long_is_ended(marked: Callable[..., Any]) -> None:
    never = threading.Event()

    def hanging(**_: Any) -> Any:
        never.wait()

    async def waiting(**_: Any) -> Any:
        await asyncio.Event().wait()

    for function in (hanging, waiting):
        told = f"reward function '{function.__name__}' took longer than reward_timeout=0.05 seconds"
        with pytest.raises(ValueError, match=told):
            call(marked(function), timeout=0.05)
    never.set()  # a thread cannot be ended
    assert call(marked(lambda completions, **_: [1.0] * len(completions)), timeout=60).sum() == 2


def test_a_hang_is_told_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    told = threading.Event()

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.set()

    logger = logging.getLogger("fastgrpo.scoring.guard")
    handler = Heard()
    logger.addHandler(handler)
    try:
        with Watch("slow", tell_every=0.01).calling():
            assert told.wait(30)
    finally:
        logger.removeHandler(handler)
    assert "reward function 'slow' has been running for" in caplog.text


def test_standard_error_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def closing(completions: list[str], **_: Any) -> list[float]:
        sys.stderr.close()
        return [0.0] * len(completions)

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(ValueError, match="closed or replaced standard error"):
        call(closing)
    assert not sys.stderr.closed


def test_what_a_function_does_to_its_arguments_is_its_own() -> None:
    seen = []

    def spoiling(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.append(([*completions], [[*ids] for ids in completion_ids]))
        completions.clear()
        completion_ids[0].clear()
        completion_ids.reverse()
        return [0.0, 0.0]

    arguments = {"completions": ["a", "b"], "completion_ids": [[1], [2, 3]]}
    call_functions([spoiling, spoiling], arguments, PLACES)
    assert seen == [(["a", "b"], [[1], [2, 3]])] * 2
