"""The `fastgrpo` command: train, eval, profile, report, demo, doctor."""

import json
import os
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from fastgrpo import __version__
from fastgrpo.arguments import parse
from fastgrpo.data.loading import load_rows
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.demo.run import DEMO_STEPS, run_demo
from fastgrpo.doctor import examine
from fastgrpo.evaluation import Evaluation, evaluate, write_evaluation
from fastgrpo.launch import progress_lines, require_writable, run_training
from fastgrpo.model.load import load_policy, load_processing
from fastgrpo.profile.run import ProfileOptions, run_profile
from fastgrpo.profile.sides import OPPONENTS
from fastgrpo.reference import ReferenceEngine
from fastgrpo.report import write_report

USAGE = """usage: fastgrpo COMMAND …

  train    train a model with GRPO            fastgrpo train --help lists the flags
  eval     score a model on CV-Bench or SAT   fastgrpo eval MODEL DATASET
  profile  time a training step against another implementation, and show where the time went
  report   draw a run's report, or several    fastgrpo report RUN…
  demo     train a tiny model on this machine fastgrpo demo
  doctor   what is installed, and what each missing part costs

FASTGRPO_TRACEBACK=1 shows where an error came from.
"""


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("--local_rank="):
        arguments.pop(0)  # from DeepSpeed's launcher, which also sets it in the environment
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fastgrpo {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"fastgrpo: unknown command {name!r}: use {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    _quieten()
    try:
        COMMANDS[name](rest)
    except ValueError as error:
        if os.environ.get("FASTGRPO_TRACEBACK"):
            raise
        print(f"fastgrpo {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastgrpo {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _quieten() -> None:
    """Switches off what libraries print that tells a user nothing. Downloads keep their bars."""
    had_download_bars = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # of loading and writing weights; the hub's go with them
    if had_download_bars:
        enable_progress_bars()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # A model's own generation settings, often at odds with each other, are not used here.
    logging.get_logger("transformers.generation.configuration_utils").setLevel(logging.ERROR)
    # That settings of today get another name in transformers 6.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find that out


def _train(argv: Sequence[str]) -> None:
    run_training(*parse(argv))


def _eval(argv: Sequence[str]) -> None:
    parser = _Parser(prog="fastgrpo eval", description="Greedy accuracy, in total and by task.")
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("dataset", help="CV-Bench or SAT schema: hub id, file or folder")
    parser.add_argument("--output_dir", type=Path, default=Path("."), help="gets evals/NAME.json and .parquet")
    parser.add_argument("--name", default="eval")
    parser.add_argument("--split", default="test")
    parser.add_argument("--max_samples", type=_at_least(1))
    parser.add_argument("--max_new_tokens", type=_at_least(1), default=1024)
    parser.add_argument("--batch_size", type=_at_least(1), default=64, help="questions answered at once")
    parser.add_argument("--prompt_mode", choices=("base", "instruct"), help="as in the model's training, else base")
    parser.add_argument("--prompt_template", choices=("paper", "answer"), help="as in its training, else paper")
    parser.add_argument("--max_pixels", type=_at_least(1))
    parser.add_argument("--min_pixels", type=_at_least(1))
    parser.add_argument("--pass_at_k", type=_at_least(0), default=0, help="also sample so many responses a question")
    parser.add_argument(
        "--shuffles", type=_at_least(0), default=0, help="ask again about shuffled pictures, so many times"
    )
    parser.add_argument("--dtype", default="auto")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=_device(best), help=f"{best} if unset")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    require_writable(options.output_dir)
    prompts = _prompts_of(options)
    rows = load_rows(options.dataset, split=options.split, max_samples=options.max_samples, seed=options.seed)
    processing = load_processing(options.model, options.min_pixels, options.max_pixels)
    model = load_policy(options.model, dtype=options.dtype).to(options.device)
    evaluation = evaluate(
        ReferenceEngine(model, processing.tokenizer, max_batch=options.batch_size),
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


def _profile(argv: Sequence[str]) -> None:
    parser = _Parser(
        prog="fastgrpo profile",
        description="Whole training steps against another implementation, taking turns. Further flags are fastgrpo "
        "train's and override the config's; a config without a model or data gets the demo's.",
    )
    parser.add_argument("config", type=Path, help="settings of `fastgrpo train` (YAML)")
    parser.add_argument("--against", choices=tuple(OPPONENTS), default="plain", help=_listed(OPPONENTS))
    parser.add_argument("--steps", type=_at_least(1), default=5, help="timed steps of each side")
    parser.add_argument("--warmup", type=_at_least(0), default=1, help="steps of each side before them")
    parser.add_argument("--scale", action="store_true", help="again with half the completions: how each phase grows")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/profile"))
    parser.add_argument("--trl_python", type=Path, default=Path(".venv-bench/bin/python"))
    options, flags = parser.parse_known_args(argv)
    run_profile(ProfileOptions(**vars(options), flags=flags))


def _listed(choices: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {meaning}" for name, meaning in choices.items())


def _report(argv: Sequence[str]) -> None:
    parser = _Parser(prog="fastgrpo report", description="One page for a run; curves with error bars for several.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of runs")
    parser.add_argument("--out", type=Path, help="the page's file")
    options = parser.parse_args(argv)
    print(write_report(options.runs, options.out))


def _demo(argv: Sequence[str]) -> None:
    parser = _Parser(prog="fastgrpo demo", description="Trains a tiny Qwen2-VL on spatial questions, on a CPU.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=_at_least(1), default=DEMO_STEPS)
    options = parser.parse_args(argv)
    run_demo(options.output_dir, seed=options.seed, steps=options.steps)


def _doctor(argv: Sequence[str]) -> None:
    _Parser(prog="fastgrpo doctor", description="What is installed, and what each missing part costs.").parse_args(argv)
    table = Table("part", "found", "what follows")
    for finding in examine():
        table.add_row(finding.part, finding.found, finding.consequence)
    Console().print(table)


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise ArgumentTypeError(f"{value} is not {minimum} or more")
        return value

    return parse_number


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ArgumentTypeError(f"{text!r} cannot be used here: {error}") from None


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "eval": _eval,
    "profile": _profile,
    "report": _report,
    "demo": _demo,
    "doctor": _doctor,
}
