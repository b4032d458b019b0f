"""A process's last line: to standard error, or to the launcher that started it, which shows the first rank's alone."""

import json
import os
import sys
import time
from pathlib import Path

from fastgrpo.safe_text.inert import inert

LAUNCHED = "FASTGRPO_LAUNCHED"
"""Set in the environment of ranks that `fastgrpo --num_processes` has started."""


def last_line(line: str) -> None:
    """Shows a line, or leaves it in torch elastic's error file for the launcher to show."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None or LAUNCHED not in os.environ:
        print(inert(line), file=sys.stderr, flush=True)
        return
    told = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
    Path(file).write_text(json.dumps({"message": told}))
