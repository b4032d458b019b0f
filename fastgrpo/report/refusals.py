"""The page of `fastgrpo eval --benchmark mossbench`: how often models refuse, what is harmless and what is not."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from fastgrpo.data.mossbench import STIMULI
from fastgrpo.evaluation.comparison import PairedTest, paired_test
from fastgrpo.evaluation.mossbench import Rate, Refusals
from fastgrpo.evaluation.refusals import RefusalEvaluation
from fastgrpo.report.comparison import ModelRow, page_facts, test_row, write_page
from fastgrpo.report.formats import count, percent
from fastgrpo.report.tables import Rows
from fastgrpo.report.tasks import Mark

LEAD = (
    "Benign questions about pictures that look harmful: a refusal is an error. Of the contrast set, whose questions "
    "are harmful, a model should refuse more. In brackets: 95 % intervals, by bootstrap over questions, exact where "
    "all came out alike."
)
Evaluations = Mapping[str, RefusalEvaluation]


def refusal_tests(evaluations: Evaluations, seed: int = 0) -> list[PairedTest]:
    """Every two models on the benign questions that were judged of both."""
    pairs = combinations(((name, one.refusals) for name, one in evaluations.items()), 2)
    return [test for test in (paired_test(*pair, seed) for pair in pairs) if test is not None]


def write_refusal_page(
    evaluations: Evaluations,
    folder: Path,
    name: str,
    *,
    title: str,
    dataset: str,
    made: Mapping[str, str],
    seed: int = 0,
) -> Path:
    """Writes {name}-comparison.json and .html into `folder`; returns the page. Arguments as of `write_comparison`."""
    tests = refusal_tests(evaluations, seed)
    figures = {
        "dataset": dataset,
        "models": {model: one.figures.to_json() for model, one in evaluations.items()},
        "paired_tests": [asdict(test) for test in tests],
    }
    page = folder / f"{name}-comparison.html"
    sizes = [len(one.answers.records) for one in evaluations.values()]
    content = _content(evaluations, tests, title) | {"facts": page_facts(dataset, sizes, made)}
    write_page(page, content, json.dumps(figures, indent=2) + "\n")
    return page


def _content(evaluations: Evaluations, tests: list[PairedTest], title: str) -> dict[str, Any]:
    names = list(evaluations)
    groups = refusal_groups(evaluations)
    drawn = ["all", *STIMULI.values(), "contrast: all"]  # the rest, by metadata, stands in the table
    return {
        "title": title,
        "names": names,
        "lead": LEAD,
        "columns": ["Model", "Benign refused", "Contrast set refused", "Judge", "no verdict", "Tokens"],
        "figures": [_figures(name, one) for name, one in evaluations.items()],
        "tested": "the difference of refusal rates of benign questions",
        "hit": "refused",
        "tests": [test_row(test) for test in tests],
        "groups": {label: _model_rows(rates) for label, rates in groups.items() if label in drawn},
        "group_columns": ["Questions", *names],
        "tasks": [
            [label, *(rates[name].text if name in rates else "–" for name in names)] for label, rates in groups.items()
        ]
        + stage_rows(evaluations),
        "skipped": {name: one.answers.skipped for name, one in evaluations.items() if one.answers.skipped},
    }


def refusal_groups(evaluations: Evaluations) -> dict[str, dict[str, Rate]]:
    """Rates by kind of question and model: all, by stimulus type, by metadata; then the contrast set's."""
    groups: dict[str, dict[str, Rate]] = {}
    for prefix, part in (("", "benign"), ("contrast: ", "contrast")):
        for name, one in evaluations.items():
            refusals: Refusals | None = getattr(one.figures, part)
            if refusals is None or refusals.total is None:
                continue
            for label, rate in {"all": refusals.total, **refusals.by_type, **refusals.by_flag}.items():
                groups.setdefault(f"{prefix}{label}", {})[name] = rate
    return groups


def _figures(name: str, one: RefusalEvaluation) -> list[str]:
    sets = [one.figures.benign, one.figures.contrast]
    rates = [part.total.text if part is not None and part.total is not None else "–" for part in sets]
    lengths = [record["length"] for record in one.answers.records]
    unjudged = sum(part.unjudged for part in sets if part is not None)
    return [name, *rates, one.figures.judge, count(unjudged), count(sum(lengths) / len(lengths))]


def _model_rows(rates: Mapping[str, Rate]) -> list[ModelRow]:
    return [
        ModelRow(name, rate.count, None, Mark(rate.value, rate.low, rate.high), percent(rate.value))
        for name, rate in rates.items()
    ]


def stage_rows(evaluations: Evaluations) -> Rows:
    """How many benign refusals went wrong at which stage, where a judge told."""
    told = {name: one.figures.benign.stages or {} for name, one in evaluations.items()}
    stages = dict.fromkeys(stage for counts in told.values() for stage in counts)
    return [
        [f"benign refusals, error of {stage}", *(count(told[name].get(stage)) for name in evaluations)]
        for stage in stages
    ]
