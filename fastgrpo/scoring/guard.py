"""Users' reward functions under guard: what they raise is told as theirs, a hang is noticed, and what they change of
the process is put back."""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType
from typing import Any

import torch

logger = logging.getLogger(__name__)

TELL_EVERY_S = 60.0


def described(error: BaseException) -> str:
    """An exception's kind and message, whatever its own `__str__` does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _put_filters(filters: Any) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _set_sigterm(handler: Any) -> None:
    if handler is not None:
        signal.signal(signal.SIGTERM, handler)


OF_PROCESS: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the working directory": (os.getcwd, os.chdir),
    "the handler of SIGTERM": (lambda: signal.getsignal(signal.SIGTERM), _set_sigterm),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "the filters of warnings": (lambda: tuple(warnings.filters), _put_filters),
    "torch's grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
}
"""What training depends on and a function may change: how it is read and put back. The environment is the user's."""


@contextmanager
def process_kept(name: str) -> Iterator[None]:
    """Puts back what the functions called `name` change of `OF_PROCESS`, with a warning; a fork that comes back ends.

    In another thread than the main one, where training goes on meanwhile, nothing is put back.

    Raises:
        ValueError: standard output or error is closed.
    """
    process = os.getpid()
    kept = OF_PROCESS if threading.current_thread() is threading.main_thread() else {}
    before = {what: read() for what, (read, _) in kept.items()}
    streams = [name for name in ("stdout", "stderr") if _is_open(getattr(sys, name))]
    try:
        yield
    finally:
        if os.getpid() != process:
            os._exit(1)  # two processes would train
        for what, (read, put_back) in kept.items():
            now = None
            with suppress(OSError):  # a working directory that is gone
                now = read()
            if now != before[what]:
                put_back(before[what])
                _warn_once(f"reward function {name!r} changed {what}: it is put back.")
    for stream in streams:
        if not _is_open(getattr(sys, stream)):
            own = getattr(sys, f"__{stream}__")
            setattr(sys, stream, own if _is_open(own) else open(1 + (stream == "stderr"), "w", closefd=False))  # noqa: SIM115
            raise ValueError(f"reward function {name!r} closed sys.{stream}, or took it away: leave it open.")


def _is_open(stream: Any) -> bool:
    return stream is not None and not getattr(stream, "closed", False)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


class Watch:
    """A call of a reward function under way.

    Args:
        name: the function's.
        timeout: seconds after which the call is ended with a ValueError; None: it may take as long as it takes.
        give_up: in another thread than the main one, whose calls cannot be ended, is given that error instead.
    """

    def __init__(
        self,
        name: str,
        timeout: float | None = None,
        tell_every: float = TELL_EVERY_S,
        give_up: Callable[[ValueError], None] | None = None,
    ) -> None:
        self.name = name
        self.timeout = timeout
        self.tell_every = tell_every
        self.give_up = give_up
        self.interrupted = False
        """By the user: a `KeyboardInterrupt` is then not the function's own."""
        self.too_late = False
        self._handler: Any = None

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Calls what is in the block. In the main thread a hang is ended; elsewhere it is told, and given up if asked.

        Raises:
            ValueError: it ended the process or was cancelled, closed standard output or error, or took longer than
                `timeout`.
        """
        done = threading.Event()
        in_main = threading.current_thread() is threading.main_thread()
        handler = self._handler = signal.getsignal(signal.SIGINT)  # a run in the background ignores it
        takes_over = in_main and handler is not None
        watcher = threading.Thread(target=self._watch, args=(done, takes_over), name="reward-watch", daemon=True)
        if takes_over:
            signal.signal(signal.SIGINT, self._on_interrupt)
        watcher.start()
        try:
            try:
                with process_kept(self.name):
                    yield
            finally:
                done.set()
                watcher.join()
            if self.too_late and in_main:  # the function went on in spite of it
                raise KeyboardInterrupt
        except BaseException as error:
            if (said := self.said_of(error)) is None:
                raise
            raise ValueError(said) from error
        finally:
            if takes_over:
                signal.signal(signal.SIGINT, handler)

    def said_of(self, error: BaseException) -> str | None:
        """What an exception that is no `Exception` of the function means; None where it is not the function's."""
        if self.too_late:
            return f"reward function {self.name!r} took longer than reward_timeout={self.timeout:g} seconds."
        if isinstance(error, SystemExit):
            return f"reward function {self.name!r} called exit({error.code!r}): raise an exception, or return None."
        if isinstance(error, asyncio.CancelledError):
            return f"reward function {self.name!r} was cancelled: it must finish what it starts."
        if isinstance(error, KeyboardInterrupt) and not self.interrupted:
            return f"reward function {self.name!r} raised KeyboardInterrupt, though nobody interrupted it."
        if not isinstance(error, Exception | KeyboardInterrupt):
            return f"reward function {self.name!r} raised {described(error)}: raise an Exception, or return None."
        return None

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self.too_late:
            raise KeyboardInterrupt
        if self._handler is signal.SIG_IGN:
            return
        self.interrupted = True
        if not callable(self._handler):
            raise KeyboardInterrupt
        self._handler(signum, frame)

    def _watch(self, done: threading.Event, can_end: bool) -> None:
        start = time.monotonic()
        while True:
            left = None if self.timeout is None or self.too_late else start + self.timeout - time.monotonic()
            if done.wait(self.tell_every if left is None else max(0.0, min(self.tell_every, left))):
                return
            seconds = time.monotonic() - start
            is_over = left is not None and seconds >= (self.timeout or 0.0)
            if not (is_over and self._end(can_end)):
                logger.warning("reward function %r has been running for %.0f s", self.name, seconds)

    def _end(self, in_main: bool) -> bool:
        """Ends a call that takes too long, or gives it up; whether it could."""
        self.too_late = True
        if in_main:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        elif self.give_up is not None:
            self.give_up(ValueError(self.said_of(TimeoutError())))
        return in_main or self.give_up is not None


async def awaited(result: Any, watch: Watch, tell: Callable[[Exception], Exception]) -> Any:
    """What `result` gives; what it raises becomes a ValueError inside, so that the event loop lives on."""
    limit = asyncio.timeout(watch.timeout)
    try:
        async with limit:
            return await result
    except Exception as error:
        watch.too_late = limit.expired()
        raise ValueError(watch.said_of(error)) if watch.too_late else tell(error) from error
    except BaseException as error:
        raise ValueError(watch.said_of(error) or f"{described(error)} in {watch.name!r}") from error


BLOCKED_S = 1.0
"""How much later than `timeout` an event loop must have ended what takes too long; else something blocks it."""


def waited(future: Any, names: str, timeout: float | None, tell_every: float = TELL_EVERY_S) -> Any:
    """What a future of another thread's event loop gives; a hang is told.

    Raises:
        ValueError: a function among `names` blocks the event loop for longer than `timeout`.
    """
    start = time.monotonic()
    while True:
        seconds = time.monotonic() - start
        left = tell_every if timeout is None else min(tell_every, timeout + BLOCKED_S - seconds)
        if left <= 0:
            raise ValueError(
                f"reward function {names!r} took longer than reward_timeout={timeout:g} seconds, blocking."
            )
        try:
            return future.result(left)
        except CancelledError as error:  # it cancelled its own task
            raise ValueError(f"reward function {names!r} was cancelled: it must finish what it starts.") from error
        except TimeoutError:  # nothing that a function raises is one here: see `awaited`
            pass
        logger.warning("reward function %r has been running for %.0f s", names, time.monotonic() - start)
