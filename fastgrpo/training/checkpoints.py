"""Where a run continues from, and what it keeps beside transformers' own state."""

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

ASIDE = ".saving"
"""Folder inside the output folder where a checkpoint is written before it gets its name."""
NOT_RESUMING = (None, False, "false", "False")
"""Values of `resume_from_checkpoint` that ask for a new run."""
STATE_FILE = "fastgrpo_state.json"


def find_checkpoint(resume: str | bool | None, output_dir: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names: a folder, or `last` (or True) for the newest of the run.

    `last` gives None where there is no checkpoint yet, so that a job that restarts itself needs no special first time.

    Raises:
        ValueError: the folder is missing or holds no resumable state; the message says which.
    """
    if resume in NOT_RESUMING:
        return None
    if resume in (True, "last", "true", "True"):
        found = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
        if found is None:
            return None
        resume = found
    checkpoint = Path(str(resume))
    if not checkpoint.is_dir():
        raise ValueError(
            f"resume_from_checkpoint={resume!r} is not a folder. Pass a checkpoint-N folder, or `last` for the newest "
            f"in {output_dir}."
        )
    has_optimizer = any(checkpoint.glob("optimizer.*")) or any(checkpoint.glob("global_step*"))
    if not (checkpoint / "trainer_state.json").is_file() or not has_optimizer:
        raise ValueError(
            f"resume_from_checkpoint={resume!r} holds weights but no optimizer state (was it saved with "
            "save_only_model?), so the run cannot continue from it. Start a new run with it as --model_name_or_path."
        )
    return checkpoint


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes what a run keeps beside transformers' own state."""
    (folder / STATE_FILE).write_text(json.dumps(state))


def load_state(checkpoint: Path | None) -> dict[str, Any]:
    """What `save_state` wrote, or an empty dict."""
    file = checkpoint / STATE_FILE if checkpoint else None
    return json.loads(file.read_text()) if file and file.is_file() else {}
