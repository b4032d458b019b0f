"""Where a run continues from, and what it keeps beside transformers' own state."""

import errno
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from torch import OutOfMemoryError
from transformers.utils import logging

from fastgrpo.training.manifest import damage, run_of

logger = logging.get_logger(__name__)

ASIDE = ".saving"
"""Folder inside the output folder where a checkpoint is written before it gets its name."""
NOT_RESUMING = (None, False, "false", "False")
"""Values of `resume_from_checkpoint` that ask for a new run."""
STATE_FILE = "fastgrpo_state.json"


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """A run's checkpoints by step, in order; what only looks like one (`checkpoint-best`) is the user's."""
    names = {
        path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*") if path.is_dir()
    }
    return dict(sorted((int(found[1]), path) for path, found in names.items() if found))


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beyond `limit`, but for the newest and the best."""
    found = list(checkpoints_of(folder).values())
    kept = [path for path in found if path == found[-1] or (best is not None and path == Path(best))]
    others = [path for path in found if path not in kept]
    for path in others[: max(0, len(found) - max(limit, len(kept)))] if limit else ():
        shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(
    resume: str | bool | None, output_dir: Path, *, run_id: str | None = None, whole: bool = False
) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names: a folder, or `last` (or True) for the newest of the run.

    `last` gives None where there is no checkpoint yet, so that a job that restarts itself needs no special first time.

    Args:
        run_id: of the run in `output_dir`; `last` passes over checkpoints of another run.
        whole: read every file, to find damage of any kind; else missing files and wrong sizes alone.

    Raises:
        ValueError: the folder is missing, damaged or holds no resumable state; the message says which. `last` falls
            back to the newest checkpoint that is not damaged, and raises where all are.
    """
    if resume in NOT_RESUMING:
        return None
    if resume in (True, "last", "true", "True"):
        return _newest(output_dir, run_id, whole)
    checkpoint = Path(str(resume))
    if not checkpoint.is_dir():
        raise ValueError(
            f"resume_from_checkpoint={resume!r} is not a folder. Pass a checkpoint-N folder, or `last` for the newest "
            f"in {output_dir}."
        )
    if found := damage(checkpoint, hashes=whole):
        raise ValueError(f"{found}. Resume from another checkpoint, or with `last` from the newest whole one.")
    _require_resumable(checkpoint, whole)
    return checkpoint


def _newest(output_dir: Path, run_id: str | None, whole: bool) -> Path | None:
    mine = [
        path
        for path in reversed(checkpoints_of(output_dir).values())
        if run_id is None or run_of(path) in (None, run_id)
    ]
    damaged: list[str] = []
    for path in mine:
        if (found := damage(path, hashes=whole)) is None:
            _require_resumable(path, whole)
            if damaged and whole:
                logger.warning(f"{damaged[0]}: going on from {path}, the newest whole checkpoint.")
            return path
        damaged.append(found)
    if damaged:
        raise ValueError(
            f"{damaged[0]}, and no checkpoint in {output_dir} is whole. Start anew without --resume_from_checkpoint: "
            "what is there moves to previous-N."
        )
    return None


def _require_resumable(checkpoint: Path, whole: bool) -> None:
    has_optimizer = any(checkpoint.glob("optimizer.*")) or any(checkpoint.glob("global_step*"))
    if not (checkpoint / "trainer_state.json").is_file() or not has_optimizer:
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r} holds weights but no optimizer state (was it saved with "
            "save_only_model?), so the run cannot continue from it. Start a new run with it as --model_name_or_path."
        )
    for name in ("trainer_state.json", STATE_FILE) if whole else ():
        with reading(checkpoint / name):
            json.loads((checkpoint / name).read_bytes() if (checkpoint / name).is_file() else b"{}")


@contextmanager
def reading(checkpoint: str | Path) -> Iterator[None]:
    """What libraries raise at files that are damaged, or are no data at all, as a ValueError that names the folder."""
    try:
        yield
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{checkpoint} is damaged: it is no JSON. Resume from another one.") from error
    except (OutOfMemoryError, ValueError):
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # what torch says of an archive that is cut
            raise
        raise ValueError(f"{checkpoint} is damaged: a file of it ends too soon. Resume from another one.") from error
    except (UnpicklingError, EOFError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{checkpoint} cannot be read ({type(error).__name__}: {reason}): it is damaged, or no checkpoint of this "
            "model. Resume from another one."
        ) from error


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes what a run keeps beside transformers' own state."""
    (folder / STATE_FILE).write_text(json.dumps(state, default=str))


def load_state(checkpoint: Path | None) -> dict[str, Any]:
    """What `save_state` wrote, or an empty dict."""
    file = checkpoint / STATE_FILE if checkpoint else None
    return json.loads(file.read_text()) if file and file.is_file() else {}
