"""The files a run leaves step by step: metrics.jsonl and the completions, each step in them once."""

import json
import logging
import math
import os
from collections import deque
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastgrpo.atomic_files import write_aside
from fastgrpo.training.completion_records import CompletionRecord
from fastgrpo.training.run_lock import RunLock

logger = logging.getLogger(__name__)

OF_A_RUN = (
    *("metrics.jsonl", "completions", "evals", "summary.json", "report.html", "settings.json", "checkpoint-*"),
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "preprocessor_config.json"),
    *("tokenizer*", "chat_template.jinja", "training_args.bin", "adapter_config.json", "README.md", "trace.json"),
    "runs/*/events.out.tfevents.*",
)
"""What a run leaves in its folder: logs and TensorBoard's, checkpoints, the trained model and its card. Anything else
there is the user's."""


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
        if not self.metrics_file.exists():
            return
        self._move_aside([path for pattern in OF_A_RUN for path in self.folder.glob(pattern)])

    def continue_after(self, step: int) -> None:
        """Drops what was logged after `step`: those steps will run, and be logged, again.

        Checkpoints of later steps, a branch that is left by resuming from an earlier one, move to previous-N/.
        """
        if self.metrics_file.exists():
            kept = [line for line in self.metrics_file.read_text().splitlines() if _step_of(line) <= step]
            write_aside(self.metrics_file, lambda path: path.write_text("".join(line + "\n" for line in kept)))
        for path in self.completions_folder.glob("completions_*.parquet"):
            if int(path.stem.split("_")[1]) > step:
                path.unlink()
        later = [path for path in self.folder.glob("checkpoint-*") if int(path.name.split("-")[1]) > step]
        if later:
            self._move_aside(later)

    def _move_aside(self, paths: Sequence[Path]) -> None:
        candidates = (self.folder / f"previous-{number}" for number in count(1))
        aside = next(path for path in candidates if not path.exists())
        aside.mkdir()
        for path in paths:
            moved = aside / path.relative_to(self.folder)
            moved.parent.mkdir(parents=True, exist_ok=True)
            path.rename(moved)
            if path.parent != self.folder and not any(path.parent.iterdir()):
                path.parent.rmdir()  # TensorBoard would list it still
        logger.warning("%s held an earlier run: moved to %s", self.folder, aside)

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line and hands it to the operating system, so that it outlives this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.metrics_file.open("a") as file:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            file.write(json.dumps({"step": step, **finite}) + "\n")

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
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return pa.array([None if value is None else str(value) for value in values])


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line cut off by a crash belongs to no finished step
