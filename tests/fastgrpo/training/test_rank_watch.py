"""Two ranks that watch each other, in forks: one hangs, stops, dies or ends, and what the other one does then."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastgrpo.safe_text.last_line import LAUNCHED
from fastgrpo.training import rank_watch
from fastgrpo.training.rank_watch import watched_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def reduces() -> None:
    dist.all_reduce(torch.ones(1))


def hangs() -> None:
    signal.pause()


def computes_on() -> None:
    threading.Event().wait(3 * rank_watch.GRACE_S)


def is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raises() -> None:
    raise KeyError("id")


def ends() -> None:
    pass


WAITED = r"; the others have been waiting for it for \d s, ddp_timeout=2\."
NAMED = r"rank 1 \(process \d+ on \S+\) "
ROWS: list[tuple[Callable[[], None], Callable[[], None], tuple[int, int], str]] = [
    (reduces, hangs, (1, 1), NAMED + r"is in hangs \(.*\.py:\d+\)" + WAITED),
    (reduces, is_stopped, (1, -9), NAMED + "is stopped" + WAITED),
    (reduces, is_killed, (2, -9), NAMED + r"has ended \(.*"),
    (hangs, is_killed, (1, -9), NAMED + r"has ended\."),
    (hangs, raises, (1, 2), "'id'"),
    (computes_on, ends, (0, 0), ""),
]


def start(store: dist.TCPStore, rank: int, act: Callable[[], None], said: Path) -> int:
    """A rank that meets the other one, and acts; its process."""
    if pid := os.fork():
        return pid
    code = 0
    try:
        sys.stderr = said.open("w")
        met = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        dist.init_process_group("gloo", store=met, rank=rank, world_size=2)
        with watched_ranks(2.0):
            reduces()
            act()
    except Exception as error:
        print(error, file=sys.stderr, flush=True)
        code = 2
    finally:
        os._exit(code)


@pytest.mark.parametrize(("act", "other", "codes", "told"), ROWS, ids=lambda value: getattr(value, "__name__", None))
def test_the_other_rank(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[], None],
    other: Callable[[], None],
    codes: tuple[int, int],
    told: str,
) -> None:
    monkeypatch.delenv(LAUNCHED, raising=False)
    for name, seconds in {"BEAT_S": 0.1, "SILENT_S": 2.0, "GRACE_S": 1.5}.items():
        monkeypatch.setattr(rank_watch, name, seconds)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    files = [tmp_path / "0", tmp_path / "1"]
    ranks = [start(store, rank, (act, other)[rank], files[rank]) for rank in (0, 1)]
    assert tuple(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks) == codes
    assert re.fullmatch(told, "".join(file.read_text() for file in files).strip().removeprefix("fastgrpo: error: "))
