"""The files a run leaves step by step: metrics.jsonl and the completions, each step in them once."""

import json
import logging
import math
import os
import re
import secrets
from collections import deque
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastgrpo.atomic_files import write_aside
from fastgrpo.safe_text.inert import inert
from fastgrpo.training.checkpoints import checkpoints_of
from fastgrpo.training.completion_records import CompletionRecord
from fastgrpo.training.manifest import run_of
from fastgrpo.training.run_lock import RunLock

logger = logging.getLogger(__name__)

OF_A_RUN = (
    *("metrics.jsonl", "completions", "evals", "summary.json", "report.html", "settings.json", "run_id"),
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "preprocessor_config.json"),
    *("tokenizer*", "chat_template.jinja", "training_args.bin", "adapter_config.json", "README.md", "trace.json"),
    "runs/*/events.out.tfevents.*",
)
"""What a run leaves in its folder beside checkpoints: logs and TensorBoard's, the trained model and its card. Anything
else there is the user's."""
MOVING = ".moving.json"
"""What is being moved aside, and where to: a kill amid that leaves it to the next start."""


class RunLog:
    """Appends to a run's logs. Only the main process makes one.

    Args:
        folder: the run's output folder; created when missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics_file = folder / "metrics.jsonl"
        self.completions_folder = folder / "completions"
        self.lock = RunLock(folder)

    def start_over(self) -> None:
        """Moves what an earlier run left in the folder into previous-N/, so that nothing is lost or mixed."""
        self.finish_moving()
        if not self.metrics_file.exists():
            return
        of_run = [path for pattern in OF_A_RUN for path in self.folder.glob(pattern)]
        self._move_aside([*of_run, *checkpoints_of(self.folder).values()])

    def run_id(self) -> str:
        """The random name of the run in this folder: its file's, else its newest checkpoint's, else a new one."""
        if known := self.known_run_id():
            return known
        saved = [run_of(path) for path in checkpoints_of(self.folder).values()]
        made = next(filter(None, reversed(saved)), None) or secrets.token_hex(8)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_aside(self.folder / "run_id", lambda path: path.write_text(made + "\n"))
        return made

    def known_run_id(self) -> str | None:
        """That name, where there is one that can be read."""
        file = self.folder / "run_id"
        found = file.read_text(errors="replace").strip() if file.is_file() else ""
        return found if re.fullmatch(r"[0-9a-f]{16}", found) else None

    def continue_after(self, step: int) -> None:
        """Drops what was logged after `step`: those steps will run, and be logged, again.

        Checkpoints of later steps, a branch that is left by resuming from an earlier one, move to previous-N/.
        """
        if self.metrics_file.exists():
            kept = [line for line in self.metrics_file.read_bytes().splitlines() if _step_of(line) <= step]
            write_aside(self.metrics_file, lambda path: path.write_bytes(b"".join(line + b"\n" for line in kept)))
        for path in self.completions_folder.glob("completions_*.parquet"):
            if (found := re.fullmatch(r"completions_(\d+)", path.stem)) and int(found[1]) > step:
                path.unlink()
        later = [path for number, path in checkpoints_of(self.folder).items() if number > step]
        if later:
            self._move_aside(later)

    def _move_aside(self, paths: Sequence[Path]) -> None:
        candidates = (f"previous-{number}" for number in count(1))
        aside = next(name for name in candidates if not (self.folder / name).exists())
        plan = {"to": aside, "paths": [str(path.relative_to(self.folder)) for path in paths]}
        write_aside(self.folder / MOVING, lambda path: path.write_text(json.dumps(plan)))
        self.finish_moving()

    def finish_moving(self) -> None:
        """Moves what is still to be moved aside, also of a start that was killed amid it."""
        if not (self.folder / MOVING).is_file():
            return
        try:
            plan = json.loads((self.folder / MOVING).read_bytes())
            aside, names = self.folder / plan["to"], [str(name) for name in plan["paths"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.folder / MOVING} is damaged: it says what of an earlier run was being moved aside. Move the "
                "folder's files elsewhere, or choose another output_dir."
            ) from error
        for name in names:
            path, moved = self.folder / name, aside / name
            if not path.exists() or Path(name).is_absolute() or ".." in Path(name).parts:
                continue
            moved.parent.mkdir(parents=True, exist_ok=True)
            path.rename(moved)
            if path.parent != self.folder and not any(path.parent.iterdir()):
                path.parent.rmdir()  # TensorBoard would list it still
        (self.folder / MOVING).unlink()
        logger.warning("%s held an earlier run: moved to %s", self.folder, aside)

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line and hands it to the operating system, so that it outlives this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        try:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:  # a full disk is told without the file's name
            raise OSError(error.errno, error.strerror, str(self.metrics_file)) from error

    def last_metrics(self, steps: int) -> list[dict[str, Any]]:
        """The lines of the last steps."""
        if not self.metrics_file.exists():
            return []
        with self.metrics_file.open() as file:
            return [json.loads(line) for line in deque(file, steps)]

    def completions(self, step: int, records: Sequence[CompletionRecord]) -> None:
        """Writes completions/completions_{step:05d}.parquet."""
        if not records:
            return
        self.completions_folder.mkdir(parents=True, exist_ok=True)
        rows = [{"step": step, **record.columns()} for record in records]
        table = pa.table({name: _column([row.get(name) for row in rows]) for row in rows for name in row})
        write_aside(
            self.completions_folder / f"completions_{step:05d}.parquet",
            lambda path: pq.write_table(table, path, compression="zstd"),
        )

    def sync(self) -> None:
        """Forces the metrics to disk: a checkpoint never knows of steps that the log lost."""
        if self.metrics_file.exists():
            with self.metrics_file.open("a") as file:
                os.fsync(file.fileno())


def _column(values: list[Any]) -> pa.Array:
    """A column of values of one kind; as text where a reward function logged what has no common type."""
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return pa.array([None if value is None else inert(str(value)) for value in values])


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a crash belongs to no finished step
