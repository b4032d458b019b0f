"""Calls of reward functions, and those of `per_group` functions in threads of their own."""

import asyncio
import copy
import inspect
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import cache, partial
from typing import Any

from fastgrpo.scoring.guard import Watch, awaited, described, process_kept, waited

RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]

AT_ONCE = 16
"""Calls of `per_group` functions under way; further ones wait."""


def reward_name(function: RewardFunction) -> str:
    """The name under which a reward function is logged: its own, or its class's."""
    wrapped = inspect.unwrap(getattr(function, "func", function))
    name: str = getattr(function, "__name__", "") or getattr(wrapped, "__name__", type(wrapped).__name__)
    return name


def call(
    function: RewardFunction,
    arguments: Mapping[str, Any],
    timeout: float | None,
    give_up: Callable[[ValueError], None] | None = None,
) -> Any:
    """What a function returns, under guard; of an asynchronous one, what is to be awaited. `give_up`: see `Watch`.

    Raises:
        ValueError: it raised, ended the process, or took longer than `timeout`.
    """
    own = {name: _copied(value) for name, value in arguments.items()}
    own |= {name: copy.copy(value) for name, value in arguments.items() if name == "trainer_state"}
    with Watch(reward_name(function), timeout, give_up=give_up).calling():
        try:
            return function(**own)
        except Exception as error:
            raise _failure(function, error, len(arguments["completions"])) from error


def _copied(value: Any) -> Any:
    """Lists and records of its own for each function, whatever it does with them."""
    if type(value) is dict:
        return {name: _copied(one) for name, one in value.items()}
    return [_copied(one) if type(one) in (list, dict) else one for one in value] if type(value) is list else value


def await_all(pending: Sequence[tuple[RewardFunction, Any]], count: int, timeout: float | None) -> list[Any]:
    """What asynchronous functions give, which run together."""

    async def finish_all() -> list[Any]:
        return await asyncio.gather(
            *(
                awaited(result, Watch(reward_name(function), timeout), partial(_failure, function, count=count))
                for function, result in pending
            )
        )

    names = ", ".join(reward_name(function) for function, _ in pending)
    with process_kept(names):
        return waited(asyncio.run_coroutine_threadsafe(finish_all(), event_loop()), names, timeout)


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the whole process, on its own thread: clients that functions keep stay usable between calls, and it
    works where a loop is running already, as in a notebook."""
    loop = asyncio.new_event_loop()

    def serve() -> None:
        while True:  # a function may stop it
            loop.run_forever()

    threading.Thread(target=serve, name="reward-functions", daemon=True).start()
    return loop


def _failure(function: RewardFunction, error: Exception, count: int) -> ValueError:
    return ValueError(f"reward function {reward_name(function)!r} failed on {count} completions: {described(error)}")


class GroupCall:
    """A `per_group` function's call on one group, in a thread of its own. What it logs is kept until all have ended."""

    _room = threading.BoundedSemaphore(AT_ONCE)

    def __init__(self, function: RewardFunction, arguments: Mapping[str, Any], timeout: float | None) -> None:
        self.count = len(arguments["completions"])
        self.metrics: dict[str, float] = {}
        self.columns: dict[str, list[Any]] = {}
        self._future: Future[Any] = Future()
        logging_here = {"log_extra": self._log_extra, "log_metric": self._log_metric}
        run = partial(self._run, function, {**arguments, **logging_here}, timeout)
        # Not a pool's: the end of the process would wait for one that hangs.
        threading.Thread(target=run, name="reward-group", daemon=True).start()

    def result(self) -> Any:
        """What the function returned; raises what `call` does."""
        return self._future.result()

    def _run(self, function: RewardFunction, arguments: Mapping[str, Any], timeout: float | None) -> None:
        self._room.acquire()
        try:
            result = call(function, arguments, timeout, self._fail)
            if inspect.isawaitable(result):
                (result,) = await_all([(function, result)], self.count, timeout)
            self._settle(self._future.set_result, result)
        except BaseException as error:  # `result` raises it, in the thread that waits
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._settle(self._future.set_exception, error)

    def _settle(self, settle: Callable[[Any], None], outcome: Any) -> None:
        with suppress(InvalidStateError):  # it had been given up
            settle(outcome)
            self._room.release()

    def _log_extra(self, name: str, values: Any) -> None:
        column = values.tolist() if hasattr(values, "tolist") else list(values)
        if len(column) != self.count:
            raise ValueError(f"log_extra({name!r}, …) was given {len(column)} values: give one each.")
        self.columns[name] = column

    def _log_metric(self, name: str, value: Any) -> None:
        self.metrics[name] = float(value)


def results_of(
    calls: Sequence[GroupCall], log_extra: Callable[..., None], log_metric: Callable[..., None]
) -> list[Any]:
    """What one function said of each group, in the groups' order; the first of its failures is raised.

    Its columns are joined, None where it logged none for a group; a metric is the mean of the groups'.
    """
    results = [one.result() for one in calls]
    for name in dict.fromkeys(name for one in calls for name in one.columns):
        log_extra(name, [value for one in calls for value in one.columns.get(name, [None] * one.count)])
    for name in dict.fromkeys(name for one in calls for name in one.metrics):
        values = [one.metrics[name] for one in calls if name in one.metrics]
        log_metric(name, sum(values) / len(values))
    return results
