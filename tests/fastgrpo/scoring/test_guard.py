"""Reward functions that misbehave: each is told as what it is."""

import asyncio
import contextlib
import copy
import io
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
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


def returning(value: Any) -> Callable[..., Any]:
    return lambda **_: value() if isinstance(value, type(lambda: 0)) else value


def doing(act: Callable[..., Any]) -> Callable[..., Any]:
    """Acts, then returns what is expected of it."""

    def misbehaving(completions: list[str], **arguments: Any) -> list[float]:
        act(completions, arguments)
        return [0.0, 1.0]

    return misbehaving


def doing_later(act: Callable[..., Any]) -> Callable[..., Any]:
    async def misbehaving(completions: list[str], **arguments: Any) -> list[float]:
        act(completions, arguments)
        return [0.0, 1.0]

    return misbehaving


def exit_in_a_child(*_: Any) -> None:
    if (child := os.fork()) == 0:
        os._exit(7)
    assert os.waitpid(child, 0)[1] == 7 << 8


def come_back_from_a_fork(*_: Any) -> None:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 1 << 8, "it ended where the function returned"


def fail_in_a_thread(*_: Any) -> None:
    hook, threading.excepthook = threading.excepthook, lambda *_: None
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    threading.excepthook = hook


def recurse(*_: Any) -> None:
    recurse()


def go_into_a_folder_that_goes(*_: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)


class WordlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


class Unreadable(list):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        raise OSError("gone")


class NoNumber:
    def __float__(self) -> float:
        raise OSError("gone")


def later(value: Any) -> Any:
    async def misbehaving(**_: Any) -> Any:
        return value

    return misbehaving


def values() -> Any:
    yield 0.0
    yield 1.0


async def values_later() -> Any:
    yield 0.0


