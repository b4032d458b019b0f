"""Users' reward functions under guard: what they raise is told as theirs, and a hang is noticed."""

import asyncio
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

TELL_EVERY_S = 60.0


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
            ValueError: it ended the process or was cancelled, closed standard error, or took longer than `timeout`.
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
            yield
        except BaseException as error:
            if (said := self.said_of(error)) is None:
                raise
            raise ValueError(said) from error
        finally:
            done.set()
            watcher.join()
            if takes_over:
                signal.signal(signal.SIGINT, handler)
        if sys.stderr is not None and getattr(sys.stderr, "closed", False):
            sys.stderr = sys.__stderr__
            raise ValueError(f"reward function {self.name!r} closed or replaced standard error: leave it open.")

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


def awaited(result: Any, watch: Watch, tell: Callable[[Exception], Exception]) -> Any:
    """A coroutine that gives what `result` gives; what it raises becomes a ValueError inside, so that the event loop
    lives on."""

    async def finish() -> Any:
        limit = asyncio.timeout(watch.timeout)
        try:
            async with limit:
                return await result
        except Exception as error:
            watch.too_late = limit.expired()
            raise ValueError(watch.said_of(error)) if watch.too_late else tell(error) from error
        except BaseException as error:
            raise ValueError(watch.said_of(error) or f"{type(error).__name__} in {watch.name!r}") from error

    return finish()
