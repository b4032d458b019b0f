"""Worker processes that end with the process they work for, however that ends."""

import ctypes
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(worker: int) -> None:
    """A data loader's `worker_init_fn`: on Linux, the kernel kills this process when the one that began it is gone.

    A worker looks for its parent by itself, but only while it waits for work: not while it reads a picture from a disk
    that hangs, nor while nobody takes what it has made.
    """
    parent = multiprocessing.parent_process()
    if sys.platform != "linux" or parent is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        os.kill(parent.pid or 0, 0)
    except ProcessLookupError:  # it has ended before the line above
        os._exit(1)
