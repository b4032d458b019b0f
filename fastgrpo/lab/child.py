"""Becomes a program that ends when the process that started it does: `python -m fastgrpo.lab.child PARENT PROGRAM …`.

A lab that is killed would else leave programs behind that write where its next start wants to go on.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2): the signal that the parent's death sends. It outlives the call of exec."""


def main() -> None:
    parent, *program = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == int(parent):  # else it died before the signal was asked for
        os.execv(program[0], program)


if __name__ == "__main__":
    main()