GIVES, NUMBER, LIST = [0.0, 1.0], "return a number, or None to abstain", "return a list of 2 numbers"
MISBEHAVIOURS: dict[str, tuple[Callable[..., Any], str | list[float | None]]] = {
    # What ends a process, or asks for it
    "exit": (raising(SystemExit()), r"called exit\(None\): raise an exception"),
    "exit 0": (raising(SystemExit(0)), r"called exit\(0\): raise an exception"),
    "exit with words": (raising(SystemExit("bye")), r"called exit\('bye'\): raise an exception"),
    "exit later": (raising_later(SystemExit(0)), r"called exit\(0\): raise an exception"),
    "interrupt": (raising(KeyboardInterrupt()), "raised KeyboardInterrupt, though nobody interrupted it"),
    "interrupt later": (raising_later(KeyboardInterrupt()), "raised KeyboardInterrupt, though nobody interrupted it"),
    "cancel": (raising(asyncio.CancelledError()), "was cancelled"),
    "cancel later": (raising_later(asyncio.CancelledError()), "was cancelled"),
    "cancel its own task": (doing_later(lambda *_: asyncio.current_task().cancel()), "was cancelled"),  # type: ignore[union-attr]
    "stop the event loop": (doing_later(lambda *_: asyncio.get_running_loop().stop()), GIVES),
    "close the event loop": (doing_later(lambda *_: asyncio.get_running_loop().close()), "RuntimeError: Cannot close"),
    "generator exit": (raising(GeneratorExit()), "raised GeneratorExit: : raise an Exception"),
    "a base exception": (raising(BaseException("x")), "raised BaseException: x: raise an Exception"),
    "a group with an interrupt": (raising(BaseExceptionGroup("g", [KeyboardInterrupt()])), "raised BaseExceptionGroup"),
    "exit in a child": (doing(exit_in_a_child), GIVES),
    "come back from a fork": (doing(come_back_from_a_fork), GIVES),
    # Errors
    "key": (raising(KeyError("x")), "failed on 2 completions: KeyError: 'x'"),
    "key later": (raising_later(KeyError("x")), "failed on 2 completions: KeyError: 'x'"),
    "a timeout of its own": (raising(TimeoutError("its own")), "failed on 2 completions: TimeoutError: its own"),
    "a later timeout of its own": (raising_later(TimeoutError("own")), "failed on 2 completions: TimeoutError: own"),
    "stop iteration": (raising(StopIteration()), "failed on 2 completions: StopIteration"),
    "stop iteration later": (raising_later(StopIteration()), "failed on 2 completions: RuntimeError"),
    "memory": (raising(MemoryError()), "failed on 2 completions: MemoryError"),
    "recursion": (doing(recurse), "failed on 2 completions: RecursionError"),
    "a group": (raising(ExceptionGroup("g", [KeyError(1)])), "failed on 2 completions: ExceptionGroup: g"),
    "an error without words": (raising(WordlessError()), "failed on 2 completions: WordlessError"),
    "an argument that is not there": (lambda absent, **_: GIVES, "TypeError: .*absent"),
    "too few arguments": (lambda: GIVES, "TypeError: .*unexpected keyword"),
    "a column that is not there": (doing(lambda _, arguments: arguments["absent"]), "KeyError: 'absent'"),
    # What it returns
    "nothing": (returning(None), f"returned NoneType: {LIST}"),
    "a scalar": (returning(1.0), f"returned float: {LIST}"),
    "a numpy scalar": (returning(np.float64(1.0)), f"returned float64: {LIST}"),
    "an array without axes": (returning(np.array(1.0)), f"returned ndarray: {LIST}"),
    "a tensor without axes": (returning(torch.tensor(1.0)), f"returned Tensor: {LIST}"),
    "a text": (returning("01"), f"returned str: {LIST}"),
    "bytes": (returning(b"01"), f"returned bytes: {LIST}"),
    "a dict": (returning({0: 0.0, 1: 1.0}), f"returned dict: {LIST}"),
    "a set": (returning({0.0, 1.0}), f"returned set: {LIST}"),
    "a generator": (returning(values), f"returned generator: {LIST}"),
    "an asynchronous generator": (returning(values_later), f"returned async_generator: {LIST}"),
    "a coroutine of a generator": (later(values()), f"returned generator: {LIST}"),
    "too few": (returning([1.0]), "returned 1 rewards for 2 completions"),
    "too many later": (later([1.0] * 3), "returned 3 rewards for 2 completions"),
    "none at all": (returning([]), "returned 0 rewards for 2 completions"),
    "an unreadable list": (returning(Unreadable(GIVES)), "returned Unreadable that cannot be read: OSError: gone"),
    "lists in a list": (returning([[0.0], [1.0]]), f"returned \\[0.0\\] for completion 0 of row 0: {NUMBER}"),
    "a column of an array": (returning(np.array([[0.0], [1.0]])), NUMBER),
    "words": (returning([0.0, "good"]), f"returned 'good' for completion 1 of row 0: {NUMBER}"),
    "digits": (returning([0.0, "1.0"]), f"returned '1.0' for completion 1 of row 0: {NUMBER}"),
    "a complex number": (returning([0.0, 1j]), f"returned 1j for completion 1 of row 0: {NUMBER}"),
    "no number": (returning([0.0, NoNumber()]), NUMBER),
    "nan": (returning([0.0, math.nan]), "returned nan for completion 1 .*--nan_rewards abstain"),
    "infinity": (returning([math.inf, 0.0]), "returned inf for completion 0"),
    "more than float32": (returning([0.0, 1e39]), r"returned 1e\+39 for completion 1"),
    "more than a float": (returning([0.0, 10**400]), NUMBER),
    "a mix with None": (returning([None, 1]), [None, 1.0]),
    "a tensor with a gradient": (returning(torch.tensor(GIVES, requires_grad=True)), GIVES),
    "an array of float16": (returning(np.array(GIVES, dtype=np.float16)), GIVES),
    "booleans": (returning((False, True)), GIVES),
    "fractions": (returning([Decimal(0), Fraction(1)]), GIVES),
    "a range": (returning(range(2)), GIVES),
    # What it does to its arguments: the next function sees them as they were
    "clear completions": (doing(lambda completions, _: completions.clear()), GIVES),
    "cut ids": (doing(lambda _, arguments: arguments["completion_ids"][0].clear()), GIVES),
    "turn a column round": (doing(lambda _, arguments: arguments["solution"].reverse()), GIVES),
    "rewrite a message": (doing(lambda _, arguments: arguments["prompts"][0][0].update(content="!")), GIVES),
    "append to a nested column": (doing(lambda _, arguments: arguments["options"][0]["all"].append("!")), GIVES),
    "count steps": (doing(lambda _, arguments: setattr(arguments["trainer_state"], "step", 9)), GIVES),
    # What it does to the process: put back
    "close standard error": (doing(lambda *_: sys.stderr.close()), "closed sys.stderr, or took it away: leave it open"),
    "close standard output": (doing(lambda *_: sys.stdout.close()), "closed sys.stdout, or took it away"),
    "take standard error away": (doing(lambda *_: setattr(sys, "stderr", None)), "closed sys.stderr"),
    "close standard error later": (doing_later(lambda *_: sys.stderr.close()), "closed sys.stderr"),
    "change the folder": (doing(lambda *_: os.chdir("/")), GIVES),
    "change the folder later": (doing_later(lambda *_: os.chdir("/")), GIVES),
    "go into a folder that goes": (doing(go_into_a_folder_that_goes), GIVES),
    "make warnings errors": (doing(lambda *_: warnings.simplefilter("error")), GIVES),
    "heed SIGTERM": (doing(lambda *_: signal.signal(signal.SIGTERM, signal.SIG_IGN)), GIVES),
    "heed SIGINT": (doing(lambda *_: signal.signal(signal.SIGINT, signal.SIG_IGN)), GIVES),
    "limit recursion": (doing(lambda *_: sys.setrecursionlimit(5000)), GIVES),
    "switch gradients off": (doing(lambda *_: torch.set_grad_enabled(False)), GIVES),
    "change the default dtype": (doing(lambda *_: torch.set_default_dtype(torch.float64)), GIVES),
    "set a variable": (doing(lambda *_: os.environ.update(OF_A_REWARD="1")), GIVES),
    "fail in a thread": (doing(fail_in_a_thread), GIVES),
}


