"""What `fastgrpo eval` makes of models' answers: accuracies, or on MOSSBench refusals. Files, page and tables."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastgrpo.cli.eval_flags import Target
from fastgrpo.cli.inference import Inference
from fastgrpo.data.row_dataset import RowDataset
from fastgrpo.evaluation import Evaluation, evaluate, write_evaluation
from fastgrpo.evaluation.comparison import Comparison, PairedTest, compare
from fastgrpo.evaluation.judge import Judge
from fastgrpo.evaluation.refusals import FreeAnswers, RefusalEvaluation, ask_freely, judge_answers, write_refusals
from fastgrpo.report.comparison import write_comparison
from fastgrpo.report.environment import environment
from fastgrpo.report.refusals import refusal_groups, refusal_tests, stage_rows, write_refusal_page
from fastgrpo.safe_text.terminal import Terminal
from fastgrpo.types import SkippedRow

SHOWN = 10
"""Rows left out that are told of one by one."""


class Scoring(Protocol):
    """One way to score."""

    def ask(self, model: Inference, rows: RowDataset, **how: Any) -> Any:
        """All answers, with ranks; `how`: progress, ranks and log."""
        ...

    def write(self, answers: Any, name: str) -> Any:
        """Scores a model's answers and writes its files; on the main rank."""
        ...

    def finish(self, found: Mapping[str, Any]) -> Path:
        """Prints all models' figures and writes the page, which it returns."""
        ...


class AccuracyScoring:
    """Right or wrong, as a person reads the answers and as the reward does."""

    def __init__(self, target: Target, options: Namespace) -> None:
        self.target, self.options = target, options

    def ask(self, model: Inference, rows: RowDataset, **how: Any) -> Evaluation:
        return evaluate(
            model.engine,
            model.builder,
            rows,
            max_new_tokens=self.options.max_new_tokens,
            batch_size=self.options.batch_size,
            pass_at_k=self.options.pass_at_k,
            shuffles=self.options.shuffles,
            seed=self.options.seed,
            **how,
        )

    def write(self, answers: Evaluation, name: str) -> Evaluation:
        write_evaluation(answers, self.options.output_dir / "evals", name, step=0, dataset=self.target.dataset)
        return answers

    def finish(self, found: Mapping[str, Evaluation]) -> Path:
        comparison, console = compare(found, self.options.seed), Terminal()
        if len(found) == 1:
            print_evaluation(next(iter(found.values())), console)
        else:
            print_comparison(comparison, console)
        named = named_page(self.target, self.options)
        return write_comparison(comparison, self.options.output_dir, self.target.name, **named)


class RefusalScoring:
    """Refused or not, by the words of the answers or by a judging model.

    Raises:
        ValueError: a judge that cannot be used.
    """

    def __init__(self, target: Target, options: Namespace) -> None:
        self.target, self.options = target, options
        self.judge = None
        if options.judge_base_url:
            self.judge = Judge(options.judge_base_url, options.judge_model, options.output_dir / "evals" / "verdicts")

    def ask(self, model: Inference, rows: RowDataset, **how: Any) -> FreeAnswers:
        options = self.options
        sizes = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size, "seed": options.seed}
        return ask_freely(model.engine, model.builder, rows, **sizes, **how)

    def write(self, answers: FreeAnswers, name: str) -> RefusalEvaluation:
        evaluation = judge_answers(answers, self.judge, self.options.seed)
        write_refusals(evaluation, self.options.output_dir / "evals", name, dataset=self.target.dataset)
        return evaluation

    def finish(self, found: Mapping[str, RefusalEvaluation]) -> Path:
        print_refusals(found, refusal_tests(found, self.options.seed), Terminal())
        named = named_page(self.target, self.options)
        return write_refusal_page(found, self.options.output_dir, self.target.name, seed=self.options.seed, **named)


def named_page(target: Target, options: Namespace) -> dict[str, Any]:
    """What the page is called and how it came about, so that it can be repeated from the page alone."""
    made = {"command": target.command, **environment(use_cpu=str(options.device).startswith("cpu"))}
    return {"title": target.title, "dataset": target.dataset, "made": made}


def print_refusals(found: Mapping[str, RefusalEvaluation], tests: Sequence[PairedTest], console: Console) -> None:
    """Refusal rates, by kind of question and model."""
    table = Table("questions", *found, title="refused, 95 % intervals", title_justify="left")
    for label, rates in refusal_groups(found).items():
        table.add_row(label, *(rates[name].text if name in rates else "–" for name in found))
    for row in stage_rows(found):
        table.add_row(*row)
    console.print(table)
    print_tests(tests, console)
    print_skipped({name: one.answers.skipped for name, one in found.items()}, console)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """One model's figures."""
    columns = ("task", "n", "accuracy", "strict", "unreadable", "answered", "of those", "chance")
    table = Table(*columns, box=SIMPLE_HEAD, padding=0)  # fits 80 characters
    for task, score in [*evaluation.by_task.items(), ("total", evaluation.total)]:
        rates = [score.accuracy, score.accuracy_strict, score.unreadable_rate]
        rates += [score.answered_rate, score.answered_accuracy, score.chance]
        table.add_row(task, str(score.count), *("–" if rate is None else f"{rate:.1%}" for rate in rates))
    console.print(table)
    if evaluation.answered_accuracy_shuffled_images is not None:
        console.print(f"accuracy of answered, pictures shuffled: {evaluation.answered_accuracy_shuffled_images:.1%}")
    if evaluation.pass_at_k:
        chance = evaluation.pass_at_k.chance
        guessing = "" if chance is None else f" (guessing: {chance:.1%})"
        console.print(f"pass@{evaluation.pass_at_k.k}: {evaluation.pass_at_k.value:.1%}{guessing}")
    print_skipped({"": evaluation.skipped}, console)


def print_skipped(skipped: Mapping[str, Sequence[SkippedRow]], console: Console) -> None:
    """By model, the rows that could not be asked about, the first few by name."""
    for name, rows in skipped.items():
        lines = [f"row {row.row_id} skipped: {row.reason}" for row in rows[:SHOWN]]
        if len(rows) > SHOWN:
            lines.append(f"{len(rows)} rows skipped in all: the JSON file of the figures has each")
        for told in lines:
            console.print(f"{name}: {told}" if name else told, soft_wrap=True)


def print_tests(tests: Sequence[PairedTest], console: Console) -> None:
    """A line for every two models."""
    for test in tests:
        console.print(test.text, soft_wrap=True)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Several models' accuracies, and how they differ."""
    names = list(comparison.evaluations)
    table = Table("task", "questions", *names, title="accuracy, 95 % intervals", title_justify="left")
    for task, row in [*comparison.by_task.items(), ("total", comparison.total)]:
        cells = [f"{row[name].text}" if name in row else "–" for name in names]
        table.add_row(task, str(max(one.count for one in row.values())), *cells)
    totals = [one.total for one in comparison.evaluations.values()]
    for label, rates in {
        "by the reward's grader": [total.accuracy_strict for total in totals],
        "no option readable": [total.unreadable_rate for total in totals],
    }.items():
        table.add_row(label, "", *("–" if rate is None else f"{rate:.1%}" for rate in rates))
    console.print(table)
    print_tests(comparison.tests, console)
    print_skipped({name: one.skipped for name, one in comparison.evaluations.items()}, console)
