"""`fastgrpo eval`: a model's greedy accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.cli.console import progress_lines
from fastgrpo.cli.inference import add_model_options, load_inference
from fastgrpo.cli.options import Parser, at_least, require_no_splits, require_writable

if TYPE_CHECKING:
    from fastgrpo.evaluation import Evaluation


def run(argv: Sequence[str]) -> None:
    """Scores a model as the flags say, prints the figures and writes them."""
    parser = Parser(prog="fastgrpo eval", description="Greedy accuracy, in total and by task.")
    add_model_options(parser)
    parser.add_argument("dataset", help="CV-Bench or SAT schema: hub id, file or folder")
    parser.add_argument("--output_dir", type=Path, default=Path("."), help="gets evals/NAME.json and .parquet")
    parser.add_argument("--name", default="eval")
    parser.add_argument("--split", help="of a data set on the hub; test if unset")
    parser.add_argument("--max_samples", type=at_least(1))
    parser.add_argument("--max_new_tokens", type=at_least(1), default=1024)
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="questions answered at once")
    parser.add_argument("--pass_at_k", type=at_least(0), default=0, help="also sample so many responses a question")
    parser.add_argument(
        "--shuffles", type=at_least(0), default=0, help="ask again about shuffled pictures, so many times"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    require_writable(options.output_dir)
    require_no_splits(options.dataset, ["--split"] if options.split else [])
    if Path(options.name).name != options.name:
        raise ValueError(f"--name {options.name} is no plain file name")

    from fastgrpo.cli.quiet import quieten
    from fastgrpo.data.loading import load_rows
    from fastgrpo.evaluation import evaluate, write_evaluation

    quieten()
    rows = load_rows(options.dataset, split=options.split or "test", max_samples=options.max_samples, seed=options.seed)
    model = load_inference(options, max_rows=options.batch_size)
    evaluation = evaluate(
        model.engine,
        model.builder,
        rows,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        pass_at_k=options.pass_at_k,
        shuffles=options.shuffles,
        seed=options.seed,
        progress=progress_lines("scoring"),
    )
    write_evaluation(evaluation, options.output_dir / "evals", options.name, step=0, dataset=options.dataset)
    print_evaluation(evaluation)


def print_evaluation(evaluation: Evaluation) -> None:
    """The table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "questions", "accuracy", "strict", "unreadable", "answered", "accuracy of answered", "chance")
    for task, score in [*evaluation.by_task.items(), ("total", evaluation.total)]:
        rates = [score.accuracy, score.accuracy_strict, score.unreadable_rate]
        rates += [score.answered_rate, score.answered_accuracy, score.chance]
        table.add_row(task, str(score.count), *("–" if rate is None else f"{rate:.1%}" for rate in rates))
    console = Console()
    console.print(table)
    if evaluation.answered_accuracy_shuffled_images is not None:
        console.print(f"accuracy of answered, pictures shuffled: {evaluation.answered_accuracy_shuffled_images:.1%}")
    if evaluation.pass_at_k:
        chance = evaluation.pass_at_k.chance
        guessing = "" if chance is None else f" (guessing: {chance:.1%})"
        console.print(f"pass@{evaluation.pass_at_k.k}: {evaluation.pass_at_k.value:.1%}{guessing}")
    for row in evaluation.skipped:
        console.print(f"row {row.row_id} skipped: {row.reason}", highlight=False)