def state_of_process() -> Any:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    torchs = torch.is_grad_enabled(), torch.get_default_dtype()
    return os.getcwd(), handlers, sys.getrecursionlimit(), list(warnings.filters), torchs, sys.stdout.closed


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_misbehaviours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.StringIO())
    monkeypatch.setenv("OF_A_REWARD", "0")
    function, outcome = MISBEHAVIOURS[name]
    seen: list[Any] = []

    def next_one(**arguments: Any) -> list[float]:
        seen.append(copy.deepcopy(arguments))
        return [1.0, 2.0]

    arguments = {
        "prompts": [[{"role": "user", "content": "?"}]] * 2, "completions": ["a", "b"], "completion_ids": [[1], [2, 3]],
        "solution": ["a", "b"], "options": [{"all": ["a"]}, {"all": ["b"]}],
        "trainer_state": types.SimpleNamespace(step=3),
    }  # fmt: skip
    expected, before = copy.deepcopy(arguments), state_of_process()
    if isinstance(outcome, str):
        with pytest.raises(ValueError, match=f"^reward function '[^']*' .*{outcome}"):
            call_functions([function, next_one], arguments, PLACES)
    else:
        rewards = call_functions([function, next_one], arguments, PLACES)
        given = [None if math.isnan(value) else value for value in rewards[:, 0].tolist()]
        assert (given, rewards[:, 1].tolist()) == (outcome, [1.0, 2.0])
        assert seen == [expected]
    assert arguments == expected
    assert state_of_process() == before
    assert not sys.stderr.closed
    assert call(doing_later(lambda *_: None)).tolist() == [[0.0], [1.0]], "the event loop lives on"


def test_numbers_that_are_not_finite_may_abstain() -> None:
    rewards = call_functions([returning([math.nan, 1.0])], {"completions": ["a", "b"]}, PLACES, "abstain")
    assert rewards.isnan().tolist() == [[True], [False]]


def test_a_change_that_is_put_back_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def changes_folder(**_: Any) -> list[float]:
        os.chdir("/")
        return [0.0, 0.0]

    for _ in range(2):
        call(changes_folder)
    assert caplog.messages == ["reward function 'changes_folder' changed the working directory: it is put back."]


@pytest.mark.parametrize("make", [raising, raising_later])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SystemExit(0), r"called exit\(0\): raise an exception"),
        (KeyboardInterrupt(), "raised KeyboardInterrupt, though nobody interrupted it"),
        (asyncio.CancelledError(), "was cancelled"),
        (KeyError("x"), "failed on 2 completions: KeyError: 'x'"),
    ],
)
def test_groups_in_threads(make: Callable[[BaseException], Any], error: BaseException, told: str) -> None:
    with pytest.raises(ValueError, match=f"reward function 'misbehaving' {told}"):
        call(per_group(make(error)))
    assert call(per_group(doing_later(lambda *_: None))).sum() == 1, "the event loop lives on"


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


def test_a_function_that_blocks_its_event_loop_is_ended() -> None:
    goes_on = threading.Event()

    async def blocking(**_: Any) -> Any:
        goes_on.wait()

    with pytest.raises(ValueError, match=r"reward function 'blocking' took longer than reward_timeout=0\.05 seconds"):
        call(blocking, timeout=0.05)
    goes_on.set()
    assert call(doing_later(lambda *_: None)).sum() == 1


def test_a_function_that_does_not_heed_the_end_of_its_time_is_told() -> None:
    def deaf(**_: Any) -> list[float]:
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        return [0.0, 1.0]

    with pytest.raises(ValueError, match=r"reward function 'deaf' took longer than reward_timeout=0\.05 seconds"):
        call(deaf, timeout=0.05)
