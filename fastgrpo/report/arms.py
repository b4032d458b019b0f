"""Reads a lab's folder: its arms with their runs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.evaluation.figures import mapping
from fastgrpo.report.run import Run, read_run
from fastgrpo.settings.given import one_line

LAB_FILE = "lab.json"
"""In a lab's folder: its arms, seeds and claims."""


@dataclass(frozen=True)
class ArmRuns:
    """One arm's runs, by seed."""

    name: str
    about: str
    command: str
    runs: dict[int, Run]

    @property
    def one(self) -> Run | None:
        """The first seed's run, for examples."""
        return next(iter(self.runs.values()), None)


@dataclass(frozen=True)
class LabRuns:
    """What a lab's folder holds."""

    path: Path
    title: str
    arms: tuple[ArmRuns, ...]
    claims: tuple[dict[str, Any], ...]
    missing: tuple[str, ...]
    """Runs without anything to show, or that did not finish, a clause each."""


def is_lab(path: Path) -> bool:
    """Whether the folder is a lab's."""
    return (path / LAB_FILE).is_file()


def read_lab_runs(path: Path) -> LabRuns:
    """Reads the runs that are there.

    Raises:
        ValueError: the lab's file cannot be read, or no run has begun.
    """
    try:
        content = mapping(json.loads((path / LAB_FILE).read_text(encoding="utf-8")))
        arms, seeds = [{"name": str(arm["name"])} | arm for arm in content["arms"]], list(content["seeds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / LAB_FILE} cannot be read ({one_line(error)}): start `fastgrpo lab` again") from error
    missing: list[str] = []
    found = []
    for arm in arms:
        runs = {}
        for seed in seeds:
            folder = path / arm["name"] / f"seed-{seed}"
            try:
                runs[seed] = read_run(folder)
            except ValueError:
                missing.append(f"{arm['name']} seed {seed}: nothing yet: not begun, or failed before its first step")
                continue
            if not runs[seed].summary:
                missing.append(f"{arm['name']} seed {seed}: not finished, shown as far as it is")
        found.append(ArmRuns(arm["name"], str(arm.get("about", "")), str(arm.get("command", "train")), runs))
    if not any(arm.runs for arm in found):
        raise ValueError(f"{path} holds no run yet: start them with `fastgrpo lab`")
    title = str(content.get("title") or path.resolve().name)
    return LabRuns(path, title, tuple(found), tuple(map(mapping, content.get("claims", ()))), tuple(missing))  # type: ignore[arg-type]
