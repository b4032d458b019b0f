"""One run at a time in an output folder."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

NOT_SUPPORTED = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
"""What file systems without locks answer."""


class RunLock:
    """The file `.lock` of a folder, locked by the operating system while a run writes there.

    A run that was killed holds no lock any more, on whatever host it ran, so what it left is taken over.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: IO[str] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock; within a block that holds it already, nothing happens.

        Raises:
            ValueError: another run holds it; the message says which.
        """
        if self._file is not None:
            yield
            return
        self._file = self._locked()
        try:
            yield
        finally:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _locked(self) -> IO[str]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = self.path.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"output_dir={str(self.path.parent)!r} is in use by {_owner(self.path)}: choose another folder, or "
                    "wait until that run has ended."
                ) from None
            except OSError as error:
                if error.errno not in NOT_SUPPORTED:
                    raise
                logger.warning("%s is on a file system without locks: start no second run there.", self.path.parent)
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                break
            file.close()  # its run has just ended, and removed it
        os.register_at_fork(after_in_child=file.close)  # a worker would hold the lock of a run that was killed
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        return file


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError):
        return "another run"
