"""The aha page: a lab's arms side by side, and what its claims come to; the same figures as `outcomes.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgrpo.report import headline, tables
from fastgrpo.report.arm_charts import arm_charts
from fastgrpo.report.arm_evaluations import COLUMNS as EVALUATION_COLUMNS
from fastgrpo.report.arm_evaluations import evaluation_rows
from fastgrpo.report.arm_table import COLUMNS, TEST_COLUMNS, arm_rows, paired_rows
from fastgrpo.report.arms import ArmRuns, LabRuns, read_lab_runs
from fastgrpo.report.claims import Judgement, claims_of, judge
from fastgrpo.report.examples import Trajectory, pick_trajectories
from fastgrpo.report.formats import NBSP, count, duration
from fastgrpo.report.measures import MEASURES
from fastgrpo.report.palette import PALETTE
from fastgrpo.report.plots import Chart, export
from fastgrpo.report.run import flatten
from fastgrpo.report.run_card import run_card
from fastgrpo.report.templates import template


def write_lab_report(folder: Path, out: Path | None = None, figures: Path | None = None) -> Path:
    """Writes the page of a lab, and `outcomes.json` beside it.

    Args:
        folder: the lab's, with the runs made so far.
        out: the file to write, or a folder to write `report.html` into. Default: the lab's folder.
        figures: a folder that also gets each chart as SVG and PNG.

    Returns:
        The file written.

    Raises:
        ValueError: no lab's folder, or none of its runs has begun.
    """
    lab = read_lab_runs(folder)
    page, charts = render_lab(lab)
    target = out or folder
    target = target / "report.html" if target.is_dir() else target
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8", errors="replace")
    told = json.dumps(outcomes(lab), indent=1)
    (target.parent / "outcomes.json").write_text(told + "\n", encoding="utf-8")
    if figures is not None:
        export(charts, figures)
    return target


def render_lab(lab: LabRuns) -> tuple[str, list[Chart]]:
    """The page as HTML that loads nothing else, and its charts."""
    arms = {arm.name: arm for arm in lab.arms}
    begun = [arm for arm in lab.arms if arm.runs]
    charts = arm_charts(begun)
    notes: list[str] = list(lab.missing)
    content = {
        "palette": PALETTE,
        "title": lab.title,
        "names": list(arms),
        "facts": _facts(begun),
        "judgements": _judgements(lab),
        "charts": charts,
        "arms": begun,
        "columns": COLUMNS,
        "rows": arm_rows(begun),
        "test_columns": TEST_COLUMNS,
        "tests": paired_rows(begun),
        "evaluation_columns": EVALUATION_COLUMNS,
        "evaluations": evaluation_rows(begun),
        "trajectories": _trajectories(begun, notes),
        "differences": _differences(begun),
        "differing": [arm.name for arm in begun],
        "cards": {arm.name: run_card(arm.one) for arm in begun if arm.one is not None},
        "notes": notes,
    }
    return template("lab.html.j2").render(content).strip() + "\n", charts


def outcomes(lab: LabRuns) -> dict[str, Any]:
    """Claims with their answers, and each arm's measures at the beginning and the end of training, a value a seed."""
    begun = [arm for arm in lab.arms if arm.runs]
    claims = [
        {
            "says": one.claim.says,
            "answer": one.answer,
            "findings": [finding.text.replace(NBSP, " ") for finding in one.findings],
        }
        for one in _judgements(lab)
    ]
    arms = {
        arm.name: {
            name: [[change.first, change.last] for change in map(measure.of, arm.runs.values())]
            for name, measure in MEASURES.items()
        }
        for arm in begun
    }
    return {
        "title": lab.title,
        "facts": {name: text.replace(NBSP, " ") for name, text in _facts(begun)},
        "claims": claims,
        "arms": arms,
    }


def _judgements(lab: LabRuns) -> list[Judgement]:
    arms = {arm.name: arm for arm in lab.arms}
    return [judge(claim, arms) for claim in claims_of(lab.claims, lab.arms)]


def _facts(arms: Sequence[ArmRuns]) -> list[tuple[str, str]]:
    runs = [run for arm in arms for run in arm.runs.values()]
    seeds = sorted({seed for arm in arms for seed in arm.runs})
    wall = sum(run.headline.wall_s or 0.0 for run in runs)
    shared = [fact for fact in headline.facts(runs) if fact[0] in ("hardware", "commit", "versions")]
    dates = sorted(date for run in runs if (date := run.headline.environment.get("date")))
    asked = sorted({run.headline.num_questions for run in runs if run.headline.num_questions is not None})
    own = [("arms", str(len(arms))), ("seeds", ", ".join(map(str, seeds))), ("runs", str(len(runs)))]
    own += [("held-out questions", " or ".join(map(count, asked)))] if asked else []
    when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "–"
    return [*own, ("time of all runs", duration(wall)), ("date", when), *shared]


def _trajectories(arms: Sequence[ArmRuns], notes: list[str]) -> dict[str, Trajectory]:
    """One of each arm's first seed, early and late."""
    found = {}
    for arm in arms:
        if arm.one is not None and arm.one.completion_files:
            for one in pick_trajectories(arm.one.completion_files, notes, prompts=1):
                found[f"{arm.name}, seed {next(iter(arm.runs))}"] = one
    return found


def _differences(arms: Sequence[ArmRuns]) -> tables.Rows:
    """Settings in which the arms' first runs differ; one that a program does not have is "–" and no difference."""
    firsts = [arm.one for arm in arms if arm.one is not None]
    configs = [flatten(run.config) for run in firsts if run.config]
    if len(configs) < len(firsts):
        return []
    rows = []
    for key, *values in tables.differences(firsts, [arm.name for arm in arms]):
        told = [value if key in config else "–" for value, config in zip(values, configs, strict=True)]
        if len({*told} - {"–"}) > 1:
            rows.append([key, *told])
    return rows
