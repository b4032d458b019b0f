"""What a run leaves when it ends: its summary and its page."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from fastgrpo.atomic_files import write_aside
from fastgrpo.evaluation.summary import RunSummary
from fastgrpo.report.environment import environment
from fastgrpo.report.page import write_report
from fastgrpo.report.run import read_run


def finish_run(folder: Path, *, seed: int, wall_s: float) -> RunSummary:
    """Sums up a run's files into summary.json and draws report.html from them.

    Args:
        wall_s: seconds that the run took, scoring included.

    Raises:
        ValueError: a folder without anything that a run writes.
    """
    run = read_run(folder)
    made_with = environment(use_cpu=bool(run.setting("use_cpu")))
    summary = replace(run.of_files, seed=seed, wall_s=wall_s, torch=torch.__version__, environment=made_with)
    text = json.dumps(summary.to_json(), indent=2) + "\n"
    write_aside(folder / "summary.json", lambda path: path.write_text(text))
    write_report([folder])
    return summary
