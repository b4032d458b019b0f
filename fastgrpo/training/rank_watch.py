"""Ranks that watch each other: one that fails, dies or hangs ends the others, and one line names it.

torch tells none of this: a collective waits for a rank that will not come, and its time limit names no rank. So every
rank says once a second, in the store through which the ranks have met, how many collectives it has begun, and what it
is at. One that has begun fewer than those who wait is the one they wait for; one whose process is gone from this
machine, without having said that it ends, has died.
"""

import itertools
import json
import os
import re
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.utils import logging

from fastgrpo.safe_text.last_line import last_line

logger = logging.get_logger(__name__)

BEAT_S = 1.0
SILENT_S = 5.0
"""A rank that has said nothing for so long is told as silent."""
TELL_EVERY_S = 60.0
GRACE_S = 3.0
"""For a rank that fails together with another one, or because of it, to tell of it."""
TERMINATED = 143
LOST = re.compile(r"gloo|NCCL|pair closure|[Cc]onnection (closed|reset|refused)|Broken pipe")
"""In what torch raises where another rank has ended."""
FAILED = "failed"
GONE = {"gone", "Z", "X"}
ENDED = dict.fromkeys(GONE, "has ended") | {"T": "is stopped"}
"""What a state of a process is called."""
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
_OURS = str(Path(__file__).parents[1])
_numbers = itertools.count()
_NAMES = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
_MACHINE = f"{_NAMES[0].read_text().strip()} {os.readlink(_NAMES[1])}" if _NAMES[1].exists() else ""
"""Where process ids mean what they mean here; empty where there is no /proc."""
_watching = False


@contextmanager
def watched_ranks(timeout: float) -> Iterator[None]:
    """Watches the ranks while the block runs; on one rank, or within such a block, does nothing.

    Args:
        timeout: seconds that a rank may keep the others waiting in a collective before all of them end.

    Raises:
        ValueError: another rank has ended; the message names it.
    """
    global _watching
    if _watching or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    try:
        watch = RankWatch(timeout)
        watch.start()
    except RuntimeError:  # a backend that does not count its collectives: not NCCL, not gloo
        yield
        return
    _watching = True
    try:
        yield
    except BaseException as error:
        watch.failed(error)
        raise
    finally:
        watch.stop()
        _watching = False


