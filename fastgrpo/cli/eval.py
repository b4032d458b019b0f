"""`fastgrpo eval`: a model's greedy accuracy."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastgrpo.cli.options import Parser, at_least, device
from fastgrpo.cli.train import progress_lines, require_writable
from fastgrpo.data.loading import load_rows
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.evaluation import Evaluation, evaluate, write_evaluation
from fastgrpo.model.load import load_policy, load_processing
from fastgrpo.plain.engine import PlainEngine


def run_eval(argv: Sequence[str]) -> None:
    """Scores a model as `fastgrpo eval` does, prints the figures and writes them."""
    parser = Parser(prog="fastgrpo eval", description="Greedy accuracy, in total and by task.")
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("dataset", help="CV-Bench or SAT schema: hub id, file or folder")
    parser.add_argument("--output_dir", type=Path, default=Path("."), help="gets evals/NAME.json and .parquet")
    parser.add_argument("--name", default="eval")
    parser.add_argument("--split", default="test")
    parser.add_argument("--max_samples", type=at_least(1))
    parser.add_argument("--max_new_tokens", type=at_least(1), default=1024)
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="questions answered at once")
    parser.add_argument("--prompt_mode", choices=("base", "instruct"), help="as in the model's training, else base")
    parser.add_argument("--prompt_template", choices=("paper", "answer"), help="as in its training, else paper")
    parser.add_argument("--max_pixels", type=at_least(1))
    parser.add_argument("--min_pixels", type=at_least(1))
    parser.add_argument("--pass_at_k", type=at_least(0), default=0, help="also sample so many responses a question")
    parser.add_argument(
        "--shuffles", type=at_least(0), default=0, help="ask again about shuffled pictures, so many times"
    )
    parser.add_argument("--dtype", default="auto")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=device(best), help=f"{best} if unset")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    require_writable(options.output_dir)
    prompts = _prompts_of(options)
    rows = load_rows(options.dataset, split=options.split, max_samples=options.max_samples, seed=options.seed)
    processing = load_processing(options.model, options.min_pixels, options.max_pixels)
    model = load_policy(options.model, dtype=options.dtype).to(options.device)
    evaluation = evaluate(
        PlainEngine(model, processing.tokenizer, max_batch=options.batch_size),
        PromptBuilder(
            processing.tokenizer,
            processing.image_processor,
            mode=prompts["prompt_mode"],
            template=prompts["prompt_template"],
        ),
        rows,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        pass_at_k=options.pass_at_k,
        shuffles=options.shuffles,
        seed=options.seed,
        progress=progress_lines("scoring"),
    )
    write_evaluation(evaluation, options.output_dir / "evals", options.name, step=0, dataset=options.dataset)
    _print_evaluation(evaluation)


def _prompts_of(options: Namespace) -> dict[str, Any]:
    """How questions are asked: as told, else as the run that trained the model asked them, else as the paper did."""
    prompts: dict[str, Any] = {"prompt_mode": "base", "prompt_template": "paper"}
    for folder in (Path(options.model).parent, Path(options.model)):  # a checkpoint-N lies inside its run's folder
        if (folder / "settings.json").is_file():
            settings = json.loads((folder / "settings.json").read_text())
            prompts |= {name: settings[name] for name in prompts if name in settings}
    prompts |= {name: getattr(options, name) for name in prompts if getattr(options, name) is not None}
    print(f"questions are asked in {prompts['prompt_mode']} mode, template {prompts['prompt_template']}")
    return prompts


def _print_evaluation(evaluation: Evaluation) -> None:
    table = Table("task", "questions", "accuracy", "answered", "accuracy of answered", "chance")
    for task, score in [*evaluation.by_task.items(), ("total", evaluation.total)]:
        answered = "–" if score.answered_accuracy is None else f"{score.answered_accuracy:.1%}"
        table.add_row(
            task,
            str(score.count),
            f"{score.accuracy:.1%}",
            f"{score.answered_rate:.1%}",
            answered,
            f"{score.chance:.1%}",
        )
    console = Console()
    console.print(table)
    if evaluation.shuffled and evaluation.shuffled.answered_accuracy is not None:
        console.print(f"accuracy of answered, pictures shuffled: {evaluation.shuffled.answered_accuracy:.1%}")
    if evaluation.pass_at_k:
        console.print(f"pass@{evaluation.pass_at_k[0]}: {evaluation.pass_at_k[1]:.1%}")
    for row in evaluation.skipped:
        console.print(f"row {row.row_id} skipped: {row.reason}", highlight=False)
