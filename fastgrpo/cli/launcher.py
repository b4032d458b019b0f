"""accelerate's launcher, which says in one line which rank ended the others and why.

Usage: python -m fastgrpo.cli.launcher ACCELERATE_LAUNCH_FLAG… --module fastgrpo COMMAND FLAG…
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time

import torch.distributed.run  # noqa: F401  before its loggers are silenced
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fastgrpo.safe_text.inert import inert
from fastgrpo.safe_text.last_line import LAUNCHED

TERMINATED = 143


def main() -> int:
    """Runs the ranks; the exit code of the first that failed, 128 + N where signal N ended it."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).disabled = True  # says the same in many lines
    os.environ[LAUNCHED] = "1"
    arguments = launch_command_parser().parse_args()
    try:
        launch_command(arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        code: int = failure.exitcode
        if code != TERMINATED:
            print(inert(_told(arguments.training_script_args[0], rank, failure)), file=sys.stderr)
        return code if code > 0 else 128 - code
    except subprocess.CalledProcessError as failed:  # one process, which has told by itself
        return failed.returncode if failed.returncode > 0 else 128 - failed.returncode
    except SignalException as received:
        return 128 + int(received.sigval)
    return 0


def _told(command: str, rank: int, failure: ProcessFailure) -> str:
    if isinstance(failure.message, dict):  # what the rank itself has left
        return str(failure.message.get("message"))
    named = f"fastgrpo {command}: error: rank {rank} (process {failure.pid})"
    if failure.exitcode >= 0:
        return f"{named} ended without a word, with exit code {failure.exitcode}: something in it calls os._exit."
    cause = f"{named} was killed by {signal.Signals(-failure.exitcode).name}"
    return f"{cause}: by hand, or by the system, as when memory runs out." if failure.exitcode == -9 else f"{cause}."


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