class RankWatch:
    """One rank's part of the watch: a thread that says how far it is, and looks at the others while it waits."""

    def __init__(self, timeout: float) -> None:
        self.rank, self.timeout = dist.get_rank(), timeout
        # A clone: the main thread may be waiting in the store itself.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._store = dist.PrefixStore(f"rank_watch/{next(_numbers)}", store)
        self._keys = [str(rank) for rank in range(dist.get_world_size())]
        self._main = threading.main_thread().ident or 0
        self._ended, self._lost = threading.Event(), threading.Event()
        self._begun, self._since, self._told = -1, time.monotonic(), 0.0
        self._seen: dict[str, tuple[bytes, float]] = {}
        """What each rank said last, and since when it has said nothing else."""
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)

    def start(self) -> None:
        self._say(0)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(RuntimeError):  # the store's
            self._say(-1, ends=True)

    def failed(self, error: BaseException) -> None:
        """Tells the other ranks that this one has failed.

        Raises:
            ValueError: it failed because another one has ended; the message names that.
        """
        if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == TERMINATED):
            return  # all ranks alike
        if not (isinstance(error, RuntimeError) and LOST.search(str(error))):
            self._ended.set()
            self._claim()
            return
        self._lost.set()
        try:
            self._look()
            time.sleep(GRACE_S)  # the thread ends this process where the other rank has told of it
            self._look()
            silent = [rank for rank, (_, since) in self._seen.items() if time.monotonic() - since >= GRACE_S]
            missed = min((*silent, *self._behind()), default=None)
            if not self._claim():
                os._exit(1)
        except RuntimeError:
            missed = None
        told = "another rank has ended" if missed is None else self._about(missed)
        raise ValueError(f"{told} ({next(iter(str(error).splitlines()))})") from error

    def _run(self) -> None:
        for beat in itertools.count(1):
            if self._ended.wait(BEAT_S):
                return
            try:
                self._say(beat)
                if self._store.check([FAILED]) and (self._lost.is_set() or not self._ended.wait(GRACE_S)):
                    os._exit(1)
                self._end_after_the_dead()
                if time.monotonic() - self._since >= SILENT_S:
                    self._look()
                    self._wait_no_longer_than_allowed()
            except RuntimeError:  # the store's
                if not self._ended.wait(GRACE_S):
                    last_line(f"fastgrpo: error on rank {self.rank}: the launcher, or rank 0, is gone.")
                    os._exit(1)

    def _say(self, beat: int, *, ends: bool = False) -> None:
        begun = dist.group.WORLD._get_sequence_number_for_group()  # type: ignore[union-attr]
        if begun != self._begun:
            self._begun, self._since, self._told = begun, time.monotonic(), 0.0
        process = {"pid": os.getpid(), "host": socket.gethostname(), "machine": _MACHINE}
        said = process | {"begun": begun, "beat": beat, "at": _at(self._main), "ends": ends}
        self._store.set(str(self.rank), json.dumps(said))

    def _look(self) -> None:
        if self._store.check(self._keys):  # all have begun to say something: reading does not wait
            for rank, said in zip(self._keys, self._store.multi_get(self._keys), strict=True):
                if self._seen.get(rank, (b"", 0.0))[0] != said:
                    self._seen[rank] = said, time.monotonic()

    def _behind(self) -> list[str]:
        return [rank for rank, (said, _) in self._seen.items() if json.loads(said)["begun"] < self._begun]

    def _end_after_the_dead(self) -> None:
        if not self._seen:
            self._look()
        gone = [rank for rank, (said, _) in self._seen.items() if _state(json.loads(said)) in GONE]
        if gone:
            self._look()
        dead = next((rank for rank in gone if not json.loads(self._seen[rank][0])["ends"]), None)
        # The main thread tells it itself where a collective fails.
        if dead is None or self._lost.is_set() or self._ended.wait(GRACE_S) or self._lost.is_set():
            return
        if self._claim():
            last_line(f"fastgrpo: error: {self._about(dead)}.")
        os._exit(1)

    def _wait_no_longer_than_allowed(self) -> None:
        waited, behind = time.monotonic() - self._since, self._behind()
        if not behind:
            return
        told = f"{self._about(behind[0])}; the others have been waiting for it for {waited:.0f} s"
        if waited >= self.timeout:
            if self._claim():
                last_line(f"fastgrpo: error: {told}, ddp_timeout={self.timeout:g}.")
                self._kill_the_silent(behind)
            os._exit(1)
        is_first = str(self.rank) == min(set(self._seen) - set(behind))
        if is_first and waited >= self._told + TELL_EVERY_S:
            self._told = waited
            logger.warning(told)

    def _kill_the_silent(self, ranks: list[str]) -> None:
        """Those of this machine that will not end by themselves: a launcher waits half a minute for them."""
        silent = [rank for rank in ranks if time.monotonic() - self._seen[rank][1] >= GRACE_S]
        time.sleep(GRACE_S)  # so that launchers take this rank's end for the first
        for said in (json.loads(self._seen[rank][0]) for rank in silent):
            if _state(said) not in {"", *GONE}:
                with suppress(ProcessLookupError):
                    os.kill(said["pid"], signal.SIGKILL)

    def _about(self, rank: str) -> str:
        content, since = self._seen[rank]
        said: dict[str, Any] = json.loads(content)
        named, silent = f"rank {rank} (process {said['pid']} on {said['host']})", time.monotonic() - since
        if (state := _state(said)) in ENDED:
            return f"{named} {ENDED[state]}"
        if silent < min(SILENT_S, GRACE_S):
            return f"{named} is in {said['at']}"
        return f"{named} has ended, is stopped or keeps Python's lock: no sign of life for {silent:.0f} s"

    def _claim(self) -> bool:
        """Tells the others to end; whether no other rank has told so before."""
        mine = str(self.rank)
        try:
            return bool(self._store.compare_set(FAILED, "", mine) == mine.encode())
        except RuntimeError:
            return True


def _state(said: dict[str, Any]) -> str:
    """A rank's process as Linux sees it: a letter of proc(5), "gone", or nothing for one of another machine."""
    if not _MACHINE or said["machine"] != _MACHINE:
        return ""
    try:
        return Path(f"/proc/{said['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def _at(thread: int) -> str:
    """The innermost function of a thread that is ours or the user's."""
    frame = outer = sys._current_frames().get(thread)
    while frame is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    found = frame or outer
    return "" if found is None else f"{found.f_code.co_name} ({found.f_code.co_filename}:{found.f_lineno})"


def _is_library(path: str) -> bool:
    return path.startswith(("<", *_LIBRARIES)) and not path.startswith(_OURS)
