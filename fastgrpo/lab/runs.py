"""A run of a lab: its folder, the programs that make it, and how far they are."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.atomic_files import write_aside
from fastgrpo.cli.arguments import as_flags
from fastgrpo.lab.config import Arm, Lab
from fastgrpo.safe_text.redaction import redacted

SETTINGS_FILE = "lab_settings.json"
"""What a run was started with: settings of the same arm that differ belong to another run."""
HOW_ASKED = ("prompt_mode", "prompt_template", "min_pixels", "max_pixels")
"""Settings of an arm that its evaluations have too."""
TAIL_BYTES = 8192


@dataclass(frozen=True)
class Stage:
    """One program of a run."""

    name: str
    arguments: list[str]
    """Behind `fastgrpo`."""
    is_done: Callable[[], bool]
    marker: Path | None = None
    """Gets the arguments when the program has ended well, where it leaves no file of its own that says so."""


@dataclass(frozen=True)
class LabRun:
    """One seed of an arm."""

    lab: Lab
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.lab.output_dir / self.arm.name / f"seed-{self.seed}"

    @property
    def log(self) -> Path:
        """What its programs print, of all attempts."""
        return self.folder / "log.txt"

    @property
    def stages(self) -> list[Stage]:
        """Evaluations of the untrained model, training, evaluations of the trained one."""
        own = {"output_dir": self.folder, "seed": self.seed, "run_name": self.name}
        flags = as_flags({**self.arm.settings, **own})
        # `last` begins anew where no checkpoint was saved yet.
        training = [self.arm.command, *flags, "--resume_from_checkpoint", "last"]
        train = Stage(self.arm.command, training, (self.folder / "summary.json").is_file)
        return [*self._evaluations("before"), train, *self._evaluations("after")]

    def _evaluations(self, when: str) -> list[Stage]:
        """Before training, of the first seed alone: all seeds begin with the same model."""
        if when == "before" and self.seed != self.lab.seeds[0]:
            return []
        model = self.folder if when == "after" else self.arm.settings.get("model_name_or_path")
        stages = []
        for name in self.arm.evaluations:
            folder = self.folder / "evaluations" / f"{name}-{when}"
            asked = {key: self.arm.settings[key] for key in HOW_ASKED if key in self.arm.settings}
            flags = as_flags({**asked, **self.lab.evaluations[name], "output_dir": folder})
            stages.append(_evaluation(f"{name} {when}", ["eval", str(model), *flags], folder / "done"))
        return stages

    @property
    def is_done(self) -> bool:
        return all(stage.is_done() for stage in self.stages)

    @property
    def max_steps(self) -> int | None:
        """Steps it will take, where its settings say so."""
        steps = self.arm.settings.get("max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    def step(self) -> int:
        """The last optimizer step in its log; 0 before the first."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - TAIL_BYTES))
                lines = file.read().splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue  # cut off, or being written
        return 0

    def check_settings(self) -> None:
        """Raises ValueError where the folder holds a run of this arm's name with other settings."""
        file = self.folder / SETTINGS_FILE
        if not file.is_file():
            return
        was, now = json.loads(file.read_text()), self._settings()
        for name in {**was, **now}:
            if was.get(name) != now.get(name):
                raise ValueError(
                    f"{self.folder} holds a run with {name}={was.get(name)!r}; the lab's file now says "
                    f"{now.get(name)!r}. Give the arm another name, choose another output_dir, or remove that folder."
                )

    def keep_settings(self) -> None:
        """Notes what the run is made with."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._settings(), indent=2) + "\n"
        write_aside(self.folder / SETTINGS_FILE, lambda path: path.write_text(text))

    def _settings(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(
            json.dumps(redacted({"command": self.arm.command, **self.arm.settings}), default=str)
        )
        return told

    def last_line(self) -> str:
        """Of its log: what a program that failed said last."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _evaluation(name: str, arguments: list[str], marker: Path) -> Stage:
    """Done where the marker holds these arguments: an evaluation asked otherwise is made again."""
    return Stage(name, arguments, lambda: marker.is_file() and json.loads(marker.read_text()) == arguments, marker)


def runs_of(lab: Lab) -> list[LabRun]:
    """Seed by seed, so that a lab that is stopped early has every arm."""
    return [LabRun(lab, arm, seed) for seed in lab.seeds for arm in lab.arms]
